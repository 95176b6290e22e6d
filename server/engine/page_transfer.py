"""A session's pages on their way to another server, or from one, a slice at a time."""

# Letters: L layers of a span, P tokens of a page.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.errors import BadInputError, PeerBusyError, PeerFaultError
from swarm.kvcache.compressed_state import CompressedState
from swarm.models.adapters.rows import NO_ADAPTER
from swarm.server.engine.page_masks import CompressedPageMask, PlainPageMask, page_mask
from swarm.server.engine.sequence_pages import HeldPages, SequencePages
from swarm.server.engine.spilling import place_pages

if TYPE_CHECKING:
    import torch

    from swarm.datatypes import AdapterHash, Span
    from swarm.server.engine.page_store import PageStore
    from swarm.server.engine.session_memory import SessionMemory
    from swarm.server.engine.work import SessionKey

__all__ = ["PageExport", "PageFormat", "PageImport", "SequencePages", "page_format"]


@dataclass(frozen=True, kw_only=True)
class PageFormat:
    """What two servers must agree on for pages of one to be pages of the other."""

    page_tokens: int
    page_values: int
    """Values of a page, keys and values of its tokens."""
    dtype: str
    """Of the values, as torch names it."""
    page_bytes: int


class PageExport:
    """Copies out what a session holds. Made anywhere, used on the engine thread; `release` ends it.

    The pages stay as they are until then, even if the session is forgotten or moved to host memory.
    """

    def __init__(self, memory: SessionMemory, key: SessionKey, positions: Sequence[int]) -> None:
        """`positions` to be copied per sequence, from sequence 0; those that hold none are left out."""
        self._memory = memory
        self._key = key
        self._positions = positions
        self._saved: torch.Tensor | None = None
        """[pages in host memory, values of a page], when the session is there."""
        self.pages: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """Of the pool, or rows of what is in host memory; in the order of their numbers."""
        self._mask: PlainPageMask | CompressedPageMask | None = None
        """What of each page is the session's."""
        self.holds_pages = False

    def begin(self) -> Mapping[int, HeldPages]:
        """What is to be copied, by sequence. Raises SessionStateError when the memory holds less than that."""
        held, saved = self._memory.held_pages(self._key, self._positions)
        if not held:
            return {}
        self.pages = np.unique(np.concatenate([pages.ravel() for part in held.values() for pages in part.page_lists()]))
        sequences: dict[int, HeldPages] = {
            sequence: part.map_pages(lambda pages: np.searchsorted(self.pages, pages))
            for sequence, part in held.items()
        }
        memory = self._memory
        self._mask = page_mask(sequences.values(), len(self.pages), memory.store, memory.compressed)
        self._saved = saved
        if saved is None:
            self._memory.store.pool.share(self.pages)
            self.holds_pages = True
            self._memory.transfers.append(self)
        return sequences

    def read(self, first: int, count: int) -> torch.Tensor:
        """Pages [count, values of a page] from number `first` on, on the host.

        What lies behind a sequence's end was other sessions' and is zero here.
        """
        wanted = self.pages[first : first + count]
        if self._saved is None:
            contents = self._memory.store.save_pages(wanted)
        else:
            contents = self._saved[wanted]
        assert self._mask is not None or not len(wanted)
        if self._mask is not None:
            self._mask.clear_others(contents, first)
        return contents

    def release(self) -> None:
        """Let go of the pages; harmless when repeated, or when `begin` was never called."""
        self._saved = None
        if self.holds_pages:
            self.holds_pages = False
            self._memory.transfers.remove(self)
            self._memory.store.pool.release(self.pages)
            self._memory.update_free()


class PageImport:
    """Takes in what another server's session holds. Made anywhere, used on the engine thread.

    `finish` or `abandon` ends it; until then no session has the pages.
    """

    def __init__(
        self,
        memory: SessionMemory,
        key: SessionKey,
        span: Span,
        sequences: Mapping[int, HeldPages],
        *,
        num_pages: int,
        adapter: AdapterHash = NO_ADAPTER,
    ) -> None:
        """Every page from 0 to `num_pages` - 1 must be some sequence's; all are exact, or all compressed."""
        self._memory = memory
        self._key = key
        self._span = span
        self._sequences = sequences
        self._num_pages = num_pages
        self._adapter = adapter
        self.pages: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        """Of the pool, in the order of their numbers."""
        self.holds_pages = False

    def begin(self) -> None:
        """Take the pages. Raises PeerBusyError when fewer are free; no session makes room for this one."""
        if not self._num_pages:
            return
        pool = self._memory.store.pool
        self._memory.drop_unused_prefixes(self._num_pages)
        if self._num_pages > pool.num_free:
            raise PeerBusyError(f"{self._num_pages} pages of KV memory are wanted, {pool.num_free} are free here")
        lists = [pages for part in self._sequences.values() for pages in part.page_lists()]
        self.pages = place_pages(pool, lists, self._num_pages)
        self.holds_pages = True
        self._memory.transfers.append(self)
        self._memory.update_free()

    def load(self, first: int, contents: torch.Tensor) -> None:
        """Fill pages from number `first` on with `contents` [pages, values of a page]."""
        self._memory.store.load_pages(self.pages[first : first + len(contents)], contents)

    def finish(self) -> None:
        """Give the pages to a new session.

        Raises PeerFaultError when there is one of this name, BadInputError when what has come can not be.
        """
        layouts = {
            sequence: part.map_pages(lambda pages: self.pages[pages]) for sequence, part in self._sequences.items()
        }
        states = [part for part in layouts.values() if isinstance(part, CompressedState)]
        for state in states:
            self._check_positions(state)
        if not self._memory.add_session(self._key, self._span, layouts, adapter=self._adapter, compresses=bool(states)):
            raise PeerFaultError("the engine holds this session already")
        self.abandon()  # the session's tables own the pages now

    def _check_positions(self, state: CompressedState) -> None:
        store = self._memory.compressed
        if store is None or store.positions is None:
            return
        pages, tiles = np.divmod(state.used_tiles().astype(np.int64), store.layout.tiles_per_page)
        # Only the positions: the codes may be most of the KV memory.
        positions = store.positions[store.to_device(state.tile_pages[pages]), store.to_device(tiles)]
        if positions.numel() and not (
            store.layout.num_sinks <= int(positions.min()) <= int(positions.max()) < state.tail.stored_end
        ):
            raise BadInputError("a stored token has a position that it can not have")

    def abandon(self) -> None:
        """Let go of the pages; harmless when repeated, or when `begin` was never called."""
        if self.holds_pages:
            self.holds_pages = False
            self._memory.transfers.remove(self)
            self._memory.store.pool.release(self.pages)
            self._memory.update_free()


def page_format(store: PageStore) -> PageFormat:
    """The format of a store's pages."""
    return PageFormat(
        page_tokens=store.page_tokens,
        page_values=store.page_tokens * store.row_values,
        dtype=str(store.dtype).removeprefix("torch."),
        page_bytes=store.page_bytes,
    )
