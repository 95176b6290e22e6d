"""Which parts of pages are a session's: the rest was other sessions', and must not leave the server."""

# Letters: n pages.

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.page_table import pages_for
from swarm.server.engine.compressed_store import SUMMARY_SLOT
from swarm.server.engine.sequence_pages import HeldPages, SequencePages

if TYPE_CHECKING:
    from swarm.server.engine.compressed_store import CompressedStore
    from swarm.server.engine.page_store import PageStore

__all__ = ["CompressedPageMask", "PlainPageMask", "page_mask"]


class PlainPageMask:
    """Of pages of exact sequences."""

    def __init__(self, sequences: Iterable[SequencePages], num_pages: int, store: PageStore) -> None:
        """`sequences` number their pages from 0 to `num_pages` - 1."""
        self._page_tokens = store.page_tokens
        self._num_values = max(shape.values_per_token for shape in store.shapes)
        self._num_filled = np.zeros(num_pages, dtype=np.int64)
        """Leading tokens of each page that belong to a sequence: of those that share it, what the longest fills."""
        for part in sequences:
            num_columns = pages_for(part.length, self._page_tokens)
            filled = np.minimum(part.length - np.arange(num_columns) * self._page_tokens, self._page_tokens)
            np.maximum.at(self._num_filled, part.pages.ravel(), np.tile(filled, len(part.pages)))

    def clear_others(self, contents: torch.Tensor, first: int) -> None:
        """Zero what is nobody's in pages [n, values of a page] from number `first` on, in place."""
        tokens = contents.view(len(contents), self._page_tokens, -1)
        tokens[..., self._num_values :] = 0
        for page, num_filled in enumerate(self._num_filled[first : first + len(contents)].tolist()):
            tokens[page, num_filled:] = 0


class CompressedPageMask:
    """Of pages of compressed sequences, of which nothing is staged."""

    def __init__(self, sequences: Iterable[CompressedState], num_pages: int, store: CompressedStore) -> None:
        """`sequences` number their pages from 0 to `num_pages` - 1."""
        layout = store.layout
        self._store = store
        self._has_slot = np.zeros((num_pages, layout.slots_per_page), dtype=np.bool_)
        self._has_score = np.zeros_like(self._has_slot)
        """Of slots: only tokens of the tail can be dropped."""
        self._has_tile = np.zeros((num_pages, layout.tiles_per_page), dtype=np.bool_)
        for state in sequences:
            self._add_slots(state)
            pages, tiles = np.divmod(state.used_tiles(), layout.tiles_per_page)
            self._has_tile[state.tile_pages[pages], tiles] = True

    def _add_slots(self, state: CompressedState) -> None:
        layout = self._store.layout
        layers = np.arange(len(state.num_dropped))[:, None]
        sinks = np.arange(min(layout.num_sinks, state.length))
        tail = layout.slots_of(np.arange(state.tail.stored_end, max(state.length, state.tail.stored_end)))
        with_summary = np.flatnonzero(state.num_dropped.any(axis=1))[:, None]
        places = (
            (layers, layout.slots_of(sinks)),
            (layers, tail),
            (with_summary, np.full(1, SUMMARY_SLOT)),
        )
        for where, slots in places:
            pages, within = layout.places_of(where, slots)
            self._has_slot[state.raw_pages[pages], within] = True
            if slots is tail:
                self._has_score[state.raw_pages[pages], within] = True

    def clear_others(self, contents: torch.Tensor, first: int) -> None:
        """Zero what is nobody's in pages [n, values of a page] from number `first` on, in place."""
        store, numbers = self._store, slice(first, first + len(contents))
        pages = contents.view(torch.uint8)
        is_kept = torch.zeros(pages.shape, dtype=torch.bool)
        self._mark(is_kept, 0, self._has_slot[numbers], 2 * store.raw.shape[2])
        if store.raw_scores is not None:
            self._mark(is_kept, store.raw_score_offset, self._has_score[numbers], 2 * store.num_kv_heads)
        has_tile, num_rows = self._has_tile[numbers], store.layout.tile_rows
        self._mark(is_kept, 0, has_tile, num_rows * store.row_bytes)
        if store.positions is not None:
            self._mark(is_kept, store.position_offset, has_tile, num_rows * store.positions.element_size())
        if store.scores is not None:
            self._mark(is_kept, store.score_offset, has_tile, num_rows * 2)
        pages.masked_fill_(~is_kept, 0)

    @staticmethod
    def _mark(is_kept: torch.Tensor, offset: int, units: npt.NDArray[np.bool_], unit_bytes: int) -> None:
        """Mark bytes of pages [n, bytes]: those of units [n, units of a page] that follow each other from an offset."""
        part = is_kept[:, offset : offset + units.shape[1] * unit_bytes]
        part |= torch.from_numpy(units).repeat_interleave(unit_bytes, dim=1)


def page_mask(
    sequences: Iterable[HeldPages], num_pages: int, store: PageStore, compressed: CompressedStore | None
) -> PlainPageMask | CompressedPageMask:
    """That of one session's pages."""
    held = list(sequences)
    states = [part for part in held if isinstance(part, CompressedState)]
    if states and compressed is not None:
        return CompressedPageMask(states, num_pages, compressed)
    return PlainPageMask([part for part in held if isinstance(part, SequencePages)], num_pages, store)
