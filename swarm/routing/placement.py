"""Which blocks a server should hold when its operator does not say: those whose scarcity limits the swarm most.

The model behind it. A server of speed v (blocks per second) that holds k blocks passes v / k tokens per second
through each of them. A block's rate is the sum over the servers that hold it, and the swarm is as fast as its
slowest block, the bottleneck; a block that nobody holds has rate 0. One swarm is better than another when its
rates, sorted, slowest first, are larger at the first difference: so fewer blocks without a server come first, then
a faster bottleneck, then fewer blocks as slow as that, and so on. Since a server is faster with fewer blocks, it may
hold fewer than it has room for; it does so where that makes the swarm better in this sense, unless its operator said
how many.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from swarm.datatypes import PeerId, ServerInfo, ServerState, Span
from swarm.errors import BadInputError

__all__ = [
    "block_rates",
    "choose_span",
    "explain_choice",
    "rank_rates",
    "server_speeds",
    "span_to_count",
]

_UNKNOWN_SPEED: Final = 1.0
"""Speed of every server while that of none is known: then only proportions matter, and they are equal."""
_RESOLUTION: Final = 10**9
"""Parts of the mean rate in which rates are compared."""
_BEYOND: Final = 2**200
"""Above any rate."""
_QUIET_LOOKS: Final = 2
"""Looks without a change that end the choosing; two, since those of others lie in between."""
MAX_LOOKS: Final = 10
"""More than that many servers that start in the same second are better sorted out by moving."""


def span_to_count(server: ServerInfo) -> Span | None:
    """The blocks that a server holds or is about to hold; None for one that is leaving or has left."""
    if server.state in (ServerState.ONLINE, ServerState.JOINING):
        return server.span
    if server.state is ServerState.DRAINING:
        return server.moving_to
    return None


def server_speeds(servers: Sequence[ServerInfo]) -> dict[PeerId, float]:
    """Blocks per second of each server. One that has not measured itself yet counts as the median of the others."""
    measured = {server.peer_id: server.tokens_per_s * len(server.span) for server in servers if server.tokens_per_s > 0}
    typical = statistics.median(measured.values()) if measured else _UNKNOWN_SPEED
    return {server.peer_id: measured.get(server.peer_id, typical) for server in servers}


def block_rates(
    servers: Sequence[ServerInfo], num_blocks: int, *, speeds: dict[PeerId, float] | None = None
) -> list[float]:
    """Tokens per second through each block, servers that are loading or on their way to it included."""
    speeds = server_speeds(servers) if speeds is None else speeds
    rates = [0.0] * num_blocks
    for server in servers:
        span = span_to_count(server)
        if span is not None:
            rate = speeds[server.peer_id] / len(span)
            for block in range(span.start, min(span.end, num_blocks)):
                rates[block] += rate
    return rates


def rank_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """A key by which swarms compare: the larger, the better (see the module's first lines).

    Rounded to nine digits of the mean, so that sums of equal rates in another order are equal.
    """
    unit = sum(rates) / len(rates) or 1.0
    return tuple(sorted(round(rate / unit, 9) for rate in rates))


def choose_span(
    servers: Sequence[ServerInfo], num_blocks: int, room: int, *, least: int = 1, speed: float | None = None
) -> Span:
    """Where a new server with room for `room` blocks helps most; it may be fewer blocks than that, down to `least`.

    `servers` are the others; `speed` is the server's own, in blocks per second, None if it is not known yet: then
    the median of the others. The leftmost of equal places wins, so servers that start one after the other line
    up without gaps. Raises BadInputError unless 1 <= room <= num_blocks.
    """
    _check_room(room, num_blocks)
    speeds = server_speeds(servers)
    if speed is None:
        speed = statistics.median(speeds.values()) if speeds else _UNKNOWN_SPEED
    return best_span(block_rates(servers, num_blocks, speeds=speeds), room, speed, least=least)


def best_span(rates: Sequence[float], room: int, speed: float, *, least: int = 1) -> Span:
    """The place, of `least` to `room` blocks, where a server of `speed` makes the best of a swarm of these `rates`."""
    num_blocks = len(rates)
    # Every swarm with this server has the same mean rate, so one unit serves to compare them all; whole numbers of
    # it are equal whatever the order they are added in.
    unit = (sum(rates) + speed) / num_blocks / _RESOLUTION
    scaled = [round(rate / unit) for rate in rates]
    least_before = [*itertools.accumulate(scaled, min, initial=_BEYOND)]
    least_after = [*itertools.accumulate(reversed(scaled), min, initial=_BEYOND)][::-1]
    best: tuple[list[int], int, int] | None = None
    for size in range(room, least - 1, -1):
        own = round(speed / unit / size)
        for start in range(num_blocks - size + 1):
            end = start + size
            least = min(least_before[start], min(scaled[start:end]) + own, least_after[end])
            if best is not None and least < best[0][0]:
                continue  # sorting would only find the same
            found = sorted(scaled[:start] + [rate + own for rate in scaled[start:end]] + scaled[end:])
            if best is None or found > best[0]:
                best = (found, start, size)
    assert best is not None
    return Span(start=best[1], end=best[1] + best[2])


@dataclass(frozen=True, kw_only=True)
class Settling:
    """What a server that is choosing its blocks has seen so far; `look_again` says what follows."""

    peer_id: PeerId
    room: int
    least: int = 1
    """Fewest blocks it may choose."""
    span: Span
    """Its choice so far, as announced."""
    known: frozenset[PeerId]
    """Servers that it knew of when it chose first, and went round."""
    rivals: frozenset[tuple[PeerId, Span]] | None = None
    """Servers that are choosing, too, and come first, as last seen; None before the first look."""
    num_quiet_looks: int = 0
    num_looks: int = 0

    @property
    def is_over(self) -> bool:
        """Whether to stop looking and load."""
        return self.num_quiet_looks >= _QUIET_LOOKS or self.num_looks >= MAX_LOOKS

    def look_again(self, servers: Sequence[ServerInfo], num_blocks: int) -> Settling:
        """The choice after another look-up, made long enough after the last announcement for all to have seen it.

        Servers that choose at the same moment do not see each other and may pick the same blocks. Of those that
        were not known and still choose, the ones with a lower peer id come first, and the others choose again around
        them; so of two exactly one gives way. Whoever was there before, or has begun to load, stays where it is. The
        own choice is kept unless another is better. It is over once neither changes, and after a few looks anyway.
        """
        first = self.those_first(servers)
        speeds = server_speeds(first)
        speed = statistics.median(speeds.values()) if speeds else _UNKNOWN_SPEED
        rates = block_rates(first, num_blocks, speeds=speeds)
        best = best_span(rates, self.room, speed, least=self.least)
        is_better = rank_rates(add_server(rates, best, speed)) > rank_rates(add_server(rates, self.span, speed))
        seen = frozenset((server.peer_id, server.span) for server in first if self._is_rival(server))
        is_quiet = not is_better and seen == (self.rivals or frozenset())
        # Where nobody came first, nobody can make this one choose again.
        num_quiet = 0 if not is_quiet else _QUIET_LOOKS if not seen else self.num_quiet_looks + 1
        return replace(
            self,
            span=best if is_better else self.span,
            rivals=seen,
            num_quiet_looks=num_quiet,
            num_looks=self.num_looks + 1,
        )

    def those_first(self, servers: Sequence[ServerInfo]) -> list[ServerInfo]:
        """The others without the rivals that give way to this one."""
        others = [server for server in servers if server.peer_id != self.peer_id]
        return [server for server in others if not self._is_rival(server) or server.peer_id < self.peer_id]

    def _is_rival(self, server: ServerInfo) -> bool:
        is_choosing = server.is_choosing and server.state is ServerState.JOINING
        return is_choosing and server.peer_id not in self.known


def add_server(rates: Sequence[float], span: Span, speed: float) -> list[float]:
    """Rates of the blocks with one more server."""
    own = speed / len(span)
    return [rate + own if block in span else rate for block, rate in enumerate(rates)]


def explain_choice(span: Span, servers: Sequence[ServerInfo], num_blocks: int) -> str:
    """Why a server that chose `span` did so, given the others, in half a sentence."""
    rates = block_rates(servers, num_blocks)
    uncovered = sum(not rate for rate in rates)
    filled = sum(not rate for rate in rates[span.start : span.end])
    if uncovered == num_blocks:
        return "no other server serves any block"
    if filled:
        return f"nobody serves {filled} of them" if filled < len(span) else "nobody serves them"
    if uncovered:
        return "they are served least, apart from blocks it has no room for"
    return f"they are where the swarm is slowest, at {min(rates):.3g} tokens/s"


def _check_room(room: int, num_blocks: int) -> None:
    if not 1 <= room <= num_blocks:
        raise BadInputError(f"{room} blocks can not be held of a model of {num_blocks}; choose 1 to {num_blocks}")
