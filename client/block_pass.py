"""One forward pass through the swarm's blocks, as the remote layer meets it."""

# Letters: B rows of a batch, T columns of a batch, H hidden size.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar

import torch

from swarm.client.blocks import BlockSession, RemoteBlocks, SequenceInput
from swarm.client.cache_plan import CachePlan, RowStep
from swarm.client.generation_cache import GenerationCache
from swarm.client.token_columns import Columns, count_tokens

__all__ = ["BlockPass", "SessionPass", "StatelessPass", "current_pass"]

_MIN_SPLIT_TOKENS = 32
"""From this many unneeded outputs on, a step is split to keep them from travelling."""


class BlockPass(ABC):
    """Takes a padded batch of hidden states through all blocks."""

    @abstractmethod
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, H] inputs of the first block to [B, T, H] outputs of the last; zeros where nothing is needed."""


current_pass: ContextVar[BlockPass | None] = ContextVar("current_pass", default=None)
"""The pass under way in this thread; the model sets it, its remote layer runs it."""


class StatelessPass(BlockPass):
    """Whole sequences at once, differentiable, leaving no state behind."""

    def __init__(self, blocks: RemoteBlocks, columns: Sequence[Columns]) -> None:
        """`columns` are those that hold tokens, per row."""
        self._blocks = blocks
        self._columns = columns

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        placed = [(row, columns) for row, columns in enumerate(self._columns) if count_tokens(columns)]
        if not placed:
            return hidden
        outputs = self._blocks.run_stateless([hidden[row, columns] for row, columns in placed])
        return _spread(hidden, placed, outputs)


class SessionPass(BlockPass):
    """New tokens of a session's sequences; not differentiable."""

    def __init__(
        self, cache: GenerationCache, plan: CachePlan, *, token_ids: torch.Tensor | None, num_outputs: int
    ) -> None:
        """
        Args:
            cache: which sequences hold what.
            plan: what to send.
            token_ids: [B, T] int64, to remember; None when embeddings were given.
            num_outputs: last columns whose outputs are needed; 0 for all.
        """
        self._cache = cache
        self._plan = plan
        self._token_ids = token_ids
        self._num_outputs = num_outputs

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.detach()
        plan, cache = self._plan, self._cache
        session = cache.session_for(plan)
        copies = self._find_copies(hidden)
        sent = [step for step in plan.steps if step.row not in copies] if copies else plan.steps
        sources = cache.sources
        rows = hidden.unbind()
        inputs = [
            SequenceInput(
                sequence=step.row, parent=sources[step.row], start=step.start, hidden=rows[step.row][step.columns]
            )
            for step in sent
        ]
        if len(inputs) < plan.num_rows:
            inputs += self._forks(hidden)
        outputs = self._send(session, inputs)[: len(sent)] if inputs else []
        cache.commit(plan, self._token_ids)
        if copies:
            of_row = {step.row: output for step, output in zip(sent, outputs, strict=True)}
            for row, source in copies.items():
                cache.copy_row(source, row)
            outputs = [of_row[copies.get(step.row, step.row)] for step in plan.steps]
        return _spread(hidden, [(step.row, step.columns) for step in plan.steps], outputs)

    def _send(self, session: BlockSession, inputs: list[SequenceInput]) -> list[torch.Tensor]:
        num_outputs = self._num_outputs
        if num_outputs == 1:
            return session.step(inputs, last_only=True)
        if num_outputs and max(len(item.hidden) for item in inputs) >= num_outputs + _MIN_SPLIT_TOKENS:
            # Of a long prompt with a few candidate tokens behind it, only the outputs of the end are needed.
            heads = [_with_hidden(item, item.start, item.parent, item.hidden[:-num_outputs]) for item in inputs]
            session.step(heads, last_only=True)
            inputs = [
                _with_hidden(item, item.start + len(head.hidden), item.sequence, item.hidden[len(head.hidden) :])
                for item, head in zip(inputs, heads, strict=True)
            ]
        return session.step(inputs)

    def _forks(self, hidden: torch.Tensor) -> list[SequenceInput]:
        """Forks of rows that send nothing now: what they continue may be gone after this step."""
        stepping = {step.row for step in self._plan.steps}
        cache = self._cache
        return [
            SequenceInput(sequence=row, parent=source, start=cache.lengths[row], hidden=hidden[row, :0])
            for row, source in enumerate(cache.sources)
            if source != row and row not in stepping
        ]

    def _find_copies(self, hidden: torch.Tensor) -> dict[int, int]:
        """Rows equal to the one before (beams, several answers to one prompt), and which row to copy."""
        steps = self._plan.steps
        if len(steps) < 2 or any(self._cache.lengths):
            return {}
        copies: dict[int, int] = {}
        first = steps[0]
        for step in steps[1:]:
            if _is_same(first, step) and torch.equal(hidden[first.row, first.columns], hidden[step.row, step.columns]):
                copies[step.row] = first.row
            else:
                first = step
        return copies


def _is_same(left: RowStep, right: RowStep) -> bool:
    return isinstance(left.columns, slice) and isinstance(right.columns, slice) and left.columns == right.columns


def _with_hidden(item: SequenceInput, start: int, parent: int, hidden: torch.Tensor) -> SequenceInput:
    return SequenceInput(sequence=item.sequence, parent=parent, start=start, hidden=hidden)


def _spread(
    hidden: torch.Tensor, placed: Sequence[tuple[int, Columns]], outputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Outputs [at most T, H] at the ends of their rows' columns, zeros elsewhere: [B, T, H]."""
    num_rows, num_columns, _ = hidden.shape
    if len(outputs) == num_rows and all(len(output) == num_columns for output in outputs):
        whole = outputs[0].unsqueeze(0) if num_rows == 1 else torch.stack(list(outputs))
        return whole.to(device=hidden.device, dtype=hidden.dtype)
    spread = torch.zeros_like(hidden)
    for (row, columns), output in zip(placed, outputs, strict=True):
        at = slice(columns.stop - len(output), columns.stop) if isinstance(columns, slice) else columns[-len(output) :]
        spread[row, at] = output.to(device=hidden.device, dtype=hidden.dtype)
    return spread
