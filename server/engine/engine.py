"""The engine thread: takes work from the network layer, runs steps before training, never lets an error out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch

from swarm.errors import PeerFaultError, SwarmError
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

__all__ = ["Engine", "EngineCounters", "SpanBackend"]

logger = logging.getLogger(__name__)

StatelessWork = ForwardWork | BackwardWork


class SpanBackend(Protocol):
    """Runs blocks; lives on the engine thread, so it needs no locks."""

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | BaseException]:
        """Run one step of each of several sessions; an error is that session's own."""

    def run_stateless(self, work: StatelessWork) -> torch.Tensor:
        """Forward outputs or input gradients [T, H]."""

    def forget(self, session: SessionKey) -> None:
        """Free a session's caches; harmless when there are none."""


@dataclass
class EngineCounters:
    """Totals since start; written by the engine thread, read by anyone."""

    num_steps: int = 0
    num_tokens: int = 0
    num_failed_steps: int = 0
    busy_s: float = 0.0


@dataclass
class _Ready:
    """Work not yet run, in order of arrival."""

    steps: deque[StepWork] = field(default_factory=deque)
    stateless: deque[StatelessWork] = field(default_factory=deque)

    def take_steps(self) -> list[StepWork]:
        """The oldest step of each session: one session's steps depend on each other, so they take turns."""
        taken: dict[SessionKey, StepWork] = {}
        later: deque[StepWork] = deque()
        for work in self.steps:
            if work.session in taken:
                later.append(work)
            else:
                taken[work.session] = work
        self.steps = later
        return list(taken.values())


class Engine:
    """Owns a backend and the thread it runs on. `start` before use, `stop` to end; submit from any thread."""

    def __init__(self, backend: SpanBackend) -> None:
        self._backend = backend
        self._inbox: queue.SimpleQueue[StepWork | StatelessWork | SessionKey | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="swarm-engine", daemon=True)
        self._stopped = threading.Event()
        self.counters = EngineCounters()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, work: StepWork | StatelessWork) -> None:
        """Queue work; its on_done is called on the engine thread exactly once."""
        self._inbox.put(work)

    def forget(self, session: SessionKey) -> None:
        """Free a session's caches after the work submitted so far."""
        self._inbox.put(session)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish what is queued, then end the thread; what is submitted later fails."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        ready = _Ready()
        to_forget: list[SessionKey] = []
        running = True
        while running or ready.steps or ready.stateless:
            running &= self._receive(ready, to_forget, wait=running and not (ready.steps or ready.stateless))
            if ready.steps:
                self._run_steps(ready.take_steps())
            elif ready.stateless:
                self._run_stateless(ready.stateless.popleft())
            if to_forget:
                # A session is forgotten only after its queued steps, which would otherwise bring it back.
                waiting = {work.session for work in ready.steps}
                for session in [item for item in to_forget if item not in waiting]:
                    self._backend.forget(session)
                    to_forget.remove(session)
        self._stopped.set()

    def _receive(self, ready: _Ready, to_forget: list[SessionKey], *, wait: bool) -> bool:
        """Move everything from the inbox to `ready`; False once asked to stop."""
        block = wait
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return True
            block = False
            if item is None:
                return False
            if isinstance(item, StepWork):
                ready.steps.append(item)
            elif isinstance(item, tuple):
                to_forget.append(item)
            else:
                ready.stateless.append(item)

    def _run_steps(self, works: list[StepWork]) -> None:
        started = time.perf_counter()
        try:
            results = self._backend.run_steps(works)
        except Exception as error:
            logger.exception("a batch of %d steps failed", len(works))
            results = [error] * len(works)
        self.counters.busy_s += time.perf_counter() - started
        for work, result in zip(works, results, strict=True):
            self.counters.num_steps += 1
            if isinstance(result, BaseException):
                self.counters.num_failed_steps += 1
                work.on_done(None, _as_swarm_error(result))
            else:
                self.counters.num_tokens += work.hidden.shape[0]
                work.on_done(result, None)

    def _run_stateless(self, work: StatelessWork) -> None:
        started = time.perf_counter()
        try:
            result = self._backend.run_stateless(work)
        except Exception as error:
            logger.warning("a stateless run failed: %s", error)
            work.on_done(None, _as_swarm_error(error))
        else:
            work.on_done(result, None)
        self.counters.busy_s += time.perf_counter() - started


def _as_swarm_error(error: BaseException) -> BaseException:
    """Foreign errors become a fault of this server, cause kept."""
    if isinstance(error, SwarmError):
        return error
    fault = PeerFaultError(f"the step failed: {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault
