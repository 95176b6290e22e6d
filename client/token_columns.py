"""Which columns of a padded batch hold real tokens."""

# Letters: B rows of a batch, T columns of a batch.

from __future__ import annotations

import torch

from swarm.errors import BadInputError

__all__ = ["Columns", "check_consecutive", "count_tokens", "pad_left", "real_columns", "skip_tokens"]

Columns = slice | torch.Tensor
"""Columns of one row, ascending: a slice with start and stop where they are consecutive, else int64 indices."""


def real_columns(mask: torch.Tensor | None, num_rows: int, num_columns: int) -> list[Columns]:
    """Columns that hold tokens, per row.

    Args:
        mask: [B, T], nonzero where a column holds a token; None where all do.
        num_rows: B.
        num_columns: T.
    """
    if mask is None or bool((is_real := mask != 0).all()):
        return [slice(0, num_columns)] * num_rows
    rows: list[Columns] = []
    for row in is_real:
        indices = row.nonzero().squeeze(1)
        count = indices.numel()
        if count == 0:
            rows.append(slice(0, 0))
        elif (first := int(indices[0])) + count == int(indices[-1]) + 1:
            rows.append(slice(first, first + count))
        else:
            rows.append(indices)
    return rows


def count_tokens(columns: Columns) -> int:
    """How many tokens the columns of one row hold."""
    return columns.stop - columns.start if isinstance(columns, slice) else columns.numel()


def skip_tokens(columns: Columns, num_tokens: int) -> Columns:
    """The columns of one row without their first `num_tokens` tokens."""
    if isinstance(columns, slice):
        return slice(min(columns.start + num_tokens, columns.stop), columns.stop)
    return columns[num_tokens:]


def check_consecutive(columns: list[Columns], position_ids: torch.Tensor | None) -> None:
    """Refuse tokens whose positions a server could not derive by counting them.

    Args:
        columns: of each row.
        position_ids: [B or 1, T]; None means that a token's column is its position.

    Raises:
        BadInputError: positions of one row's tokens do not rise by one from token to token.
    """
    for row, of_row in enumerate(columns):
        if position_ids is None:
            is_consecutive = isinstance(of_row, slice)
        else:
            positions = position_ids[row if position_ids.shape[0] > 1 else 0][of_row]
            is_consecutive = bool((positions.diff() == 1).all())
        if not is_consecutive:
            raise BadInputError(
                f"the tokens of row {row} are not at consecutive positions; servers count positions by token, so give"
                " position_ids that rise by one from token to token, and an attention_mask with padding at the ends"
            )


def pad_left(
    rows: list[list[int]], *, pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each row's token ids as one batch: ids [B, T] int64, and mask [B, T] int64, None when rows are equally long."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows], device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
