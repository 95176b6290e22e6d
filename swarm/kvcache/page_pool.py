"""A pool of equal pages: free runs, reference counts, and a preference for keeping a sequence in one run. Pure.

Pages end the reservation of contiguous memory for an answer's maximum length (PagedAttention, SOSP 2023).
Attention over pages that happen to be neighbours needs no gathering, though, so a growing sequence gets the
page after its last one while that is free, and a new one starts in the middle of the largest free run, where
both it and its neighbour below have room to grow.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["OutOfPagesError", "PageNumbers", "PagePool"]

PageNumbers = Sequence[int] | npt.NDArray[np.int64]
"""Page numbers, each at most once."""


class OutOfPagesError(Exception):
    """Fewer pages are free than were asked for; nothing was taken."""


class PagePool:
    """Pages 0 … num_pages - 1, each free or held by one or more owners."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._num_owners: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        self._is_kept: npt.NDArray[np.bool_] = np.zeros(num_pages, dtype=np.bool_)
        self._num_reclaimable = 0
        self._num_free = num_pages
        self._run_starts = [0]
        self._run_ends = {0: num_pages}
        """Free runs [start, end), never touching each other."""

    def __repr__(self) -> str:
        return f"<PagePool {self._num_free} of {self.num_pages} free in {len(self._run_starts)} runs>"

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_reclaimable(self) -> int:
        """Kept pages that nobody else holds: they are free as soon as they are dropped."""
        return self._num_reclaimable

    def num_owners(self, page: int) -> int:
        """How many owners hold a page; more than one makes it read-only."""
        return int(self._num_owners[page])

    def has_shared(self, pages: PageNumbers) -> bool:
        """Whether any of the pages has more than one owner."""
        return bool((self._num_owners[pages] > 1).any())

    def num_shared(self, pages: PageNumbers) -> int:
        """How many of the pages have more than one owner."""
        return int(np.count_nonzero(self._num_owners[pages] > 1)) if len(pages) else 0

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
        self._num_owners[start:end] = 1
        self._num_free -= end - start
        return list(range(start, end))

    def share(self, pages: PageNumbers) -> None:
        """Add an owner to pages that are held. Raises ValueError, and changes nothing, when one is free."""
        if not len(pages):
            return
        before = self._held(pages, "can not be shared")
        self._num_reclaimable -= int(np.count_nonzero(self._is_kept[pages] & (before == 1)))
        self._num_owners[pages] = before + 1

    def release(self, pages: PageNumbers) -> None:
        """Give up one ownership of each page; a page without owners is free.

        Raises ValueError, and changes nothing, when one is free already.
        """
        if not len(pages):
            return
        after = self._held(pages, "can not be released") - 1
        self._num_owners[pages] = after
        self._num_reclaimable += int(np.count_nonzero(self._is_kept[pages] & (after == 1)))
        self._free_runs(np.asarray(pages)[after == 0])

    def keep(self, pages: PageNumbers) -> None:
        """Add an owner that gives pages up on demand: see `num_reclaimable`, and `drop`. A page is kept once."""
        if self._is_kept[pages].any():
            raise ValueError("a page is kept already")
        self.share(pages)
        self._is_kept[pages] = True

    def drop(self, pages: PageNumbers) -> None:
        """End what `keep` began."""
        if not self._is_kept[pages].all():
            raise ValueError("a page is not kept")
        self._num_reclaimable -= int(np.count_nonzero(self._num_owners[pages] == 1))
        self._is_kept[pages] = False
        self.release(pages)

    def _held(self, pages: PageNumbers, problem: str) -> npt.NDArray[np.int32]:
        num_owners: npt.NDArray[np.int32] = self._num_owners[pages]
        if not num_owners.all():
            page = np.asarray(pages)[num_owners == 0][0]
            raise ValueError(f"page {page} is free and {problem}")
        return num_owners

    def _free_runs(self, pages: npt.NDArray[np.int64]) -> None:
        """Return pages, whole runs at a time."""
        if not len(pages):
            return
        self._num_free += len(pages)
        ordered = np.sort(pages)
        first_of_runs = np.flatnonzero(np.diff(ordered, prepend=-2) != 1)
        ends = np.append(first_of_runs[1:], len(ordered)) - 1
        for start, last in zip(ordered[first_of_runs].tolist(), ordered[ends].tolist(), strict=True):
            self._free_run(start, last + 1)

    def _free_run(self, start: int, end: int) -> None:
        index = bisect.bisect_left(self._run_starts, start)
        if index < len(self._run_starts) and self._run_starts[index] == end:
            end = self._run_ends.pop(self._run_starts.pop(index))
        if index > 0 and self._run_ends[self._run_starts[index - 1]] == start:
            start = self._run_starts[index - 1]
        else:
            self._run_starts.insert(index, start)
        self._run_ends[start] = end

    def check_integrity(self, owners: Iterable[PageNumbers], kept: Iterable[PageNumbers] = ()) -> None:
        """Raise AssertionError unless `owners` and `kept` are all the pages' owners, and free runs are the rest."""
        counted = np.zeros(self.num_pages, dtype=np.int32)
        for pages in owners:
            np.add.at(counted, np.asarray(pages, dtype=np.int64), 1)
        is_kept = np.zeros(self.num_pages, dtype=np.int32)
        for pages in kept:
            np.add.at(is_kept, np.asarray(pages, dtype=np.int64), 1)
        assert is_kept.max() <= 1, "a page is kept twice"
        assert (self._is_kept == is_kept).all(), "pages are kept by others than those known"
        assert (counted + is_kept == self._num_owners).all(), "pages are held by others than the owners known"
        reclaimable = int(np.count_nonzero((is_kept == 1) & (counted == 0)))
        assert self._num_reclaimable == reclaimable, "the count of reclaimable pages is wrong"
        assert self._run_starts == sorted(self._run_ends), "free runs are listed twice or not at all"
        free = np.zeros(self.num_pages, dtype=np.bool_)
        for start in self._run_starts:
            end = self._run_ends[start]
            assert not free[start:end].any(), "free runs overlap"
            assert end not in self._run_ends, "free runs touch"
            free[start:end] = True
        assert (free == (self._num_owners == 0)).all(), "a page is both free and held, or lost"
        assert self._num_free == int(free.sum()), "the count of free pages is wrong"
