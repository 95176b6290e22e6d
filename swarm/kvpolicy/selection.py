"""Which tokens of one KV head are kept: recent ones, then the best scores, ties to the newer position."""

# Letters: P KV heads of any layers, m candidates of one, or of all where they stand one after another.

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["find_dropped", "rank_scores", "select_kept", "sort_order"]

_MIDDLE_RANK: Final = 1 << 16
_PROTECTED: Final = (1 << 17) - 1


def select_kept(scores: torch.Tensor, positions: torch.Tensor, num_kept: int, *, protected_from: int) -> torch.Tensor:
    """Indices [num_kept] int64, ascending, of the tokens to keep.

    Depends on nothing but its arguments, bit for bit: equal scores are told apart by position.

    Args:
        scores: [m] float, higher is better; NaN counts as lowest.
        positions: [m] int64, absolute, strictly rising.
        num_kept: at most m.
        protected_from: tokens at this position or later are kept before all others.
    """
    ranked = _protect(scores, positions, protected_from)
    # Newest first, so that the stable sort leaves the newer of two equals in front.
    order = torch.sort(ranked.flip(0), descending=True, stable=True).indices
    return (len(scores) - 1 - order[:num_kept]).sort().values


def find_dropped(
    scores: torch.Tensor,
    positions: torch.Tensor,
    owners: torch.Tensor,
    num_dropped: npt.NDArray[np.int64],
    *,
    protected_from: int,
) -> npt.NDArray[np.bool_]:
    """The same choice for many heads at once, whose candidates stand in any order: bool [m], what is not kept.

    Args:
        scores: [m] float of float16's precision.
        positions: [m] int64, below 2 ** 31; those of one head differ.
        owners: [m] int64, which head each candidate is of.
        num_dropped: [P] of each head.
        protected_from: tokens at this position or later are kept before all others.
    """
    ranks = torch.where(positions >= protected_from, _PROTECTED, rank_scores(scores))
    order = sort_order((owners << 48) + (ranks << 31) + positions)
    sorted_owners = owners.cpu().numpy()[order]
    first = np.searchsorted(sorted_owners, np.arange(len(num_dropped)))
    dropped = np.zeros(len(order), dtype=np.bool_)
    dropped[order] = np.arange(len(order)) - first[sorted_owners] < num_dropped[sorted_owners]
    return dropped


def rank_scores(scores: torch.Tensor) -> torch.Tensor:
    """int64 above 0 and below 2 ** 17, in the order of scores of float16's precision; not a number is lowest."""
    # Adding 0 makes one zero of two. Bits of floats rise with them, but for the order of negative ones.
    bits = (scores.half() + 0.0).view(torch.int16).long()
    ranks = torch.where(bits < 0, bits ^ 0x7FFF, bits) + _MIDDLE_RANK
    return torch.where(scores.isnan(), 1, ranks)


def sort_order(keys: torch.Tensor) -> npt.NDArray[np.int64]:
    """[m] int64: indices that sort keys [m] int64 that differ."""
    if keys.device.type == "cpu":  # several times faster than torch's
        return np.argsort(keys.numpy())
    order: npt.NDArray[np.int64] = keys.argsort().cpu().numpy()
    return order


def _protect(scores: torch.Tensor, positions: torch.Tensor, protected_from: int) -> torch.Tensor:
    ranked = torch.nan_to_num(scores.float(), nan=-torch.inf)
    return torch.where(positions >= protected_from, torch.inf, ranked)
