"""Moves sequences' pages to host memory and back, pages that sequences share only once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.kvcache.page_pool import OutOfPagesError, PagePool
from swarm.kvcache.page_table import PageTable
from swarm.server.engine.page_store import PageStore

if TYPE_CHECKING:
    import torch

__all__ = ["SpilledPages", "count_pages", "place_pages", "restore_pages", "spill_pages"]


@dataclass(frozen=True)
class SpilledPages:
    """What several tables held."""

    contents: torch.Tensor
    """[pages, values of a page] on the host."""
    layouts: Mapping[int, npt.NDArray[np.int64]]
    """Per sequence, [layers, pages] rows of `contents`."""
    lengths: Mapping[int, int]
    """Positions of each sequence."""

    @property
    def num_pages(self) -> int:
        return self.contents.shape[0]

    @property
    def size_bytes(self) -> int:
        return self.contents.numel() * self.contents.element_size()


def count_pages(tables: Mapping[int, PageTable]) -> int:
    """Pages of all the tables, shared ones once."""
    if len(tables) == 1:
        return sum(table.num_pages * table.num_layers for table in tables.values())
    return len(np.unique(np.concatenate([table.owned_pages() for table in tables.values()]))) if tables else 0


def spill_pages(store: PageStore, tables: Mapping[int, PageTable]) -> SpilledPages:
    """Copy what the tables hold to the host, and empty them."""
    held = [table.owned_pages() for table in tables.values()]
    pages, rows = np.unique(np.concatenate(held), return_inverse=True)
    ends = np.cumsum([len(part) for part in held])[:-1]
    layouts = {
        sequence: part.reshape(table.num_layers, table.num_pages)
        for (sequence, table), part in zip(tables.items(), np.split(rows, ends), strict=True)
    }
    spilled = SpilledPages(
        contents=store.save_pages(pages),
        layouts=layouts,
        lengths={sequence: table.length for sequence, table in tables.items()},
    )
    for table in tables.values():
        table.free()
    return spilled


def restore_pages(store: PageStore, spilled: SpilledPages, tables: Mapping[int, PageTable]) -> None:
    """Fill empty tables as they were. Raises OutOfPagesError, and then nothing has changed."""
    pool = store.pool
    pages = place_pages(pool, list(spilled.layouts.values()), spilled.num_pages)
    store.load_pages(pages, spilled.contents)
    for sequence, layout in spilled.layouts.items():
        tables[sequence].adopt(pages[layout], spilled.lengths[sequence])
    pool.release(pages)  # the tables own them now


def place_pages(pool: PagePool, layouts: Sequence[npt.NDArray[np.int64]], num_pages: int) -> npt.NDArray[np.int64]:
    """Take a page of the pool for each number in `layouts`, neighbours for the pages of a layer where possible.

    Each layout is a sequence's [layers, pages] numbers from 0 to `num_pages` - 1, each of which is in some layout.
    Raises OutOfPagesError, and then nothing has changed.
    """
    if num_pages > pool.num_free:
        raise OutOfPagesError(f"{num_pages} pages were asked for, {pool.num_free} are free")
    pages = np.full(num_pages, -1, dtype=np.int64)
    for layout in layouts:
        for rows in layout:
            missing = rows[pages[rows] < 0]
            if len(missing):
                place = int(np.flatnonzero(rows == missing[0])[0])
                after = int(pages[rows[place - 1]]) if place else None
                pages[missing] = pool.allocate(len(missing), after=after)
    return pages
