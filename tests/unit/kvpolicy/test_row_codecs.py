"""Stored rows are packed, whole in themselves, close to what they stand for, and equal on every machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvpolicy.packing import BitLayout
from swarm.kvpolicy.row_codecs import (
    Axes,
    RawCodec,
    TokenCodec,
    hadamard_axes,
    mix_equal_widths,
    normal_levels,
    plan_widths,
)
from swarm.kvpolicy.selection import select_kept


def random_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(num_heads: int = 2, dim: int = 64, key_bits: float = 4, value_bits: float = 4) -> TokenCodec:
    axes = hadamard_axes(num_heads, dim)
    layouts = [BitLayout(plan_widths([1.0] * dim, bits)) for bits in (key_bits, value_bits)]
    return TokenCodec(axes, axes, *layouts)


@given(
    groups=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8)), min_size=1, max_size=4), seed=st.integers(0, 99)
)
def test_packed_codes_come_back(groups: list[tuple[int, int]], seed: int) -> None:
    """Every mix of widths, odd ones too, is stored without loss in the bytes its widths say."""
    layout = BitLayout.of_groups(40, sorted(((8 * count, bits) for count, bits in groups[:1]), key=lambda g: -g[1]))
    limits = torch.tensor([1 << width for width in layout.widths])
    codes = (torch.rand(5, 40, generator=torch.Generator().manual_seed(seed)) * limits).to(torch.uint8)
    rows = layout.pack(codes)
    assert rows.shape == (5, sum(layout.widths) // 8) and rows.dtype == torch.uint8
    assert torch.equal(layout.unpack(rows), codes)


def test_layouts_that_fill_no_bytes_are_refused() -> None:
    """Half bytes would shift everything behind them."""
    with pytest.raises(ValueError, match="whole bytes"):
        BitLayout([2, 2, 2])
    with pytest.raises(ValueError, match="never rising"):
        BitLayout([2, 2, 2, 2, 4, 4])


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 4, 6])
def test_planned_widths_stay_within_their_bits_and_favour_the_large(bits: float) -> None:
    """The budget is a promise, and axes that matter get more of it."""
    widths = plan_widths([2.0**-rank for rank in range(64)], bits)
    assert len(widths) == 64 and sum(widths) <= bits * 64
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
    BitLayout(widths)


def test_four_bits_are_as_close_as_they_should_be() -> None:
    """The best 4-bit levels for a normal distribution leave about 1 % of the energy."""
    codec = build()
    keys, values = random_numbers(300, 64), random_numbers(300, 64, seed=1) * 7
    heads = torch.arange(300) % 2
    rows = codec.encode(keys, values, heads)
    assert rows.shape == (300, codec.row_bytes) and codec.row_bytes == 32 + 32 + 4
    for seen, expected in zip(codec.decode(rows, heads), (keys, values), strict=True):
        assert float((seen - expected).square().mean() / expected.square().mean()) < 0.015


def test_rows_can_be_moved_and_dropped_without_touching_others() -> None:
    """Compaction moves bytes; nothing is ever quantised twice."""
    codec = build()
    keys, values, heads = random_numbers(32, 64), random_numbers(32, 64, seed=1), torch.zeros(32, dtype=torch.int64)
    rows = codec.encode(keys, values, heads)
    kept = torch.tensor([3, 5, 20])
    assert torch.equal(codec.encode(keys[kept], values[kept], heads[kept]), rows[kept])
    assert torch.equal(codec.decode(rows[kept], heads[kept])[0], codec.decode(rows, heads)[0][kept])


def test_scores_can_be_taken_in_the_stored_coordinates() -> None:
    """A server rotates one query instead of a thousand keys; both must mean the same."""
    codec = build()
    heads = torch.ones(40, dtype=torch.int64)
    rows = codec.encode(random_numbers(40, 64), random_numbers(40, 64, seed=1), heads)
    query = random_numbers(64, seed=2)
    coordinates, _ = codec.decode_coordinates(rows)
    indirect = coordinates @ (codec.keys.decode[1] @ query) + codec.keys.mean[1] @ query
    torch.testing.assert_close(indirect, codec.decode(rows, heads)[0] @ query, atol=1e-4, rtol=1e-4)


def test_mixing_axes_of_one_width_changes_no_vector() -> None:
    """It only turns the coordinates among themselves."""
    dim, sizes = 16, [2.0**-rank for rank in range(16)]
    decode = random_numbers(1, dim, dim)
    axes = Axes(mean=random_numbers(1, dim), encode=torch.linalg.inv(decode), decode=decode)
    mixed = mix_equal_widths(axes, sizes, plan_widths(sizes, 3))
    vector = random_numbers(3, dim, seed=5)
    back = (vector - mixed.mean) @ mixed.encode[0] @ mixed.decode[0] + mixed.mean
    torch.testing.assert_close(back, vector, atol=1e-3, rtol=1e-3)


def test_sixteen_bit_rows_are_exact() -> None:
    """A policy that only drops must not change what it keeps."""
    codec = RawCodec(8, 4)
    keys, values = random_numbers(5, 8).half(), random_numbers(5, 4).half()
    heads = torch.zeros(5, dtype=torch.int64)
    seen_keys, seen_values = codec.decode(codec.encode(keys, values, heads), heads)
    assert torch.equal(seen_keys, keys.float()) and torch.equal(seen_values, values.float())


def test_levels_are_symmetric_and_rise() -> None:
    """Levels are computed, not typed in; these are the properties that would show a slip."""
    for width in (1, 2, 3, 4, 8):
        levels = normal_levels(width)
        assert len(levels) == 1 << width and bool((levels[1:] > levels[:-1]).all())
        torch.testing.assert_close(levels, -levels.flip(0))
    torch.testing.assert_close(normal_levels(1), torch.tensor([-0.798, 0.798]), atol=1e-3, rtol=0)


def test_selection_breaks_ties_by_position_and_keeps_recent_tokens() -> None:
    """Two servers with equal scores must keep equal sets, or failover gives other tokens."""
    scores = torch.tensor([5.0, 1.0, 1.0, 1.0, float("nan"), 0.0])
    positions = torch.tensor([4, 9, 10, 30, 31, 40])
    assert select_kept(scores, positions, 4, protected_from=40).tolist() == [0, 2, 3, 5]
    assert select_kept(scores, positions, 2, protected_from=31).tolist() == [4, 5]
    assert select_kept(scores, positions, 6, protected_from=100).tolist() == [0, 1, 2, 3, 4, 5]
