"""Moving: only for a gain worth the trouble, never when a block would be left alone, one server at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import ServerInfo, ServerState, Span
from swarm.routing.placement import block_rates
from swarm.routing.rebalancing import MIN_GAIN, Wishes, find_obstacle, may_move_again, plan_move
from tests.server_infos import make_server

LEFT, RIGHT = Span(start=0, end=6), Span(start=6, end=12)


def at(peer: str, span: Span, *, speed: float = 60.0, **others: Any) -> ServerInfo:
    return make_server(peer, span.start, span.end, tokens_per_s=speed / len(span), **others)


def test_a_spare_server_fills_a_gap() -> None:
    """Nobody can be served while one block is missing, so this is reason enough for any move."""
    servers = [at("a", LEFT), at("b", LEFT)]
    for me in servers:
        move = plan_move(me, servers, 12, 6, only_gaps=True)
        assert move is not None
        assert (move.span, move.num_gaps_filled) == (RIGHT, 6)
        assert str(move) == "to blocks 6:12, 6 of which nobody serves"


def test_the_only_holder_of_a_block_stays() -> None:
    """Filling one gap by opening another helps nobody."""
    servers = [at("a", LEFT), at("b", Span(start=1, end=6))]
    assert plan_move(servers[0], servers, 12, 6) is None
    assert find_obstacle(servers[0], servers) == "nobody else would serve block 0"
    assert plan_move(servers[1], servers, 12, 6) is not None


def test_holders_that_are_loading_or_leaving_do_not_count() -> None:
    """They do not serve yet, or will not for long."""
    me = at("a", LEFT)
    for state in (ServerState.JOINING, ServerState.DRAINING, ServerState.OFFLINE):
        assert find_obstacle(me, [me, at("b", LEFT, state=state)]) is not None
    assert find_obstacle(me, [me, at("b", LEFT)]) is None


def test_of_two_that_wish_to_leave_the_same_blocks_one_may() -> None:
    """And which one is clear to both, from the same announcements."""
    a, b, c = (replace(at(peer, LEFT), moving_to=RIGHT) for peer in "abc")
    stays = at("d", LEFT)
    assert find_obstacle(a, [a, b, c, stays]) is None
    assert find_obstacle(b, [a, b, c, stays]) == "a wishes to move, too, and comes first"
    assert find_obstacle(a, [a, b]) == "nobody else would serve blocks 0-5"  # b may be gone before it looks again


def test_one_server_at_a_time() -> None:
    """A move under way changes what the next one is worth; peer ids do not matter any more."""
    me = at("a", LEFT)
    others = [at("b", LEFT), at("c", LEFT)]
    for state in (ServerState.DRAINING, ServerState.JOINING):
        moving = replace(at("z", LEFT, state=state), moving_to=RIGHT)
        assert find_obstacle(me, [me, *others, moving]) == "z is moving"


def test_a_small_gain_is_not_worth_a_move() -> None:
    """A move takes a server out of service while it loads; without a threshold they would never stop."""
    fast, slow = at("a", LEFT, speed=100), at("b", RIGHT, speed=50)
    for speed, moves in ((9.0, False), (12.0, True)):
        me = at("c", LEFT, speed=speed)
        move = plan_move(me, [fast, slow, me], 12, 6)
        assert (move is not None) == moves, speed
        if move is not None:
            assert move.span == RIGHT
            assert str(move).startswith("to blocks 6:12, which makes the slowest ones 1.")


def test_only_gaps_means_only_gaps() -> None:
    """The frequent look is for emergencies."""
    me = at("c", LEFT, speed=100)
    servers = [at("a", LEFT, speed=100), at("b", RIGHT, speed=10), me]
    assert plan_move(me, servers, 12, 6) is not None
    assert plan_move(me, servers, 12, 6, only_gaps=True) is None


spans = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda t: Span(start=t[0], end=min(t[0] + t[1], 6)))


@given(
    servers=st.lists(st.tuples(spans, st.floats(1, 10)), min_size=1, max_size=6),
    room=st.integers(1, 6),
)
def test_a_move_never_harms(servers: list[tuple[Span, float]], room: int) -> None:
    """Whatever the swarm: no new gap, also while it loads, and what it touches is faster by the threshold."""
    infos = [at(f"p{index}", span, speed=speed, num_blocks=6) for index, (span, speed) in enumerate(servers)]
    me, others = infos[0], infos[1:]
    move = plan_move(me, infos, 6, room)
    if move is None:
        return
    before, during = block_rates(infos, 6), block_rates(others, 6)
    after = block_rates([*others, at("p0", move.span, speed=servers[0][1], num_blocks=6)], 6)
    assert {block for block in range(6) if not during[block]} == {block for block in range(6) if not before[block]}
    assert after.count(0.0) == before.count(0.0) - move.num_gaps_filled
    assert len(move.span) <= room
    if not move.num_gaps_filled:
        touched = [block for block in range(6) if block in me.span or block in move.span]
        assert min(after[block] for block in touched) >= MIN_GAIN * min(before[block] for block in touched) - 1e-9
        assert min(after) >= min(before) - 1e-9


def test_two_moves_an_hour() -> None:
    """Sessions have to be handed over each time; and the second is for emergencies."""
    assert may_move_again([], now_s=0, only_gaps=False)
    assert not may_move_again([10.0], now_s=20, only_gaps=False)
    assert may_move_again([10.0], now_s=20, only_gaps=True)
    assert not may_move_again([10.0, 20.0], now_s=3609, only_gaps=True)
    assert may_move_again([10.0, 20.0], now_s=3611, only_gaps=True)
    assert may_move_again([10.0, 20.0], now_s=3621, only_gaps=False)


def test_an_endless_wish_is_not_believed() -> None:
    """A peer that wishes and never moves, out of malice or because it hangs, must not keep the others in place."""
    wishes = Wishes()
    me, staying = at("b", LEFT), at("c", LEFT)
    stuck = replace(at("a", LEFT), moving_to=RIGHT)
    servers = [me, staying, stuck]
    assert find_obstacle(me, wishes.believe(servers, now_s=0)) is not None
    assert find_obstacle(me, wishes.believe(servers, now_s=1800)) is not None
    assert find_obstacle(me, wishes.believe(servers, now_s=1801)) is None
    another = replace(stuck, moving_to=Span(start=5, end=9))
    assert find_obstacle(me, wishes.believe([me, staying, another], now_s=1802)) is not None
