"""How blocks are shared out among devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.models.block_sizes import BlockSizes
from swarm.server.capacity_plan import DeviceMemory
from swarm.server.spread_plan import plan_spread, split_blocks

GIB = 2**30


def make_sizes(*weight_bytes: int) -> BlockSizes:
    return BlockSizes(
        precision="nf4",
        weight_bytes=weight_bytes,
        kv_bytes_per_token=4096,
        step_bytes_per_token=1024,
        scratch_bytes=2**20,
    )


def gpu(number: int, free_gib: float) -> DeviceMemory:
    free_bytes = int(free_gib * GIB)
    return DeviceMemory(name=f"cuda:{number}", free_bytes=free_bytes, total_bytes=free_bytes, is_host=False)


def test_a_larger_gpu_gets_more_blocks() -> None:
    """People own a 24 GB and an 8 GB card, not two equal ones."""
    plan = plan_spread(make_sizes(*[GIB] * 40), [gpu(0, 24), gpu(1, 8)], Span(start=10, end=30), kv_tokens=10_000)
    assert [share.device for share in plan.shares] == ["cuda:0", "cuda:1"]
    assert [str(share.span) for share in plan.shares] == ["10:25", "25:30"]
    assert plan.shares[0].kv_bytes == 15 * 10_000 * 4096
    assert plan.sentence == ("blocks 10:25 on cuda:0, 25:30 on cuda:1 in nf4, with room for 10,000 KV tokens on each")


def test_what_is_left_goes_to_the_cache() -> None:
    """A position takes room on every device, so the tightest one decides."""
    plan = plan_spread(make_sizes(*[GIB] * 8), [gpu(0, 8), gpu(1, 8)], Span(start=0, end=8))
    assert [len(share.span) for share in plan.shares] == [4, 4]
    assert 3 * GIB < plan.shares[0].kv_bytes < 4 * GIB
    assert plan.kv_tokens == plan.shares[0].kv_bytes // (4 * 4096)


def test_a_span_that_does_not_fit_is_refused() -> None:
    """With what was asked for, what there is, and what to change."""
    with pytest.raises(BadInputError, match=r"blocks 0:8 in nf4 .* do not fit .*cuda:0.* \+ .*cuda:1.*--num-blocks"):
        plan_spread(make_sizes(*[GIB] * 8), [gpu(0, 4), gpu(1, 4)], Span(start=0, end=8))


@given(
    needs=st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    usable=st.lists(st.integers(0, 10_000), min_size=1, max_size=4),
)
def test_splits_are_complete_fit_and_are_balanced(needs: list[int], usable: list[int]) -> None:
    """No block is lost or double, none is where it has no room, and no single move would help the fullest device."""
    counts = split_blocks(needs, usable)
    if counts is None:
        # Whatever the order, at most one block's room is lost at the end of each device.
        assert sum(usable) < sum(needs) + len(usable) * max(needs)
        return
    assert sum(counts) == len(needs)
    first, shares = 0, []
    for count, room in zip(counts, usable, strict=True):
        used = sum(needs[first : first + count])
        assert used <= room
        shares.append(used / room if room else 0.0)
        first += count
    # The best possible fill can not be below the average, nor can ours be above it by more than one block.
    average = sum(needs) / sum(usable)
    smallest = min(room for room in usable if room)
    assert average - 1e-9 <= max(shares) <= average + len(usable) * max(needs) / smallest + 1e-9
