"""Placement: a server's room goes where the swarm is slowest, whatever the sizes and speeds of the machines."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import PeerId, ServerInfo, ServerState, Span
from swarm.errors import BadInputError
from swarm.routing import choose_span
from swarm.routing.placement import Settling, best_span, block_rates, explain_choice, rank_rates
from tests.server_infos import make_server


def join_one_by_one(rooms: list[int], num_blocks: int) -> list[ServerInfo]:
    """Machines of equal speed, each of which chooses when the one before serves."""
    servers: list[ServerInfo] = []
    for index, room in enumerate(rooms):
        span = choose_span(servers, num_blocks, room)
        assert len(span) <= room
        servers.append(at(f"peer{index}", span.start, span.end))
        servers[-1] = dataclasses.replace(servers[-1], num_blocks=num_blocks)
    return servers


def at(peer: str, start: int, end: int, *, speed: float = 60.0, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    """A server of blocks [start, end) that runs `speed` blocks per second."""
    return make_server(peer, start, end, state=state, tokens_per_s=speed / (end - start))


def loading(peer: str, start: int, end: int, *, is_choosing: bool = False) -> ServerInfo:
    """One that has just begun and does not know its speed."""
    return make_server(peer, start, end, state=ServerState.JOINING, tokens_per_s=0.0, is_choosing=is_choosing)


def choosing(peer: str, start: int, end: int) -> ServerInfo:
    return loading(peer, start, end, is_choosing=True)


# -- choosing ----------------------------------------------------------------------------------------------


def test_servers_that_start_in_turn_cover_the_model() -> None:
    """`swarm serve MODEL --num-blocks 10` on three machines must just work."""
    servers = join_one_by_one([10, 10, 10], 30)
    assert [(server.span.start, server.span.end) for server in servers] == [(0, 10), (10, 20), (20, 30)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_servers_of_any_sizes_leave_no_gap_and_waste_no_room(rooms: list[int]) -> None:
    """Machines differ; as long as some block is missing, a newcomer's room goes to missing blocks."""
    servers = join_one_by_one(rooms, 12)
    covered = {block for server in servers for block in range(server.span.start, server.span.end)}
    assert covered == set(range(min(sum(rooms), 12)))


def test_a_gap_is_filled_wherever_it_is() -> None:
    """A lost server's blocks are what the swarm needs most."""
    servers = [at("a", 0, 5), at("b", 8, 12), at("c", 0, 12, state=ServerState.OFFLINE)]
    assert choose_span(servers, 12, 3) == Span(start=5, end=8)


def test_fewer_blocks_than_there_is_room_for_where_that_is_faster() -> None:
    """A server is as fast as its blocks are few; room alone is no reason to spread it over the whole model."""
    servers = [at("a", 0, 9, speed=90), at("b", 0, 9, speed=90)]
    assert choose_span(servers, 12, 12, speed=60.0) == Span(start=9, end=12)


def test_slow_blocks_are_helped_before_rare_ones() -> None:
    """Two old machines may be slower than one new one: speed counts, not the number of servers."""
    servers = [at("a", 0, 6, speed=6), at("b", 0, 6, speed=6), at("c", 6, 12, speed=60)]
    assert choose_span(servers, 12, 6) == Span(start=0, end=6)


def test_a_slow_server_helps_where_it_can() -> None:
    """A speed of a tenth changes where help is worth most: enough of it for few blocks, rather than little for many."""
    servers = [at("a", 0, 6, speed=60), at("b", 6, 12, speed=54)]
    assert choose_span(servers, 12, 6, speed=6.0) == Span(start=6, end=12)
    uneven = [at("a", 0, 10, speed=100), at("b", 10, 12, speed=18)]
    assert choose_span(uneven, 12, 12, speed=2.0) == Span(start=10, end=12)


def test_servers_still_loading_count_as_an_average_one() -> None:
    """Two servers started at once must not both fill the same gap, though neither knows its speed yet."""
    assert choose_span([loading("a", 0, 6)], 12, 6).start == 6
    rates = block_rates([at("a", 0, 6, speed=30), at("b", 0, 6, speed=90), loading("c", 6, 12)], 12)
    assert rates == [20.0] * 6 + [10.0] * 6


def test_a_server_on_its_way_counts_where_it_goes() -> None:
    """Or everybody would run to the gap that one is about to fill; and one that leaves counts no more."""
    leaving = at("a", 0, 6, state=ServerState.DRAINING)
    assert block_rates([leaving], 12) == [0.0] * 12
    moving = dataclasses.replace(leaving, moving_to=Span(start=6, end=12))
    assert block_rates([moving], 12) == [0.0] * 6 + [10.0] * 6


def test_an_impossible_number_of_blocks_is_refused() -> None:
    """More blocks than the model has is a typo."""
    for room in (0, 13):
        with pytest.raises(BadInputError, match="choose 1 to 12"):
            choose_span([], 12, room)


@given(
    rates=st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5]), min_size=1, max_size=8),
    room=st.integers(1, 8),
    speed=st.floats(0.1, 10),
)
def test_no_other_place_is_better(rates: list[float], room: int, speed: float) -> None:
    """The search skips most places early; it must still find the best."""
    room = min(room, len(rates))

    def with_server(start: int, size: int) -> tuple[float, ...]:
        return rank_rates([rate + speed / size * (start <= block < start + size) for block, rate in enumerate(rates)])

    found = best_span(rates, room, speed)
    ranks = [with_server(start, size) for size in range(1, room + 1) for start in range(len(rates) - size + 1)]
    # Both round, at the ninth digit.
    assert with_server(found.start, len(found)) == pytest.approx(max(ranks), abs=1e-7)


def test_the_choice_is_explained() -> None:
    """An operator asks why; half a sentence answers."""
    span = Span(start=6, end=12)
    assert explain_choice(span, [], 12) == "no other server serves any block"
    assert explain_choice(span, [at("a", 0, 6)], 12) == "nobody serves them"
    assert explain_choice(span, [at("a", 0, 8)], 12) == "nobody serves 4 of them"
    assert explain_choice(span, [at("a", 0, 6), at("b", 6, 12, speed=30)], 12) == (
        "they are where the swarm is slowest, at 5 tokens/s"
    )


# -- choosing at the same moment ---------------------------------------------------------------------------


def settling(peer: str, span: Span, *, known: tuple[str, ...] = ()) -> Settling:
    return Settling(peer_id=PeerId(peer), room=6, span=span, known=frozenset(map(PeerId, known)))


def test_of_two_that_chose_the_same_the_higher_peer_id_gives_way() -> None:
    """Both see the same; if both gave way, or none, the gap would stay."""
    servers = [choosing("a", 0, 6), choosing("b", 0, 6)]
    first = settling("a", Span(start=0, end=6)).look_again(servers, 12)
    assert (first.span, first.is_over) == (Span(start=0, end=6), True)
    second = settling("b", Span(start=0, end=6)).look_again(servers, 12)
    assert (second.span, second.is_over) == (Span(start=6, end=12), False)


def test_whoever_was_there_before_is_not_asked_to_give_way() -> None:
    """A server that loads already has looked its last; a newcomer goes round it whatever the peer ids."""
    both = Span(start=0, end=6)
    servers = [choosing("a", 0, 6), loading("b", 0, 6)]
    assert settling("a", both).look_again(servers, 12).span == Span(start=6, end=12)
    servers = [choosing("a", 0, 6), choosing("b", 0, 6)]
    assert settling("a", both, known=("b",)).look_again(servers, 12).span == Span(start=6, end=12)


def test_choosing_ends() -> None:
    """A server has to load at last, also if a hostile peer announces something else every second."""
    now = settling("b", Span(start=0, end=6))
    for look in range(10):
        assert not now.is_over
        now = now.look_again([choosing("a", 6 * (look % 2), 6 * (look % 2) + 6)], 12)
    assert now.is_over


def test_a_quiet_look_is_followed_by_another() -> None:
    """A rival that comes first may be choosing again at this moment, because of somebody before it."""
    servers = [choosing("a", 6, 12), choosing("b", 0, 6)]
    now = settling("b", Span(start=0, end=6)).look_again(servers, 12)
    assert not now.is_over
    looks = [now := now.look_again(servers, 12) for _ in range(2)]
    assert [look.is_over for look in looks] == [False, True]
