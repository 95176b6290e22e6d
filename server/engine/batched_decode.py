"""Attention of many sequences that add one token each, in few padded calls: the way of a GPU.

On a CPU the same lost to one call per sequence, by 1.1 times at 160 keys and 1.8 times at 1,024
(docs/performance.md): there pages that lie in a run are read in place, here they are copied.
"""

# Letters: S sequences of a group, n keys of the longest padded to whole pages, L layers, P tokens of a page;
# Hq query heads, Hk KV heads, D head dimension, T tokens of a step.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from swarm.server.engine.decode_groups import group_by_length

if TYPE_CHECKING:
    from swarm.server.engine.ragged_attention import SequenceSlice

__all__ = ["MAX_PADDED_TOKENS", "DecodeGroup", "make_groups"]

MAX_PADDED_TOKENS: Final = 65_536
"""Keys and values of one call are copied, 256 MiB of a 70B model's at this limit."""


@dataclass
class DecodeGroup:
    """Sequences whose newest tokens attend in one call."""

    rows: torch.Tensor
    """[S] rows of the packed batch."""
    pages: torch.Tensor
    """[L, S, n / P] pages; those beyond a sequence's last are 0 and never read."""
    lengths: torch.Tensor
    """[S, 1] positions held, the new one included."""
    page_tokens: int
    _visible: dict[int, torch.Tensor] = field(default_factory=dict)
    """[S, n] booleans by window: which positions the new token sees."""

    def visible(self, window: int) -> torch.Tensor:
        """[S, n] which positions each new token sees; `window` 0 for all."""
        mask = self._visible.get(window)
        if mask is None:
            positions = torch.arange(self.pages.shape[2] * self.page_tokens, device=self.pages.device).unsqueeze(0)
            mask = positions < self.lengths
            if window:
                mask &= positions >= self.lengths - window
            self._visible[window] = mask
        return mask

    def slots(self, table_row: int, window: int) -> torch.Tensor:
        """[S, n] token slots of one layer.

        Where nothing is visible a sequence's own newest token stands in: other memory may hold what makes
        even masked scores NaN, and a sequence must never touch another's.
        """
        offsets = torch.arange(self.page_tokens, device=self.pages.device)
        slots = (self.pages[table_row].unsqueeze(2) * self.page_tokens + offsets).flatten(1)
        return torch.where(self.visible(window), slots, slots.gather(1, self.lengths - 1))


def make_groups(
    slices: Sequence[SequenceSlice], *, page_tokens: int, device: torch.device, max_padded_tokens: int
) -> list[DecodeGroup]:
    """Groups of all slices that add one token to others."""
    chosen = [part for part in slices if part.end_row - part.first_row == 1 and part.start > 0]
    groups: list[DecodeGroup] = []
    for members in group_by_length([part.start + 1 for part in chosen], max_padded_tokens=max_padded_tokens):
        parts = [chosen[index] for index in members]
        num_pages = [-(-(part.start + 1) // page_tokens) for part in parts]
        pages = np.zeros((parts[0].table.num_layers, len(parts), max(num_pages)), dtype=np.int64)
        for index, (part, count) in enumerate(zip(parts, num_pages, strict=True)):
            pages[:, index, :count] = part.table.pages[:, :count]
        groups.append(
            DecodeGroup(
                rows=torch.tensor([part.first_row for part in parts], device=device),
                pages=torch.from_numpy(pages).to(device),
                lengths=torch.tensor([[part.start + 1] for part in parts], device=device),
                page_tokens=page_tokens,
            )
        )
    return groups
