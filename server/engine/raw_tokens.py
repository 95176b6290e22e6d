"""Reads and moves the 16-bit tokens of a compressed sequence: sinks and ring in slots, the input at hand in pages."""

# Letters: L layers of a sequence, G some of them, Hk KV heads, P = G * Hk, n tokens, D, Dv head dimensions.

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from swarm.kvcache.compressed_table import CompressedTable
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compressed_store import CompressedStore

__all__ = ["fill_ring", "read_tokens"]


def read_tokens(
    store: CompressedStore,
    sequence: CompressedSequence,
    layers: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys [P, n, D], values [P, n, Dv] and scores [P, n] float16 (None where none are kept) of tokens.

    Args:
        layers: [G] of the sequence.
        positions: [n] ascending; sinks, in the tail, or staged.
    """
    table = sequence.table
    num_slots = int(np.searchsorted(positions, table.staged_start)) if table.tail.is_staging else len(positions)
    parts = []
    if num_slots:
        parts.append(_read_slots(store, table, layers, positions[:num_slots]))
    if num_slots < len(positions):
        parts.append(_read_staged(store, sequence, layers, positions[num_slots:] - table.staged_start))
    if len(parts) == 1:
        return parts[0]
    keys = torch.cat([part[0].to(store.raw_dtype) for part in parts], dim=1)
    values = torch.cat([part[1].to(store.raw_dtype) for part in parts], dim=1)
    scores = [part[2] for part in parts if part[2] is not None]
    return keys, values, torch.cat(scores, dim=1) if scores else None


_Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _read_slots(
    store: CompressedStore, table: CompressedTable, layers: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> _Tokens:
    places = store.slot_places(table, layers[:, None], table.layout.slots_of(positions))
    keys, values, scores = store.read_slots(*places)
    keys, values = keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
    return keys, values, scores.transpose(1, 2).flatten(0, 1) if scores is not None else None


def _read_staged(
    store: CompressedStore, sequence: CompressedSequence, layers: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
) -> _Tokens:
    """Args: places: [n] ascending, from the first staged token on."""
    first, end = int(places[0]), int(places[-1]) + 1
    slots = sequence.table.staged.slots(first, end)[layers][:, places - first]
    keys, values = store.store.gather(0, torch.from_numpy(slots).to(store.device))
    scores = sequence.staged_scores
    if scores is not None:
        wanted = torch.from_numpy(places).to(scores.device)
        scores = scores[torch.from_numpy(layers).to(scores.device)][:, :, wanted].flatten(0, 1)
    return keys.flatten(0, 1), values.flatten(0, 1), scores


def fill_ring(store: CompressedStore, sequence: CompressedSequence, *, stored_end: int) -> None:
    """Copy what is staged and not stored, sinks and tail, into its slots.

    Args:
        stored_end: where the tail begins.
    """
    table = sequence.table
    staged = np.arange(table.staged_start, table.length)
    positions = staged[(staged < table.policy.num_sinks) | (staged >= stored_end)]
    if not len(positions):
        return
    store.own_raw(table)
    num_layers = table.layout.num_layers
    keys, values, scores = _read_staged(store, sequence, np.arange(num_layers), positions - table.staged_start)

    def by_layers(part: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = part.unflatten(0, (num_layers, -1))
        return heads.transpose(1, 2)

    places = store.token_places(table, positions)
    store.write_slots(*places, by_layers(keys), by_layers(values), by_layers(scores) if scores is not None else None)
