"""Carries a plan of faults out on real servers, never taking the last server of a block, and writes a log."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from swarm.cli.chaos.faults import DELAY_S, Fault, FaultKind, uncovered_blocks
from swarm.cli.chaos.swarm_under_test import FrailServer, ServersUnderTest

__all__ = ["FaultRecord", "Injector"]

logger = logging.getLogger(__name__)
_TICK_S: Final = 0.05
_JOIN_TIMEOUT_S: Final = 120.0


@dataclass(kw_only=True)
class FaultRecord:
    """What became of a planned fault; times on time.monotonic's clock."""

    fault: Fault
    began_s: float | None = None
    """None when it was left out."""
    server: int | None = None
    """Which server it hit: of those with the planned one's blocks, the one that most sessions used."""
    ended_s: float | None = None
    """When everything was as before, a server that was started again online; None: not yet."""
    why_left_out: str = ""


class Injector:
    """Runs in a thread of its own from `start` to `stop`; only it touches the servers meanwhile."""

    def __init__(self, servers: ServersUnderTest, faults: Sequence[Fault], *, restart_s: float) -> None:
        """
        Args:
            servers: those the faults' numbers mean come first, all online.
            faults: ascending in time.
            restart_s: how long a server that starts may take before the log complains.
        """
        self._servers = servers
        self._harmed = tuple(servers.servers)
        self._spans = [server.span for server in self._harmed]
        self._restart_s = restart_s
        self.records = [FaultRecord(fault=fault) for fault in faults]
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-injector", daemon=True)
        self._cut_off: set[int] = set()
        """Servers whose lines do not work."""
        self._under_fault: set[int] = set()
        self.problems: list[str] = []
        """What went wrong without our doing: servers that ended or did not start."""
        self.started_s = 0.0

    def start(self) -> None:
        """Time zero of the plan is now."""
        self.started_s = time.monotonic()
        for record in self.records:
            self._at(self.started_s + record.fault.at_s, self._beginning(record))
        self._thread.start()

    def stop(self) -> None:
        """Begin no more faults, undo those that last, and start what is not running; returns when all are online."""
        self._is_over.set()
        self._thread.join()
        for server in self._servers.servers:
            server.recover()
        for index, server in enumerate(self._harmed):
            if server.has_ended:
                self._start(index)
        deadline_s = time.monotonic() + _JOIN_TIMEOUT_S
        for server in self._servers.servers:
            if server in self._harmed:
                try:
                    server.wait_until_online(timeout_s=max(deadline_s - time.monotonic(), 1.0))
                except Exception as error:
                    self.problems.append(f"{server.name} did not come back: {error}")
        now_s = time.monotonic()
        for record in self.records:
            if record.began_s is not None and record.ended_s is None:
                record.ended_s = now_s

    # -- the agenda ----------------------------------------------------------------------------

    def _at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when_s, next(self._numbers), action))

    def _run(self) -> None:
        while not self._is_over.wait(_TICK_S):
            for server in self._servers.servers:
                server.note_baseline()
            while self._agenda and self._agenda[0][0] <= time.monotonic() and not self._is_over.is_set():
                _, _, action = heapq.heappop(self._agenda)
                try:
                    action()
                except Exception as error:
                    logger.exception("a fault could not be carried out")
                    self.problems.append(f"a fault could not be carried out: {error}")

    def _beginning(self, record: FaultRecord) -> Callable[[], None]:
        return lambda: self._begin(record)

    def _begin(self, record: FaultRecord) -> None:
        fault = record.fault
        victims = self._victims(fault)
        reasons = [self._why_not(fault, index) for index in victims] or [
            "all servers of these blocks are harmed already"
        ]
        if all(reasons):
            record.why_left_out = reasons[0]
            logger.info("left out %s: %s", fault, record.why_left_out)
            return
        record.server = victims[reasons.index("")]
        server = self._harmed[record.server]
        logger.info("begin %s (%s, blocks %s)", fault, server.name, server.span)
        record.began_s = time.monotonic()
        self._under_fault.add(record.server)
        end = self._apply(record, server)
        if end is not None:
            self._at(record.began_s + fault.duration_s, end)

    def _victims(self, fault: Fault) -> list[int]:
        """Servers of the planned one's blocks that nothing happens to now, the most used one first.

        Plans do not know what sessions use, and most faults would meet idle servers otherwise.
        """
        alike = [index for index, span in enumerate(self._spans) if span == self._spans[fault.server]]
        free = [index for index in alike if index not in self._under_fault]
        return sorted(free, key=lambda index: (-self._harmed[index].count_sessions(), index != fault.server))

    def _why_not(self, fault: Fault, index: int) -> str:
        """Why a fault would do what the plan does not mean, now that servers may have been slower than planned."""
        server = self._harmed[index]
        if not server.is_serving:
            return f"{server.name} is not back yet"
        away = [other for other, one in enumerate(self._harmed) if not one.is_serving or other in self._cut_off]
        if fault.kind is FaultKind.GAP:
            return "another server is away" if away else ""
        if fault.kind in (FaultKind.DELAY, FaultKind.SLOW, FaultKind.JOIN):
            return ""
        missing = uncovered_blocks(self._spans, without=[*away, index])
        return f"nobody else has block {missing[0]} now" if missing else ""

    # -- what faults do ------------------------------------------------------------------------

    def _apply(self, record: FaultRecord, server: FrailServer) -> Callable[[], None] | None:
        """Begin; what ends it after its duration, or None when that is arranged already."""
        fault, index = record.fault, self._harmed.index(server)

        def ended() -> None:
            self._under_fault.discard(index)
            record.ended_s = time.monotonic()
            logger.info("ended %s", fault)

        def both(undo: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                undo()
                then()

            return run

        def mend() -> None:
            self._cut_off.discard(index)
            server.mend()
            ended()

        match fault.kind:
            case FaultKind.KILL:
                server.kill()
                return lambda: self._restart([index], ended)
            case FaultKind.GAP:
                others = [
                    other
                    for other, span in enumerate(self._spans)
                    if other != index and span.start < server.span.end and server.span.start < span.end
                ]
                for other in [index, *others]:
                    self._harmed[other].kill()
                return lambda: self._restart([index, *others], ended)
            case FaultKind.STOP:
                server.freeze()
                return both(server.thaw, ended)
            case FaultKind.SLOW:
                server.begin_slowness()
                return both(server.end_slowness, ended)
            case FaultKind.CUT | FaultKind.SILENCE:
                self._cut_off.add(index)
                (server.cut if fault.kind is FaultKind.CUT else server.silence)()
                return mend
            case FaultKind.DELAY:
                server.delay(DELAY_S)
                return mend
            case FaultKind.LEAVE:
                server.begin_leave()
                self._when(lambda: server.has_ended, lambda: self._later(fault.duration_s, [index], ended))
            case FaultKind.JOIN:
                guest = self._servers.add(server.span)

                def leave() -> None:
                    guest.begin_leave()
                    self._when(lambda: guest.has_ended, ended)

                self._when(lambda: guest.is_serving or guest.has_ended, lambda: self._at_once_or_later(fault, leave))
        return None

    def _at_once_or_later(self, fault: Fault, leave: Callable[[], None]) -> None:
        self._at(time.monotonic() + fault.duration_s, leave)

    def _later(self, pause_s: float, indices: Sequence[int], then: Callable[[], None]) -> None:
        self._at(time.monotonic() + pause_s, lambda: self._restart(indices, then))

    def _restart(self, indices: Sequence[int], then: Callable[[], None]) -> None:
        """Start servers one after the other, each when the one before it is online."""
        first, *others = indices
        self._start(first)
        server = self._harmed[first]
        asked_s = time.monotonic()

        def online() -> None:
            took_s = time.monotonic() - asked_s
            logger.info("%s is back after %.1f s", server.name, took_s)
            if server.has_ended:
                self.problems.append(f"{server.name} ended while it started")
            if took_s > self._restart_s:
                logger.info("that is more than the %.0f s that were planned with", self._restart_s)
            if others:
                self._restart(others, then)
            else:
                then()

        self._when(lambda: server.is_serving or server.has_ended, online)

    def _start(self, index: int) -> None:
        self._harmed[index].start()

    def _when(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        """Do something as soon as a condition holds."""

        def look() -> None:
            if condition():
                action()
            else:
                self._at(time.monotonic() + _TICK_S, look)

        look()
