"""Servers that join, move and leave by the real decisions, on a simulated clock with announcements that take time."""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace

from swarm.datatypes import PeerId, ServerInfo, ServerState, Span
from swarm.routing.placement import Settling, choose_span
from swarm.routing.rebalancing import find_obstacle, may_move_again, plan_move
from tests.server_infos import make_server

__all__ = ["SimulatedServer", "SimulatedSwarm", "best_bottleneck"]

Life = Generator[float, None, None]
"""What a server does: yields how many seconds to wait."""

_ANNOUNCE_PERIOD_S = 5.0
_LAG_S = 1.0
"""An announcement is seen by others after this long."""
_SETTLE_S = 2.0
_DRAIN_S = 30.0
_REBALANCE_S = 300.0


@dataclass(eq=False)
class SimulatedServer:
    """A machine: how many blocks it has room for, and how many it runs in a second."""

    peer_id: PeerId
    room: int
    speed: float
    least: int = 1
    """Fewest blocks it may hold; its operator may have said how many."""
    load_s: float = 60.0
    info: ServerInfo | None = None
    """What it announced last; None while it is off."""
    serves: Span | None = None
    """Blocks that sessions can be run through at this moment."""
    moves_at_s: list[float] = field(default_factory=list)


class SimulatedSwarm:
    """A registry with lag, and a clock."""

    def __init__(self, num_blocks: int, *, seed: int, moves: bool = True) -> None:
        self.num_blocks = num_blocks
        self.moves = moves
        self.now_s = 0.0
        self.rng = random.Random(seed)
        self.servers: list[SimulatedServer] = []
        self.num_gaps_opened_by_moves = 0
        self._seen: dict[PeerId, list[tuple[float, ServerInfo | None]]] = {}
        self._events: list[tuple[float, int, Iterator[float]]] = []
        self._numbers = itertools.count()
        self._lives: dict[PeerId, Life] = {}
        self._last_s = 0.0
        self._rate_seconds = 0.0
        self._covered_s = 0.0

    # -- running -------------------------------------------------------------------------------

    def start(self, life: Iterator[float], *, after_s: float = 0.0) -> None:
        """Let something happen from `after_s` on."""
        heapq.heappush(self._events, (self.now_s + after_s, next(self._numbers), life))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            at_s, _, life = heapq.heappop(self._events)
            self._account(at_s)
            wait_s = next(life, None)
            if wait_s is not None:
                self.start(life, after_s=wait_s)
        self._account(until_s)

    def _account(self, now_s: float) -> None:
        bottleneck = self.bottleneck()
        self._rate_seconds += bottleneck * (now_s - self._last_s)
        self._covered_s += (bottleneck > 0) * (now_s - self._last_s)
        self._last_s = self.now_s = now_s

    # -- what is so ----------------------------------------------------------------------------

    def bottleneck(self) -> float:
        """Tokens per second of the slowest block, counting what really serves."""
        rates = [0.0] * self.num_blocks
        for server in self.servers:
            if server.serves is not None:
                for block in range(server.serves.start, server.serves.end):
                    rates[block] += server.speed / len(server.serves)
        return min(rates)

    @property
    def mean_bottleneck(self) -> float:
        """Over all the time so far."""
        return self._rate_seconds / self.now_s

    @property
    def covered_share(self) -> float:
        """Share of the time in which every block was served."""
        return self._covered_s / self.now_s

    # -- discovery -----------------------------------------------------------------------------

    def view(self) -> list[ServerInfo]:
        """What a look-up answers now."""
        found: list[ServerInfo] = []
        for history in self._seen.values():
            seen = [info for at_s, info in history if at_s <= self.now_s]
            if seen and seen[-1] is not None:
                found.append(seen[-1])
        return found

    def _announce(self, server: SimulatedServer, info: ServerInfo | None, *, lag_s: float = _LAG_S) -> None:
        server.info = info
        history = self._seen.setdefault(server.peer_id, [])
        while len(history) > 1 and history[1][0] <= self.now_s:
            history.pop(0)
        history.append((self.now_s + lag_s, info))

    # -- a server's life -----------------------------------------------------------------------

    def join(self, server: SimulatedServer, *, after_s: float = 0.0) -> None:
        """Switch a machine on."""
        if server not in self.servers:
            self.servers.append(server)
        life = self._live(server)
        self._lives[server.peer_id] = life
        self.start(life, after_s=after_s)

    def leave(self, server: SimulatedServer, *, politely: bool) -> None:
        """Switch a machine off: after draining, or at once, when others notice as its record expires."""
        self._lives.pop(server.peer_id).close()
        if server.info is None:
            return
        if politely and server.serves is not None:
            self._announce(server, replace(server.info, state=ServerState.DRAINING, moving_to=None))
            self.start(self._end(server), after_s=_DRAIN_S)
        else:
            server.serves = None
            self._announce(server, None, lag_s=2 * _ANNOUNCE_PERIOD_S)

    def _end(self, server: SimulatedServer) -> Life:
        server.serves = None
        self._announce(server, None)
        yield 0.0

    def _live(self, server: SimulatedServer) -> Life:
        others = self.view()
        known = frozenset(other.peer_id for other in others)
        span = choose_span(others, self.num_blocks, server.room, least=server.least)
        joining = make_server(
            server.peer_id,
            span.start,
            span.end,
            num_blocks=self.num_blocks,
            state=ServerState.JOINING,
            tokens_per_s=0.0,
        )
        settling = Settling(peer_id=server.peer_id, room=server.room, least=server.least, span=span, known=known)
        while not settling.is_over:
            self._announce(server, replace(joining, span=settling.span, is_choosing=True))
            yield _SETTLE_S * self.rng.uniform(1, 2)
            settling = settling.look_again(self.view(), self.num_blocks)
        joining = replace(joining, span=settling.span)
        self._announce(server, joining)
        yield server.load_s
        self._go_online(server, joining)
        yield from self._rebalance_forever(server)

    def _go_online(self, server: SimulatedServer, info: ServerInfo) -> None:
        server.serves = info.span
        tokens_per_s = server.speed / len(info.span)
        self._announce(server, replace(info, state=ServerState.ONLINE, tokens_per_s=tokens_per_s, moving_to=None))

    def _rebalance_forever(self, server: SimulatedServer) -> Life:
        for turn in itertools.count(1):
            yield _REBALANCE_S / 10 * self.rng.uniform(0.5, 1.5)
            assert server.info is not None
            only_gaps = turn % 10 != 0
            if not self.moves or not may_move_again(server.moves_at_s, now_s=self.now_s, only_gaps=only_gaps):
                continue
            sizes = {"room": server.room, "least": server.least}
            move = plan_move(server.info, self.view(), self.num_blocks, **sizes, only_gaps=only_gaps)
            if move is None:
                continue
            stays = server.info
            self._announce(server, replace(stays, moving_to=move.span))
            yield 2 * _ANNOUNCE_PERIOD_S
            again = plan_move(stays, self.view(), self.num_blocks, **sizes, only_gaps=only_gaps)
            if again is None:
                self._announce(server, stays)
                continue
            target = again.span
            self._announce(server, replace(stays, state=ServerState.DRAINING, moving_to=target))
            yield _DRAIN_S
            if find_obstacle(stays, self.view()) is not None:
                self._announce(server, stays)
                continue
            yield from self._move(server, stays, target)

    def _move(self, server: SimulatedServer, stays: ServerInfo, target: Span) -> Life:
        gaps_before = self._gaps()
        server.serves = None
        self.num_gaps_opened_by_moves += len(self._gaps() - gaps_before)
        server.moves_at_s.append(self.now_s)
        moving = replace(
            stays, state=ServerState.JOINING, span=target, moving_to=target, tokens_per_s=server.speed / len(target)
        )
        self._announce(server, moving)
        yield server.load_s
        self._go_online(server, moving)

    def _gaps(self) -> set[int]:
        held = {
            block
            for server in self.servers
            if server.serves is not None
            for block in range(server.serves.start, server.serves.end)
        }
        return set(range(self.num_blocks)) - held


@functools.cache
def best_bottleneck(machines: tuple[tuple[int, float], ...], num_blocks: int) -> float:
    """The fastest that any placement of machines (room, speed) makes the slowest block, to six digits.

    A server of speed v that holds k blocks, at most its room, adds v / k to the rate of each. To decide whether a
    rate T can be reached, look at the leftmost block below T: some server not placed yet must hold it. All
    blocks before it are at T already, so that server may as well begin there. So it is enough to try every
    order of servers and, for each, every size.
    """

    def place(needed: float, rates: list[float], left: frozenset[int]) -> bool:
        first = next((block for block, rate in enumerate(rates) if rate < needed), None)
        if first is None:
            return True
        missing = [needed - rate for rate in rates if rate < needed]
        if sum(machines[server][1] for server in left) < sum(missing):
            return False
        if sum(machines[server][0] for server in left) < len(missing):
            return False
        for server in left:
            room, speed = machines[server]
            for size in range(min(room, num_blocks - first), 0, -1):
                with_server = [rate + speed / size for rate in rates[first : first + size]]
                if place(needed, rates[:first] + with_server + rates[first + size :], left - {server}):
                    return True
        return False

    def can_reach(rate: float) -> bool:
        return place(rate * (1 - 1e-9), [0.0] * num_blocks, frozenset(range(len(machines))))

    low, high = 0.0, sum(speed for _, speed in machines) / num_blocks
    if can_reach(high):
        return high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if can_reach(middle) else (low, middle)
    return low
