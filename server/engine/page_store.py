"""The tensors of KV pages: one slab, cut into pages of equal bytes, written and read by slot."""

# Letters: L layers of a span, P tokens of a page, Hk KV heads, D head dimension, T tokens of a step.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swarm.errors import BadInputError
from swarm.kvcache.page_pool import PageNumbers, PagePool
from swarm.kvcache.page_table import PageCopy, PageTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KVShape", "PageStore"]


@dataclass(frozen=True)
class KVShape:
    """What one token of one layer stores."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def values_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class PageStore:
    """All KV memory of a server. A page holds P tokens of one layer, keys and values side by side per token.

    Token-major order makes neighbouring pages one longer array, so a sequence whose pages form a run is
    read in place.
    """

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        memory_bytes: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        row_values: int | None = None,
    ) -> None:
        """Take `memory_bytes` at once (on CPU the system backs only what is touched).

        Args:
            row_values: values of one token's slot where that is to be more than the layers need, so that what else
                pages are cut into fits better.

        Raises BadInputError when not even one page per layer fits.
        """
        self.shapes = tuple(shapes)
        self.page_tokens = page_tokens
        self.row_values = max(row_values or 0, *(shape.values_per_token for shape in shapes))
        """Values of one token slot: layers share pages, so the largest layer sets the size."""
        self.page_bytes = page_tokens * self.row_values * dtype.itemsize
        num_pages = memory_bytes // self.page_bytes
        if num_pages < len(shapes):
            raise BadInputError(
                f"--kv-memory of {memory_bytes} bytes holds {num_pages} pages of {self.page_bytes} bytes; "
                f"{len(shapes)} layers need at least {len(shapes)}, so give {len(shapes) * self.page_bytes} or more"
            )
        self.pool = PagePool(num_pages)
        self._slab = torch.empty(num_pages * page_tokens, self.row_values, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._slab.dtype

    @property
    def num_layers(self) -> int:
        return len(self.shapes)

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit when all layers hold the same."""
        return self.pool.num_pages // self.num_layers * self.page_tokens

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit."""
        return self.pool.num_free // self.num_layers * self.page_tokens

    def bytes_as(self, dtype: torch.dtype) -> torch.Tensor:
        """The memory of all pages as other values, [pages, values of that dtype in a page]; a view."""
        return self._slab.view(self.pool.num_pages, -1).view(dtype)

    def new_table(self, num_layers: int) -> PageTable:
        """An empty table for a sequence in `num_layers` of the layers."""
        return PageTable(self.pool, num_layers=num_layers, page_tokens=self.page_tokens)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy whole pages, before one owner writes to its own."""
        if not copies:
            return
        pages = self._slab.view(self.pool.num_pages, -1)
        sources = torch.tensor([copy.source for copy in copies], device=self._slab.device)
        targets = torch.tensor([copy.target for copy in copies], device=self._slab.device)
        pages.index_copy_(0, targets, pages.index_select(0, sources))

    def save_pages(self, pages: PageNumbers) -> torch.Tensor:
        """A copy of whole pages in host memory, [pages, values of a page]."""
        wanted = torch.tensor(pages, device=self._slab.device)
        return self._slab.view(self.pool.num_pages, -1).index_select(0, wanted).cpu()

    def load_pages(self, pages: PageNumbers, saved: torch.Tensor) -> None:
        """Fill pages with what `save_pages` returned."""
        targets = torch.tensor(pages, device=self._slab.device)
        self._slab.view(self.pool.num_pages, -1).index_copy_(0, targets, saved.to(self._slab.device))

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store keys [T, Hk, Dk] and values [T, Hk, Dv] at token slots [T]."""
        shape = self.shapes[layer]
        num_tokens = key.shape[0]
        rows = torch.cat((key.reshape(num_tokens, -1), value.reshape(num_tokens, -1)), dim=1)
        if rows.shape[1] == self.row_values:
            self._slab.index_copy_(0, slots, rows)
        else:
            self._slab[:, : shape.values_per_token].index_copy_(0, slots, rows)

    def gather(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of keys [S, Hk, n, Dk] and values [S, Hk, n, Dv] at token slots [S, n]."""
        shape = self.shapes[layer]
        num_heads = shape.num_kv_heads
        rows = self._slab.index_select(0, slots.flatten())
        keys, values = rows[:, : shape.values_per_token].split(
            [num_heads * shape.key_dim, num_heads * shape.value_dim], dim=1
        )
        return (
            keys.unflatten(1, (num_heads, -1)).unflatten(0, slots.shape).transpose(1, 2),
            values.unflatten(1, (num_heads, -1)).unflatten(0, slots.shape).transpose(1, 2),
        )

    def read(
        self, layer: int, pages: npt.NDArray[np.int64], run_pages: int, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, Hk, end - start, D] of positions [start, end) of a sequence.

        `pages` are the sequence's pages in this layer, of which the first `run_pages` are neighbours. A run
        is read in place: do not write to what is returned.
        """
        shape = self.shapes[layer]
        if end <= run_pages * self.page_tokens:
            base, first_slot = self._slab, int(pages[0]) * self.page_tokens + start
        else:
            first_page = start // self.page_tokens
            last_page = -(-end // self.page_tokens)
            wanted = torch.from_numpy(pages[first_page:last_page].copy()).to(self._slab.device)
            base = self._slab.view(self.pool.num_pages, -1).index_select(0, wanted).view(-1, self.row_values)
            first_slot = start - first_page * self.page_tokens
        offset = base.storage_offset() + first_slot * self.row_values
        num_heads, num_tokens = shape.num_kv_heads, end - start
        key = base.as_strided((1, num_heads, num_tokens, shape.key_dim), (0, shape.key_dim, self.row_values, 1), offset)
        value = base.as_strided(
            (1, num_heads, num_tokens, shape.value_dim),
            (0, shape.value_dim, self.row_values, 1),
            offset + num_heads * shape.key_dim,
        )
        return key, value
