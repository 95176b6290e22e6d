"""Decides what one forward pass over cached sequences has to send."""

# Letters: B rows of a batch, T columns of a batch.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.client.token_columns import Columns, check_consecutive, count_tokens, real_columns, skip_tokens

__all__ = ["CachePlan", "Row", "RowStep", "plan_pass"]

_FIRST_COLUMN = slice(0, 1)


@dataclass(slots=True)
class Row:
    """What one row of the batch holds, once everything noted has been carried out."""

    source: int
    """Sequence of the session that it continues; the row's own after each step."""
    length: int = 0
    """Positions it keeps of that."""
    is_finished: bool = False
    """Whether its answer is complete, while other rows go on."""
    token_ids: list[int] | None = None
    """Token ids at those positions; kept only for sessions."""
    pending: int | None = None
    """The last sampled token, not sent yet; kept only for sessions."""

    def copy(self) -> Row:
        """An independent row of the same content."""
        ids = None if self.token_ids is None else list(self.token_ids)
        return Row(self.source, self.length, self.is_finished, ids, self.pending)

    def truncate(self, length: int) -> None:
        """Keep at most `length` positions."""
        self.length = min(self.length, length)
        if self.token_ids is not None:
            del self.token_ids[self.length :]

    def rewind(self, length: int) -> None:
        """As `truncate`, counting the pending token too."""
        if self.length + (self.pending is not None) > length:
            self.pending = None
        self.truncate(length)


@dataclass(slots=True)
class RowStep:
    """The new tokens of one row in one pass."""

    row: int
    columns: Columns
    """Columns of the pass whose hidden states travel."""
    start: int
    """Position of the first of them: positions of the row that are kept."""
    end: int
    """Position after the last of them."""


@dataclass(slots=True)
class CachePlan:
    """What one pass does to the cache; nothing changes before it is committed."""

    num_rows: int
    num_columns: int
    """Columns of the pass."""
    steps: list[RowStep]
    """Rows with something to send, in order."""
    mask: torch.Tensor | None
    """[B, T] bool, which columns count as tokens; None when all do."""
    is_replay: bool
    """Whether the pass shows each row from its first token on, whatever of it has been sent before."""

    def check_positions(self, position_ids: torch.Tensor) -> None:
        """Raises BadInputError for positions [B or 1, T] that do not rise by one from token to token."""
        at = position_ids if position_ids.shape[0] == 1 else position_ids[[step.row for step in self.steps]]
        check_consecutive([step.columns for step in self.steps], at)

    def positions(self, device: torch.device) -> torch.Tensor:
        """[B, T] int64 positions of the pass's tokens; 0 where nothing is sent."""
        positions = torch.zeros(self.num_rows, self.num_columns, dtype=torch.long, device=device)
        for step in self.steps:
            positions[step.row, step.columns] = torch.arange(step.start, step.end, device=device)
        return positions

    def leave_out_sent(self, num_outputs: int) -> int:
        """Renumber columns from the first that any row sends; returns how many lie before it.

        `num_columns` and `mask` still tell of all columns.
        """
        firsts = [
            step.columns.start if isinstance(step.columns, slice) else int(step.columns[0]) for step in self.steps
        ]
        num_left_out = min(min(firsts, default=0), self.num_columns - max(num_outputs, 1))
        if num_left_out <= 0:
            return 0
        for step in self.steps:
            columns = step.columns
            if isinstance(columns, slice):
                step.columns = slice(columns.start - num_left_out, columns.stop - num_left_out)
            else:
                step.columns = columns - num_left_out
        return num_left_out


def plan_pass(
    rows: Sequence[Row], *, num_columns: int, mask: torch.Tensor | None, num_outputs: int, is_replay: bool
) -> CachePlan:
    """Decide which columns of which rows travel, and at which positions.

    Args:
        rows: of the batch.
        num_columns: T, columns of this pass.
        mask: [B, >= T] attention mask whose last T columns are those of the pass; None when all are tokens.
        num_outputs: last columns whose outputs are needed; 0 for all.
        is_replay: whether the pass shows each row from its first token on.
    """
    has_finished = any(row.is_finished for row in rows)
    if num_columns == 1 and mask is None and not is_replay and not has_finished:
        steps = [RowStep(index, _FIRST_COLUMN, row.length, row.length + 1) for index, row in enumerate(rows)]
        return CachePlan(len(rows), 1, steps, None, False)
    is_real = None if mask is None else mask[:, mask.shape[1] - num_columns :] != 0
    if has_finished:
        is_going = torch.tensor([not row.is_finished for row in rows])[:, None].expand(len(rows), num_columns)
        is_real = is_going if is_real is None else is_real.cpu() & is_going
    steps = []
    for index, columns in enumerate(real_columns(is_real, len(rows), num_columns)):
        count, held = count_tokens(columns), rows[index].length
        if is_replay:
            # Outputs that are needed must be computed (again), even where nothing is new.
            start = min(held, max(count - num_outputs, 0) if num_outputs else count)
            columns, end = skip_tokens(columns, start), count
        else:
            start, end = held, held + count
        if end > start:
            steps.append(RowStep(index, columns, start, end))
    return CachePlan(len(rows), num_columns, steps, is_real, is_replay)
