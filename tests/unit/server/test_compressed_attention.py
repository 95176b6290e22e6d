"""The compiled attention over compressed sequences gives what the open form gives, whatever a layer does besides."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from swarm.kvcache.compressed_table import PartPlan
from swarm.kvpolicy.reference_cache import attend_over
from swarm.kvpolicy.settings import PRESETS
from swarm.kvpolicy.streaming import TailState
from swarm.server.engine.attention_kind import AttentionKind
from swarm.server.engine.compressed_attention import CompressedAttention, CompressedSlice
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compressed_store import CompressedStore
from swarm.server.engine.page_store import KVShape, PageStore
from swarm.server.engine.tile_attention import load_tile_attention
from swarm.server.policy_layers import PolicyLayers, PolicyWish

NUM_LAYERS = 2
LENGTH = 400
STORED_END = LENGTH - 28


@dataclass
class Memory:
    store: CompressedStore
    layers: PolicyLayers
    sequences: list[CompressedSequence]

    def slices(self, counts: Sequence[int]) -> list[CompressedSlice]:
        found, row = [], 0
        for sequence, count in zip(self.sequences, counts, strict=True):
            table = sequence.table
            plan = PartPlan(LENGTH, LENGTH + count, False, False, table.tail)
            found.append(CompressedSlice(row, row + count, plan, sequence))
            row += count
        return found


def fill(preset: str, shape: KVShape, *, dtype: torch.dtype = torch.float32, window: int = 0) -> Memory:
    """Three sequences of random content; heads hold different numbers of rows, one of them none."""
    policy = PRESETS[preset]
    wish = PolicyWish(policy=policy, num_layers=NUM_LAYERS, first_layer=0, max_positions=512)
    shapes = [shape] * NUM_LAYERS
    layers = wish.build(shapes, [window] * NUM_LAYERS, page_tokens=16, itemsize=dtype.itemsize)
    pages = PageStore(
        shapes, memory_bytes=16 << 20, page_tokens=16, dtype=dtype, device="cpu", row_values=layers.row_values
    )
    store = CompressedStore(
        pages,
        policy=policy,
        row_bytes=layers.settings[0].codec.row_bytes,
        position_bytes=layers.position_bytes,
        has_scores=layers.has_scores,
    )
    generator = torch.Generator().manual_seed(1)
    random = np.random.default_rng(1)
    heads = shape.num_kv_heads
    sequences = []
    for number in range(3):
        sequence = CompressedSequence(store, store.new_table(NUM_LAYERS), first_layer=0)
        table = sequence.table
        table.add_tiles(random.integers(0 if number else 1, 6, (NUM_LAYERS, heads)).astype(np.int32))
        store.own_raw(table)
        table.length, table.tail = LENGTH, TailState(STORED_END, compressed_at=LENGTH - 1)
        if layers.settings[0].has_summary:
            table.num_dropped[:] = random.integers(0, 3, (NUM_LAYERS, heads)) * 50
        every, within = table.tile_places(
            np.arange(len(table.tile_pages) * table.layout.tiles_per_page, dtype=np.int32)
        )
        places = (
            torch.from_numpy(np.repeat(every, 16)),
            torch.from_numpy(np.repeat(within, 16)),
            torch.arange(16).repeat(len(every)),
        )
        num_rows = len(places[0])
        keys = torch.randn(num_rows, shape.key_dim, generator=generator)
        values = torch.randn(num_rows, shape.value_dim, generator=generator)
        coded = layers.settings[0].codec.encode(keys, values, torch.zeros(num_rows, dtype=torch.int64))
        positions = torch.randint(4, STORED_END, (num_rows,), generator=generator)
        store.write_rows(places, coded, positions, torch.zeros(num_rows))
        slots = np.arange(table.layout.slots_per_layer)
        raw = [
            torch.randn(NUM_LAYERS, len(slots), heads, dim, generator=generator)
            for dim in (shape.key_dim, shape.value_dim)
        ]
        store.write_slots(*store.slot_places(table, np.arange(NUM_LAYERS)[:, None], slots[None]), *raw)
        sequences.append(sequence)
    return Memory(store, layers, sequences)


GQA = KVShape(3, 64, 64)
CASES = {
    "three queries of a head": ("pyramid+gear", GQA, 9, torch.float32, 0, None, False),
    "as many KV heads": ("pyramid+gear", KVShape(4, 16, 16), 4, torch.float32, 0, None, False),
    "eight of one head": ("gear", KVShape(2, 64, 64), 16, torch.float32, 0, None, False),
    "two of one head, uneven dimensions": ("pyramid", KVShape(2, 24, 8), 4, torch.float32, 0, None, False),
    "only dropped": ("pyramid", GQA, 9, torch.float32, 0, None, False),
    "16-bit model": ("pyramid+gear", GQA, 9, torch.bfloat16, 0, None, False),
    "capped": ("pyramid+gear", GQA, 9, torch.float32, 0, 5.0, False),
    "learned sinks": ("gear", GQA, 9, torch.float32, 0, None, True),
    "window": ("pyramid+gear", GQA, 9, torch.float32, 150, None, False),
    "window, capped, sinks": ("gear", GQA, 9, torch.float32, 150, 5.0, True),
    "without a summary": ("pyramidinfer", GQA, 9, torch.float32, 0, None, False),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("case", CASES)
def test_compiled_and_open_attention_agree(case: str, counts: tuple[int, ...], threads: int) -> None:
    """One of them serves where there is a compiler, the other everywhere else: both must be right."""
    preset, shape, num_heads, dtype, window, softcap, has_sinks = CASES[case]
    memory = fill(preset, shape, dtype=dtype, window=window)
    generator = torch.Generator().manual_seed(2)
    compiled = CompressedAttention(memory.store, memory.layers.settings)
    openly = CompressedAttention(memory.store, memory.layers.settings, allows_kernel=False)
    assert compiled.tiles is not None and openly.tiles is None
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    kind = AttentionKind(scaling=0.2, softcap=softcap, sinks=sinks, window=window)
    slices = memory.slices(counts)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = compiled.plan(slices), openly.plan(slices)
        for layer in range(NUM_LAYERS):
            num_rows = sum(counts)
            query, key, value = (
                torch.randn(heads, num_rows, dim, generator=generator).to(dtype)
                for heads, dim in (
                    (num_heads, shape.key_dim),
                    (shape.num_kv_heads, shape.key_dim),
                    (shape.num_kv_heads, shape.value_dim),
                )
            )
            key, value = steps[0].round(key[None])[0], steps[0].round(value[None])[0]
            found, expected = (torch.zeros(num_heads, num_rows, shape.value_dim, dtype=dtype) for _ in range(2))
            steps[0].attend(layer, layer, kind, query, key, value, found)
            steps[1].attend(layer, layer, kind, query, key, value, expected)
            tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("most_scores", [1 << 24, 1000])
@pytest.mark.parametrize("case", CASES)
def test_staged_tokens_attend_over_all_that_is_held_and_each_other(
    monkeypatch: pytest.MonkeyPatch, case: str, most_scores: int
) -> None:
    """A long follow-up reads a whole context that is decoded once for all heads, in bounded memory."""
    monkeypatch.setattr("swarm.server.engine.open_attention._MAX_SCORES", most_scores)
    preset, shape, num_heads, dtype, window, softcap, has_sinks = CASES[case]
    memory = fill(preset, shape, dtype=dtype, window=window)
    generator = torch.Generator().manual_seed(3)
    sinks = torch.randn(num_heads, generator=generator) if has_sinks else None
    kind = AttentionKind(scaling=0.2, softcap=softcap, sinks=sinks, window=window)
    sequence, count, heads = memory.sequences[0], 40, shape.num_kv_heads
    table, layer = sequence.table, 1
    plan = table.plan(LENGTH, count, is_unfinished=True)
    table.reserve(table.pages_wanted(plan, 0))
    table.grow(plan)
    attention = CompressedAttention(memory.store, memory.layers.settings)
    step = attention.plan([CompressedSlice(0, count, plan, sequence)])
    query, key, value = (
        torch.randn(number, count, dim, generator=generator).half().to(dtype)
        for number, dim in ((num_heads, shape.key_dim), (heads, shape.key_dim), (heads, shape.value_dim))
    )
    found = torch.zeros(num_heads, count, shape.value_dim, dtype=dtype)
    step.attend(layer, layer, kind, query, key, value, found)
    raw = step._read_kept(layer, layer, step.staged[0], window).raw
    new = torch.arange(LENGTH, LENGTH + count)
    expected = []
    for head in range(heads):
        coded, positions, _ = memory.store.read_head(table, layer, head)
        stored = memory.layers.settings[layer].codec.decode(coded, torch.full((len(coded),), head))
        if positions is None or not window:
            positions = torch.zeros(len(coded), dtype=torch.int64)
        places = torch.cat((raw.positions, positions, new))
        is_hidden = places > new[:, None]
        if window:
            is_hidden |= places <= new[:, None] - window
        own = slice(head * num_heads // heads, (head + 1) * num_heads // heads)
        outputs = attend_over(
            query[own].float(),
            torch.cat((raw.keys[head].float(), stored[0], key[head].float())),
            torch.cat((raw.values[head].float(), stored[1], value[head].float())),
            is_hidden=is_hidden,
            biases=torch.cat((raw.biases[head], torch.zeros(len(coded) + count))),
            scaling=0.2,
            softcap=softcap,
            sink_scores=sinks[own] if sinks is not None else None,
        )
        expected.append(outputs.to(dtype))
    tolerance = 1e-2 if dtype is torch.bfloat16 else 2e-5
    torch.testing.assert_close(found, torch.cat(expected), rtol=tolerance, atol=tolerance)


def test_without_the_compiler_there_is_the_open_form(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that lacks numba serves compressed sessions all the same, and says once that it is slow."""
    memory = fill("gear", GQA)
    monkeypatch.setitem(sys.modules, "swarm.server.engine.tile_kernel", None)
    monkeypatch.delattr("swarm.server.engine.tile_kernel", raising=False)
    with caplog.at_level("WARNING"):
        assert load_tile_attention(memory.store, memory.layers.settings) is None
    assert "numba" in caplog.text
