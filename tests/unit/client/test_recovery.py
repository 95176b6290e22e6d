"""Routes after a loss: who holds the session stays in it, gaps are filled, nobody appears twice."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.session.holdings import Holding
from swarm.client.session.recovery import gaps_between, hops_to_keep, last_to_restore, plan_around
from swarm.datatypes import Hop, PeerId, Route, ServerInfo, ServerState, Span, blocks_without_server
from swarm.errors import NoRouteError
from swarm.routing import plan_route
from tests.server_infos import make_server

NUM_BLOCKS = 12


def holding(name: str, start: int, end: int, server: ServerInfo | None = None) -> Holding:
    return Holding(peer_id=PeerId(name), span=Span(start=start, end=end), epoch=1, step=1, server=server)


def hop(server: ServerInfo, start: int, end: int) -> Hop:
    return Hop(server=server, span=Span(start=start, end=end))


def plan(servers: Sequence[ServerInfo], kept: Sequence[Hop], avoid: Collection[str] = ()) -> list[tuple[str, int, int]]:
    def plan_span(span: Span, without: Collection[PeerId]) -> Route:
        return plan_route(servers, NUM_BLOCKS, start=span.start, end=span.end, avoid=without, rng=random.Random(0))

    route = plan_around(kept, NUM_BLOCKS, avoid=[PeerId(peer) for peer in avoid], plan_span=plan_span)
    return [(item.peer_id, item.start, item.end) for item in route.hops]


def test_only_the_gap_is_planned() -> None:
    """Whoever serves everything would make a shorter route, and all others' work in vain."""
    left, right = make_server("left", 0, 4), make_server("right", 8, 12)
    servers = [left, right, make_server("spare", 3, 9), make_server("whole", 0, 12)]
    kept = [hop(left, 0, 4), hop(right, 8, 12)]
    assert plan(servers, kept, avoid=["whole"]) == [("left", 0, 4), ("spare", 4, 8), ("right", 8, 12)]


def test_two_gaps_are_filled_by_two_servers() -> None:
    """One server is one hop of a session."""
    middle = make_server("middle", 4, 8)
    servers = [middle, make_server("whole", 0, 12), make_server("right", 8, 12)]
    assert plan(servers, [hop(middle, 4, 8)]) == [("whole", 0, 4), ("middle", 4, 8), ("right", 8, 12)]


def test_a_gap_that_only_a_kept_server_could_fill_gives_its_hop_up() -> None:
    """It must start again, for more blocks; the others need not."""
    left, right = make_server("left", 0, 6), make_server("right", 8, 12)
    servers = [left, right, make_server("middle", 6, 8)]
    kept = [hop(left, 2, 6), hop(right, 8, 12)]
    assert plan(servers, kept) == [("left", 0, 6), ("middle", 6, 8), ("right", 8, 12)]


def test_where_one_server_would_be_needed_for_two_gaps_all_is_planned_at_once() -> None:
    """The one between them holds the session; there is no route with it."""
    middle, whole = make_server("middle", 4, 8), make_server("whole", 0, 12)
    assert plan([middle, whole], [hop(middle, 4, 8)]) == [("whole", 0, 12)]


def test_missing_blocks_are_named() -> None:
    """They are what the user hears about."""
    left = make_server("left", 0, 4)
    with pytest.raises(NoRouteError) as raised:
        plan([left, make_server("right", 9, 12)], [hop(left, 0, 4)])
    assert raised.value.missing_blocks == (4, 5, 6, 7, 8)


def test_who_can_be_kept() -> None:
    """Who vanished from the look-ups may still be there; who has left, moved, or failed is not."""
    known = make_server("known", 0, 4)
    kinds = {
        "known": (holding("known", 0, 4, known), []),
        "draining": (holding("a", 0, 4, known), [make_server("a", 0, 4, state=ServerState.DRAINING)]),
        "left": (holding("a", 0, 4, known), [make_server("a", 0, 4, state=ServerState.OFFLINE)]),
        "moved": (holding("a", 0, 4, known), [make_server("a", 2, 6)]),
        "failed": (holding("bad", 0, 4, make_server("bad", 0, 4)), []),
        "successor": (holding("heir", 0, 4), [make_server("heir", 0, 12)]),
        "unknown successor": (holding("heir", 0, 4), []),
        "leaving successor": (holding("heir", 0, 4), [make_server("heir", 0, 4, state=ServerState.DRAINING)]),
    }
    kept = {name for name, (item, servers) in kinds.items() if hops_to_keep([item], servers, avoid=[PeerId("bad")])}
    assert kept == {"known", "draining", "successor"}


def test_of_two_copies_of_a_block_the_first_named_is_kept() -> None:
    """That is the later one."""
    servers = [make_server("new", 2, 6), make_server("old", 0, 4), make_server("right", 6, 12)]
    holdings = [holding("new", 2, 6, servers[0]), holding("old", 0, 4, servers[1]), holding("right", 6, 12, servers[2])]
    assert [item.peer_id for item in hops_to_keep(holdings, servers, avoid=())] == ["new", "right"]


def test_new_addresses_are_used() -> None:
    """A server that came back from a power cut may have another one."""
    old, new = make_server("a", 0, 4, addresses=["old:1"]), make_server("a", 0, 4, addresses=["new:1"])
    (kept,) = hops_to_keep([holding("a", 0, 4, old)], [new], avoid=())
    assert kept.server.addresses == ("new:1",)


def test_the_log_goes_as_far_as_the_last_that_lacks_it() -> None:
    """Those after it hold what follows from the whole log already."""
    assert last_to_restore([True, False, True, False, True]) == 3
    assert last_to_restore([True, True]) is None
    assert last_to_restore([False]) == 0


spans = st.tuples(st.integers(0, NUM_BLOCKS - 1), st.integers(1, NUM_BLOCKS)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], NUM_BLOCKS))
)


@given(st.lists(spans, min_size=1, max_size=8), st.data())
def test_whatever_is_lost_the_route_is_whole_or_the_blocks_are_named(
    drawn: list[tuple[int, int]], data: st.DataObject
) -> None:
    """A route exists with kept hops whenever one exists at all."""
    servers = [make_server(f"server-{index}", start, end) for index, (start, end) in enumerate(drawn)]
    kept: list[Hop] = []
    for server in servers:
        begin = max([server.span.start, *(item.end for item in kept)])
        if begin < server.span.end and data.draw(st.booleans()):
            end = data.draw(st.integers(begin + 1, server.span.end))
            kept.append(hop(server, begin, end))
    avoid = {server.peer_id for server in servers if data.draw(st.integers(0, 3)) == 0}
    kept = [item for item in kept if item.peer_id not in avoid]
    usable = [server for server in servers if server.peer_id not in avoid]
    missing = blocks_without_server(usable, NUM_BLOCKS)
    if missing:
        with pytest.raises(NoRouteError) as raised:
            plan(servers, kept, avoid)
        assert set(raised.value.missing_blocks) <= set(missing)
        return
    route = plan(servers, kept, avoid)
    assert len({peer for peer, _, _ in route}) == len(route)
    assert not avoid.intersection(peer for peer, _, _ in route)
    assert (route[0][1], route[-1][2]) == (0, NUM_BLOCKS)
    assert not gaps_between([hop(servers[int(peer[7:])], start, end) for peer, start, end in route], NUM_BLOCKS)
