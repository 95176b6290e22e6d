"""Which pages hold a sequence's positions, per layer. Pure decisions; numpy only as a fast table of integers.

Every layer has its own row of pages, because compressed policies let layers hold different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm.kvcache.page_pool import OutOfPagesError, PagePool

__all__ = ["PageCopy", "PageTable", "pages_for"]

_FIRST_CAPACITY = 8


@dataclass(frozen=True)
class PageCopy:
    """Contents to copy before a shared page is written to."""

    source: int
    target: int


def pages_for(num_tokens: int, page_tokens: int) -> int:
    """Pages that hold `num_tokens` of one layer."""
    return -(-num_tokens // page_tokens)


class PageTable:
    """Pages of one sequence: `length` positions in each of `num_layers` layers."""

    def __init__(self, pool: PagePool, *, num_layers: int, page_tokens: int) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._table: npt.NDArray[np.int64] = np.zeros((num_layers, _FIRST_CAPACITY), dtype=np.int64)
        self._num_pages = 0
        self.length = 0
        """Positions held in each layer."""
        self.first_breaks: npt.NDArray[np.int64] = np.zeros(num_layers, dtype=np.int64)
        """Per layer, how many leading pages are neighbours in one run."""

    @property
    def num_layers(self) -> int:
        return int(self._table.shape[0])

    @property
    def num_pages(self) -> int:
        """Pages held in each layer."""
        return self._num_pages

    @property
    def pages(self) -> npt.NDArray[np.int64]:
        """[layers, pages] page numbers; a view, valid until the table changes."""
        return self._table[:, : self._num_pages]

    def pages_wanted(self, length: int) -> int:
        """How many pages of the pool `grow` to `length` would take, copies of shared pages included."""
        new = pages_for(length, self._page_tokens) - self._num_pages
        return (max(new, 0) + (1 if self._last_is_shared(length) else 0)) * self.num_layers

    def _last_is_shared(self, length: int) -> bool:
        """Whether growing writes into a last page that others hold too."""
        if length <= self.length or self.length % self._page_tokens == 0:
            return False
        return self._pool.has_shared(self._table[:, self._num_pages - 1])

    def grow(self, length: int) -> list[PageCopy]:
        """Hold `length` positions; returns the copies to make before writing.

        Raises OutOfPagesError, and then nothing has changed.
        """
        if length < self.length:
            raise ValueError(f"can not grow from {self.length} to {length} positions; that is a rewind")
        num_new = pages_for(length, self._page_tokens) - self._num_pages
        copies_last = self._last_is_shared(length)
        wanted = (max(num_new, 0) + copies_last) * self.num_layers
        if wanted > self._pool.num_free:
            raise OutOfPagesError(f"{wanted} pages are wanted, {self._pool.num_free} are free")
        copies = self._own_last_page() if copies_last else []
        if num_new > 0:
            self._append_pages(num_new)
        self.length = length
        return copies

    def _own_last_page(self) -> list[PageCopy]:
        """Replace shared last pages by own ones."""
        copies: list[PageCopy] = []
        last = self._num_pages - 1
        for layer in range(self.num_layers):
            source = int(self._table[layer, last])
            after = int(self._table[layer, last - 1]) if last else None
            (target,) = self._pool.allocate(1, after=after)
            self._pool.release([source])
            self._table[layer, last] = target
            copies.append(PageCopy(source, target))
        self._find_breaks()
        return copies

    def _append_pages(self, count: int) -> None:
        old, new = self._num_pages, self._num_pages + count
        self._reserve_columns(new)
        for layer in range(self.num_layers):
            after = int(self._table[layer, old - 1]) if old else None
            self._table[layer, old:new] = self._pool.allocate(count, after=after)
        self._num_pages = new
        self._find_breaks()

    def _reserve_columns(self, count: int) -> None:
        if count > self._table.shape[1]:
            table = np.zeros((self.num_layers, max(count, 2 * self._table.shape[1])), dtype=np.int64)
            table[:, : self._num_pages] = self.pages
            self._table = table

    def _find_breaks(self) -> None:
        """Recount the leading run of each layer."""
        pages = self.pages
        if self._num_pages < 2:
            self.first_breaks = np.full(self.num_layers, self._num_pages, dtype=np.int64)
            return
        is_next = np.diff(pages, axis=1) == 1
        self.first_breaks = 1 + np.where(is_next.all(axis=1), self._num_pages - 1, is_next.argmin(axis=1))

    def adopt(self, pages: npt.NDArray[np.int64], length: int) -> None:
        """Continue with pages [layers, pages] that others hold too, and hold `length` positions then.

        Raises ValueError unless the table ends at a page's end and the pages are as many as that takes.
        """
        if self.length % self._page_tokens:
            raise ValueError(f"pages can not be adopted at position {self.length}, within another page")
        num_pages = self._num_pages + pages.shape[1]
        if pages.shape[0] != self.num_layers or num_pages != pages_for(length, self._page_tokens):
            raise ValueError(f"pages {pages.shape} do not bring a table of {self.length} positions to {length}")
        self._pool.share(pages.ravel())
        self._reserve_columns(num_pages)
        self._table[:, self._num_pages : num_pages] = pages
        self._num_pages = num_pages
        self.length = length
        self._find_breaks()

    def rewind(self, length: int) -> None:
        """Forget positions from `length` on; whole pages go back to the pool."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can not rewind from {self.length} to {length} positions")
        keep = pages_for(length, self._page_tokens)
        if keep < self._num_pages:
            self._pool.release(self._table[:, keep : self._num_pages].ravel())
            self._num_pages = keep
            self._find_breaks()
        self.length = length

    def fork(self, length: int) -> PageTable:
        """Another table over the same first `length` positions; pages are shared until one side writes."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can not fork {length} of {self.length} positions")
        twin = PageTable(self._pool, num_layers=self.num_layers, page_tokens=self._page_tokens)
        keep = pages_for(length, self._page_tokens)
        twin._table = self._table.copy()
        twin._num_pages = keep
        twin.length = length
        twin._find_breaks()
        self._pool.share(twin.pages.ravel())
        return twin

    def free(self) -> None:
        """Give all pages back; the table is empty then."""
        self.rewind(0)

    def slots(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """[layers, end - start] token slots (page * page_tokens + offset) of positions [start, end)."""
        positions = np.arange(start, end)
        pages = self._table[:, positions // self._page_tokens]
        slots: npt.NDArray[np.int64] = pages * self._page_tokens + positions % self._page_tokens
        return slots

    def owned_pages(self) -> npt.NDArray[np.int64]:
        """All pages, layer by layer."""
        return self.pages.ravel()
