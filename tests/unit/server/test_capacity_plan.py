"""How many blocks and KV tokens a device is planned to hold."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.models.block_sizes import BlockSizes
from swarm.server.capacity_plan import DeviceMemory, plan_capacity, spread_evenly

GIB = 2**30
MIB = 2**20


def make_sizes(*weight_bytes: int, precision: str = "bf16", kv_bytes_per_token: int = 4096) -> BlockSizes:
    return BlockSizes(
        precision=precision,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        step_bytes_per_token=1024,
        scratch_bytes=MIB,
    )


def make_device(free_gib: float, *, is_host: bool = False) -> DeviceMemory:
    free_bytes = int(free_gib * GIB)
    name = "main memory" if is_host else "cuda:0"
    return DeviceMemory(name=name, free_bytes=free_bytes, total_bytes=max(free_bytes, 16 * GIB), is_host=is_host)


def test_blocks_and_tokens_fill_a_gpu_and_the_sentence_says_so() -> None:
    """A volunteer must see at one glance what the machine takes on, and why not more."""
    plan = plan_capacity(make_sizes(*[GIB] * 80, precision="nf4"), make_device(16), kv_tokens=50_000)
    assert plan.num_blocks == 13  # 13 x (1 GiB + 195 MiB) are below the 15.5 GiB usable, 14 are not
    assert plan.kv_bytes == 13 * 50_000 * 4096
    assert plan.num_streamed == 0
    assert plan.sentence == (
        "13 of 80 blocks in nf4 (1.00 GiB each) and 2.48 GiB of KV (50,000 tokens) "
        "fit the 15.5 GiB usable of cuda:0 (16.0 GiB free)"
    )


def test_kv_memory_in_bytes_is_kept_whatever_the_number_of_blocks() -> None:
    """`--kv-memory 4GiB` means 4 GiB; how many tokens that is depends on the blocks."""
    plan = plan_capacity(make_sizes(*[GIB] * 80), make_device(16), kv_bytes=4 * GIB)
    assert plan.num_blocks == 11
    assert plan.kv_bytes == 4 * GIB
    assert plan.kv_tokens == 4 * GIB // (11 * 4096)


def test_what_blocks_leave_of_a_gpu_goes_to_the_cache_but_not_main_memory() -> None:
    """Memory of a GPU is of no use to others; main memory is."""
    sizes = make_sizes(*[GIB] * 4)
    assert plan_capacity(sizes, make_device(16)).kv_bytes > 11 * GIB
    on_host = plan_capacity(sizes, make_device(16, is_host=True))
    assert on_host.num_blocks == 4
    assert on_host.kv_bytes <= 4 * GIB


def test_main_memory_is_never_taken_whole() -> None:
    """A machine that swaps serves nobody, and its owner does not come back."""
    device = make_device(16, is_host=True)
    plan = plan_capacity(make_sizes(*[GIB] * 80), device)
    assert plan.weight_bytes + plan.kv_bytes <= 0.86 * 16 * GIB
    small = DeviceMemory(name="main memory", free_bytes=GIB, total_bytes=2 * GIB, is_host=True)
    assert small.usable_bytes == GIB // 2


def test_unequal_blocks_fit_wherever_the_span_starts() -> None:
    """Which blocks will be chosen is not known yet: the heaviest stretch must fit."""
    sizes = make_sizes(GIB, GIB, GIB, 4 * GIB, 4 * GIB, GIB)
    plan = plan_capacity(sizes, make_device(10), kv_tokens=1000)
    assert plan.num_blocks == 3  # any 3 are at most 9 GiB; 4 may be 10
    exact = plan_capacity(sizes, make_device(10), kv_tokens=1000, span=Span(start=0, end=4))
    assert exact.num_blocks == 4
    assert exact.weight_bytes == 7 * GIB


@pytest.mark.parametrize("kwargs", [{"num_blocks": 30}, {"span": Span(start=10, end=40)}])
def test_more_blocks_than_fit_are_refused_with_what_would_help(kwargs: dict[str, object]) -> None:
    """Found out before an hour of download; each way out is a flag to copy."""
    with pytest.raises(BadInputError) as caught:
        plan_capacity(make_sizes(*[GIB] * 80), make_device(16), kv_bytes=GIB, **kwargs)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "14 would" in message
    for flag in ("--num-blocks 14", "--weights nf4", "--offload", "less --kv-memory"):
        assert flag in message


def test_not_one_block_is_a_clear_refusal() -> None:
    """The commonest case of a large model on a small machine."""
    with pytest.raises(BadInputError, match=r"not one block in nf4 \(20\.00 GiB\) fits the 15\.5 GiB usable of cuda:0"):
        plan_capacity(make_sizes(20 * GIB, precision="nf4"), make_device(16))


def test_too_little_kv_memory_is_refused() -> None:
    """A server without room for one conversation would only send clients away."""
    with pytest.raises(BadInputError, match="holds 2 tokens of 4 blocks"):
        plan_capacity(make_sizes(*[GIB] * 4), make_device(16), kv_bytes=40_000, num_blocks=4)


def test_blocks_beyond_the_memory_stream() -> None:
    """As many as possible stay, beside two places for those on their way."""
    plan = plan_capacity(make_sizes(*[GIB] * 80), make_device(16), kv_bytes=GIB, num_blocks=40, may_stream=True)
    assert plan.num_blocks == 40
    assert plan.num_streamed == 40 - 12
    assert plan.weight_bytes == 14 * GIB
    assert "28 of them stream in for each step, which is slow" in plan.sentence


def test_streaming_is_not_used_unasked_for() -> None:
    """Without a number of blocks, more and slower blocks are no gain to the swarm."""
    plan = plan_capacity(make_sizes(*[GIB] * 80), make_device(16), kv_bytes=GIB, may_stream=True)
    assert (plan.num_blocks, plan.num_streamed) == (14, 0)


def test_streaming_too_needs_room_for_two_blocks() -> None:
    """One computes while the next arrives."""
    with pytest.raises(BadInputError, match=r"4 blocks in bf16 .* do not fit"):
        plan_capacity(make_sizes(*[9 * GIB] * 4), make_device(16), kv_bytes=GIB, num_blocks=4, may_stream=True)


@given(
    weight_mib=st.lists(st.integers(1, 4000), min_size=1, max_size=20),
    free_mib=st.integers(1, 64_000),
    kv_tokens=st.one_of(st.none(), st.integers(64, 10_000)),
    is_host=st.booleans(),
)
def test_plans_never_exceed_the_memory_and_never_waste_a_block(
    weight_mib: list[int], free_mib: int, kv_tokens: int | None, is_host: bool
) -> None:
    """An optimistic plan ends in an out-of-memory error in the middle of somebody's session."""
    sizes = make_sizes(*[mib * MIB for mib in weight_mib])
    device = DeviceMemory(name="x", free_bytes=free_mib * MIB, total_bytes=64_000 * MIB, is_host=is_host)
    try:
        plan = plan_capacity(sizes, device, kv_tokens=kv_tokens)
    except BadInputError:
        assert max(weight_mib) * MIB + 64 * 4096 > device.usable_bytes * 0.7 - 8 * MIB - (kv_tokens or 0) * 4096
        return
    assert plan.weight_bytes + plan.kv_bytes + sizes.step_bytes(512) <= device.usable_bytes
    stretches = zip(*(sizes.weight_bytes[first:] for first in range(plan.num_blocks)), strict=False)
    assert plan.weight_bytes == max(map(sum, stretches))
    assert plan.kv_tokens >= (kv_tokens or 64)


def test_streamed_layers_are_spread_evenly() -> None:
    """Each should have as long as possible to arrive while others compute."""
    assert spread_evenly(8, 2) == [2, 6]
    assert spread_evenly(4, 4) == [0, 1, 2, 3]
    assert spread_evenly(5, 0) == []
    for num_layers, num_streamed in itertools.product(range(1, 12), range(1, 12)):
        if num_streamed <= num_layers:
            chosen = spread_evenly(num_layers, num_streamed)
            assert len(set(chosen)) == num_streamed
            assert chosen == sorted(chosen)
            assert chosen[0] >= 0
            assert chosen[-1] < num_layers
