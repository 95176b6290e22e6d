"""Attention of new tokens over compressed sequences: of one layer, for all of them in a batch."""

# Letters: R rows of the packed batch that this covers, L layers, Hq, Hk query and KV heads, G = Hq / Hk, D, Dv key and
# value dimensions, t new tokens and n keys of one sequence.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch.nn import functional

from swarm.server.engine.attention_kind import causal_mask
from swarm.server.engine.compressed_layers import CodedLayer, code_layers
from swarm.server.engine.compressed_sequence import MAX_STAGED_QUERIES
from swarm.server.engine.kept_entries import KeptEntries, read_entries
from swarm.server.engine.open_attention import Block, StagedKeys, attend_kept
from swarm.server.engine.tile_attention import TileAttention, load_tile_attention

if TYPE_CHECKING:
    from swarm.kvcache.compressed_table import PartPlan
    from swarm.kvpolicy.layer_settings import LayerSettings
    from swarm.server.engine.attention_kind import AttentionKind
    from swarm.server.engine.compressed_sequence import CompressedSequence
    from swarm.server.engine.compressed_store import CompressedStore

__all__ = ["CompressedAttention", "CompressedSlice", "CompressedStep"]

_BLOCK_TOKENS: Final = 32
"""Queries of a staged input that are attended together on a CPU."""


@dataclass(frozen=True, slots=True)
class CompressedSlice:
    """One compressed sequence's new tokens within a packed batch."""

    first_row: int
    end_row: int
    part: PartPlan
    sequence: CompressedSequence

    @property
    def num_new(self) -> int:
        return self.end_row - self.first_row


class CompressedAttention:
    """What the layers of a server need to attend over compressed sequences; one for all steps."""

    def __init__(
        self, store: CompressedStore, settings: Sequence[LayerSettings], *, allows_kernel: bool = True
    ) -> None:
        """`settings` of each layer of the server."""
        self.store = store
        self.settings = tuple(settings)
        self.layers: list[CodedLayer] = code_layers(settings, store.device)
        self.tiles: TileAttention | None = load_tile_attention(store, settings) if allows_kernel else None
        """None where there is no compiler for it, or on a device of another kind."""

    def plan(self, slices: Sequence[CompressedSlice]) -> CompressedStep:
        """What is the same in all layers of a step."""
        return CompressedStep(self, slices)


@dataclass
class CompressedStep:
    """The compressed sequences of one step."""

    attention: CompressedAttention
    slices: Sequence[CompressedSlice]
    ring: list[CompressedSlice] = field(init=False)
    """Those whose new tokens go into slots."""
    staged: list[CompressedSlice] = field(init=False)
    """Those whose new tokens stand in pages for now."""
    _queries: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    """Newest queries [Hq, at most 64, D] of staged slices, by index in `staged` and layer of the sequence."""

    def __post_init__(self) -> None:
        self.num_rows = sum(part.num_new for part in self.slices)
        self._masks: dict[tuple[int, Block, int], torch.Tensor] = {}
        self.ring = [part for part in self.slices if not part.part.is_staged]
        self.staged = [part for part in self.slices if part.part.is_staged]
        store = self.attention.store
        device = store.device
        self._rows = torch.from_numpy(
            np.concatenate([np.arange(part.first_row, part.end_row) for part in self.ring] or [np.zeros(0, np.int64)])
        ).to(device)
        places = [
            store.token_places(part.sequence.table, np.arange(part.part.start, part.part.end)) for part in self.ring
        ]
        self._pages = torch.cat([pages for pages, _ in places], dim=1) if places else None
        self._slots = torch.cat([slots for _, slots in places], dim=1) if places else None
        tiles = self.attention.tiles
        self._tile_step = tiles.plan(self.ring) if tiles is not None and self.ring else None

    def round(self, numbers: torch.Tensor) -> torch.Tensor:
        """Keys or values [1, Hk, T, D], those of compressed sequences as what will be stored: to later tokens they
        look as they do to those of their own step.
        """
        raw_dtype = self.attention.store.raw_dtype
        if numbers.dtype is raw_dtype:
            return numbers
        if self.num_rows == numbers.shape[2]:
            return numbers.to(raw_dtype).to(numbers.dtype)
        rounded = numbers.clone()
        for part in self.slices:
            rows = slice(part.first_row, part.end_row)
            rounded[:, :, rows] = numbers[:, :, rows].to(raw_dtype).to(numbers.dtype)
        return rounded

    def keep(self, scores: Mapping[int, torch.Tensor], first_layer: int) -> None:
        """After all layers: remember how much new tokens matter, and staged inputs' newest queries.

        `scores` [Hk, T] by layer of the server; `first_layer` is the sequences' first. If it fails, nothing is
        remembered of staged inputs, so that the step can run once more.
        """
        store = self.attention.store
        every = (
            torch.stack([scores[first_layer + row] for row in range(self.slices[0].sequence.num_layers)])
            if store.has_scores
            else None
        )
        if every is not None and store.raw_scores is not None and self._pages is not None and self._slots is not None:
            ring_scores = every.index_select(2, self._rows).transpose(1, 2)
            store.raw_scores[self._pages, self._slots] = ring_scores.to(store.raw_scores.dtype)
        before = [(part.sequence, part.sequence.staged_scores, part.sequence.staged_queries) for part in self.staged]
        try:
            for index, part in enumerate(self.staged):
                own = every[:, :, part.first_row : part.end_row] if every is not None else None
                part.sequence.add_staged(own, self._newest_queries(index))
        except BaseException:
            for sequence, staged_scores, staged_queries in before:
                sequence.staged_scores, sequence.staged_queries = staged_scores, staged_queries
            raise

    def _newest_queries(self, index: int) -> torch.Tensor | None:
        """[L, Hq, w, D] of a staged slice, zeros in layers that judge by none; None if all do."""
        found = self._queries.get(index)
        if not found:
            return None
        nothing = torch.zeros_like(next(iter(found.values())))
        num_layers = self.slices[0].sequence.num_layers
        return torch.stack([found.get(row, nothing) for row in range(num_layers)])

    # -- one layer -----------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        row: int,
        kind: AttentionKind,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: torch.Tensor,
    ) -> None:
        """Fill the rows of `packed` [Hq, T, Dv] that belong to compressed sequences; new tokens are stored first.

        Args:
            layer: of the server; `row` the same layer in the sequences' tables.
            query: [Hq, T, D]; key [Hk, T, D] and value [Hk, T, Dv] already rounded to what slots hold.
        """
        if self.ring:
            self._attend_ring(layer, row, kind, query, key, value, packed)
        for index, part in enumerate(self.staged):
            rows = slice(part.first_row, part.end_row)
            packed[:, rows] = self._attend_staged(layer, row, kind, part, query[:, rows], key[:, rows], value[:, rows])
            if self.attention.settings[layer].judges:
                newest = query[:, max(part.first_row, part.end_row - MAX_STAGED_QUERIES) : part.end_row]
                self._queries.setdefault(index, {})[row] = newest.clone()

    def _attend_ring(
        self,
        layer: int,
        row: int,
        kind: AttentionKind,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: torch.Tensor,
    ) -> None:
        store = self.attention.store
        is_all = len(self._rows) == query.shape[1]
        if not is_all:
            query, key, value = (numbers.index_select(1, self._rows) for numbers in (query, key, value))
        assert self._pages is not None and self._slots is not None
        store.write_slots(self._pages[row], self._slots[row], key.transpose(0, 1), value.transpose(0, 1))
        if self._tile_step is not None:
            outputs = self._tile_step.attend(row, kind, self.attention.layers[layer], query)
        else:
            outputs = self._attend_ring_openly(layer, row, kind, query)
        outputs = outputs.to(packed.dtype)
        if is_all:
            packed.copy_(outputs)
        else:
            packed.index_copy_(1, self._rows, outputs)

    def _attend_ring_openly(self, layer: int, row: int, kind: AttentionKind, query: torch.Tensor) -> torch.Tensor:
        """Without the kernel: [Hq, R, Dv] float32."""
        outputs = []
        first = 0
        for part in self.ring:
            queries = query[:, first : first + part.num_new]
            kept = self._read_kept(layer, row, part, kind.window)
            block = Block(part.part.start, part.part.end)
            outputs.append(attend_kept(kind, self.attention.layers[layer], block, kept, queries))
            first += part.num_new
        return torch.cat(outputs, dim=1)

    def _attend_staged(
        self,
        layer: int,
        row: int,
        kind: AttentionKind,
        part: CompressedSlice,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """New tokens [Hq, t, D] that stand in pages, over everything before them and each other: [Hq, t, Dv]."""
        table = part.sequence.table
        is_cpu = self.attention.store.device.type == "cpu"
        if part.part.start == 0 and not is_cpu:
            return kind.attend(query[None], key[None], value[None], start=0)[0]
        num_staged = part.part.end - table.staged_start
        if num_staged == part.num_new:
            keys, values = key, value
        else:
            pages = table.staged
            keys, values = (
                numbers[0]
                for numbers in self.attention.store.store.read(
                    layer, pages.pages[row], int(pages.first_breaks[row]), 0, num_staged
                )
            )
        kept = self._read_kept(layer, row, part, kind.window) if table.staged_start > 0 else None
        blocks = self._staged_blocks(part)
        if blocks == [Block(part.part.start, part.part.end)]:
            return self._attend_block(layer, kind, part, blocks[0], kept, query, keys, values)
        room = blocks[-1].end - table.staged_start - num_staged
        if room:
            keys, values = (functional.pad(numbers, (0, 0, 0, room)) for numbers in (keys, values))
        query = functional.pad(query, (0, 0, part.part.start - blocks[0].start, blocks[-1].end - part.part.end))
        outputs = []
        for block in blocks:
            first = block.start - blocks[0].start
            num_keys = block.end - table.staged_start
            own = query[:, first : first + block.end - block.start].contiguous()
            outputs.append(
                self._attend_block(layer, kind, part, block, kept, own, keys[:, :num_keys], values[:, :num_keys])
            )
        skipped = part.part.start - blocks[0].start
        return torch.cat(outputs, dim=1)[:, skipped : skipped + part.num_new]

    def _staged_blocks(self, part: CompressedSlice) -> list[Block]:
        """What a slice's new tokens are attended in.

        On a CPU blocks stand at fixed positions, whatever part of them is new, so that the order of sums does not
        depend on how an input is cut into parts. Other devices give no such promise, and take it all at once.
        """
        start, end = part.part.start, part.part.end
        if self.attention.store.device.type != "cpu":
            return [Block(start, end)]
        first = start // _BLOCK_TOKENS * _BLOCK_TOKENS
        return [Block(begin, begin + _BLOCK_TOKENS) for begin in range(first, end, _BLOCK_TOKENS)]

    def _attend_block(
        self,
        layer: int,
        kind: AttentionKind,
        part: CompressedSlice,
        block: Block,
        kept: KeptEntries | None,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Queries [Hq, b, D] of a block's positions over kept entries and staged keys [Hk, n, D] up to its end."""
        mask = self._staged_mask(part.sequence.table.staged_start, block, kind.window)
        if kept is None:
            return kind.attend_masked(query[None], keys[None], values[None], mask)[0]
        return attend_kept(
            kind, self.attention.layers[layer], block, kept, query, StagedKeys(keys, values, is_hidden=~mask)
        )

    def _read_kept(self, layer: int, row: int, part: CompressedSlice, window: int) -> KeptEntries:
        table = part.sequence.table
        return read_entries(
            self.attention.store,
            table,
            row,
            self.attention.layers[layer],
            # What a staged input has not yet been through stands in pages.
            raw_end=table.staged_start if part.part.is_staged else part.part.end,
            has_summary=self.attention.settings[layer].has_summary,
            window=window,
        )

    def _staged_mask(self, staged_start: int, block: Block, window: int) -> torch.Tensor:
        """[b, n] booleans: which staged keys each position of a block sees; the same in all layers alike."""
        mask = self._masks.get((staged_start, block, window))
        if mask is None:
            mask = causal_mask(block.start, block.end - block.start, staged_start, window, self.attention.store.device)
            # Positions before the staged ones have nothing to see, nor does anybody look; but softmax needs something.
            mask[: max(staged_start - block.start, 0)] = True
            self._masks[staged_start, block, window] = mask
        return mask
