"""The stored rows of a sequence's KV heads: reads them, fills them anew at an event, and sums up what is dropped."""

# Letters: L layers of a sequence, Hk KV heads, G layers and P = G * Hk (layer, KV head) pairs at hand, n leaving
# tokens, R rows, D, Dv head dimensions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from swarm.kvcache.compressed_table import CompressedTable
from swarm.kvpolicy.layer_settings import LayerSettings
from swarm.kvpolicy.stacked_codec import StackedCodec
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compressed_store import SUMMARY_SLOT, CompressedStore

__all__ = ["RowKeeper", "Rows", "StoredRows"]

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Owners [R] (which of some pairs) and rows of each."""


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """The rows of some pairs, pair by pair: R of all."""

    owners: npt.NDArray[np.int64]
    """[R] which of the pairs"""
    rows: npt.NDArray[np.int64]
    """[R] where among the pair's rows"""
    places: tuple[torch.Tensor, torch.Tensor]
    """Pages [R / 16] and tiles within them."""
    positions: torch.Tensor
    """[R] int64"""
    scores: torch.Tensor
    """[R] float32"""


class RowKeeper:
    """Rows of all sequences of a server."""

    def __init__(self, store: CompressedStore, settings: Sequence[LayerSettings]) -> None:
        """`settings` are those of each of the server's layers."""
        self._store = store
        self._settings = tuple(settings)
        self._num_heads = store.num_kv_heads
        self.codec = StackedCodec([each.codec for each in settings], device=store.device)

    def read_stored(
        self, table: CompressedTable, layers: npt.NDArray[np.int64], held: npt.NDArray[np.int64]
    ) -> StoredRows:
        """What stands in the tiles of some layers: `held` [P] rows of each pair."""
        store, block = self._store, table.layout.tile_rows
        assert store.positions is not None and store.scores is not None
        num_tiles = held // block
        most = int(num_tiles.max())
        tiles = table.tiles[layers, :, :most].reshape(len(held), most)
        owners, columns = np.nonzero(np.arange(most) < num_tiles[:, None])
        pages, within = table.tile_places(tiles[owners, columns])
        places = torch.from_numpy(pages).to(store.device), torch.from_numpy(within).to(store.device)
        return StoredRows(
            owners=owners.repeat(block),
            rows=(columns[:, None] * block + np.arange(block)).reshape(-1),
            places=places,
            positions=store.positions[places].flatten().long(),
            scores=store.scores[places].flatten().float(),
        )

    def add_to_summary(
        self,
        sequence: CompressedSequence,
        layers: npt.NDArray[np.int64],
        gone: Rows,
        is_kept: npt.NDArray[np.bool_],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Take dropped tokens into the mean of all dropped ones.

        Args:
            gone: stored rows that are dropped.
            is_kept: [P, n] of the leaving tokens.
            keys: [P, n, D] of the leaving tokens
            values: [P, n, Dv]
        """
        store, table, device = self._store, sequence.table, self._store.device
        if not self._settings[sequence.first_layer + layers[0]].has_summary:
            return
        num_dropped = (~is_kept).sum(axis=1) + np.bincount(gone[0], minlength=len(is_kept))
        if not num_dropped.any():
            return
        new_weights = torch.from_numpy(~is_kept).to(device).unsqueeze(1).float()
        key_sums = torch.bmm(new_weights, keys.float()).squeeze(1)
        value_sums = torch.bmm(new_weights, values.float()).squeeze(1)
        if len(gone[0]):
            codes, _, _ = store.read_rows(self._row_places(table, layers, gone))
            owners = torch.from_numpy(gone[0]).to(device)
            more = self.codec.add_up(codes, owners, self._pairs_of(sequence, layers), len(is_kept))
            key_sums, value_sums = key_sums + more[0], value_sums + more[1]
        before = table.num_dropped[layers]
        total = before + num_dropped.reshape(before.shape)
        table.num_dropped[layers] = total
        places = store.slot_places(table, layers, np.full(len(layers), SUMMARY_SLOT))
        old_keys, old_values, _ = store.read_slots(*places)
        share = torch.from_numpy(before / total.clip(1)).to(device).float().unsqueeze(2)
        weight = torch.from_numpy(total.clip(1)).to(device).float().unsqueeze(2)
        # A slot that nothing was written to yet may hold anything, and 0 times anything is not always 0.
        is_old = share > 0
        mean_keys = torch.where(is_old, old_keys.float(), 0.0) * share + key_sums.view(*before.shape, -1) / weight
        mean_values = torch.where(is_old, old_values.float(), 0.0) * share + value_sums.view(*before.shape, -1) / weight
        store.write_slots(*places, mean_keys, mean_values)

    def store_rows(
        self,
        sequence: CompressedSequence,
        layers: npt.NDArray[np.int64],
        held: npt.NDArray[np.int64],
        wanted: npt.NDArray[np.int64],
        gone: Rows,
        movers: Rows | None,
        is_kept: npt.NDArray[np.bool_],
        tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        *,
        first: int = 0,
    ) -> None:
        """Fill rows 0 to `wanted` of every pair with what is kept: rows stay unless dropped or beyond that.

        Args:
            held: [P] rows before.
            wanted: [P] rows after.
            gone: stored rows that are dropped.
            movers: rows that are kept, but stand beyond `wanted`.
            is_kept: [P, n] of the leaving tokens.
            tokens: keys [P, n, D], values [P, n, Dv] and scores [P, n] of the leaving tokens.
            first: position of the first of them.
        """
        store, table, device = self._store, sequence.table, self._store.device
        keys, values, scores = tokens
        is_wanted = torch.from_numpy(is_kept).to(device)
        codes = self.codec.encode(keys, values, self._pairs_of(sequence, layers), is_wanted)
        owners, places = np.nonzero(is_kept)
        positions = torch.from_numpy(places + first).to(device)
        new_scores = scores[is_wanted].half() if scores is not None else None
        if movers is not None:
            # Where fewer rows are kept than before, rows from the end go into the holes first.
            moved, moved_positions, moved_scores = store.read_rows(self._row_places(table, layers, movers))
            assert moved_positions is not None and moved_scores is not None and new_scores is not None
            order = torch.from_numpy(np.argsort(np.concatenate((movers[0], owners)), kind="stable")).to(device)
            codes = torch.cat((moved, codes))[order]
            positions = torch.cat((moved_positions, positions))[order]
            new_scores = torch.cat((moved_scores, new_scores))[order]
        holes = self._find_holes(held, wanted, gone)
        store.write_rows(self._row_places(table, layers, holes), codes, positions, new_scores)

    @staticmethod
    def _find_holes(held: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64], gone: Rows) -> Rows:
        """Rows below `wanted` [P] that are to be filled, pair by pair: dropped ones, and new ones from `held` on."""
        num_fresh = np.maximum(wanted - held, 0)
        fresh_owners = np.arange(len(held)).repeat(num_fresh)
        starts = np.cumsum(num_fresh) - num_fresh
        fresh_rows = np.arange(len(fresh_owners)) - starts[fresh_owners] + held[fresh_owners]
        is_inside = gone[1] < wanted[gone[0]]
        owners = np.concatenate((gone[0][is_inside], fresh_owners))
        rows = np.concatenate((gone[1][is_inside], fresh_rows))
        order = np.argsort((owners << 32) + rows)
        return owners[order], rows[order]

    def _pairs_of(self, sequence: CompressedSequence, layers: npt.NDArray[np.int64]) -> slice | torch.Tensor:
        """The codec's numbers of all KV heads [P] of a sequence's layers."""
        first = (sequence.first_layer + layers) * self._num_heads
        if (np.diff(layers) == 1).all():
            return slice(int(first[0]), int(first[-1]) + self._num_heads)
        pairs = first[:, None] + np.arange(self._num_heads)
        return torch.from_numpy(pairs.reshape(-1)).to(self._store.device)

    def _row_places(
        self, table: CompressedTable, layers: npt.NDArray[np.int64], rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where rows of the heads of `layers` stand."""
        owners, places = rows
        return self._store.row_places(table, layers[owners // self._num_heads], owners % self._num_heads, places)
