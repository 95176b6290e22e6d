"""Whether a server should move to other blocks, and whether it may.

A move takes a server out of service while it loads, so it has to be worth it and must never open a gap: every block
that it holds must be held by others. It happens in two phases. A server that would gain announces its wish, waits
until everybody must have seen it, looks again, and moves only if it still gains, nobody else is on the move, and
nobody with a lower peer id wishes to move too. So of servers that wish to leave the same block one stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from swarm.datatypes import PeerId, ServerInfo, ServerState, Span, blocks_without_server, format_blocks
from swarm.routing.placement import add_server, best_span, block_rates, server_speeds

__all__ = ["MIN_GAIN", "Move", "Wishes", "find_obstacle", "may_move_again", "plan_move"]

MIN_GAIN: Final = 1.2
"""A move must make what it touches this much faster; less would not repay the time it takes."""
MAX_MOVES_PER_HOUR: Final = 2
_HOUR_S: Final = 3600.0
_LONGEST_MOVE_S: Final = 1800.0
"""Time to drain and to load the largest span from a slow disk or a download."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """Blocks a server should hold instead of those it holds, and why."""

    span: Span
    num_gaps_filled: int
    """How many fewer blocks are without any server."""
    gain: float
    """By how much the slowest of the blocks that it touches gets faster; 1.0 where gaps are filled."""

    def __str__(self) -> str:
        if self.num_gaps_filled:
            return f"to blocks {self.span}, {self.num_gaps_filled} of which nobody serves"
        return f"to blocks {self.span}, which makes the slowest ones {self.gain:.2f} times faster"


def plan_move(
    me: ServerInfo,
    servers: Sequence[ServerInfo],
    num_blocks: int,
    room: int,
    *,
    least: int = 1,
    only_gaps: bool = False,
    min_gain: float = MIN_GAIN,
) -> Move | None:
    """The best move of a server with room for `room` blocks, which may hold as few as `least`; None to stay.

    A block without a server is always reason enough. Otherwise the slowest of all blocks that the server leaves or
    joins must become `min_gain` times faster. `servers` may contain `me`. With `only_gaps` other reasons do not count.
    """
    others = [server for server in servers if server.peer_id != me.peer_id]
    if find_obstacle(me, others) is not None:
        return None
    speeds = server_speeds([*others, me])
    rates = block_rates(others, num_blocks, speeds=speeds)
    speed = speeds[me.peer_id]
    now = add_server(rates, me.span, speed)
    num_gaps = now.count(0.0)
    if not num_gaps and (only_gaps or (sum(rates) + speed) / num_blocks < min_gain * min(now)):
        return None  # not even perfect balance would be enough
    span = best_span(rates, room, speed, least=least)
    if span == me.span:
        return None
    then = add_server(rates, span, speed)
    num_filled = num_gaps - then.count(0.0)
    if num_filled > 0:
        return Move(span=span, num_gaps_filled=num_filled, gain=1.0)
    if num_gaps or only_gaps:
        return None  # faster blocks are of no use to anybody while others are missing
    touched = [block for block in range(num_blocks) if block in span or block in me.span]
    before = min(now[block] for block in touched)
    gain = min(then[block] for block in touched) / before
    if gain < min_gain:
        return None
    return Move(span=span, num_gaps_filled=0, gain=gain)


def find_obstacle(me: ServerInfo, servers: Sequence[ServerInfo]) -> str | None:
    """Why `me` must not leave its blocks now, as half a sentence; None if it may.

    Every block it holds must be held by an ONLINE server that does not wish to move itself.
    """
    others = [server for server in servers if server.peer_id != me.peer_id]
    for server in others:
        if server.moving_to is None:
            continue
        if server.state in (ServerState.DRAINING, ServerState.JOINING):
            return f"{server.peer_id} is moving"
        if server.state is ServerState.ONLINE and server.peer_id < me.peer_id:
            return f"{server.peer_id} wishes to move, too, and comes first"
    staying = [server for server in others if server.moving_to is None]
    alone = [block for block in blocks_without_server(staying, me.num_blocks) if block in me.span]
    if alone:
        return f"nobody else would serve block{'s' if len(alone) > 1 else ''} {format_blocks(alone)}"
    return None


class Wishes:
    """What others wish, and since when: one that never moves must not keep everybody else in place."""

    def __init__(self) -> None:
        self._since_s: dict[tuple[PeerId, Span], float] = {}

    def believe(self, servers: Sequence[ServerInfo], *, now_s: float) -> list[ServerInfo]:
        """`servers` without wishes that have been seen for longer than any honest move takes."""
        believed: list[ServerInfo] = []
        since_s: dict[tuple[PeerId, Span], float] = {}
        for server in servers:
            wish = server.moving_to
            if wish is not None:
                key = (server.peer_id, wish)
                since_s[key] = self._since_s.get(key, now_s)
                if now_s - since_s[key] > _LONGEST_MOVE_S:
                    server = replace(server, moving_to=None)
            believed.append(server)
        self._since_s = since_s
        return believed


def may_move_again(moves_at_s: Sequence[float], *, now_s: float, only_gaps: bool) -> bool:
    """Whether a server that moved at these times may move now; all in seconds of one clock.

    The last move of an hour is kept for filling gaps.
    """
    num_allowed = MAX_MOVES_PER_HOUR if only_gaps else MAX_MOVES_PER_HOUR - 1
    return sum(now_s - at_s < _HOUR_S for at_s in moves_at_s) < num_allowed
