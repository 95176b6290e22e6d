"""How many bytes of KV memory a sequence takes under a policy, known before it is there. Pure.

A compressed sequence at rest holds, for every layer: slots of 16-bit tokens (one summary, the sinks and the tail, used
or not), and for every KV head tiles of stored tokens with their positions and scores. All of it lies in pages as large
as those of uncompressed sequences. While an input is read, its tokens stand in such uncompressed pages as well.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from swarm.kvcache.compressed_layout import CompressedLayout, fit_page_bytes, plan_layout, slot_bytes, tile_bytes
from swarm.kvpolicy.budget import BudgetCurve, count_kept
from swarm.kvpolicy.settings import KVPolicy
from swarm.kvpolicy.streaming import tail_start

__all__ = ["NOMINAL_TOKENS", "Footprint", "position_bytes_for"]

NOMINAL_TOKENS = 2048
"""Context at which `bytes_per_token` is told, where the model holds as many."""
_SHORT_POSITIONS = 32768


def position_bytes_for(policy: KVPolicy, *, max_positions: int, has_windows: bool) -> int:
    """Bytes of a stored token's position: none where rows stand in order, two while they reach."""
    if policy.pruning is None and not has_windows:
        return 0
    return 2 if max_positions < _SHORT_POSITIONS else 4


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of sequences in some layers of a model, under one policy."""

    policy: KVPolicy
    curve: BudgetCurve
    """Of the whole model."""
    layers: tuple[int, ...]
    """Absolute; all of one shape."""
    num_kv_heads: int
    key_dim: int
    value_dim: int
    row_bytes: int
    """Of a stored token of one KV head, without its position and score."""
    page_bytes: int
    """Of one layer's page; `page_tokens` uncompressed tokens."""
    page_tokens: int = 16
    max_positions: int
    windows: Mapping[int, int] = field(default_factory=dict)
    """Of absolute layers with a sliding window."""

    @property
    def position_bytes(self) -> int:
        """Of a stored token; 0 where positions need not be stored."""
        return position_bytes_for(
            self.policy, max_positions=self.max_positions, has_windows=any(map(self.windows.get, self.layers))
        )

    @property
    def has_scores(self) -> bool:
        """Whether tokens are stored with scores."""
        return self.policy.pruning is not None

    @property
    def slot_bytes(self) -> int:
        """A 16-bit token of one layer, all KV heads, with a score for each where tokens are chosen by one."""
        return slot_bytes(
            num_kv_heads=self.num_kv_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            has_scores=self.has_scores,
        )

    @property
    def tile_bytes(self) -> int:
        """A block of stored tokens of one KV head of one layer."""
        return tile_bytes(
            tile_rows=self.policy.block_tokens,
            row_bytes=self.row_bytes,
            position_bytes=self.position_bytes,
            has_scores=self.has_scores,
        )

    @functools.cached_property
    def layout(self) -> CompressedLayout:
        """How pages are cut for these layers. Raises ValueError when pages are too small."""
        return plan_layout(
            self.policy,
            page_bytes=self.page_bytes,
            num_layers=len(self.layers),
            num_kv_heads=self.num_kv_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            row_bytes=self.row_bytes,
            position_bytes=self.position_bytes,
            has_scores=self.has_scores,
        )

    @classmethod
    def with_fitting_pages(
        cls,
        policy: KVPolicy,
        curve: BudgetCurve,
        *,
        layers: tuple[int, ...],
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        row_bytes: int,
        page_tokens: int,
        itemsize: int,
        max_positions: int,
        windows: Mapping[int, int],
    ) -> Footprint:
        """In pages of `page_tokens` uncompressed tokens with values of `itemsize` bytes, or a little larger ones."""
        step_bytes = page_tokens * itemsize
        least = cls(
            policy=policy,
            curve=curve,
            layers=layers,
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            row_bytes=row_bytes,
            page_bytes=step_bytes * num_kv_heads * (key_dim + value_dim),
            page_tokens=page_tokens,
            max_positions=max_positions,
            windows=windows,
        )
        page_bytes = fit_page_bytes(
            least.page_bytes, step_bytes=step_bytes, tile=least.tile_bytes, slot=least.slot_bytes
        )
        return replace(least, page_bytes=page_bytes)

    def count_tiles(self, num_tokens: int, layer: int) -> int:
        """Tiles of all KV heads of an absolute layer after the events of `num_tokens` tokens."""
        stored_end = tail_start(self.policy, num_tokens)
        num_leaving = stored_end - self.policy.num_sinks
        block_tokens = self.policy.block_tokens
        window = self.windows.get(layer, 0)
        if window:
            # A tile goes when no query after the event sees any of its positions; this is the earliest event.
            first_seen = max(stored_end + self.policy.tail_tokens - window + 1, self.policy.num_sinks)
            num_gone = min((first_seen - self.policy.num_sinks) // block_tokens, num_leaving // block_tokens)
            return self.num_kv_heads * (num_leaving // block_tokens - num_gone)
        return sum(
            count_kept(self.policy, self.curve, layer, head, num_leaving) // block_tokens
            for head in range(self.num_kv_heads)
        )

    def layout_bytes(self, num_tokens: int) -> int:
        """Bytes at rest of a sequence of `num_tokens` tokens, without what rounding up to whole pages adds."""
        if not num_tokens:
            return 0
        num_slots = len(self.layers) * self.layout.slots_per_layer
        return num_slots * self.slot_bytes + self._count_all_tiles(num_tokens) * self.tile_bytes

    def full_bytes(self, num_tokens: int) -> int:
        """Bytes of an uncompressed sequence: one of a session that wants `none`, or one that is being read."""
        return -(-num_tokens // self.page_tokens) * len(self.layers) * self.page_bytes

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes of the whole pages that a sequence of `num_tokens` tokens holds at rest."""
        if not self.policy.compresses:
            return self.full_bytes(num_tokens)
        if not num_tokens:
            return 0
        num_tile_pages = self.layout.tile_pages_for(self._count_all_tiles(num_tokens))
        return (self.layout.num_raw_pages + num_tile_pages) * self.page_bytes

    def staging_bytes(self, num_tokens: int) -> int:
        """Bytes that a sequence holds beside those at rest while an input of `num_tokens` tokens is read, at most."""
        return self.full_bytes(min(num_tokens, self.policy.chunk_tokens)) if self.policy.compresses else 0

    @functools.cached_property
    def bytes_per_token(self) -> int:
        """Bytes of a token, whole pages and slack included, of a sequence of usual length."""
        num_tokens = max(1, min(NOMINAL_TOKENS, self.max_positions))
        return max(1, -(-self.sequence_bytes(num_tokens) // num_tokens))

    def _count_all_tiles(self, num_tokens: int) -> int:
        return sum(self.count_tiles(num_tokens, layer) for layer in self.layers)
