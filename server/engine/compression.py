"""Compression events: what leaves the tail of a sequence joins its stored rows, and each KV head keeps its budget.

The same rule as swarm/kvpolicy/reference_cache.py, over pages, and for all KV heads of a sequence at once: an event
comes with every sixteenth token of an answer. A dropped token's row is overwritten by a kept one's, so rows stand in
no order; in layers with a sliding window they do, and whole tiles go from the front.
"""

# Letters: L layers of a sequence, Hk KV heads, G query heads of each, P (layer, KV head) pairs, n leaving tokens,
# m candidates (stored, then leaving) with room for the fullest head, w newest queries, R rows, D, Dv head dimensions.

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from swarm.kvcache.compressed_table import PartPlan
from swarm.kvpolicy.budget import count_kept, count_recent
from swarm.kvpolicy.layer_settings import LayerSettings
from swarm.kvpolicy.scorers import MIN_QUERIES
from swarm.kvpolicy.selection import find_dropped
from swarm.kvpolicy.streaming import CompressionEvent, event_after, settle
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compressed_store import CompressedStore
from swarm.server.engine.judging import Judge
from swarm.server.engine.raw_tokens import fill_ring, read_tokens
from swarm.server.engine.stored_rows import RowKeeper

__all__ = ["Compressor"]

_WHOLE_EVENT_TOKENS: Final = 64
"""Events of fewer leaving tokens are carried out for all layers at once, others layer by layer, to spare memory."""


def _count_by_head(
    settings: Sequence[LayerSettings],
    num_heads: int,
    count: Callable[[LayerSettings, int, int], int],
    layer: int,
    num_tokens: int,
) -> tuple[int, ...]:
    """Of each KV head of a server's layer, with `num_tokens` to choose from."""
    return tuple(count(settings[layer], head, num_tokens) for head in range(num_heads))


def _count_kept_of(settings: LayerSettings, head: int, num_tokens: int) -> int:
    return count_kept(settings.policy, settings.curve, settings.layer, head, num_tokens)


def _count_recent_of(settings: LayerSettings, head: int, num_tokens: int) -> int:
    assert settings.policy.pruning is not None
    return count_recent(settings.policy.pruning, settings.curve, settings.layer, head, num_tokens)


class Compressor:
    """Carries out events for all sequences of a server (an Events)."""

    def __init__(self, store: CompressedStore, settings: Sequence[LayerSettings], scalings: Sequence[float]) -> None:
        """
        Args:
            settings: of each of the server's layers.
            scalings: what each of them multiplies attention scores with.
        """
        self._store = store
        self._settings = tuple(settings)
        self._policy = store.policy
        self._num_heads = store.num_kv_heads
        self._rows = RowKeeper(store, settings)
        self._judge = Judge(store, settings, scalings, self._rows.codec)
        self.busy_s = 0.0
        """Spent on events since start; other threads may read it."""
        # Without a reference to this object: it holds the KV memory, which is to go when its owner does.
        by_head = functools.partial(_count_by_head, self._settings, self._num_heads)
        self._count_kept = functools.lru_cache(maxsize=1024)(functools.partial(by_head, _count_kept_of))
        self._count_recent = functools.lru_cache(maxsize=1024)(functools.partial(by_head, _count_recent_of))

    # -- what a step asks for ------------------------------------------------------------------

    def settle(self, sequence: CompressedSequence, start: int) -> None:
        """Carry out the event that is due before a step that begins at `start`, if there is one."""
        table = sequence.table
        if start == 0 or table.tail.is_staging:
            return
        event = event_after(self._policy, table.tail.stored_end, start)
        if event is not None:
            began_s = time.perf_counter()
            self._carry_out(sequence, event, None)
            table.trim()
            self.busy_s += time.perf_counter() - began_s
        table.tail = settle(self._policy, table.tail, start)

    def finish(self, sequence: CompressedSequence, plan: PartPlan) -> None:
        """Carry out what a part ends with, and have nothing staged: stored, or in the ring."""
        table = sequence.table
        began_s = time.perf_counter()
        event = event_after(self._policy, table.tail.stored_end, plan.end)
        if event is not None:
            says_enough = plan.end - table.staged_start >= MIN_QUERIES
            self._carry_out(sequence, event, sequence.staged_queries if says_enough else None)
        fill_ring(self._store, sequence, stored_end=plan.after.stored_end)
        sequence.leave_staging(plan.after)
        self.busy_s += time.perf_counter() - began_s

    def max_new_tiles(self, sequence: CompressedSequence, length: int) -> int:
        """How many tiles an event at `length` tokens adds at most; 0 when none is due."""
        table = sequence.table
        event = event_after(self._policy, table.tail.stored_end, length)
        if event is None:
            return 0
        num_rows, _ = self._count_rows(sequence, event)
        # Tiles that windows give back at the front come first, so they are used again.
        num_added = num_rows // self._policy.block_tokens - table.num_tiles
        return int(np.maximum(num_added, 0).sum())

    # -- how many ------------------------------------------------------------------------------

    def _count_rows(
        self, sequence: CompressedSequence, event: CompressionEvent
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows [L, Hk] stored after an event, and blocks [L] from the sinks on that nobody sees any more."""
        policy, table = self._policy, sequence.table
        num_tokens, block = event.end - policy.num_sinks, policy.block_tokens
        held = table.num_tiles.astype(np.int64) * block
        rows = held + (event.end - event.first)
        num_gone = np.zeros(len(held), dtype=np.int64)
        for layer in range(len(held)):
            settings = self._settings[sequence.first_layer + layer]
            if settings.window:
                num_gone[layer] = max(0, event.length - settings.window + 1 - policy.num_sinks) // block
                num_blocks = min(int(rows[layer, 0]), num_tokens - int(num_gone[layer]) * block)
                rows[layer] = max(0, num_blocks)
            elif policy.pruning is not None:
                rows[layer] = np.minimum(rows[layer], self._count_kept(sequence.first_layer + layer, num_tokens))
        return rows, num_gone

    def _find_protected(
        self, sequence: CompressedSequence, event: CompressionEvent, layers: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Position from which each KV head of some layers keeps everything, [layers * Hk]."""
        recent = [self._count_recent(sequence.first_layer + layer, event.length) for layer in layers.tolist()]
        return event.length - np.array(recent, dtype=np.int64).reshape(-1)

    # -- events --------------------------------------------------------------------------------

    @torch.inference_mode()
    def _carry_out(self, sequence: CompressedSequence, event: CompressionEvent, judges: torch.Tensor | None) -> None:
        table, block = sequence.table, self._policy.block_tokens
        num_rows, num_gone = self._count_rows(sequence, event)
        self._store.own_tiles(table)
        settings = self._settings[sequence.first_layer : sequence.first_layer + table.layout.num_layers]
        if any(each.has_summary for each in settings):
            self._store.own_raw(table)
        self._drop_front(sequence, event, num_gone)
        num_before = table.num_tiles.astype(np.int64) * block
        table.add_tiles(np.maximum(num_rows // block - table.num_tiles, 0).astype(np.int32))
        every = np.arange(table.layout.num_layers)
        is_windowed = np.array([each.window > 0 for each in settings])
        at_once = judges is None and event.end - event.first <= _WHOLE_EVENT_TOKENS
        for layers in (every[is_windowed], every[~is_windowed]):
            for group in [layers] if at_once else np.split(layers, len(layers)) if len(layers) else []:
                if len(group):
                    self._compress_layers(sequence, event, group, num_before[group], num_rows[group], judges)
        for layer, head in zip(*np.nonzero(num_rows // block < table.num_tiles), strict=True):
            count = int(num_rows[layer, head]) // block
            table.give_back_tiles(int(layer), int(head), table.tiles_of(int(layer), int(head))[count:].copy())

    def _drop_front(
        self, sequence: CompressedSequence, event: CompressionEvent, num_gone: npt.NDArray[np.int64]
    ) -> None:
        """Give back tiles that no later query sees."""
        table = sequence.table
        num_blocks = (event.first - self._policy.num_sinks) // self._policy.block_tokens
        for layer in np.flatnonzero(num_gone):
            first_held = num_blocks - int(table.num_tiles[layer, 0])
            count = min(int(num_gone[layer]), num_blocks) - first_held
            if count > 0:
                for head in range(self._num_heads):
                    table.give_back_tiles(int(layer), head, table.tiles_of(int(layer), head)[:count].copy())

    def _compress_layers(
        self,
        sequence: CompressedSequence,
        event: CompressionEvent,
        layers: npt.NDArray[np.int64],
        num_before: npt.NDArray[np.int64],
        num_rows: npt.NDArray[np.int64],
        judges: torch.Tensor | None,
    ) -> None:
        """Bring some layers, all or none of them with windows, to the state after an event.

        Args:
            layers: [G] of the sequence.
            num_before: [G, Hk] rows they hold.
            num_rows: [G, Hk] rows they will hold; tiles for them are there.
        """
        table, policy = sequence.table, self._policy
        num_new = event.end - event.first
        positions = np.arange(event.first, event.end)
        keys, values, new_scores = read_tokens(self._store, sequence, layers, positions)
        held, wanted = num_before.reshape(-1), num_rows.reshape(-1)
        num_dropped = held + num_new - wanted
        if policy.pruning is None or self._settings[sequence.first_layer + layers[0]].window:
            # Of an input longer than the window only the end is kept: the newest, as many as there is room for.
            is_kept = np.arange(num_new) >= num_dropped[:, None]
            nothing = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
            # Scores mean nothing here, but nothing of an earlier owner of the memory shall stay.
            no_scores = torch.zeros(is_kept.shape, device=self._store.device) if self._store.has_scores else None
            tokens = keys, values, no_scores
            self._rows.store_rows(sequence, layers, held, wanted, nothing, None, is_kept, tokens, first=event.first)
            return
        assert new_scores is not None
        stored = self._rows.read_stored(table, layers, held)
        owners = np.concatenate((stored.owners, np.arange(len(held)).repeat(num_new)))
        new_positions = torch.from_numpy(positions).to(self._store.device).repeat(len(held))
        scores = self._judge.rescore(sequence, event, layers, stored, owners, new_scores, judges)
        is_dropped = find_dropped(
            scores,
            torch.cat((stored.positions, new_positions)),
            torch.from_numpy(owners).to(self._store.device),
            num_dropped,
            protected_from=self._find_protected(sequence, event, layers),
        )
        num_stored = len(stored.owners)
        is_gone = is_dropped[:num_stored]
        places = np.flatnonzero(is_gone)
        gone = stored.owners[places], stored.rows[places]
        is_kept = ~is_dropped[num_stored:].reshape(len(held), num_new)
        self._rows.add_to_summary(sequence, layers, gone, is_kept, keys, values)
        leaving = keys, values, scores[num_stored:].view(len(held), num_new)
        movers = None
        if (wanted < held).any():
            places = np.flatnonzero((stored.rows >= wanted[stored.owners]) & ~is_gone)
            movers = stored.owners[places], stored.rows[places]
        self._rows.store_rows(sequence, layers, held, wanted, gone, movers, is_kept, leaving, first=event.first)
