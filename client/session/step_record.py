"""Where the inputs of one sequence began and ended, which is what decides how its cache was compressed. Pure, no I/O.

A server that compresses does so at points that follow from the steps it is sent. A fresh server that is to stand
where another one stood must therefore be sent steps that lead it past the same points.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.kvpolicy.settings import KVPolicy
from swarm.kvpolicy.streaming import (
    TailState,
    advance,
    can_rewind,
    fits_tail,
    is_staged,
    new_tail,
    settle,
    tail_capacity,
)

__all__ = ["RecordedStep", "StepRecord"]


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """Consecutive tokens that went, or are to go, to the servers in one step."""

    start: int
    end: int
    is_unfinished: bool
    """Whether more tokens of the same input followed in the next step."""

    @property
    def count(self) -> int:
        return self.end - self.start


class StepRecord:
    """The steps that made a sequence what it is; what was taken back is no part of it."""

    __slots__ = ("_ends", "_settled", "_unfinished")

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._unfinished: set[int] = set()
        """Those of `_ends` that lie inside an input."""
        self._settled: dict[str, tuple[int, TailState]] = {}
        """By policy: the state after so many steps, as far as it was asked for."""

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self._ends[-1] if self._ends else 0

    def note(self, count: int, *, is_unfinished: bool) -> None:
        """A step has appended `count` tokens."""
        if count:
            self._ends.append(self.length + count)
            if is_unfinished:
                self._unfinished.add(self.length)

    def first(self, length: int) -> StepRecord:
        """The record of the first `length` tokens; what was cut ends there."""
        copy = StepRecord()
        if length >= self.length:
            copy._ends, copy._unfinished = list(self._ends), set(self._unfinished)
            copy._settled = dict(self._settled)
            return copy
        if length:
            num_whole = bisect_left(self._ends, length)
            copy._ends = [*self._ends[:num_whole], length]
            copy._unfinished = {end for end in self._unfinished if end < length}
            copy._settled = {name: known for name, known in self._settled.items() if known[0] <= num_whole}
        return copy

    def steps(self) -> list[RecordedStep]:
        """All steps, in order."""
        starts = [0, *self._ends[:-1]]
        return [
            RecordedStep(start, end, end in self._unfinished) for start, end in zip(starts, self._ends, strict=True)
        ]

    def tail(self, policy: KVPolicy) -> TailState:
        """The state in which a server of that policy is after these steps."""
        num_known, tail = self._settled.get(policy.preset, (0, new_tail(policy)))
        num_steps = len(self._ends)
        for index in range(num_known, num_steps):
            if index == num_steps - 1:
                # The last step is the one that may be taken back, so what is remembered ends before it.
                self._settled[policy.preset] = (index, tail)
            end = self._ends[index]
            start = self._ends[index - 1] if index else 0
            tail = advance(policy, tail, start, end - start, is_unfinished=end in self._unfinished)
        return tail

    def can_rewind(self, policies: Sequence[KVPolicy], length: int) -> bool:
        """Whether servers of these policies can forget all but the first `length` tokens exactly."""
        return length >= self.length or all(can_rewind(policy, self.tail(policy), length) for policy in policies)

    def room(self, policies: Sequence[KVPolicy], start: int) -> int | None:
        """How many tokens can be appended at `start` so that all but the first of them could be taken back again.

        None: any number. 0: it can not be gone back to `start` itself.
        """
        room: int | None = None
        kept = self.first(start)
        for policy in policies:
            if not policy.compresses:
                continue
            if start < self.length and not can_rewind(policy, self.tail(policy), start):
                return 0
            tail = kept.tail(policy)
            stored_end = settle(policy, tail, start).stored_end
            left = stored_end + tail_capacity(policy) - start
            if tail.is_staging or not fits_tail(policy, tail, start, left):
                return 0
            room = left if room is None else min(room, left)
        return room

    def segments(self, policies: Sequence[KVPolicy], *, max_tokens: int) -> list[RecordedStep]:
        """As few steps as lead fresh servers of these policies past the same events to the same state.

        Steps inside the tail are joined up to the next event, or to `max_tokens`, since a step that is cut would be
        staged; inputs that were staged are sent as they were.
        """
        joined: list[RecordedStep] = []
        before = [new_tail(policy) for policy in policies]
        """States before the last of `joined`, and after it."""
        after = before
        for step in self.steps():
            reached = _advance(policies, after, step)
            longer = RecordedStep(joined[-1].start, step.end, is_unfinished=False) if joined else step
            can_join = (
                bool(joined)
                and longer.count <= max_tokens
                and not _is_staged(policies, after, step)
                and not _is_staged(policies, before, joined[-1])
                and not _is_staged(policies, before, longer)
                and _advance(policies, before, longer) == reached
            )
            if can_join:
                joined[-1] = longer
            else:
                joined.append(step)
                before = after
            after = reached
        return joined


def _advance(policies: Sequence[KVPolicy], tails: Sequence[TailState], step: RecordedStep) -> list[TailState]:
    return [
        advance(policy, tail, step.start, step.count, is_unfinished=step.is_unfinished)
        for policy, tail in zip(policies, tails, strict=True)
    ]


def _is_staged(policies: Sequence[KVPolicy], tails: Sequence[TailState], step: RecordedStep) -> bool:
    """Whether a step is staged by any server."""
    return any(
        is_staged(policy, tail, step.start, step.count, is_unfinished=step.is_unfinished)
        for policy, tail in zip(policies, tails, strict=True)
    )
