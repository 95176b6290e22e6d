"""Bytes that are announced and admitted by are the bytes that sequences will really hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from swarm.errors import UnsupportedModelError
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.settings import find_policy
from swarm.server.policy_layers import PolicyLayers, PolicyWish

NUM_LAYERS, HEADS, DIM = 4, 2, 16
TABLE_BYTES = {"tile": 4, "head": 12}
"""What the oracle counts for page tables, which are no pages."""
SERVED = ("pyramid", "gear", "pyramid+gear", "smallest")


def shapes(*dims: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(num_kv_heads=HEADS, key_dim=dim, value_dim=DIM) for dim in dims]


def build(policy: str, *, windows: tuple[int, ...] = (0, 0, 0), max_positions: int = 4096) -> PolicyLayers:
    wish = PolicyWish(policy=find_policy(policy), num_layers=NUM_LAYERS, first_layer=1, max_positions=max_positions)
    return wish.build(shapes(DIM, DIM, DIM), windows, page_tokens=16, itemsize=4)


def oracle_bytes(layers: PolicyLayers, num_tokens: int) -> int:
    """Bytes of slots and tiles of a sequence that came as one input, by the oracle's own account."""
    cache = ReferenceCache({each.layer: each for each in layers.settings})
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        keys = torch.randn(HEADS, num_tokens, DIM, generator=generator)
        cache.attend(
            layer,
            torch.randn(2 * HEADS, num_tokens, DIM, generator=generator),
            keys,
            torch.randn(HEADS, num_tokens, DIM, generator=generator),
            torch.randn(num_tokens, 32, generator=generator),
            scaling=DIM**-0.5,
        )
    for each in cache.layers.values():
        each.settle()  # what is due when the next step begins
    heads = [rows for each in cache.layers.values() for rows in each.heads]
    num_tiles = sum(-(-len(rows.positions) // 16) for rows in heads)
    total = cache.count_bytes() - num_tiles * TABLE_BYTES["tile"] - len(heads) * TABLE_BYTES["head"]
    if not layers.has_scores:  # the oracle's slots have room for scores under every policy
        total -= len(heads) * layers.layout.slots_per_layer * 2
    return total


@pytest.mark.parametrize("policy", SERVED)
@pytest.mark.parametrize("windows", [(0, 0, 0), (40, 0, 40)])
def test_bytes_are_those_that_the_oracle_holds(policy: str, windows: tuple[int, ...]) -> None:
    """Capacity is promised before a session is there; the promise must be kept to the byte."""
    layers = build(policy, windows=windows)
    for num_tokens in (1, 20, 36, 52, 100, 340, 852):  # where events are, as after single tokens
        assert layers.footprint.layout_bytes(num_tokens) == oracle_bytes(layers, num_tokens), num_tokens
    for num_tokens in (19, 45, 93, 333):
        held = oracle_bytes(layers, num_tokens)
        assert 0 <= layers.footprint.layout_bytes(num_tokens) - held <= 2 * HEADS * layers.footprint.tile_bytes


@pytest.mark.parametrize("policy", SERVED)
def test_pages_hold_the_layout_with_little_slack(policy: str) -> None:
    """What sessions get is whole pages."""
    footprint = build(policy).footprint
    for num_tokens in (1, 100, 2048):
        pages = footprint.sequence_bytes(num_tokens)
        assert pages % footprint.page_bytes == 0
        assert footprint.layout_bytes(num_tokens) <= pages
    assert footprint.sequence_bytes(0) == footprint.layout_bytes(0) == 0
    assert footprint.sequence_bytes(2048) < 1.15 * footprint.layout_bytes(2048) + 2 * footprint.page_bytes


def test_a_token_is_told_at_a_usual_context() -> None:
    """Servers of the same policy are compared by what they announce."""
    footprint = build("pyramid+gear").footprint
    assert footprint.bytes_per_token == -(-footprint.sequence_bytes(2048) // 2048)
    short = build("pyramid+gear", max_positions=512).footprint
    assert short.bytes_per_token == -(-short.sequence_bytes(512) // 512)
    assert short.bytes_per_token < short.full_bytes(16) // 16


def test_reading_an_input_takes_full_pages_up_to_a_chunk() -> None:
    """The largest need of a session must be known before it is let in."""
    footprint = build("gear").footprint
    assert footprint.full_bytes(17) == 2 * 3 * footprint.page_bytes
    assert footprint.staging_bytes(100) == footprint.full_bytes(100)
    assert footprint.staging_bytes(9000) == footprint.full_bytes(2048)


def test_positions_take_as_much_as_the_context_needs() -> None:
    """Two bytes reach up to 32767, and where rows stand in order none are needed."""
    assert build("pyramid").position_bytes == 2
    assert build("pyramid", max_positions=32768).position_bytes == 4
    assert build("gear").position_bytes == 0
    assert build("gear", windows=(0, 40, 0)).position_bytes == 2


def test_layers_of_different_sizes_are_refused() -> None:
    """One size of tiles serves all layers; the server says so and keeps such models exactly."""
    wish = PolicyWish(policy=find_policy("gear"), num_layers=2, first_layer=0, max_positions=512)
    with pytest.raises(UnsupportedModelError, match="tokens of different sizes"):
        wish.build(shapes(16, 32), (0, 0), page_tokens=16, itemsize=4)
