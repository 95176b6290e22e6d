"""The engine thread: takes work from the network layer, runs it step by step, never lets an error out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swarm.errors import PeerFaultError, SwarmError
from swarm.server.engine.backend import NotNow, SpanBackend, StatelessWork
from swarm.server.engine.gathering import Gathering
from swarm.server.engine.job import StepJob
from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.scheduler import Candidate, ChunkSizer, SchedulerConfig, Share, StepEstimate, plan_step
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

if TYPE_CHECKING:
    from swarm.server.engine.session_memory import SessionMemory

__all__ = ["Engine", "EngineCounters", "NotNow", "SpanBackend"]

logger = logging.getLogger(__name__)

_RETRY_S = 0.02


@dataclass
class EngineCounters:
    """Totals since start; written by the engine thread, read by anyone."""

    num_steps: int = 0
    """Sessions' steps finished."""
    num_batches: int = 0
    """Engine steps, each of them parts of several sessions' steps."""
    num_tokens: int = 0
    num_failed_steps: int = 0
    busy_s: float = 0.0


class Engine:
    """Owns a backend and the thread it runs on. `start` before use, `stop` to end; submit from any thread."""

    def __init__(
        self,
        backend: SpanBackend,
        config: SchedulerConfig | None = None,
        *,
        first_step_s: float | None = None,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`first_step_s` is what a decoding step takes as far as known before the first; it is only told to others."""
        self._backend = backend
        self._config = config or SchedulerConfig()
        self._now_s = now_s
        self._inbox: queue.SimpleQueue[StepJob | StatelessWork | SessionKey | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._jobs: dict[SessionKey, deque[StepJob]] = {}
        """Unfinished steps by session, sessions in the order in which they came to wait."""
        self._stateless: deque[tuple[StatelessWork, float]] = deque()
        """Work and when it came."""
        self._sizer = ChunkSizer(self._config)
        self._gathering: Gathering[SessionKey] = Gathering(self._config.gather_share)
        self._is_prefill_turn = True
        self._is_stopping = False
        self._has_stopped = False
        self._submitting = threading.Lock()
        """Held while something enters the inbox, so that nothing enters after the last look into it."""
        self._at_work_since_s: float | None = None
        self._first_estimate = StepEstimate(first_step_s or 0.0, 0.0)
        self.estimate = self._first_estimate
        """What steps take at the present load; other threads may read it."""
        self._thread = threading.Thread(target=self._run, name="swarm-engine", daemon=True)
        self.counters = EngineCounters()

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit the KV memory when idle."""
        return self._backend.num_tokens_total

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit."""
        return self._backend.num_tokens_free

    @property
    def kv_usage(self) -> KVUsage:
        """Use of the KV memory after the last engine step."""
        return self._backend.kv_usage

    @property
    def num_tokens_run(self) -> int:
        """Tokens that were computed since start; those answered from memory took no time."""
        return self._backend.num_tokens_run

    @property
    def silent_s(self) -> float:
        """How long the engine has been at work without finishing anything; 0 while it is idle."""
        since_s = self._at_work_since_s
        return 0.0 if since_s is None else max(self._now_s() - since_s, 0.0)

    @property
    def memory(self) -> SessionMemory | None:
        """Who holds the sessions' pages, to be used on the engine thread alone; None when they can not be moved."""
        return self._backend.memory

    def has_lost(self, session: SessionKey) -> bool:
        """Whether the memory of a session was given to others."""
        return self._backend.has_lost(session)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, work: StepWork | StatelessWork) -> None:
        """Queue work; its on_done is called exactly once, on the engine thread, or here if that has ended."""
        item: StepJob | StatelessWork
        if isinstance(work, StepWork):
            is_decode = work.hidden.shape[0] <= self._config.decode_tokens
            item = StepJob(work, is_decode, arrived_s=self._now_s())
        else:
            item = work
        with self._submitting:
            if not self._has_stopped:
                self._inbox.put(item)
                return
        _answer(work, None, PeerFaultError("the server is stopping"))

    def forget(self, session: SessionKey) -> None:
        """Drop a session: what it still has queued is answered with an error, its memory is freed."""
        self._inbox.put(session)

    def call(self, function: Callable[[], None]) -> None:
        """Call something on the engine thread, between steps, in the order of what else is asked.

        Raises PeerFaultError when the engine has stopped.
        """
        with self._submitting:
            if self._has_stopped:
                raise PeerFaultError("the server is stopping")
            self._inbox.put(function)

    def cancel(self, works: Sequence[StepWork]) -> None:
        """Drop steps nobody wants any more, the last ones of a session; its memory stays, and so do earlier steps."""
        self._inbox.put(lambda: self._cancel(works))

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away: such a session makes room before all others."""
        self._inbox.put(lambda: self._backend.set_away(session, is_away))

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread; work not yet run is answered with an error. Harmless when repeated."""
        self._inbox.put(None)
        if self._thread.ident is None:
            self._answer_all(PeerFaultError("the server is stopping"))
        else:
            self._thread.join(timeout_s)

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        wait_s: float | None = None
        while True:
            self._receive(wait_s=wait_s)
            if self._is_stopping:
                break
            try:
                wait_s = self._run_once()
            except Exception:  # a bug of ours or a backend's must not leave clients waiting
                logger.exception("the engine failed outside of a step")
                for session in list(self._jobs):
                    self._fail_session(session, PeerFaultError("the server failed"))
                wait_s = None
        self._answer_all(PeerFaultError("the server is stopping"))

    def _answer_all(self, error: BaseException) -> None:
        """The end: nothing enters the inbox any more, and everything queued gets an answer."""
        with self._submitting:
            self._has_stopped = True
            self._receive(wait_s=0.0)
        for session in list(self._jobs):
            self._fail_session(session, error)
        while self._stateless:
            _answer(self._stateless.popleft()[0], None, error)

    def _receive(self, *, wait_s: float | None) -> None:
        """Take everything from the inbox, waiting for the first thing (None: for as long as it takes)."""
        is_first = True
        while True:
            try:
                item = self._inbox.get(block=is_first and wait_s != 0.0, timeout=wait_s if is_first else None)
            except queue.Empty:
                return
            is_first = False
            if item is None:
                self._is_stopping = True
            elif isinstance(item, StepJob):
                self._gathering.arrived(item.work.session, now_s=item.arrived_s)
                self._jobs.setdefault(item.work.session, deque()).append(item)
            elif isinstance(item, tuple):
                self._fail_session(item, PeerFaultError("the session was closed"))
            elif isinstance(item, ForwardWork | BackwardWork):
                self._stateless.append((item, self._now_s()))
            else:
                self._call(item)

    def _call(self, function: Callable[[], None]) -> None:
        self._at_work_since_s = self._now_s()
        try:
            function()
        except Exception:
            logger.exception("a request to the engine failed")
        finally:
            self._at_work_since_s = None

    def _cancel(self, works: Sequence[StepWork]) -> None:
        unwanted = {id(work) for work in works}
        for session in {work.session for work in works}:
            waiting = self._jobs.pop(session, deque[StepJob]())
            left = deque(job for job in waiting if id(job.work) not in unwanted)
            if left:
                self._jobs[session] = left
            elif waiting:
                self._backend.drop_step(session)
            for job in waiting:
                if id(job.work) in unwanted:
                    _answer(job.work, None, PeerFaultError("the step is not wanted any more"))

    def _run_once(self) -> float | None:
        """One engine step; returns how long to wait for news before the next (None: until there are any)."""
        self._at_work_since_s = self._now_s()
        try:
            return self._run_next()
        finally:
            self._at_work_since_s = None
            waiting = [jobs[0].is_decode for jobs in self._jobs.values()]
            self.estimate = self._sizer.estimate(
                num_prefilling=waiting.count(False), num_decoding=waiting.count(True), first=self._first_estimate
            )

    def _run_next(self) -> float | None:
        now_s = self._now_s()
        jobs = [
            job
            for job in [waiting[0] for waiting in self._jobs.values()]
            if job.retry_at_s <= now_s and self._look(job)
        ]
        if self._stateless and (not jobs or now_s - self._stateless[0][1] > self._config.stateless_wait_s):
            self._run_stateless(self._stateless.popleft()[0])
        elif jobs:
            is_decode_turn = any(job.is_decode for job in jobs) and not (
                self._is_prefill_turn and any(not job.is_decode for job in jobs)
            )
            if is_decode_turn:
                wait_s = self._gathering.wait_s(step_s=self._sizer.decode_step_s, now_s=now_s)
                if wait_s > 0:
                    return wait_s
            self._run_steps(jobs, now_s)
        if not self._jobs and not self._stateless:
            return None
        if self._stateless or any(waiting[0].retry_at_s <= now_s for waiting in self._jobs.values()):
            return 0.0
        return _RETRY_S

    def _look(self, job: StepJob) -> bool:
        """Find out where a session's next step may be cut; False if that failed, and the session with it."""
        memory = self._backend.memory
        if job.has_looked or not job.work.compresses or memory is None:
            return True
        try:
            job.set_stretches(memory.find_stretches(job.work))
        except Exception as error:
            logger.exception("a step could not be looked at")
            self.counters.num_failed_steps += 1
            self._fail_session(job.work.session, _as_swarm_error(error))
            return False
        return True

    def _cut_parts(self, jobs: Sequence[StepJob], shares: Sequence[Share]) -> tuple[list[StepJob], list[StepWork]]:
        """The jobs that get a share, and their parts; where a part can not be cut, the session fails."""
        chosen: list[StepJob] = []
        parts: list[StepWork] = []
        for share in shares:
            job = jobs[share.index]
            try:
                part = job.part(share.num_tokens)
            except Exception as error:
                logger.exception("a step could not be cut")
                self.counters.num_failed_steps += 1
                self._fail_session(job.work.session, _as_swarm_error(error))
                continue
            chosen.append(job)
            parts.append(part)
        return chosen, parts

    def _run_steps(self, jobs: Sequence[StepJob], now_s: float) -> None:
        """Run what the scheduler picks of these jobs."""
        shares = plan_step(
            [Candidate(job.num_left, job.is_decode, job.least_tokens) for job in jobs],
            chunk_tokens=self._sizer.chunk_tokens(now_s=now_s),
            max_step_tokens=self._config.max_step_tokens,
            is_prefill_turn=self._is_prefill_turn,
            chunk_multiple=self._config.chunk_multiple,
        )
        chosen, parts = self._cut_parts(jobs, shares)
        if not parts:
            return
        num_run_before, compressing_before_s = self._backend.num_tokens_run, self._backend.compressing_s
        try:
            results = self._backend.run_steps(parts)
        except Exception as error:
            logger.exception("a batch of %d steps failed", len(parts))
            results = [error] * len(parts)
        ended_s = self._now_s()
        is_prefill = not chosen[0].is_decode
        self._is_prefill_turn = not is_prefill
        num_run = self._backend.num_tokens_run - num_run_before
        if num_run:
            seconds = ended_s - now_s
            if is_prefill:
                # An input is compressed once, at its end or every 2,048 tokens: no measure of what its tokens take.
                seconds = max(seconds - (self._backend.compressing_s - compressing_before_s), 0.0)
            self._sizer.record(num_tokens=num_run, is_prefill=is_prefill, seconds=seconds, now_s=ended_s)
        self.counters.num_batches += 1
        self.counters.busy_s += ended_s - now_s
        for job, part, result in zip(chosen, parts, results, strict=True):
            if isinstance(result, NotNow):
                job.retry_at_s = ended_s + _RETRY_S
            elif isinstance(result, BaseException):
                self.counters.num_failed_steps += 1
                self._fail_session(job.work.session, _as_swarm_error(result))
            else:
                self.counters.num_tokens += part.hidden.shape[0]
                self._advance(job, part, result)

    def _advance(self, job: StepJob, part: StepWork, output: torch.Tensor) -> None:
        """Account for a part that has run; the step's last part answers it."""
        job.has_begun = True
        job.num_done += part.hidden.shape[0]
        job.outputs.append(output)
        if job.num_left:
            return
        waiting = self._jobs.pop(job.work.session)
        waiting.popleft()
        if waiting:
            self._jobs[job.work.session] = waiting  # at the end: sessions take turns
        self.counters.num_steps += 1
        if job.is_decode and not waiting:
            self._gathering.answered(job.work.session, now_s=self._now_s())
        _answer(job.work, job.outputs[0] if len(job.outputs) == 1 else torch.cat(job.outputs), None)

    def _fail_session(self, session: SessionKey, error: BaseException) -> None:
        """Free a session and answer all its queued steps: after a failed one the later ones can not be right."""
        self._gathering.forget(session)
        try:
            self._backend.forget(session)
        except Exception:
            logger.exception("a session's memory could not be freed")
        for job in self._jobs.pop(session, ()):
            _answer(job.work, None, error)

    def _run_stateless(self, work: StatelessWork) -> None:
        started_s = self._now_s()
        try:
            result = self._backend.run_stateless(work)
        except Exception as error:
            logger.warning("a stateless run failed: %s", error)
            _answer(work, None, _as_swarm_error(error))
        else:
            _answer(work, result, None)
        self.counters.busy_s += self._now_s() - started_s


def _answer(work: StepWork | StatelessWork, output: torch.Tensor | None, error: BaseException | None) -> None:
    """Call on_done; whatever is wrong with one caller is not the others' problem."""
    try:
        work.on_done(output, error)
    except Exception:
        logger.exception("an answer could not be delivered")


def _as_swarm_error(error: BaseException) -> BaseException:
    """Foreign errors become a fault of this server, cause kept."""
    if isinstance(error, SwarmError):
        return error
    fault = PeerFaultError(f"the step failed: {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault
