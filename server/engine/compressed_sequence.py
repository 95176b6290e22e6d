"""One compressed sequence of a session: its table, and what its next event wants to know of the input at hand."""

# Letters: L layers of the sequence, Hk KV heads, Hq query heads, D head dimension, n tokens.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.compressed_table import CompressedTable, PartPlan
from swarm.kvcache.staged_notes import StagedNotes

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.kvpolicy.streaming import TailState
    from swarm.server.engine.compressed_store import CompressedStore
    from swarm.server.engine.sequence_pages import HeldPages

__all__ = ["MAX_STAGED_QUERIES", "CompressedSequence", "Compression", "Events"]

MAX_STAGED_QUERIES: Final = 64
"""Newest queries of an input that are kept to judge its tokens by."""


class Events(Protocol):
    """Compresses sequences; see compression.py. Pages and tiles are taken from the table's reserve."""

    def settle(self, sequence: CompressedSequence, start: int) -> None:
        """Carry out the event that is due before a step that begins at `start`, if there is one."""

    def finish(self, sequence: CompressedSequence, plan: PartPlan) -> None:
        """Carry out what a part ends with, and have nothing staged."""

    def max_new_tiles(self, sequence: CompressedSequence, length: int) -> int:
        """How many tiles an event at `length` tokens adds at most; 0 when none is due."""


@dataclass(frozen=True)
class Compression:
    """What a server's memory needs to hold sessions under the server's policy."""

    store: CompressedStore
    events: Events
    first_block: int
    """The model's block that the store's layer 0 is."""
    bytes_per_token: int
    """Of a token in all of the store's layers, in a sequence of usual length; by this, room is told in tokens."""
    query_values: int = 0
    """Of a token's queries in one layer, all heads, where inputs are judged by their newest ones."""

    def new_sequence(self, span: Span) -> CompressedSequence:
        """An empty one in the blocks of `span`."""
        store = self.store
        notes = StagedNotes(
            page_bytes=store.page_bytes,
            score_bytes=len(span) * store.num_kv_heads * torch.float16.itemsize if store.has_scores else 0,
            query_bytes=len(span) * self.query_values * store.raw_dtype.itemsize,
            max_queries=MAX_STAGED_QUERIES,
        )
        table = store.new_table(len(span), notes)
        return CompressedSequence(self.store, table, first_layer=span.start - self.first_block)


class CompressedSequence:
    """What one sequence of a session holds under the server's policy."""

    def __init__(self, store: CompressedStore, table: CompressedTable, *, first_layer: int) -> None:
        self.store = store
        self.table = table
        self.first_layer = first_layer
        """The server's layer that the table's layer 0 is."""
        self.staged_scores: torch.Tensor | None = None
        """float16 [L, Hk, n] of the staged tokens; None when nothing is staged or nothing is chosen by scores."""
        self.staged_queries: torch.Tensor | None = None
        """[L, Hq, at most MAX_STAGED_QUERIES, D] 16 bit, the newest of the staged tokens."""

    @property
    def num_layers(self) -> int:
        return self.table.layout.num_layers

    def add_staged(self, scores: torch.Tensor | None, queries: torch.Tensor | None) -> None:
        """Remember scores [L, Hk, n] and queries [L, Hq, n or the newest of them, D] of n tokens staged just now."""
        if scores is not None:
            scores = scores.to(torch.float16)
            before = self.staged_scores
            self.staged_scores = scores if before is None else torch.cat((before, scores), dim=2)
        if queries is not None:
            queries = queries[:, :, -MAX_STAGED_QUERIES:].to(self.store.raw_dtype)
            if self.staged_queries is not None:
                queries = torch.cat((self.staged_queries, queries), dim=2)[:, :, -MAX_STAGED_QUERIES:]
            self.staged_queries = queries.contiguous()

    def leave_staging(self, after: TailState) -> None:
        """What was staged is compressed or in the ring now: forget it, and give back pages that are not needed."""
        self.table.leave_staging(after)
        self.table.trim()
        self.table.release_spare()
        self._forget_staged()

    def _forget_staged(self) -> None:
        self.staged_scores = self.staged_queries = None

    @property
    def length(self) -> int:
        """Positions held; 0 while the pages are in host memory."""
        return self.table.length

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.table.num_pages

    def owned_pages(self) -> npt.NDArray[np.int64]:
        """All of them."""
        return self.table.owned_pages()

    def filled_pages(self) -> npt.NDArray[np.int64]:
        """Those that hold something of the sequence."""
        return self.table.filled_pages()

    def fork_pages_wanted(self, length: int) -> int:
        """Pages that a fork at `length` takes at once."""
        return self.table.fork_pages_wanted(length)

    def can_rewind(self, start: int) -> bool:
        """Whether the sequence can go on from an earlier position as if it had never been further."""
        return self.table.can_rewind(start)

    def rewind(self, start: int) -> None:
        """Forget positions from `start` on. Raises ValueError where the table's `can_rewind` says no."""
        self.table.rewind(start)
        if not self.table.tail.is_staging:
            self._forget_staged()

    def fork(self, length: int) -> CompressedSequence:
        """Another sequence that holds the same first `length` positions, likewise."""
        twin = CompressedSequence(self.store, self.table.fork(length), first_layer=self.first_layer)
        if twin.table.tail.is_staging:
            twin.staged_scores, twin.staged_queries = self.staged_scores, self.staged_queries
        return twin

    def free(self) -> None:
        """Give all pages back; the sequence is empty then."""
        self.table.free()
        self._forget_staged()

    def drop_reserve(self) -> None:
        """Give back pages that were taken in reserve for the step at hand."""
        self.table.release_spare()

    def take_out(self) -> CompressedState:
        """Give all pages back as their contents are saved elsewhere; returns what `put_back` needs."""
        state = self.table.state()
        self.table.free()
        self._move_staged("cpu")
        return state

    def put_back(self, held: HeldPages) -> None:
        """Undo `take_out`, on pages that others hold too."""
        assert isinstance(held, CompressedState)
        self.table.adopt(held)
        self._move_staged(self.store.device)

    def _move_staged(self, device: torch.device | str) -> None:
        if self.staged_scores is not None:
            self.staged_scores = self.staged_scores.to(device)
        if self.staged_queries is not None:
            self.staged_queries = self.staged_queries.to(device)
