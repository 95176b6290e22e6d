"""What an offer says of compressed sequences: written by the server that leaves, read by the one that takes them.

Pure values. What is read is the other side's word until `swarm.kvcache.compressed_checks` has seen it.
"""

# Letters: L layers of a session's blocks, Hk KV heads.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from swarm.errors import BadInputError, NoRouteError
from swarm.kvcache.compressed_checks import check_states
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvpolicy.streaming import TailState
from swarm.pb import node_pb2 as pb

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.kvcache.compressed_layout import CompressedLayout
    from swarm.kvcache.footprint import Footprint
    from swarm.server.engine.compressed_store import CompressedStore
    from swarm.server.engine.session_memory import SessionMemory
    from swarm.server.rpc.request_checks import HostedModel
    from swarm.server.rpc.session_claims import KVSizes

__all__ = [
    "CompressionTerms",
    "compression_terms",
    "read_states",
    "read_tail",
    "write_sequences",
    "write_tables",
    "write_tail",
]

_MAX_TABLE_BYTES: Final = 128 * 2**20
"""Of all tables of a session, as they are held: one for each KV head, all as long as the longest."""


@dataclass(frozen=True, kw_only=True)
class CompressionTerms:
    """How a server keeps compressed sessions, as far as another one must do it alike."""

    layout: CompressedLayout
    """Of sequences in all layers of the server."""
    footprint: Footprint
    """Of these layers."""
    pages: pb.CompressedPages
    """What the other one compares."""

    @classmethod
    def of_store(cls, store: CompressedStore, footprint: Footprint, *, rules_hash: str) -> CompressionTerms:
        """Those of the server that holds `store`."""
        layout = store.layout
        pages = pb.CompressedPages(
            rules_hash=rules_hash,
            page_bytes=store.page_bytes,
            num_kv_heads=layout.num_kv_heads,
            tile_rows=layout.tile_rows,
            tiles_per_page=layout.tiles_per_page,
            row_bytes=store.row_bytes,
            position_bytes=store.position_dtype.itemsize if store.position_dtype is not None else 0,
            has_scores=store.has_scores,
            slots_per_page=layout.slots_per_page,
            num_sinks=layout.num_sinks,
            tail_slots=layout.tail_slots,
            raw_dtype=str(store.raw_dtype).removeprefix("torch."),
        )
        return cls(layout=layout, footprint=footprint, pages=pages)

    def check_pages(self, offered: pb.CompressedPages) -> None:
        """Raises NoRouteError unless pages are cut there as here, and their content means the same."""
        for field in pb.CompressedPages.DESCRIPTOR.fields:
            theirs, ours = getattr(offered, field.name), getattr(self.pages, field.name)
            if theirs != ours:
                raise NoRouteError(
                    f"a compressed session with {field.name} {str(theirs)[:40]!r} can not go on here, where it is "
                    f"{ours!r}"
                )


def compression_terms(memory: SessionMemory, sizes: KVSizes, model: HostedModel) -> CompressionTerms | None:
    """Those of a server; None where no session is compressed."""
    if memory.compressed is None or sizes.footprint is None:
        return None
    return CompressionTerms.of_store(memory.compressed, sizes.footprint, rules_hash=model.rules_hash)


# -- writing -----------------------------------------------------------------------------------


def write_tail(tail: TailState) -> pb.CompressedTail:
    """The state of a sequence that stands in no input."""
    return pb.CompressedTail(stored_end=tail.stored_end, compressed_at=tail.compressed_at)


def write_sequences(sequences: Mapping[int, CompressedState]) -> list[pb.HandoverSequence]:
    """All but the tables."""
    return [
        pb.HandoverSequence(
            sequence=sequence,
            length=state.length,
            tail=write_tail(state.tail),
            raw_pages=state.raw_pages.tolist(),
            tile_pages=state.tile_pages.tolist(),
        )
        for sequence, state in sequences.items()
    ]


def write_tables(states: Iterable[CompressedState]) -> npt.NDArray[np.int32]:
    """The tables of sequences in the order of `write_sequences`, [numbers] int32."""
    parts: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    for state in states:
        is_used = np.arange(state.tiles.shape[2]) < state.num_tiles[..., None]
        parts += [state.num_tiles.ravel(), state.num_dropped.ravel().astype(np.int32), state.tiles[is_used]]
    return np.concatenate(parts)


# -- reading -----------------------------------------------------------------------------------


def read_tail(message: pb.CompressedTail) -> TailState:
    """The state that is claimed of a sequence."""
    return TailState(message.stored_end, compressed_at=message.compressed_at)


def read_states(
    offer: pb.HandoverOffer, tables: npt.NDArray[np.int32], terms: CompressionTerms, span: Span
) -> dict[int, CompressedState]:
    """What is offered, by sequence, found to be possible. Raises BadInputError.

    Args:
        offer: its sequences' numbers and lengths have been checked.
        tables: [numbers], as they came.
        span: the session's blocks, which this server has.
    """
    layout = terms.layout.for_layers(len(span))
    tables_read = _Tables(tables, num_layers=len(span), num_kv_heads=layout.num_kv_heads)
    states: dict[int, CompressedState] = {}
    for item in offer.sequences:
        if item.pages:
            raise BadInputError(f"sequence {item.sequence} of a compressed session names uncompressed pages")
        num_tiles, num_dropped, tiles = tables_read.next()
        states[item.sequence] = CompressedState(
            length=item.length,
            tail=read_tail(item.tail),
            staged_start=item.length,
            input_start=item.length,
            tiles=tiles,
            num_tiles=num_tiles,
            num_dropped=num_dropped,
            raw_pages=np.array(item.raw_pages, dtype=np.int64),
            tile_pages=np.array(item.tile_pages, dtype=np.int64),
            staged_pages=np.zeros((len(span), 0), dtype=np.int64),
        )
    tables_read.check_end()
    check_states(states.values(), layout, terms.footprint, first_layer=span.start, num_pages=offer.num_pages)
    return states


class _Tables:
    """Reads sequences' tables one after the other; allocates no more than `_MAX_TABLE_BYTES`."""

    def __init__(self, numbers: npt.NDArray[np.int32], *, num_layers: int, num_kv_heads: int) -> None:
        self._numbers = numbers
        self._heads = (num_layers, num_kv_heads)
        self._place = 0
        self._num_bytes = 0

    def next(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """(tiles [L, Hk], tokens dropped [L, Hk], tiles [L, Hk, most]) of the next sequence. Raises BadInputError."""
        num_heads = self._heads[0] * self._heads[1]
        num_tiles = self._take(num_heads).reshape(self._heads)
        num_dropped = self._take(num_heads).reshape(self._heads).astype(np.int64)
        if int(num_tiles.min()) < 0:
            raise BadInputError("a KV head is offered with fewer than no tiles")
        most = int(num_tiles.max())
        used = self._take(int(num_tiles.sum(dtype=np.int64)))
        self._num_bytes += num_heads * most * used.itemsize
        if self._num_bytes > _MAX_TABLE_BYTES:
            raise BadInputError(f"the tables of the session would take more than {_MAX_TABLE_BYTES} bytes here")
        tiles = np.zeros((*self._heads, most), dtype=np.int32)
        tiles[np.arange(most) < num_tiles[..., None]] = used
        return num_tiles, num_dropped, tiles

    def check_end(self) -> None:
        """Raises BadInputError when there is more than the sequences had."""
        if self._place != len(self._numbers):
            raise BadInputError(f"{len(self._numbers) - self._place} numbers follow the tables of all sequences")

    def _take(self, count: int) -> npt.NDArray[np.int32]:
        taken = self._numbers[self._place : self._place + count]
        if len(taken) != count:
            raise BadInputError(f"the tables end after {len(self._numbers)} numbers, within those of a sequence")
        self._place += count
        return taken.copy()
