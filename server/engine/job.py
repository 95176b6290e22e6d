"""A session's step on its way through the engine, which may run it in several parts."""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swarm.server.engine.step_cuts import Stretch, count_allowed, least_part_tokens
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    import torch

__all__ = ["StepJob"]


@dataclass(eq=False)
class StepJob:
    """A session's step and how far it has come."""

    work: StepWork
    is_decode: bool
    """Whether it is short enough to run beside all others that are; not where its tokens are staged, see step_cuts."""
    arrived_s: float
    outputs: list[torch.Tensor] = field(default_factory=list)
    """[T, H] of each part that has run."""
    num_done: int = 0
    has_begun: bool = False
    stretches: Sequence[Stretch] | None = None
    """Where a compressed session's step may be cut, known once it comes to run; None: anywhere."""
    has_looked: bool = False
    """Whether `stretches` has been asked for."""
    retry_at_s: float = float("-inf")
    """Not before this time, since there was no memory for it."""

    @property
    def num_left(self) -> int:
        """Tokens that have not run."""
        return self.work.hidden.shape[0] - self.num_done

    @property
    def least_tokens(self) -> int:
        """Of the next part, unless fewer are left."""
        return 1 if self.stretches is None else least_part_tokens(self.stretches, self.num_done)

    def set_stretches(self, stretches: Sequence[Stretch] | None) -> None:
        """Say where the step may be cut.

        Staged tokens attend one sequence at a time over stored rows that are decoded anew for each part. Few as they
        may be, that takes many times a decoding step, so they take turns with decoders as a long input does.
        """
        self.stretches = stretches
        self.has_looked = True
        if stretches is not None and any(stretch.num_tokens and not stretch.is_whole for stretch in stretches):
            self.is_decode = False

    def part(self, num_tokens: int) -> StepWork:
        """The next `num_tokens`, or about as many where a step can not be cut there, as a step of their own.

        The first part names every sequence, so that all forks happen before anything grows.
        """
        work = self.work
        if self.stretches is not None:
            num_tokens = count_allowed(self.stretches, self.num_done, num_tokens)
        if not self.has_begun and num_tokens == work.hidden.shape[0]:
            return work
        items: list[SequenceStep] = []
        first = 0
        for item in work.sequences:
            skipped = min(max(self.num_done - first, 0), item.count)
            taken = min(max(self.num_done + num_tokens - first, 0), item.count) - skipped
            first += item.count
            is_unfinished = item.is_unfinished or skipped + taken < item.count
            if not self.has_begun:
                items.append(SequenceStep(item.sequence, item.parent, item.start, taken, is_unfinished))
            elif taken:
                start = item.start + skipped
                items.append(SequenceStep(item.sequence, item.sequence, start, taken, is_unfinished))
        rows = work.hidden[self.num_done : self.num_done + num_tokens]
        return replace(work, sequences=items, hidden=rows)
