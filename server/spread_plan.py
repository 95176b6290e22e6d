"""Which blocks go to which device when a span is spread over several. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.server.capacity_plan import MIN_KV_TOKENS, STEP_TOKENS, format_size

if TYPE_CHECKING:
    from swarm.models.block_sizes import BlockSizes
    from swarm.server.capacity_plan import DeviceMemory

__all__ = ["DeviceShare", "SpreadPlan", "plan_spread", "split_blocks"]

_NUM_HALVINGS: Final = 40
"""Of the search for the fullest device's share: far below the size of a block."""


@dataclass(frozen=True, kw_only=True)
class DeviceShare:
    """One device's part of a span."""

    device: str
    span: Span
    kv_bytes: int


@dataclass(frozen=True, kw_only=True)
class SpreadPlan:
    """Consecutive parts of a span on consecutive devices."""

    shares: tuple[DeviceShare, ...]
    """Devices that get blocks, in the order of the blocks."""
    kv_tokens: int
    """Positions that fit every device."""
    sentence: str


def plan_spread(
    sizes: BlockSizes, devices: Sequence[DeviceMemory], span: Span, *, kv_tokens: int | None = None
) -> SpreadPlan:
    """Spread a span so that all devices are about equally full, and room for as many KV tokens is left on each.

    Args:
        devices: in the order in which blocks should go through them.
        kv_tokens: positions asked for; None takes what is left.

    Raises:
        BadInputError: the span does not fit, or leaves no room for so many tokens.
    """
    wanted_tokens = MIN_KV_TOKENS if kv_tokens is None else kv_tokens
    step_bytes = sizes.step_bytes(STEP_TOKENS)
    usable_bytes = [max(device.usable_bytes - step_bytes, 0) for device in devices]
    # A block comes with the pages of its tokens.
    kv_bytes = wanted_tokens * sizes.kv_bytes_per_token
    needs_bytes = [sizes.weight_bytes[block] + kv_bytes for block in range(span.start, span.end)]
    counts = split_blocks(needs_bytes, usable_bytes)
    if counts is None:
        raise BadInputError(
            f"blocks {span} in {sizes.precision} ({format_size(sum(needs_bytes))} with {wanted_tokens:,} KV tokens) "
            f"do not fit {' + '.join(str(device) for device in devices)}; serve fewer blocks (--num-blocks) "
            "or fewer bits (--weights nf4)"
        )
    bounds = [span.start]
    for count in counts:
        bounds.append(bounds[-1] + count)
    parts = [
        (device.name, usable, Span(start=start, end=end))
        for device, usable, (start, end) in zip(devices, usable_bytes, pairwise(bounds), strict=True)
        if start < end
    ]
    room = [
        (usable - sum(sizes.weight_bytes[part.start : part.end])) // (len(part) * sizes.kv_bytes_per_token)
        for _, usable, part in parts
    ]
    tokens = min(room) if kv_tokens is None else kv_tokens
    shares = tuple(
        DeviceShare(device=name, span=part, kv_bytes=tokens * len(part) * sizes.kv_bytes_per_token)
        for name, _, part in parts
    )
    where = ", ".join(f"{share.span} on {share.device}" for share in shares)
    return SpreadPlan(
        shares=shares,
        kv_tokens=tokens,
        sentence=f"blocks {where} in {sizes.precision}, with room for {tokens:,} KV tokens on each",
    )


def split_blocks(needs_bytes: Sequence[int], usable_bytes: Sequence[int]) -> list[int] | None:
    """How many consecutive blocks each device gets, so that the fullest is as empty as can be; None if they do not fit.

    A device may get none.
    """
    if _fill(needs_bytes, usable_bytes) is None:
        return None
    too_little, enough = 0.0, 1.0
    for _ in range(_NUM_HALVINGS):
        share = (too_little + enough) / 2
        if _fill(needs_bytes, [int(usable * share) for usable in usable_bytes]) is None:
            too_little = share
        else:
            enough = share
    return _fill(needs_bytes, [int(usable * enough) for usable in usable_bytes])


def _fill(needs_bytes: Sequence[int], limits_bytes: Sequence[int]) -> list[int] | None:
    """Give each device in turn as many blocks as it holds; None when some are left over."""
    counts: list[int] = []
    first = 0
    for limit in limits_bytes:
        used, end = 0, first
        while end < len(needs_bytes) and used + needs_bytes[end] <= limit:
            used += needs_bytes[end]
            end += 1
        counts.append(end - first)
        first = end
    return counts if first == len(needs_bytes) else None
