"""How many blocks and KV tokens fit a device, decided before anything is loaded. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.datatypes import Span
    from swarm.models.block_sizes import BlockSizes

__all__ = [
    "MIN_KV_TOKENS",
    "STEP_TOKENS",
    "CapacityPlan",
    "DeviceMemory",
    "check_room_to_read",
    "format_size",
    "note_on_inputs",
    "plan_capacity",
    "spread_evenly",
]

_GIB: Final = 2**30
_MIB: Final = 2**20
_KV_SHARE: Final = 0.25
"""Part of the usable memory that goes to the KV cache when nobody says how much, and blocks could fill it all."""
_ENOUGH_KV_TOKENS: Final = 65_536
"""When nobody says how much, further blocks help the swarm more than more tokens than these."""
MIN_KV_TOKENS: Final = 64
"""A server with room for less serves nobody."""
STEP_TOKENS: Final = 512
"""Longest step of the engine (SchedulerConfig.max_step_tokens), which sets what a step needs beside the weights."""
_HOST_RESERVE_SHARE: Final = 0.15
_MIN_HOST_RESERVE_BYTES: Final = _GIB
_GPU_RESERVE_SHARE: Final = 0.02
_MIN_GPU_RESERVE_BYTES: Final = 512 * _MIB
_NUM_STAGED: Final = 2
"""Streamed blocks on the device at a time: one computes while the next arrives."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory where blocks could be put."""

    name: str
    """For people: `cuda:0`, `main memory`."""
    free_bytes: int
    """What a program could take now."""
    total_bytes: int
    is_host: bool
    """Main memory, which the rest of the machine lives in too."""

    @property
    def reserve_bytes(self) -> int:
        """What is left alone: for the system and other programs, or a GPU's libraries and fragmentation.

        On the host a seventh of all, at least 1 GiB, but on small machines never more than half of what is free.
        """
        if self.is_host:
            reserve = max(_MIN_HOST_RESERVE_BYTES, int(self.total_bytes * _HOST_RESERVE_SHARE))
        else:
            reserve = max(_MIN_GPU_RESERVE_BYTES, int(self.total_bytes * _GPU_RESERVE_SHARE))
        return min(reserve, self.free_bytes // 2)

    @property
    def usable_bytes(self) -> int:
        return max(self.free_bytes - self.reserve_bytes, 0)

    def __str__(self) -> str:
        return f"{_gib(self.usable_bytes)} usable of {self.name} ({_gib(self.free_bytes)} free)"


@dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """What a server takes on."""

    num_blocks: int
    """Blocks it holds, those streamed included."""
    num_streamed: int
    """Blocks among them whose weights stay in host memory or on disk until they run."""
    weight_bytes: int
    """At most so much memory for weights on the device."""
    kv_bytes: int
    kv_tokens: int
    """Positions that fit `kv_bytes` in all blocks of the span."""
    sentence: str
    """The plan in words, with its reasons."""

    def sentence_for(self, kv_tokens: int) -> str:
        """The same words once it is known how many tokens the memory really holds."""
        return self.sentence.replace(f"({self.kv_tokens:,} tokens)", f"({kv_tokens:,} tokens)")


@dataclass(frozen=True, kw_only=True)
class _Room:
    """The sizes at hand, and what KV memory was asked for."""

    sizes: BlockSizes
    usable_bytes: int
    kv_bytes: int | None
    kv_tokens: int | None

    def kv_bytes_for(self, num_blocks: int) -> int:
        """KV memory that must be left free for so many blocks."""
        per_token = num_blocks * self.sizes.kv_bytes_per_token
        if self.kv_tokens is not None:
            return self.kv_tokens * per_token
        if self.kv_bytes is not None:
            return self.kv_bytes
        share = min(int(self.usable_bytes * _KV_SHARE), _ENOUGH_KV_TOKENS * per_token)
        return max(share, MIN_KV_TOKENS * per_token)

    def left_bytes(self, num_blocks: int) -> int:
        """What weights may take when so many blocks are held."""
        return self.usable_bytes - self.kv_bytes_for(num_blocks) - self.sizes.step_bytes(STEP_TOKENS)


def plan_capacity(
    sizes: BlockSizes,
    device: DeviceMemory,
    *,
    span: Span | None = None,
    num_blocks: int | None = None,
    kv_bytes: int | None = None,
    kv_tokens: int | None = None,
    may_stream: bool = False,
) -> CapacityPlan:
    """How many blocks to hold and how much KV memory to give them.

    Args:
        sizes: of the whole model's blocks, at the precision wanted.
        span: the blocks asked for; or
        num_blocks: how many were asked for. With neither, as many as fit: whichever blocks they will be.
        kv_bytes: KV memory asked for; or
        kv_tokens: positions asked for. With neither, up to a quarter of the memory; on a GPU all that blocks leave.
        may_stream: blocks beyond the memory may stream in from elsewhere (swarm.models.offload).

    Raises:
        BadInputError: what was asked for does not fit, or not even one block; the message says what would.
    """
    if None not in (span, num_blocks) or None not in (kv_bytes, kv_tokens):
        raise ValueError("give span or num_blocks, and kv_bytes or kv_tokens")
    room = _Room(sizes=sizes, usable_bytes=device.usable_bytes, kv_bytes=kv_bytes, kv_tokens=kv_tokens)
    asked = len(span) if span is not None else num_blocks
    _check_kv(room, asked or 1)
    num_fit = _count_fitting(room)
    if asked is None and num_fit:
        return _plan(room, device, num_fit, 0, _most_bytes(sizes.weight_bytes, num_fit))
    wanted = asked or 1
    if span is not None:
        weight_bytes = sum(sizes.weight_bytes[span.start : span.end])
    else:
        weight_bytes = _most_bytes(sizes.weight_bytes, wanted)
    if weight_bytes <= room.left_bytes(wanted):
        return _plan(room, device, wanted, 0, weight_bytes)
    num_resident = _count_resident(room, wanted)
    if may_stream and num_resident is not None:
        resident_bytes = (num_resident + _NUM_STAGED) * sizes.largest_bytes
        return _plan(room, device, wanted, wanted - num_resident, resident_bytes)
    raise BadInputError(_refusal(room, device, asked, span, num_fit, may_stream=may_stream))


def check_room_to_read(plan: CapacityPlan, sizes: BlockSizes) -> None:
    """Tokens stand uncompressed while they are read, so some must fit like this.

    Args:
        sizes: of the blocks with uncompressed pages.

    Raises:
        BadInputError: too few do.
    """
    per_token = plan.num_blocks * sizes.kv_bytes_per_token
    if plan.kv_bytes < MIN_KV_TOKENS * per_token:
        raise BadInputError(
            f"{format_size(plan.kv_bytes)} of KV hold {plan.kv_bytes // per_token} uncompressed tokens, which is what "
            f"prompts are while they are read: too few to serve anybody; give {format_size(1024 * per_token)} or more "
            "--kv-memory"
        )


def note_on_inputs(preset: str, kv_bytes: int, longest: str, enough_bytes: int) -> str:
    """What an operator should know of KV memory that compressed sessions fit, and long inputs do not.

    Args:
        preset: by which caches are kept.
        kv_bytes: the KV memory there is.
        longest: tokens of the longest input that fits, in words.
        enough_bytes: KV memory in which inputs have no such limit.
    """
    return (
        f"KV policy {preset} compresses an input once it has been read, and more than {longest} tokens of one do not "
        f"fit {format_size(kv_bytes)} of KV until then; give {-(-enough_bytes // _MIB)}MiB or more --kv-memory for "
        "longer ones"
    )


def spread_evenly(num_layers: int, num_streamed: int) -> list[int]:
    """Which layers of a span to stream: at even distances, so that each has the longest time to arrive."""
    return [(2 * index + 1) * num_layers // (2 * num_streamed) for index in range(num_streamed)]


def _count_fitting(room: _Room) -> int:
    """The largest number of consecutive blocks that fit, wherever they start."""
    sizes = room.sizes
    num_fit = 0
    for count in range(1, sizes.num_blocks + 1):
        if _most_bytes(sizes.weight_bytes, count) > room.left_bytes(count):
            break
        num_fit = count
    return num_fit


def _count_resident(room: _Room, num_blocks: int) -> int | None:
    """How many of `num_blocks` stay on the device while the others stream; None when not even streaming fits."""
    num_resident = room.left_bytes(num_blocks) // room.sizes.largest_bytes - _NUM_STAGED
    return min(num_resident, num_blocks) if num_resident >= 0 else None


def _most_bytes(weight_bytes: Sequence[int], count: int) -> int:
    """The heaviest `count` consecutive blocks: which ones a server will hold is decided later."""
    window = sum(weight_bytes[:count])
    most = window
    for first in range(len(weight_bytes) - count):
        window += weight_bytes[first + count] - weight_bytes[first]
        most = max(most, window)
    return most


def _check_kv(room: _Room, num_blocks: int) -> None:
    per_token = num_blocks * room.sizes.kv_bytes_per_token
    if room.kv_bytes is not None and room.kv_bytes < MIN_KV_TOKENS * per_token:
        raise BadInputError(
            f"--kv-memory of {format_size(room.kv_bytes)} holds {room.kv_bytes // per_token} tokens of {num_blocks} "
            f"block{'s' if num_blocks > 1 else ''}, too few to serve anybody; "
            f"give {format_size(1024 * per_token)} or more"
        )


def _plan(room: _Room, device: DeviceMemory, num_blocks: int, num_streamed: int, weight_bytes: int) -> CapacityPlan:
    sizes = room.sizes
    kv_bytes = room.kv_bytes_for(num_blocks)
    if room.kv_bytes is None and room.kv_tokens is None and not device.is_host:
        # What a GPU has is there to be used; main memory belongs to others too.
        kv_bytes = max(kv_bytes, device.usable_bytes - sizes.step_bytes(STEP_TOKENS) - weight_bytes)
    kv_tokens = kv_bytes // (num_blocks * sizes.kv_bytes_per_token)
    each = f"{format_size(round(sum(sizes.weight_bytes) / sizes.num_blocks))} each"
    if num_streamed:
        which = f"{num_streamed} of them stream" if num_streamed < num_blocks else "all of them stream"
        each = f"{each}; {which} in for each step, which is slow"
    sentence = (
        f"{num_blocks} of {sizes.num_blocks} blocks in {sizes.precision} ({each}) and {format_size(kv_bytes)} of KV "
        f"({kv_tokens:,} tokens) fit the {device}"
    )
    return CapacityPlan(
        num_blocks=num_blocks,
        num_streamed=num_streamed,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=kv_tokens,
        sentence=sentence,
    )


def _refusal(
    room: _Room, device: DeviceMemory, asked: int | None, span: Span | None, num_fit: int, *, may_stream: bool
) -> str:
    sizes = room.sizes
    kv = format_size(room.kv_bytes_for(asked or 1))
    is_kv_asked = room.kv_bytes is not None or room.kv_tokens is not None
    if is_kv_asked and room.left_bytes(asked or 1) <= 0:
        return f"{kv} of KV alone do not fit the {device}; give less --kv-memory"
    advice = ["--weights nf4"] if sizes.precision != "nf4" else []
    if not may_stream:
        advice.append("--offload")
    if is_kv_asked:
        advice.append("less --kv-memory")
    if asked is not None and num_fit:
        what = f"blocks {span}" if span is not None else f"{asked} blocks"
        advice.insert(0, f"--num-blocks {num_fit}")
        seen = f"{what} in {sizes.precision} and {kv} of KV do not fit the {device}, {num_fit} would"
    else:
        seen = (
            f"not one block in {sizes.precision} ({format_size(sizes.largest_bytes)}) fits the {device} "
            f"beside {kv} of KV and {format_size(sizes.step_bytes(STEP_TOKENS))} for computing"
        )
    return f"{seen}; free memory, or try {' or '.join(advice)}" if advice else f"{seen}; free memory"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"


def format_size(size_bytes: int) -> str:
    """`459.1 MiB`, `1.59 GiB`."""
    if size_bytes >= _GIB:
        return f"{size_bytes / _GIB:.2f} GiB"
    return f"{size_bytes / _MIB:.1f} MiB"
