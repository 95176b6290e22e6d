"""Which tokens of one KV head are kept: recent ones, then the best scores, ties to the newer position."""

# Letters: P KV heads of any layers, m candidates of one, or of all where they stand one after another.

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["find_dropped", "find_nth", "rank_scores", "select_kept"]

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
    protected_from: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """The same choice for many heads at once, whose candidates stand in any order: bool [m], what is not kept.

    Args:
        scores: [m] float of float16's precision.
        positions: [m] int64, below 2 ** 31; those of one head differ.
        owners: [m] int64, which head each candidate is of.
        num_dropped: [P] of each head.
        protected_from: [P], tokens of a head at this position or later are kept before all its others.
    """
    is_protected = positions >= torch.from_numpy(protected_from).to(owners.device)[owners]
    ranks = torch.where(is_protected, _PROTECTED, rank_scores(scores))
    keys, owners_there = ((ranks << 31) + positions).cpu().numpy(), owners.cpu().numpy()
    return np.asarray(keys <= find_nth(keys, owners_there, num_dropped - 1)[owners_there])


def find_nth(
    keys: npt.NDArray[np.int64], owners: npt.NDArray[np.int64], nth: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """[P] int64: of each head's keys the one that would stand at a place if they were sorted, counted from 0.

    Without sorting: of thousands of candidates a few are dropped.

    Args:
        keys: [m] from 0 on; those of one head differ.
        owners: [m], which head each is of.
        nth: [P] places, the last where there are fewer; -1 there gives -1, as does a head without keys.
    """
    order = np.argsort(owners, kind="stable")  # owners come in few rising runs, which this sort only merges
    grouped = keys[order]
    borders = np.searchsorted(owners, np.arange(len(nth) + 1), sorter=order)
    found = np.full(len(nth), -1, dtype=np.int64)
    for head, place in enumerate(nth.tolist()):
        own = grouped[borders[head] : borders[head + 1]]
        place = min(place, len(own) - 1)
        if place >= 0:
            own.partition(place)
            found[head] = own[place]
    return found


def rank_scores(scores: torch.Tensor) -> torch.Tensor:
    """int64 above 0 and below 2 ** 17, in the order of scores of float16's precision; not a number is lowest."""
    # Adding 0 makes one zero of two. Bits of floats rise with them, but for the order of negative ones.
    bits = (scores.half() + 0.0).view(torch.int16).long()
    ranks = torch.where(bits < 0, bits ^ 0x7FFF, bits) + _MIDDLE_RANK
    return torch.where(scores.isnan(), 1, ranks)


def _protect(scores: torch.Tensor, positions: torch.Tensor, protected_from: int) -> torch.Tensor:
    ranked = torch.nan_to_num(scores.float(), nan=-torch.inf)
    return torch.where(positions >= protected_from, torch.inf, ranked)
