"""Routes of fewest hops, against brute force and by their invariants."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.datatypes import ModelHash, PeerId, ServerInfo, ServerState
from swarm.errors import BadInputError, NoRouteError
from swarm.routing import FewestHopsRouter, Router, plan_route
from tests.server_infos import make_server

NUM_BLOCKS = 8


@st.composite
def swarms(draw: st.DrawFn) -> list[ServerInfo]:
    """Often a chain that covers the model, so that most swarms have routes, and spans at random beside it."""
    cuts = sorted({0, NUM_BLOCKS, *draw(st.sets(st.integers(1, NUM_BLOCKS - 1)))})
    chain = list(pairwise(cuts)) if draw(st.integers(0, 3)) else []
    anywhere = st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS)).map(
        lambda span: (span[0], min(sum(span), NUM_BLOCKS))
    )
    return [
        make_server(
            f"peer{index}",
            start,
            end,
            num_blocks=NUM_BLOCKS,
            state=draw(st.sampled_from([ServerState.ONLINE] * 8 + list(ServerState))),
            kv_tokens_free=draw(st.integers(0, 1000)),
        )
        for index, (start, end) in enumerate(draw(st.permutations(chain + draw(st.lists(anywhere, max_size=5)))))
    ]


def _fewest_hops_by_brute_force(servers: list[ServerInfo], start: int, end: int) -> int | None:
    """Breadth-first over every position that any part of any span can lead to."""
    reached, num_hops = {start}, 0
    while end not in reached:
        further = {
            position
            for server in servers
            for begin in reached
            if begin in server.span
            for position in range(begin + 1, min(server.span.end, end) + 1)
        }
        if further <= reached:
            return None
        reached |= further
        num_hops += 1
    return num_hops


@settings(max_examples=300)
@given(
    swarms(),
    st.integers(0, NUM_BLOCKS - 1),
    st.integers(1, NUM_BLOCKS),
    st.sets(st.integers(0, 12), max_size=2),
    st.integers(0, 2**32),
)
def test_routes_are_whole_allowed_and_shortest(
    servers: list[ServerInfo], start: int, length: int, avoided: set[int], seed: int
) -> None:
    """Whatever the swarm looks like: each block exactly once, by a server that may and can, in fewest hops."""
    end = min(start + length, NUM_BLOCKS)
    avoid = {PeerId(f"peer{index}") for index in avoided}
    usable = [s for s in servers if s.state is ServerState.ONLINE and s.peer_id not in avoid]
    fewest = _fewest_hops_by_brute_force(usable, start, end)
    rng = random.Random(seed)
    if fewest is None:
        with pytest.raises(NoRouteError) as refusal:
            plan_route(servers, NUM_BLOCKS, start=start, end=end, avoid=avoid, rng=rng)
        missing = [block for block in range(start, end) if not any(block in s.span for s in usable)]
        assert list(refusal.value.missing_blocks) == missing
        return
    route = plan_route(servers, NUM_BLOCKS, start=start, end=end, avoid=avoid, rng=rng)
    assert (route.span.start, route.span.end) == (start, end)
    assert len(route.hops) == fewest
    for hop in route.hops:
        assert hop.server in usable
        assert hop.server.span.contains_span(hop.span)
    assert len({hop.peer_id for hop in route.hops}) == fewest, "no server twice"


def test_missing_blocks_are_named() -> None:
    """The operator must learn which blocks to start a server for."""
    servers = [make_server("a", 0, 3), make_server("b", 7, 12), make_server("c", 4, 5, state=ServerState.DRAINING)]
    with pytest.raises(NoRouteError, match="blocks 3-6") as refusal:
        plan_route(servers, 12, rng=random.Random(0))
    assert refusal.value.missing_blocks == (3, 4, 5, 6)
    with pytest.raises(NoRouteError, match="block 3;"):
        plan_route(servers, 12, start=2, end=4, rng=random.Random(0))


def test_a_part_of_a_span_is_used_where_spans_overlap() -> None:
    """Servers choose spans on their own, so overlaps are the rule."""
    servers = [make_server("a", 0, 8), make_server("b", 4, 12)]
    route = plan_route(servers, 12, rng=random.Random(0))
    assert [(hop.peer_id, hop.start, hop.end) for hop in route.hops] == [("a", 0, 8), ("b", 8, 12)]


def test_clients_spread_over_equal_servers_by_their_free_memory() -> None:
    """If all clients chose alike, one replica would starve while the others idle."""
    servers = [
        make_server("roomy", 0, 12, kv_tokens_free=900),
        make_server("busy", 0, 12, kv_tokens_free=300),
        make_server("full", 0, 12, kv_tokens_free=0),
    ]
    rng = random.Random(0)
    chosen = Counter(plan_route(servers, 12, rng=rng).hops[0].peer_id for _ in range(2000))
    assert chosen[PeerId("roomy")] > 2 * chosen[PeerId("busy")] > 4 * chosen[PeerId("full")] > 0


def test_those_who_failed_often_are_chosen_less_often() -> None:
    """A preference, no ban: there must be a way back for who has been mended."""
    servers = [make_server(name, 0, 12) for name in ("steady", "shaky", "hopeless", "unknown")]
    reliability = {PeerId("steady"): 1.0, PeerId("shaky"): 0.5, PeerId("hopeless"): 0.0}
    rng = random.Random(0)
    chosen = Counter(plan_route(servers, 12, reliability=reliability, rng=rng).hops[0].peer_id for _ in range(4000))
    assert abs(chosen[PeerId("steady")] - chosen[PeerId("unknown")]) < 300
    assert chosen[PeerId("steady")] > 2 * chosen[PeerId("shaky")] > 4 * chosen[PeerId("hopeless")] > 0


def test_the_same_seed_gives_the_same_route() -> None:
    """Tests and simulations must be repeatable."""
    servers = [make_server(f"peer{index}", 0, 12) for index in range(5)]

    def routes(router: Router) -> list[str]:
        return [router.plan_route(servers, 12).hops[0].peer_id for _ in range(20)]

    assert routes(FewestHopsRouter(random.Random(7))) == routes(FewestHopsRouter(random.Random(7)))
    assert len(set(routes(FewestHopsRouter()))) > 1


def test_mixed_models_and_impossible_blocks_are_refused() -> None:
    """Hidden states of one model mean nothing to another."""
    a, b = make_server("a", 0, 6), make_server("b", 6, 12, model_hash=ModelHash("cd" * 16))
    with pytest.raises(BadInputError, match="different models"):
        plan_route([a, b], 12, rng=random.Random(0))
    with pytest.raises(BadInputError, match="different models"):
        plan_route([a], 6, rng=random.Random(0))
    for start, end in ((0, 13), (-1, 3), (3, 3), (5, 2)):
        with pytest.raises(BadInputError, match="not in the model"):
            plan_route([a], 12, start=start, end=end, rng=random.Random(0))
