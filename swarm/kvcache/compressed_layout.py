"""How pages are cut for compressed sequences: slots for single 16-bit tokens, tiles for blocks of stored rows. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.kvpolicy.streaming import tail_capacity

if TYPE_CHECKING:
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["CompressedLayout", "fit_page_bytes", "plan_layout", "slot_bytes", "tile_bytes"]

_SCORE_BYTES = 2
_PADDING_LIMIT = 0.07
"""Pages of ordinary sessions grow by no more than this so that tiles fit well, unless not even one fitted."""
_PADDING_WEIGHT = 0.5
"""What a byte that ordinary sessions lose counts against one that compressed ones lose."""


@dataclass(frozen=True, kw_only=True)
class CompressedLayout:
    """What a page holds, and what stands where in the pages of one sequence.

    A slot is one token of one layer, all KV heads, in 16 bit. Of each layer, slot 0 is the summary of what was
    dropped, the sinks follow, then a ring for the tail. A tile is `tile_rows` stored rows of one (layer, KV head).
    """

    num_layers: int
    """Layers that a sequence is in."""
    num_kv_heads: int
    tile_rows: int
    tiles_per_page: int
    slots_per_page: int
    num_sinks: int
    tail_slots: int

    @property
    def slots_per_layer(self) -> int:
        return 1 + self.num_sinks + self.tail_slots

    @property
    def num_raw_pages(self) -> int:
        """Pages of slots of a sequence, the same at any length."""
        return -(-self.num_layers * self.slots_per_layer // self.slots_per_page)

    def slots_of(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Slots within a layer of positions that are sinks or in the tail; same shape."""
        ring = (positions - self.num_sinks) % self.tail_slots + self.num_sinks
        slots: npt.NDArray[np.int64] = 1 + np.where(positions < self.num_sinks, positions, ring)
        return slots

    def places_of(
        self, layers: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(index in the sequence's raw pages, slot within that page) of slots within layers; shapes broadcast."""
        numbers = layers * self.slots_per_layer + slots
        return numbers // self.slots_per_page, numbers % self.slots_per_page

    def for_layers(self, num_layers: int) -> CompressedLayout:
        """The same for sequences in fewer layers."""
        return replace(self, num_layers=num_layers)

    def tile_pages_for(self, num_tiles: int) -> int:
        """Pages that hold `num_tiles` of one sequence."""
        return -(-num_tiles // self.tiles_per_page)


def slot_bytes(*, num_kv_heads: int, key_dim: int, value_dim: int, has_scores: bool) -> int:
    """Bytes of one slot: keys, values and scores of all heads."""
    return num_kv_heads * (2 * (key_dim + value_dim) + (_SCORE_BYTES if has_scores else 0))


def tile_bytes(*, tile_rows: int, row_bytes: int, position_bytes: int, has_scores: bool) -> int:
    """Bytes of one tile: rows, positions (0, 2 or 4 bytes each) and scores."""
    return tile_rows * (row_bytes + position_bytes + (_SCORE_BYTES if has_scores else 0))


def plan_layout(
    policy: KVPolicy,
    *,
    page_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    row_bytes: int,
    position_bytes: int,
    has_scores: bool,
) -> CompressedLayout:
    """Cut pages of `page_bytes` for a policy. Raises ValueError when no tile or no slot fits into one."""
    slot = slot_bytes(num_kv_heads=num_kv_heads, key_dim=key_dim, value_dim=value_dim, has_scores=has_scores)
    tile = tile_bytes(
        tile_rows=policy.block_tokens, row_bytes=row_bytes, position_bytes=position_bytes, has_scores=has_scores
    )
    if page_bytes < max(slot, tile):
        raise ValueError(f"pages of {page_bytes} bytes hold no tile of {tile} bytes or no slot of {slot} bytes")
    return CompressedLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        tile_rows=policy.block_tokens,
        tiles_per_page=page_bytes // tile,
        slots_per_page=page_bytes // slot,
        num_sinks=policy.num_sinks,
        tail_slots=tail_capacity(policy),
    )


def fit_page_bytes(page_bytes: int, *, step_bytes: int, tile: int, slot: int) -> int:
    """The size, `page_bytes` or some steps more, at which little of a page is left over beside whole tiles.

    Args:
        page_bytes: what ordinary tokens need.
        step_bytes: by what pages can grow; a multiple of it is added, such that the size is a multiple of 4.
        tile: bytes of a tile; at least one fits in the end.
        slot: bytes of a slot, likewise.
    """
    best: tuple[float, int] | None = None
    size = page_bytes
    while best is None or size <= page_bytes * (1 + _PADDING_LIMIT):
        if size >= max(tile, slot) and size % 4 == 0:
            cost = size % tile / size + _PADDING_WEIGHT * (size - page_bytes) / page_bytes
            if best is None or cost < best[0]:
                best = cost, size
        size += step_bytes
    return best[1]
