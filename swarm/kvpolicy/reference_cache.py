"""A compressed KV cache in its plainest form: what every faster one must agree with, and what is measured.

One sequence, any layers of a model. Bytes are those of an engine's layout at rest: tiles of packed rows with their
positions and scores, slots for the summary, the sinks and the longest tail whether used or not, and the table. What
whole pages add is the engine's to tell. Decoded numbers are kept between events for speed only and do not count; a
server decodes into a workspace.
"""

# Letters: Hq query heads, Hk KV heads, G = Hq / Hk, t new tokens, m stored tokens of a head, n keys, D, Dv dimensions.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from swarm.kvpolicy.budget import count_kept, count_recent
from swarm.kvpolicy.layer_settings import LayerSettings
from swarm.kvpolicy.scorers import MIN_QUERIES, NewTokens, attention_received
from swarm.kvpolicy.selection import select_kept
from swarm.kvpolicy.streaming import (
    CompressionEvent,
    TailState,
    advance,
    can_rewind,
    event_after,
    is_staged,
    new_tail,
    next_cut,
    tail_capacity,
)

__all__ = ["HeadRows", "LayerCache", "LayerSettings", "ReferenceCache", "attend_over"]

_TILE_ENTRY_BYTES = 4
_HEAD_ENTRY_BYTES = 12
"""How many tiles, and how many tokens were dropped."""
_SCORE_BYTES = 2
_SHORT_POSITIONS = 1 << 15
_STORED_DTYPE = torch.float16


@dataclass
class HeadRows:
    """What one KV head stores between sinks and tail, ordered by position."""

    rows: torch.Tensor
    """[m, row bytes] uint8"""
    positions: torch.Tensor
    """[m] int64 here; two bytes each are counted below 32768 positions, four above"""
    scores: torch.Tensor
    """[m] float16"""
    summary_key: torch.Tensor
    """[D] float32, mean key of all dropped tokens; counted as 16 bit"""
    summary_value: torch.Tensor
    """[Dv] likewise"""
    num_dropped: int = 0


@dataclass
class LayerCache:
    """The cache of one layer of one sequence."""

    settings: LayerSettings
    heads: list[HeadRows] = field(default_factory=list)
    raw_keys: torch.Tensor | None = None
    """[Hk, sinks + tail, D] 16 bit"""
    raw_values: torch.Tensor | None = None
    raw_scores: torch.Tensor | None = None
    """[Hk, sinks + tail] float16"""
    length: int = 0
    tail: TailState = field(init=False)
    queries: torch.Tensor | None = None
    """[Hq, w, D] 16 bit, newest queries of what is staged"""
    num_staged: int = 0
    _decoded: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tail = new_tail(self.settings.policy)

    @property
    def stored_end(self) -> int:
        """Where the tail begins; the sinks' number until something is stored."""
        return self.tail.stored_end

    def append(self, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> None:
        """Take keys [Hk, t, D] and values [Hk, t, Dv] of the next t positions; hidden [t, H] goes to the scorer."""
        new = NewTokens(
            layer=self.settings.layer,
            positions=torch.arange(self.length, self.length + len(hidden)),
            hidden=hidden,
            num_kv_heads=self.settings.num_kv_heads,
        )
        scores = self.settings.scorer.score_new(new).to(_STORED_DTYPE)
        keys, values = keys.to(_STORED_DTYPE), values.to(_STORED_DTYPE)
        if self.raw_keys is None or self.raw_values is None or self.raw_scores is None:
            self.raw_keys, self.raw_values, self.raw_scores = keys, values, scores
            self.heads = [self._no_rows(keys, values) for _ in range(self.settings.num_kv_heads)]
            self._decoded = [(torch.zeros(0, keys.shape[-1]), torch.zeros(0, values.shape[-1])) for _ in self.heads]
        else:
            self.raw_keys = torch.cat((self.raw_keys, keys), dim=1)
            self.raw_values = torch.cat((self.raw_values, values), dim=1)
            self.raw_scores = torch.cat((self.raw_scores, scores), dim=1)
        self.length += keys.shape[1]

    def _no_rows(self, keys: torch.Tensor, values: torch.Tensor) -> HeadRows:
        return HeadRows(
            rows=torch.zeros(0, self.settings.codec.row_bytes, dtype=torch.uint8),
            positions=torch.zeros(0, dtype=torch.int64),
            scores=torch.zeros(0, dtype=_STORED_DTYPE),
            summary_key=torch.zeros(keys.shape[-1]),
            summary_value=torch.zeros(values.shape[-1]),
        )

    def rewind(self, length: int) -> None:
        """Forget the positions from `length` on.

        Raises:
            ValueError: that can not be done exactly.
        """
        if length > self.length or not can_rewind(self.settings.policy, self.tail, length):
            raise ValueError(f"can not go back from {self.length} to {length} tokens in state {self.tail}")
        if length == 0:
            self.raw_keys = self.raw_values = self.raw_scores = self.queries = None
            self.tail, self.num_staged = new_tail(self.settings.policy), 0
        elif self.raw_keys is not None and self.raw_values is not None and self.raw_scores is not None:
            num_raw = self.raw_keys.shape[1] - (self.length - length)
            self.raw_keys, self.raw_values = self.raw_keys[:, :num_raw], self.raw_values[:, :num_raw]
            self.raw_scores = self.raw_scores[:, :num_raw]
        self.length = length

    # -- reading -------------------------------------------------------------------------------

    def keys_of(self, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 keys [n, D], values [n, Dv], positions [n] and score biases [n] of a head; raw tokens come last.

        The summary comes first if there is one, at position -1: every query sees it.
        """
        assert self.raw_keys is not None and self.raw_values is not None
        rows = self.heads[head]
        stored_keys, stored_values = self._decoded[head]
        positions = [rows.positions, self._raw_positions()]
        keys = [stored_keys, self.raw_keys[head].float()]
        values = [stored_values, self.raw_values[head].float()]
        has_summary = rows.num_dropped > 0 and self.settings.has_summary
        if has_summary:
            keys.insert(0, rows.summary_key[None])
            values.insert(0, rows.summary_value[None])
            positions.insert(0, torch.tensor([-1]))
        biases = torch.zeros(sum(map(len, keys)))
        if has_summary:
            biases[0] = math.log(rows.num_dropped)
        return torch.cat(keys), torch.cat(values), torch.cat(positions), biases

    def _raw_positions(self) -> torch.Tensor:
        sinks = min(self.settings.policy.num_sinks, self.length)
        return torch.cat((torch.arange(sinks), torch.arange(self.stored_end, max(self.length, self.stored_end))))

    # -- compressing ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Do what is due before the next step."""
        if not self.tail.is_staging:
            event = event_after(self.settings.policy, self.stored_end, self.length)
            if event is not None:
                self.compress(event, None, 1.0)

    def finish(self, queries: torch.Tensor, scaling: float, *, is_unfinished: bool) -> None:
        """Account for a part that has been appended and has attended, and compress if it ends an input or a chunk.

        Args:
            queries: [Hq, t, D], of the part.
        """
        policy, count = self.settings.policy, queries.shape[1]
        start = self.length - count
        after = advance(policy, self.tail, start, count, is_unfinished=is_unfinished)
        if is_staged(policy, self.tail, start, count, is_unfinished=is_unfinished):
            self.num_staged += count
            queries = queries.to(_STORED_DTYPE)
            joined = queries if self.queries is None else torch.cat((self.queries, queries), dim=1)
            self.queries = joined[:, -max(self.settings.scorer.query_tokens, 1) :]
            event = event_after(policy, self.stored_end, self.length)
            if event is not None and (not is_unfinished or self.length == next_cut(policy, start)):
                self.compress(event, self.queries if self.num_staged >= MIN_QUERIES else None, scaling)
            if not is_unfinished:
                self.queries, self.num_staged = None, 0
        self.tail = after

    def compress(self, event: CompressionEvent, queries: torch.Tensor | None, scaling: float) -> None:
        """Bring the layer to the state after `event`.

        Args:
            queries: [Hq, w, D], the newest w of the input that has just been run; more than the scorer wants is fine.
                None where they say too little.
            scaling: what the model multiplies scores with.
        """
        assert self.raw_keys is not None and self.raw_values is not None and self.raw_scores is not None
        policy = self.settings.policy
        num_new = event.end - event.first
        first = policy.num_sinks
        if queries is None or queries.shape[1] < MIN_QUERIES or not self.settings.judges:
            judges: list[torch.Tensor | None] = [None] * len(self.heads)
        else:
            judges = list(queries[:, -self.settings.scorer.query_tokens :].chunk(len(self.heads)))
        for head, rows in enumerate(self.heads):
            new_positions = torch.arange(event.first, event.end)
            new_keys = self.raw_keys[head, first : first + num_new]
            new_values = self.raw_values[head, first : first + num_new]
            positions = torch.cat((rows.positions, new_positions))
            scores = torch.cat((rows.scores, self.raw_scores[head, first : first + num_new])).float()
            scores = self._judge(head, scores, judges[head], scaling, num_new)
            scores = scores.to(_STORED_DTYPE)
            kept = self._choose(head, scores.float(), positions, event)
            self._drop(head, kept, new_keys, new_values)
            num_stored = len(rows.positions)
            old, new = kept[kept < num_stored], kept[kept >= num_stored] - num_stored
            heads = torch.full((len(new),), head)
            coded = self.settings.codec.encode(new_keys[new], new_values[new], heads)
            rows.rows = torch.cat((rows.rows[old], coded))
            decoded = zip(self._decoded[head], self.settings.codec.decode(coded, heads), strict=True)
            keys, values = (torch.cat((before[old], added)) for before, added in decoded)
            self._decoded[head] = keys, values
            rows.positions, rows.scores = positions[kept], scores[kept]
        keep_raw = torch.ones(self.raw_keys.shape[1], dtype=torch.bool)
        keep_raw[first : first + num_new] = False
        self.raw_keys = self.raw_keys[:, keep_raw]
        self.raw_values = self.raw_values[:, keep_raw]
        self.raw_scores = self.raw_scores[:, keep_raw]
        self.tail = replace(self.tail, stored_end=event.end, compressed_at=event.length)
        self.queries, self.num_staged = None, 0

    def _judge(
        self, head: int, scores: torch.Tensor, queries: torch.Tensor | None, scaling: float, num_new: int
    ) -> torch.Tensor:
        """Scores [m] of stored and leaving tokens after the newest queries [G, w, D] have been looked at."""
        scorer = self.settings.scorer
        is_new = torch.arange(len(scores)) >= len(scores) - num_new
        if queries is None:
            return scorer.rescore_unseen(scores, is_new, torch.zeros(len(scores), dtype=torch.int64))
        keys, _, positions, _ = self.keys_of(head)
        weights = attention_received(queries, keys, scaling, num_before=len(keys) - queries.shape[1])
        is_candidate = positions >= self.settings.policy.num_sinks
        received = weights[is_candidate][: len(scores)]
        return scorer.rescore(self.settings.layer, head, scores, is_new, received)

    def _choose(
        self, head: int, scores: torch.Tensor, positions: torch.Tensor, event: CompressionEvent
    ) -> torch.Tensor:
        """Indices of the candidates that stay."""
        policy, pruning = self.settings.policy, self.settings.policy.pruning
        if self.settings.window:
            # Blocks that no later query sees go, and nothing else: inside a window every token may be wanted.
            ends = positions + policy.block_tokens - (positions - policy.num_sinks) % policy.block_tokens
            return torch.nonzero(ends - 1 > event.length - self.settings.window)[:, 0]
        if pruning is None:
            return torch.arange(len(positions))
        num_kept = count_kept(policy, self.settings.curve, self.settings.layer, head, event.end - policy.num_sinks)
        num_recent = count_recent(pruning, self.settings.curve, self.settings.layer, head, event.length)
        protected_from = event.length - num_recent
        return select_kept(scores, positions, min(num_kept, len(positions)), protected_from=protected_from)

    def _drop(self, head: int, kept: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor) -> None:
        """Take what is not kept into the summary."""
        if not self.settings.has_summary:
            return
        rows = self.heads[head]
        stored_keys, stored_values = self._decoded[head]
        is_dropped = torch.ones(len(stored_keys) + len(new_keys), dtype=torch.bool)
        is_dropped[kept] = False
        num_dropped = int(is_dropped.sum())
        if num_dropped == 0:
            return
        total = rows.num_dropped + num_dropped
        keys = torch.cat((stored_keys, new_keys.float()))[is_dropped]
        values = torch.cat((stored_values, new_values.float()))[is_dropped]
        share = rows.num_dropped / total
        rows.summary_key = (rows.summary_key * share + keys.sum(dim=0) / total).half().float()
        rows.summary_value = (rows.summary_value * share + values.sum(dim=0) / total).half().float()
        rows.num_dropped = total

    # -- accounting ----------------------------------------------------------------------------

    def count_bytes(self, *, has_positions: bool) -> int:
        """Bytes held for this layer at rest.

        Args:
            has_positions: whether tiles have room for positions; in all layers or in none.
        """
        if self.raw_keys is None or self.raw_values is None or self.raw_scores is None:
            return 0
        policy = self.settings.policy
        num_heads, _, key_dim = self.raw_keys.shape
        row_bytes = self.settings.codec.row_bytes
        if has_positions:
            row_bytes += 2 if self.length < _SHORT_POSITIONS else 4
        if policy.pruning is not None:
            row_bytes += _SCORE_BYTES
        num_slots = 1 + policy.num_sinks + tail_capacity(policy)
        total = num_slots * num_heads * (2 * (key_dim + self.raw_values.shape[-1]) + _SCORE_BYTES)
        for rows in self.heads:
            num_tiles = math.ceil(len(rows.rows) / policy.block_tokens)
            total += num_tiles * (policy.block_tokens * row_bytes + _TILE_ENTRY_BYTES) + _HEAD_ENTRY_BYTES
        return total


def attend_over(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    is_hidden: torch.Tensor,
    biases: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one KV head in the open: queries [G, t, D] over keys [n, D] and values [n, Dv] to [G, t, Dv].

    Args:
        is_hidden: [t, n] bool, keys that a query does not see.
        biases: [n], added to the scores: the logarithm of how many tokens a key stands for.
        softcap: bound of the scores (gemma2).
        sink_scores: [G], learned scores that take weight and give nothing (gpt_oss).
    """
    scores = torch.matmul(queries, keys.transpose(0, 1)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + biases).masked_fill(is_hidden, -torch.inf)
    if sink_scores is not None:
        scores = torch.cat((scores, sink_scores[:, None, None].expand(-1, queries.shape[1], 1)), dim=-1)
    return torch.matmul(scores.softmax(dim=-1)[..., : len(keys)], values)


class ReferenceCache:
    """The caches of some layers of one sequence, run by swarm.kvpolicy.reference_model."""

    def __init__(self, layers: Mapping[int, LayerSettings]) -> None:
        self.layers = {layer: LayerCache(settings) for layer, settings in layers.items()}

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sink_scores: torch.Tensor | None = None,
        is_unfinished: bool = False,
    ) -> torch.Tensor:
        """Append t tokens and attend from them: queries [Hq, t, D] to outputs [Hq, t, Dv]; compress when it is time.

        Args:
            keys: [Hk, t, D], rotated, of the next t positions.
            values: [Hk, t, Dv]
            hidden: [t, hidden size], the input of the attention module.
            softcap: bound of the scores (gemma2).
            sink_scores: [Hq], learned scores that take weight and give nothing (gpt_oss).
            is_unfinished: whether more tokens of the same input follow.
        """
        cache = self.layers[layer]
        cache.settle()
        start, num_new = cache.length, queries.shape[1]
        cache.append(keys, values, hidden)
        num_heads = cache.settings.num_kv_heads
        group = len(queries) // num_heads
        new_positions = torch.arange(start, start + num_new)[:, None]
        outputs = []
        for head in range(num_heads):
            head_keys, head_values, positions, biases = cache.keys_of(head)
            is_hidden = positions > new_positions
            if cache.settings.window:
                is_hidden |= positions <= new_positions - cache.settings.window
            heads = slice(head * group, (head + 1) * group)
            outputs.append(
                attend_over(
                    queries[heads].float(),
                    head_keys,
                    head_values,
                    is_hidden=is_hidden,
                    biases=biases,
                    scaling=scaling,
                    softcap=softcap,
                    sink_scores=sink_scores[heads].float() if sink_scores is not None else None,
                )
            )
        cache.finish(queries, scaling, is_unfinished=is_unfinished)
        return torch.cat(outputs).to(queries.dtype)

    def count_bytes(self) -> int:
        """Bytes held by all layers at rest."""
        caches = self.layers.values()
        has_positions = any(cache.settings.policy.pruning is not None or cache.settings.window for cache in caches)
        return sum(cache.count_bytes(has_positions=has_positions) for cache in caches)

    def rewind(self, length: int) -> None:
        """Forget the positions from `length` on; ValueError where that can not be done exactly."""
        for cache in self.layers.values():
            cache.rewind(length)

    def kept_positions(self) -> dict[int, list[list[int]]]:
        """Stored positions by layer and head; what failover with compression has to reproduce."""
        return {layer: [rows.positions.tolist() for rows in cache.heads] for layer, cache in self.layers.items()}
