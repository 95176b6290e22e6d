"""What a compressed sequence keeps in one layer, read as numbers: for attention without the kernel."""

# Letters: Hk KV heads, D, Dv key and value dimensions, m entries in slots, R stored rows of a head.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from swarm.kvcache.compressed_table import CompressedTable
    from swarm.server.engine.compressed_layers import CodedLayer
    from swarm.server.engine.compressed_store import CompressedStore

__all__ = ["CodedRows", "KeptEntries", "RawEntries", "read_entries"]


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Stored rows of one KV head in its codec's coordinates."""

    keys: torch.Tensor
    """float32 [R, D]"""
    values: torch.Tensor
    """float32 [R, Dv]"""
    positions: torch.Tensor | None
    """[R] where some may be out of sight"""


@dataclass(frozen=True, slots=True)
class RawEntries:
    """What stands in slots, of one layer."""

    keys: torch.Tensor
    """[Hk, m, D]"""
    values: torch.Tensor
    """[Hk, m, Dv]"""
    positions: torch.Tensor
    """[m]; -1 is the summary."""
    biases: torch.Tensor
    """[Hk, m]"""


@dataclass(frozen=True, slots=True)
class KeptEntries:
    """All of it, read once for all new tokens of a sequence."""

    raw: RawEntries
    stored: Sequence[CodedRows]
    """Of each KV head."""


def read_entries(
    store: CompressedStore,
    table: CompressedTable,
    row: int,
    coded: CodedLayer,
    *,
    raw_end: int,
    has_summary: bool,
    window: int,
) -> KeptEntries:
    """Read one layer of a sequence.

    Args:
        row: the layer in the table.
        coded: the layer's codes.
        raw_end: slots hold what came before this position.
        has_summary: whether the layer keeps one for what it drops.
        window: positions a query sees; 0 for all.
    """
    raw = _read_raw(store, table, row, end=raw_end, has_summary=has_summary)
    return KeptEntries(raw, _read_stored(store, table, row, coded, window))


def _read_stored(
    store: CompressedStore, table: CompressedTable, row: int, coded: CodedLayer, window: int
) -> list[CodedRows]:
    """Each head's stored rows in one layer."""
    num_heads = store.num_kv_heads
    tiles = np.concatenate([table.tiles_of(row, head) for head in range(num_heads)])
    codes, positions, _ = store.read_tiles(*table.tile_places(tiles))
    keys, values = coded.decode_coordinates(codes)
    counts = (table.num_tiles[row] * table.layout.tile_rows).tolist()
    # Whatever is stored came before all new tokens, so without a window they see all of it.
    of_heads = positions.split(counts) if positions is not None and window else [None] * num_heads
    return [CodedRows(*found) for found in zip(keys.split(counts), values.split(counts), of_heads, strict=True)]


def _read_raw(store: CompressedStore, table: CompressedTable, row: int, *, end: int, has_summary: bool) -> RawEntries:
    """Summary, sinks and ring of a sequence in one layer."""
    sinks = np.arange(min(table.layout.num_sinks, end))
    ring = np.arange(table.tail.stored_end, max(end, table.tail.stored_end))
    positions: npt.NDArray[np.int64] = np.concatenate((sinks, ring)).astype(np.int64)
    slots = table.layout.slots_of(positions)
    dropped = table.num_dropped[row]
    has_summary = has_summary and bool(dropped.any())
    if has_summary:
        slots = np.concatenate((np.zeros(1, np.int64), slots))
        positions = np.concatenate((np.full(1, -1), positions))
    device = store.device
    biases = np.zeros((store.num_kv_heads, len(slots)), dtype=np.float32)
    if has_summary:
        with np.errstate(divide="ignore"):
            biases[:, 0] = np.log(dropped)  # -inf, which hides the entry, where a head has dropped nothing
    if not len(slots):
        empty = torch.zeros(store.num_kv_heads, 0, store.key_dim, device=device)
        values = torch.zeros(store.num_kv_heads, 0, store.value_dim, device=device)
        return RawEntries(
            empty, values, torch.zeros(0, dtype=torch.int64, device=device), torch.from_numpy(biases).to(device)
        )
    pages, within = store.slot_places(table, np.full(len(slots), row), slots)
    keys, values, _ = store.read_slots(pages, within)
    if has_summary and not dropped.all():
        # Nothing was ever written there; whatever it is must not become NaN.
        is_empty = torch.from_numpy(dropped == 0).to(device)
        keys[0, is_empty], values[0, is_empty] = 0, 0
    return RawEntries(
        keys.transpose(0, 1),
        values.transpose(0, 1),
        torch.from_numpy(positions).to(device),
        torch.from_numpy(biases).to(device),
    )
