"""A pool of equal pages: free runs, reference counts, and a preference for keeping a sequence in one run. Pure.

Pages end the reservation of contiguous memory for an answer's maximum length (PagedAttention, SOSP 2023).
Attention over pages that happen to be neighbours needs no gathering, though, so a growing sequence gets the
page after its last one while that is free, and a new one starts in the middle of the largest free run, where
both it and its neighbour below have room to grow.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

__all__ = ["OutOfPagesError", "PagePool"]


class OutOfPagesError(Exception):
    """Fewer pages are free than were asked for; nothing was taken."""


class PagePool:
    """Pages 0 … num_pages - 1, each free or held by one or more owners."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._num_owners = [0] * num_pages
        self._num_free = num_pages
        self._run_starts = [0]
        self._run_ends = {0: num_pages}
        """Free runs [start, end), never touching each other."""

    def __repr__(self) -> str:
        return f"<PagePool {self._num_free} of {self.num_pages} free in {len(self._run_starts)} runs>"

    @property
    def num_free(self) -> int:
        return self._num_free

    def num_owners(self, page: int) -> int:
        """How many owners hold a page; more than one makes it read-only."""
        return self._num_owners[page]

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` pages, if possible the run that follows page `after`.

        Raises OutOfPagesError when fewer are free.
        """
        if count > self._num_free:
            raise OutOfPagesError(f"{count} pages were asked for, {self._num_free} are free")
        pages: list[int] = []
        if after is not None and after + 1 in self._run_ends:
            pages = self._take(after + 1, count)
        while len(pages) < count:
            missing = count - len(pages)
            start = max(self._run_starts, key=lambda run: self._run_ends[run] - run)
            room = self._run_ends[start] - start
            pages += self._take(start + (room - missing) // 2 if room > missing else start, missing)
        return pages

    def _take(self, start: int, count: int) -> list[int]:
        """Up to `count` pages from `start`, which lies in a free run."""
        index = bisect.bisect_right(self._run_starts, start) - 1
        run_start = self._run_starts[index]
        run_end = self._run_ends.pop(run_start)
        end = min(start + count, run_end)
        del self._run_starts[index]
        for left, right in ((end, run_end), (run_start, start)):
            if left < right:
                self._run_starts.insert(index, left)
                self._run_ends[left] = right
        for page in range(start, end):
            self._num_owners[page] = 1
        self._num_free -= end - start
        return list(range(start, end))

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to pages that are held."""
        for page in pages:
            if self._num_owners[page] < 1:
                raise ValueError(f"page {page} is free and can not be shared")
            self._num_owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Give up one ownership of each page; a page without owners is free."""
        for page in pages:
            if self._num_owners[page] < 1:
                raise ValueError(f"page {page} is free already")
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                self._free(page)

    def _free(self, page: int) -> None:
        self._num_free += 1
        index = bisect.bisect_left(self._run_starts, page)
        start, end = page, page + 1
        if index < len(self._run_starts) and self._run_starts[index] == end:
            end = self._run_ends.pop(self._run_starts.pop(index))
        if index > 0 and self._run_ends[self._run_starts[index - 1]] == start:
            start = self._run_starts[index - 1]
        else:
            self._run_starts.insert(index, start)
        self._run_ends[start] = end

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless `owners` are exactly those of the pages, and free runs are all the rest."""
        counted = [0] * self.num_pages
        for pages in owners:
            for page in pages:
                counted[page] += 1
        assert counted == self._num_owners, "pages are held by others than the owners known"
        assert self._run_starts == sorted(self._run_ends), "free runs are listed twice or not at all"
        free = [False] * self.num_pages
        for start in self._run_starts:
            for page in range(start, self._run_ends[start]):
                assert not free[page], "free runs overlap"
                free[page] = True
        assert free == [count == 0 for count in counted], "a page is both free and held, or lost"
        assert self._num_free == sum(free), "the count of free pages is wrong"
        assert all(self._run_ends[start] not in self._run_ends for start in self._run_starts), "free runs touch"
