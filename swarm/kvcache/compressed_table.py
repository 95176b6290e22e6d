"""Which pages and tiles a compressed sequence owns, and how far it has come. Pure decisions; numpy only.

Everything within a sequence is numbered locally (raw page 0 ..., tile 0 ...), so that forking, moving to host memory
and handing over only exchange lists of pages. Pages that forks share are copied before one side writes.
"""

# Letters: L layers of the sequence, Hk KV heads.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.kvcache.compressed_layout import CompressedLayout
from swarm.kvcache.compressed_state import CompressedState, can_go_back
from swarm.kvcache.page_pool import OutOfPagesError, PageNumbers, PagePool
from swarm.kvcache.page_table import PageCopy, PageTable, pages_for
from swarm.kvcache.staged_notes import NO_NOTES, StagedNotes
from swarm.kvpolicy.streaming import TailState, advance, is_staged, new_tail, settle, stop_staging

if TYPE_CHECKING:
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["CompressedLayout", "CompressedState", "CompressedTable", "PartPlan"]


@dataclass(frozen=True, slots=True)
class PartPlan:
    """What one part of a step means for a sequence that has been settled at its start."""

    start: int
    end: int
    is_staged: bool
    """Its tokens stand in staged pages at first; else they go into the ring (and sinks) at once."""
    ends_staging: bool
    """After it everything staged is compressed or moved to the ring: `finish` is due."""
    after: TailState
    """Once that is done."""


class CompressedTable:
    """Pages of one compressed sequence: `length` positions, of which layers and heads hold different choices."""

    def __init__(
        self,
        pool: PagePool,
        layout: CompressedLayout,
        *,
        policy: KVPolicy,
        page_tokens: int,
        notes: StagedNotes = NO_NOTES,
    ) -> None:
        """
        Args:
            page_tokens: those of ordinary pages, for what is staged.
            notes: what the sequence keeps of staged tokens outside the pool.
        """
        self._pool = pool
        self.layout = layout
        self.policy = policy
        self._page_tokens = page_tokens
        self._notes = notes
        self._clear()

    def _clear(self) -> None:
        self.length = 0
        self.tail = new_tail(self.policy)
        self.staged = PageTable(self._pool, num_layers=self.layout.num_layers, page_tokens=self._page_tokens)
        """Its position 0 is `staged_start`."""
        self.note_pages: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """Empty pages, as large as what is noted of staged tokens outside the pool."""
        self.staged_start = 0
        self.input_start = 0
        """Where the input began that is being staged."""
        heads = (self.layout.num_layers, self.layout.num_kv_heads)
        self.tiles: npt.NDArray[np.int32] = np.zeros((*heads, 0), dtype=np.int32)
        """[L, Hk, capacity] local numbers of tiles, valid up to `num_tiles`."""
        self.num_tiles: npt.NDArray[np.int32] = np.zeros(heads, dtype=np.int32)
        self.num_dropped: npt.NDArray[np.int64] = np.zeros(heads, dtype=np.int64)
        self.raw_pages: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.tile_pages: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._free_tiles: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)
        """Of `tile_pages`, ascending."""
        self._spare: list[int] = []
        """Pages taken for what the part at hand may need."""

    # -- what a part needs ---------------------------------------------------------------------

    def plan(self, start: int, count: int, *, is_unfinished: bool) -> PartPlan:
        """What a part of `count` tokens from `start` means; it crosses no multiple of the policy's chunk."""
        staged = is_staged(self.policy, self.tail, start, count, is_unfinished=is_unfinished)
        after = advance(self.policy, self.tail, start, count, is_unfinished=is_unfinished)
        settled = settle(self.policy, self.tail, start)
        ends = staged and (not after.is_staging or after.stored_end > settled.stored_end)
        return PartPlan(start, start + count, staged, ends, after)

    def pages_wanted(self, plan: PartPlan, num_new_tiles: int) -> int:
        """Pages beyond those held in reserve that a part may take at most, copies of shared pages included.

        Args:
            num_new_tiles: what the event at its end adds at most; 0 if there is none.
        """
        wanted = 0
        if plan.is_staged:
            num_staged = plan.end - (self.staged_start if self.tail.is_staging else plan.start)
            wanted += self.staged.pages_wanted(num_staged) + self._notes.pages_for(num_staged) - len(self.note_pages)
        if plan.ends_staging or (not plan.is_staged and plan.end > plan.start):
            wanted += self._raw_pages_wanted()
        if plan.ends_staging:
            wanted += self.event_pages_wanted(num_new_tiles) - self._raw_pages_wanted()
        return max(0, wanted - len(self._spare))

    def event_pages_wanted(self, num_new_tiles: int) -> int:
        """Pages that an event may take at most."""
        num_missing = max(0, num_new_tiles - len(self._free_tiles))
        num_shared = self._pool.num_shared(self.tile_pages)
        return self._raw_pages_wanted() + num_shared + self.layout.tile_pages_for(num_missing)

    def _raw_pages_wanted(self) -> int:
        if not len(self.raw_pages):
            return self.layout.num_raw_pages
        return self._pool.num_shared(self.raw_pages)

    def reserve(self, num_pages: int) -> None:
        """Hold `num_pages` more until they are needed or `release_spare`. Raises OutOfPagesError."""
        if num_pages > 0:
            after = int(self.tile_pages[-1]) if len(self.tile_pages) else None
            self._spare = self._pool.allocate(num_pages, after=after) + self._spare

    def release_spare(self) -> None:
        """Give back what was reserved and not used."""
        self._pool.release(self._spare)
        self._spare = []

    def _take(self, count: int) -> npt.NDArray[np.int64]:
        """Pages from the reserve, then from the pool."""
        num_missing = count - len(self._spare)
        if num_missing > self._pool.num_free:
            raise OutOfPagesError(f"{num_missing} pages are wanted, {self._pool.num_free} are free")
        taken = self._spare[:count]
        self._spare = self._spare[count:]
        if num_missing > 0:
            taken += self._pool.allocate(num_missing)
        return np.array(taken, dtype=np.int64)

    # -- growing -------------------------------------------------------------------------------

    def grow(self, plan: PartPlan) -> list[PageCopy]:
        """Make room for a part's tokens, and count them as held; returns the copies to make before writing.

        A ring part may then write any slot. A staged part writes `staged`; what its end needs is kept in reserve.
        Raises OutOfPagesError.
        """
        if plan.start != self.length:
            raise ValueError(f"a part from {plan.start} does not continue a sequence of {self.length} positions")
        if plan.end == plan.start:
            return []
        if not plan.is_staged:
            copies = self.own_raw_pages()
            self.length = plan.end
            return copies
        if not self.tail.is_staging:
            self.staged.free()
            self.input_start = self.staged_start = plan.start
        length = plan.end - self.staged_start
        self._hold_notes(length)
        self._lend(self.staged.pages_wanted(length))
        copies = self.staged.grow(length)
        self.tail = replace(self.tail, is_staging=True)
        self.length = plan.end
        return copies

    def _hold_notes(self, num_staged: int) -> None:
        """Have pages for the notes of so many staged tokens; never fewer than before."""
        num_missing = self._notes.pages_for(num_staged) - len(self.note_pages)
        if num_missing > 0:
            self.note_pages = np.concatenate((self.note_pages, self._take(num_missing)))

    def _lend(self, count: int) -> None:
        """Give reserved pages back to the pool, for the staged table to take at once."""
        lent, self._spare = self._spare[:count], self._spare[count:]
        self._pool.release(lent)

    def own_raw_pages(self) -> list[PageCopy]:
        """Have raw pages that nobody else holds; returns the copies to make before writing to them."""
        if not len(self.raw_pages):
            self.raw_pages = self._take(self.layout.num_raw_pages)
            return []
        self.raw_pages, copies = self._own(self.raw_pages, np.arange(len(self.raw_pages)))
        return copies

    def own_tile_pages(self, indices: npt.NDArray[np.int64] | None = None) -> list[PageCopy]:
        """Have tile pages (those with these indices in `tile_pages`, or all) that nobody else holds; likewise."""
        wanted = np.arange(len(self.tile_pages)) if indices is None else np.unique(indices)
        self.tile_pages, copies = self._own(self.tile_pages, wanted)
        return copies

    def _own(
        self, pages: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], list[PageCopy]]:
        if not len(indices) or not self._pool.has_shared(pages[indices]):
            return pages, []
        shared = [index for index in indices.tolist() if self._pool.num_owners(int(pages[index])) > 1]
        sources = pages[shared]
        targets = self._take(len(shared))
        pages = pages.copy()
        pages[shared] = targets
        self._pool.release(sources)
        return pages, [PageCopy(*pair) for pair in zip(sources.tolist(), targets.tolist(), strict=True)]

    def leave_staging(self, after: TailState) -> None:
        """Everything staged is now elsewhere: give its pages back, and stand in state `after`."""
        self.staged.free()
        self._pool.release(self.note_pages)
        self.note_pages = self.note_pages[:0]
        self.staged_start = self.length
        self.tail = after

    # -- tiles ---------------------------------------------------------------------------------

    def tiles_of(self, layer: int, head: int) -> npt.NDArray[np.int32]:
        """Local tiles of a head in their order; a view."""
        return self.tiles[layer, head, : self.num_tiles[layer, head]]

    def tile_places(self, tiles: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(pages of the pool, tiles within them) of local tiles of any shape."""
        index, within = np.divmod(tiles.astype(np.int64), self.layout.tiles_per_page)
        pages = self.tile_pages[index] if index.size else index
        return pages, within

    def take_tiles(self, layer: int, head: int, count: int) -> npt.NDArray[np.int32]:
        """Append `count` tiles to a head's; returns them. Raises OutOfPagesError, and nothing has changed."""
        counts = np.zeros_like(self.num_tiles)
        counts[layer, head] = count
        self.add_tiles(counts)
        return self.tiles_of(layer, head)[int(self.num_tiles[layer, head]) - count :].copy()

    def add_tiles(self, counts: npt.NDArray[np.int32]) -> None:
        """Append counts [L, Hk] of tiles to the heads', freed ones first. Raises OutOfPagesError, nothing changed."""
        total = int(counts.sum())
        if total == 0:
            return
        num_missing = total - len(self._free_tiles)
        if num_missing > 0:
            self._add_tile_pages(self.layout.tile_pages_for(num_missing))
        taken, self._free_tiles = self._free_tiles[:total], self._free_tiles[total:]
        after = self.num_tiles + counts
        most = int(after.max())
        if most > self.tiles.shape[2]:
            tiles = np.zeros((*self.num_tiles.shape, max(most, self.tiles.shape[2] * 5 // 4)), dtype=np.int32)
            tiles[:, :, : self.tiles.shape[2]] = self.tiles
            self.tiles = tiles
        columns = np.arange(self.tiles.shape[2])
        self.tiles[(columns >= self.num_tiles[..., None]) & (columns < after[..., None])] = taken
        self.num_tiles = after.astype(np.int32)

    def _add_tile_pages(self, count: int) -> None:
        first = len(self.tile_pages) * self.layout.tiles_per_page
        self.tile_pages = np.concatenate((self.tile_pages, self._take(count)))
        new = np.arange(first, first + count * self.layout.tiles_per_page, dtype=np.int32)
        self._free_tiles = np.concatenate((self._free_tiles, new))

    def give_back_tiles(self, layer: int, head: int, tiles: npt.NDArray[np.int32]) -> None:
        """Free some tiles of a head; the others keep their order. Raises ValueError when one is not the head's."""
        tiles = tiles.astype(np.int32)  # a copy, since it may be a view of what is changed here
        held = self.tiles_of(layer, head)
        kept = held[~np.isin(held, tiles)]
        if len(held) - len(kept) != len(tiles):
            raise ValueError("a tile was given back that the head does not hold")
        self.tiles[layer, head, : len(kept)] = kept
        self.num_tiles[layer, head] = len(kept)
        self._free_tiles = np.sort(np.concatenate((self._free_tiles, tiles)))

    def trim(self) -> None:
        """Give back pages at the end that hold no tile any more."""
        per_page = self.layout.tiles_per_page
        is_free = np.zeros(len(self.tile_pages) * per_page, dtype=np.bool_)
        is_free[self._free_tiles] = True
        num_used = len(self.tile_pages)
        while num_used and is_free[(num_used - 1) * per_page : num_used * per_page].all():
            num_used -= 1
        if num_used < len(self.tile_pages):
            self._pool.release(self.tile_pages[num_used:])
            self.tile_pages = self.tile_pages[:num_used].copy()
            self._free_tiles = self._free_tiles[self._free_tiles < num_used * per_page]

    # -- going back and aside ------------------------------------------------------------------

    def can_rewind(self, start: int) -> bool:
        """Whether the sequence can go on from `start` exactly as if it had never been further."""
        return can_go_back(self.tail, length=self.length, input_start=self.input_start, start=start)

    def rewind(self, start: int) -> None:
        """Forget positions from `start` on. Raises ValueError where `can_rewind` says no."""
        if not 0 <= start <= self.length or not self.can_rewind(start):
            raise ValueError(f"can not rewind from {self.length} to {start} positions, {self.tail}")
        if start == self.length:
            return
        if start == 0:
            self.free()
            return
        if self.tail.is_staging:
            self.leave_staging(stop_staging(self.tail))
        self.length = self.staged_start = start

    def fork(self, length: int) -> CompressedTable:
        """Another table that holds the same first `length` positions. Raises ValueError where `can_rewind` says no.

        Raises OutOfPagesError when fewer than `fork_pages_wanted` are free.
        """
        if not 0 <= length <= self.length or not self.can_rewind(length):
            raise ValueError(f"can not fork {length} of {self.length} positions, {self.tail}")
        twin = CompressedTable(
            self._pool, self.layout, policy=self.policy, page_tokens=self._page_tokens, notes=self._notes
        )
        if length:
            twin.adopt(self.state().rewind(length))
        return twin

    def fork_pages_wanted(self, length: int) -> int:
        """Pages that a fork at `length` takes at once: notes are soon its own, other pages are shared."""
        return len(self.note_pages) if length == self.length else 0

    def free(self) -> None:
        """Give all pages back; the table is empty then."""
        self.release_spare()
        self.staged.free()
        for pages in (self.raw_pages, self.tile_pages, self.note_pages):
            self._pool.release(pages)
        self._clear()

    # -- as a whole ----------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """Pages held, those in reserve included."""
        num_single = len(self.raw_pages) + len(self.tile_pages) + len(self.note_pages) + len(self._spare)
        return num_single + self.staged.pages.size

    @property
    def num_tiles_held(self) -> int:
        """Tiles of all heads."""
        return int(self.num_tiles.sum())

    def owned_pages(self) -> npt.NDArray[np.int64]:
        """All pages, those in reserve included."""
        return np.concatenate((self.filled_pages(), self.note_pages, np.array(self._spare, dtype=np.int64)))

    def filled_pages(self) -> npt.NDArray[np.int64]:
        """Those that hold something of the sequence."""
        return np.concatenate((self.raw_pages, self.tile_pages, self.staged.owned_pages()))

    def state(self) -> CompressedState:
        """Everything but contents and reserve; copies."""
        most = int(self.num_tiles.max(initial=0))
        columns = np.arange(most)
        return CompressedState(
            length=self.length,
            tail=self.tail,
            staged_start=self.staged_start if self.tail.is_staging else self.length,
            input_start=self.input_start if self.tail.is_staging else self.length,
            tiles=np.where(columns < self.num_tiles[..., None], self.tiles[:, :, :most], 0).astype(np.int32),
            num_tiles=self.num_tiles.copy(),
            num_dropped=self.num_dropped.copy(),
            raw_pages=self.raw_pages.copy(),
            tile_pages=self.tile_pages.copy(),
            staged_pages=self.staged.pages.copy(),
        )

    def adopt(self, state: CompressedState) -> None:
        """Become what `state` says, on pages that others hold too. Raises ValueError unless the table is empty.

        Takes pages for what is noted of staged tokens; raises OutOfPagesError, and nothing has changed.
        """
        if self.num_pages or self.length:
            raise ValueError("only an empty table can become another one")
        if state.staged_pages.size:
            self._hold_notes(state.num_staged)
            self.staged.adopt(state.staged_pages, state.num_staged)
        self._pool.share(state.raw_pages)
        self._pool.share(state.tile_pages)
        self.length, self.tail = state.length, state.tail
        self.staged_start, self.input_start = state.staged_start, state.input_start
        self.tiles, self.num_tiles = state.tiles.copy(), state.num_tiles.copy()
        self.num_dropped = state.num_dropped.copy()
        self.raw_pages, self.tile_pages = state.raw_pages.copy(), state.tile_pages.copy()
        is_free = np.ones(len(state.tile_pages) * self.layout.tiles_per_page, dtype=np.bool_)
        is_free[state.used_tiles()] = False
        self._free_tiles = np.flatnonzero(is_free).astype(np.int32)

    def check_integrity(self) -> None:
        """Raise AssertionError unless what the table says fits together."""
        layout, policy = self.layout, self.policy
        used = self.state().used_tiles()
        every = np.sort(np.concatenate((used, self._free_tiles)))
        assert (every == np.arange(len(self.tile_pages) * layout.tiles_per_page)).all(), "a tile is lost or held twice"
        assert len(self.raw_pages) in (0, layout.num_raw_pages)
        assert (self.num_dropped >= 0).all()
        assert 0 <= self.staged_start <= self.length or not self.staged.length
        assert self.staged.length == (self.length - self.staged_start if self.tail.is_staging else 0)
        assert len(self.note_pages) == self._notes.pages_for(self.staged.length), "notes are not counted"
        assert self.staged.num_pages == pages_for(self.staged.length, self._page_tokens)
        num_raw = (self.staged_start if self.tail.is_staging else self.length) - self.tail.stored_end
        assert num_raw <= layout.tail_slots, "the ring is too short for the tail"
        assert len(self.raw_pages) or self.staged.length == self.length, "tokens stand nowhere"
        assert self.tail.stored_end >= policy.num_sinks
        assert len(used) == 0 or self.tail.stored_end > policy.num_sinks
        held: Iterable[PageNumbers] = (
            self.raw_pages,
            self.tile_pages,
            self.staged.owned_pages(),
            self.note_pages,
            self._spare,
        )
        numbers = [page for pages in held for page in pages]
        assert len(set(numbers)) == len(numbers), "a page is used for two things"
