"""Moves sequences' pages to host memory and back, pages that sequences share only once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.kvcache.page_pool import OutOfPagesError, PagePool
from swarm.server.engine.held_session import HeldSequence
from swarm.server.engine.page_store import PageStore
from swarm.server.engine.sequence_pages import HeldPages

if TYPE_CHECKING:
    import torch

__all__ = ["SpilledPages", "count_pages", "place_pages", "restore_pages", "spill_pages"]


@dataclass(frozen=True)
class SpilledPages:
    """What several sequences held."""

    contents: torch.Tensor
    """[pages, values of a page] on the host."""
    layouts: Mapping[int, HeldPages]
    """Per sequence; pages are rows of `contents`."""
    num_note_pages: int = 0
    """Pages without contents that the sequences held, for as much memory beside the pool; that is on the host, too."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool that the sequences need to be back."""
        return self.contents.shape[0] + self.num_note_pages

    @property
    def size_bytes(self) -> int:
        return self.num_pages * self.contents.shape[1] * self.contents.element_size()


def count_pages(sequences: Mapping[int, HeldSequence]) -> int:
    """Pages of all the sequences, shared ones once."""
    if len(sequences) == 1:
        return sum(held.num_pages for held in sequences.values())
    return len(np.unique(np.concatenate([held.owned_pages() for held in sequences.values()]))) if sequences else 0


def spill_pages(store: PageStore, sequences: Mapping[int, HeldSequence]) -> SpilledPages:
    """Copy what the sequences hold to the host, and empty them."""
    for held in sequences.values():
        held.drop_reserve()
    pages = np.unique(np.concatenate([held.filled_pages() for held in sequences.values()]))
    num_note_pages = count_pages(sequences) - len(pages)
    contents = store.save_pages(pages)
    layouts = {
        number: held.take_out().map_pages(lambda numbers: np.searchsorted(pages, numbers))
        for number, held in sequences.items()
    }
    return SpilledPages(contents, layouts, num_note_pages)


def restore_pages(store: PageStore, spilled: SpilledPages, sequences: Mapping[int, HeldSequence]) -> None:
    """Fill empty sequences as they were. Raises OutOfPagesError, and then nothing has changed."""
    pool = store.pool
    if spilled.num_pages > pool.num_free:
        raise OutOfPagesError(f"{spilled.num_pages} pages are wanted, {pool.num_free} are free")
    lists = [pages for layout in spilled.layouts.values() for pages in layout.page_lists()]
    pages = place_pages(pool, lists, len(spilled.contents))
    store.load_pages(pages, spilled.contents)
    for number, layout in spilled.layouts.items():
        sequences[number].put_back(layout.map_pages(lambda rows: pages[rows]))
    pool.release(pages)  # the sequences own them now


def place_pages(pool: PagePool, layouts: Sequence[npt.NDArray[np.int64]], num_pages: int) -> npt.NDArray[np.int64]:
    """Take a page of the pool for each number in `layouts`, neighbours for the pages of a row where possible.

    Each layout is [rows, pages] numbers from 0 to `num_pages` - 1, each of which is in some layout.
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
