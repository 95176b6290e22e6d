"""States of compressed sequences as servers hold them, made up by the rules they follow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from swarm.kvcache.compressed_layout import CompressedLayout
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.footprint import Footprint
from swarm.kvpolicy.budget import count_kept
from swarm.kvpolicy.streaming import TailState, new_tail, tail_capacity, tail_start

__all__ = ["make_state", "number_pages"]


def make_state(
    layout: CompressedLayout,
    footprint: Footprint,
    length: int,
    *,
    compressed_at: int | None = None,
    first_layer: int = 0,
    seed: int = 0,
) -> CompressedState:
    """A sequence of `length` tokens whose last event was at `compressed_at` of them (or as late as it can be).

    Its pages are numbered from 0: slots, then tiles, which stand in no order.
    """
    policy, block = footprint.policy, footprint.policy.block_tokens
    if compressed_at is None:
        compressed_at = length
    tail = TailState(tail_start(policy, compressed_at), compressed_at=compressed_at)
    if tail.stored_end == policy.num_sinks:
        tail = new_tail(policy)
    assert length - tail.stored_end <= tail_capacity(policy)
    num_leaving = tail.stored_end - policy.num_sinks
    rows = np.zeros((layout.num_layers, layout.num_kv_heads), dtype=np.int64)
    dropped = np.zeros_like(rows)
    for layer in range(layout.num_layers):
        window = footprint.windows.get(first_layer + layer, 0)
        for head in range(layout.num_kv_heads):
            if window:
                num_gone = max(0, tail.compressed_at - window + 1 - policy.num_sinks) // block * block
                rows[layer, head] = max(0, num_leaving - num_gone)
                continue
            rows[layer, head] = count_kept(policy, footprint.curve, first_layer + layer, head, num_leaving)
            if policy.pruning is not None and policy.pruning.has_summary:
                dropped[layer, head] = num_leaving - rows[layer, head]
    num_tiles = (rows // block).astype(np.int32)
    total, most = int(num_tiles.sum()), int(num_tiles.max())
    tiles = np.zeros((*num_tiles.shape, most), dtype=np.int32)
    numbers = np.random.default_rng(seed).permutation(total).astype(np.int32)
    tiles[np.arange(most) < num_tiles[..., None]] = numbers
    num_raw = layout.num_raw_pages
    return CompressedState(
        length=length,
        tail=tail,
        staged_start=length,
        input_start=length,
        tiles=tiles,
        num_tiles=num_tiles,
        num_dropped=dropped,
        raw_pages=np.arange(num_raw, dtype=np.int64),
        tile_pages=np.arange(num_raw, num_raw + layout.tile_pages_for(total), dtype=np.int64),
        staged_pages=np.zeros((layout.num_layers, 0), dtype=np.int64),
    )


def number_pages(states: Mapping[int, CompressedState]) -> int:
    """How many pages the states name."""
    parts = [part for state in states.values() for part in (state.raw_pages, state.tile_pages)]
    return len(np.unique(np.concatenate(parts))) if parts else 0
