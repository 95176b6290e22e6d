"""A backend whose layers are spread over several devices: parts of the span, each with its own backend, in a row.

Each part has its own pages on its own device, so nothing below knows of the others. The parts compute one after
the other: several devices hold more blocks or more sessions than one, and are no faster for a single one.
"""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from swarm.datatypes import Span
from swarm.server.engine.engine import NotNow
from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    from swarm.server.engine.engine import SpanBackend

__all__ = ["ChainedBackend", "Stage"]


@dataclass(frozen=True)
class Stage:
    """Blocks on one device."""

    span: Span
    backend: SpanBackend


@dataclass
class _Progress:
    """A step that some stages have run while the next one has no room for it yet."""

    work: StepWork
    num_stages: int
    """Stages whose sequences stand at the end of the step, forks included."""
    hidden: torch.Tensor
    """[T, H] outputs of the last of them."""

    def is_of(self, work: StepWork) -> bool:
        """Whether `work` is the same tokens again, and not a longer or shorter part of its step."""
        return list(work.sequences) == list(self.work.sequences) and work.span == self.work.span


class ChainedBackend:
    """A SpanBackend over stages that follow each other without a gap."""

    memory = None
    """Sessions can not be moved to other servers: their pages are in several stores."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("ChainedBackend needs stages")
        for left, right in pairwise(stages):
            if left.span.end != right.span.start:
                raise ValueError(f"stages {left.span} and {right.span} do not join")
        self._stages = tuple(stages)
        self._waiting: dict[SessionKey, _Progress] = {}

    @property
    def span(self) -> Span:
        """Blocks of all stages."""
        return Span(start=self._stages[0].span.start, end=self._stages[-1].span.end)

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit every stage when idle."""
        return min(stage.backend.num_tokens_total for stage in self._stages)

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit every stage; another thread may read it."""
        return min(stage.backend.num_tokens_free for stage in self._stages)

    @property
    def kv_usage(self) -> KVUsage:
        """Use of the stages' KV memory together; another thread may read it."""
        usages = [stage.backend.kv_usage for stage in self._stages]
        return KVUsage(
            total_bytes=sum(usage.total_bytes for usage in usages),
            used_bytes=sum(usage.used_bytes for usage in usages),
            wasted_bytes=sum(usage.wasted_bytes for usage in usages),
            shared_bytes=sum(usage.shared_bytes for usage in usages),
            num_tokens_shared=min(usage.num_tokens_shared for usage in usages),
            num_spills=sum(usage.num_spills for usage in usages),
        )

    @property
    def num_tokens_run(self) -> int:
        """Tokens that were computed since start, by the stage that computed most."""
        return max(stage.backend.num_tokens_run for stage in self._stages)

    @property
    def compressing_s(self) -> float:
        """Seconds spent since start on compressing, in all stages."""
        return sum(stage.backend.compressing_s for stage in self._stages)

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | NotNow | BaseException]:
        """One step of each session through all stages; [T, H] each, or that session's error."""
        results: list[torch.Tensor | NotNow | BaseException] = [work.hidden for work in works]
        before = [self._waiting.pop(work.session, None) for work in works]
        for number, stage in enumerate(self._stages):
            chosen: list[int] = []
            parts: list[StepWork] = []
            for index, work in enumerate(works):
                result, progress = results[index], before[index]
                part = _overlap(work.span, stage.span)
                if part is None or not isinstance(result, torch.Tensor):
                    continue
                sequences = work.sequences
                if progress is not None and number < progress.num_stages:
                    if progress.is_of(work):
                        results[index] = progress.hidden
                        continue
                    # The forks are made here; making them again would read parents as they are now.
                    sequences = [
                        SequenceStep(item.sequence, item.sequence, item.start, item.count) for item in sequences
                    ]
                chosen.append(index)
                parts.append(replace(work, span=part, sequences=sequences, hidden=result))
            if not parts:
                continue
            for index, result in zip(chosen, stage.backend.run_steps(parts), strict=True):
                if isinstance(result, NotNow):
                    self._remember(works[index], before[index], number, results[index])
                results[index] = result
        return results

    def _remember(
        self, work: StepWork, before: _Progress | None, number: int, hidden: torch.Tensor | NotNow | BaseException
    ) -> None:
        """Stage `number` has no room for a step that the stages before it have run."""
        assert isinstance(hidden, torch.Tensor)
        if before is not None and number < before.num_stages:  # it has gone back to a stage that had run
            number = before.num_stages
            work, hidden = replace(work, sequences=()), hidden[:0]  # equal to no step: all run again
        if number and any(_overlap(work.span, stage.span) for stage in self._stages[:number]):
            self._waiting[work.session] = _Progress(work, number, hidden)

    def run_stateless(self, work: ForwardWork | BackwardWork) -> torch.Tensor:
        """Whole sequences without pages: outputs, or the gradient of the inputs, [T, H]."""
        parts = [
            (stage.backend, part) for stage in self._stages if (part := _overlap(work.span, stage.span)) is not None
        ]
        hidden = work.hidden
        inputs: list[torch.Tensor] = []
        num_forward = len(parts) if isinstance(work, ForwardWork) else len(parts) - 1
        for backend, part in parts[:num_forward]:
            inputs.append(hidden)
            hidden = backend.run_stateless(ForwardWork(part, work.counts, hidden, work.on_done)).cpu()
        if isinstance(work, ForwardWork):
            return hidden
        inputs.append(hidden)
        gradient = work.gradient
        for (backend, part), rows in zip(reversed(parts), reversed(inputs), strict=True):
            gradient = backend.run_stateless(BackwardWork(part, work.counts, rows, gradient, work.on_done)).cpu()
        return gradient

    def forget(self, session: SessionKey) -> None:
        """Give a session's memory back on all devices; harmless when there is none."""
        self._waiting.pop(session, None)
        for stage in self._stages:
            stage.backend.forget(session)

    def drop_step(self, session: SessionKey) -> None:
        """The session's step that was last tried, or ran in part, is not gone on with."""
        self._waiting.pop(session, None)
        for stage in self._stages:
            stage.backend.drop_step(session)

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away."""
        for stage in self._stages:
            stage.backend.set_away(session, is_away)

    def has_lost(self, session: SessionKey) -> bool:
        """Whether a stage closed the session to make room; another thread may ask."""
        return any(stage.backend.has_lost(session) for stage in self._stages)


def _overlap(asked: Span, held: Span) -> Span | None:
    """The blocks in both."""
    start, end = max(asked.start, held.start), min(asked.end, held.end)
    return Span(start=start, end=end) if start < end else None
