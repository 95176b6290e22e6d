"""Which tokens of one KV head are kept: recent ones, then the best scores, ties to the newer position."""

from __future__ import annotations

import torch

__all__ = ["select_kept"]


def select_kept(scores: torch.Tensor, positions: torch.Tensor, num_kept: int, *, protected_from: int) -> torch.Tensor:
    """Indices [num_kept] int64, ascending, of the tokens to keep.

    Depends on nothing but its arguments, bit for bit: equal scores are told apart by position.

    Args:
        scores: [m] float, higher is better; NaN counts as lowest.
        positions: [m] int64, absolute, strictly rising.
        num_kept: at most m.
        protected_from: tokens at this position or later are kept before all others.
    """
    ranked = torch.nan_to_num(scores.float(), nan=-torch.inf)
    ranked = torch.where(positions >= protected_from, torch.inf, ranked)
    # Newest first, so that the stable sort leaves the newer of two equals in front.
    order = torch.sort(ranked.flip(0), descending=True, stable=True).indices
    return (len(scores) - 1 - order[:num_kept]).sort().values
