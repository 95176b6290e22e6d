"""Attention of new tokens over compressed sequences: of one layer, for all of them in a batch."""

# Letters: R rows of the packed batch that this covers, L layers, Hq, Hk query and KV heads, G = Hq / Hk, D, Dv key and
# value dimensions, t new tokens and n keys of one sequence.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from swarm.server.engine.attention_kind import causal_mask
from swarm.server.engine.compressed_layers import CodedLayer, code_layers
from swarm.server.engine.compressed_sequence import MAX_STAGED_QUERIES
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
_MAX_SCORES: Final = 1 << 24
"""Scores of one KV head at a time without the kernel, so that a long part over many tokens takes 64 MB for them."""


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
        self._masks: dict[tuple[int, _Block, int], torch.Tensor] = {}
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
            memory = self._read_memory(layer, row, part, kind.window)
            block = _Block(part.part.start, part.part.end)
            outputs.append(self._attend_over_memory(layer, kind, block, memory, queries))
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
        memory = self._read_memory(layer, row, part, kind.window) if table.staged_start > 0 else None
        blocks = self._staged_blocks(part)
        if len(blocks) == 1 and blocks[0].fits(part):
            return self._attend_block(layer, kind, part, blocks[0], memory, query, keys, values)
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
                self._attend_block(layer, kind, part, block, memory, own, keys[:, :num_keys], values[:, :num_keys])
            )
        skipped = part.part.start - blocks[0].start
        return torch.cat(outputs, dim=1)[:, skipped : skipped + part.num_new]

    def _staged_blocks(self, part: CompressedSlice) -> list[_Block]:
        """What a slice's new tokens are attended in.

        On a CPU blocks stand at fixed positions, whatever part of them is new, so that the order of sums does not
        depend on how an input is cut into parts. Other devices give no such promise, and take it all at once.
        """
        start, end = part.part.start, part.part.end
        if self.attention.store.device.type != "cpu":
            return [_Block(start, end)]
        first = start // _BLOCK_TOKENS * _BLOCK_TOKENS
        return [_Block(begin, begin + _BLOCK_TOKENS) for begin in range(first, end, _BLOCK_TOKENS)]

    def _attend_block(
        self,
        layer: int,
        kind: AttentionKind,
        part: CompressedSlice,
        block: _Block,
        memory: _Memory | None,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Queries [Hq, b, D] of a block's positions over memory and staged keys [Hk, n, D] up to its end."""
        mask = self._staged_mask(part.sequence.table.staged_start, block, kind.window)
        if memory is None:
            return kind.attend_masked(query[None], keys[None], values[None], mask)[0]
        return self._attend_over_memory(layer, kind, block, memory, query, keys, values, ~mask)

    def _read_memory(self, layer: int, row: int, part: CompressedSlice, window: int) -> _Memory:
        raw = self._read_raw(layer, row, part)
        return _Memory(raw, self._read_stored(layer, row, part, window))

    def _attend_over_memory(
        self,
        layer: int,
        kind: AttentionKind,
        block: _Block,
        memory: _Memory,
        query: torch.Tensor,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        is_key_hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries [Hq, b, D] of a block's positions over summary, sinks, stored rows and ring, then staged keys
        [Hk, n, D], some of them hidden [b, n].

        Stored rows are attended in the codec's coordinates, which queries and outputs are turned to and from: so all
        heads' rows are decoded at once, and none is turned.
        """
        store, coded = self.attention.store, self.attention.layers[layer]
        num_heads, num_new = store.num_kv_heads, block.end - block.start
        raw = memory.raw
        plain_keys, plain_values = raw.keys.float(), raw.values.float()
        is_hidden = _hide(raw.positions, block, kind.window)
        biases = raw.biases
        if keys is not None and values is not None and is_key_hidden is not None:
            plain_keys = torch.cat((plain_keys, keys.float()), dim=1)
            plain_values = torch.cat((plain_values, values.float()), dim=1)
            is_hidden = torch.cat((is_hidden, is_key_hidden), dim=1)
            biases = torch.cat((biases, biases.new_zeros(num_heads, keys.shape[1])), dim=1)
        num_plain = plain_keys.shape[1]
        queries = query.float().reshape(num_heads, -1, num_new, query.shape[-1]) * kind.scale(query.shape[-1])
        group = queries.shape[1]
        turned = torch.bmm(queries.flatten(1, 2), coded.query_turn).unflatten(1, (group, num_new))
        outputs = query.new_empty(num_heads, group, num_new, store.value_dim, dtype=torch.float32)
        for head, rows in enumerate(memory.stored):
            num_keys = num_plain + len(rows.keys)
            for part_rows in torch.arange(num_new).split(max(1, _MAX_SCORES // (group * max(num_keys, 1)))):
                new = slice(int(part_rows[0]), int(part_rows[-1]) + 1)
                scores = query.new_empty(group, new.stop - new.start, num_keys, dtype=torch.float32)
                scores[..., :num_plain] = queries[head, :, new] @ plain_keys[head].T
                own = turned[head, :, new]
                scores[..., num_plain:] = own[..., :-1] @ rows.keys.T + own[..., -1:]
                if kind.softcap is not None:
                    scores = torch.tanh(scores / kind.softcap) * kind.softcap
                scores[..., :num_plain] += biases[head]
                scores[..., :num_plain].masked_fill_(is_hidden[new], -torch.inf)
                if rows.positions is not None:
                    scores[..., num_plain:].masked_fill_(_hide(rows.positions, block, kind.window)[new], -torch.inf)
                if kind.sinks is not None:
                    sinks = kind.sinks[head * group : (head + 1) * group].float()
                    scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), dim=-1)
                weights = scores.softmax(dim=-1)
                plain, over_rows = weights[..., :num_plain], weights[..., num_plain:num_keys]
                turn_back = coded.output_turn[head]
                outputs[head, :, new] = (
                    plain @ plain_values[head]
                    + (over_rows @ rows.values) @ turn_back[:-1]
                    + over_rows.sum(dim=-1, keepdim=True) * turn_back[-1]
                )
        return outputs.flatten(0, 1)

    def _staged_mask(self, staged_start: int, block: _Block, window: int) -> torch.Tensor:
        """[b, n] booleans: which staged keys each position of a block sees; the same in all layers alike."""
        mask = self._masks.get((staged_start, block, window))
        if mask is None:
            mask = causal_mask(block.start, block.end - block.start, staged_start, window, self.attention.store.device)
            # Positions before the staged ones have nothing to see, nor does anybody look; but softmax needs something.
            mask[: max(staged_start - block.start, 0)] = True
            self._masks[staged_start, block, window] = mask
        return mask

    def _read_stored(self, layer: int, row: int, part: CompressedSlice, window: int) -> list[_CodedRows]:
        """Each head's stored rows in one layer."""
        store, table = self.attention.store, part.sequence.table
        num_heads = store.num_kv_heads
        tiles = np.concatenate([table.tiles_of(row, head) for head in range(num_heads)])
        coded, positions, _ = store.read_tiles(*table.tile_places(tiles))
        keys, values = self.attention.layers[layer].decode_coordinates(coded)
        counts = (table.num_tiles[row] * table.layout.tile_rows).tolist()
        # Whatever is stored came before all new tokens, so without a window they see all of it.
        of_heads = positions.split(counts) if positions is not None and window else [None] * num_heads
        return [_CodedRows(*found) for found in zip(keys.split(counts), values.split(counts), of_heads, strict=True)]

    def _read_raw(self, layer: int, row: int, part: CompressedSlice) -> _RawEntries:
        """Summary, sinks and ring of a sequence in one layer."""
        store, table = self.attention.store, part.sequence.table
        # What a staged input has not yet been through stands in pages.
        end = table.staged_start if part.part.is_staged else part.part.end
        sinks = np.arange(min(table.layout.num_sinks, end))
        ring = np.arange(table.tail.stored_end, max(end, table.tail.stored_end))
        positions: npt.NDArray[np.int64] = np.concatenate((sinks, ring)).astype(np.int64)
        slots = table.layout.slots_of(positions)
        dropped = table.num_dropped[row]
        has_summary = self.attention.settings[layer].has_summary and bool(dropped.any())
        if has_summary:
            slots = np.concatenate((np.zeros(1, np.int64), slots))
            positions = np.concatenate((np.full(1, -1), positions))
        device = store.device
        biases = np.zeros((store.num_kv_heads, len(slots)), dtype=np.float32)
        if has_summary:
            with np.errstate(divide="ignore"):
                biases[:, 0] = np.log(dropped)  # -inf, which hides the entry, where a head has dropped nothing
        if not len(slots):
            empty = torch.zeros(store.num_kv_heads, 0, store.key_dim, device=device)
            values = torch.zeros(store.num_kv_heads, 0, store.value_dim, device=device)
            return _RawEntries(
                empty, values, torch.zeros(0, dtype=torch.int64, device=device), torch.from_numpy(biases).to(device)
            )
        pages, within = store.slot_places(table, np.full(len(slots), row), slots)
        keys, values, _ = store.read_slots(pages, within)
        if has_summary and not dropped.all():
            # Nothing was ever written there; whatever it is must not become NaN.
            is_empty = torch.from_numpy(dropped == 0).to(device)
            keys[0, is_empty], values[0, is_empty] = 0, 0
        return _RawEntries(
            keys.transpose(0, 1),
            values.transpose(0, 1),
            torch.from_numpy(positions).to(device),
            torch.from_numpy(biases).to(device),
        )


@dataclass(frozen=True, slots=True)
class _Block:
    """Positions whose tokens are attended together."""

    start: int
    end: int

    def fits(self, part: CompressedSlice) -> bool:
        """Whether a slice's new tokens are exactly these."""
        return (self.start, self.end) == (part.part.start, part.part.end)


def _hide(positions: torch.Tensor, block: _Block, window: int) -> torch.Tensor:
    """[b, n] booleans: which keys at positions [n] each position of a block does not see."""
    new = torch.arange(block.start, block.end, device=positions.device)[:, None]
    is_hidden = positions > new
    if window:
        is_hidden |= positions <= new - window
    return is_hidden


@dataclass(frozen=True, slots=True)
class _CodedRows:
    """Stored rows of one KV head in its codec's coordinates."""

    keys: torch.Tensor
    """float32 [R, D]"""
    values: torch.Tensor
    """float32 [R, Dv]"""
    positions: torch.Tensor | None
    """[R] where some may be out of sight"""


@dataclass(frozen=True, slots=True)
class _RawEntries:
    """What stands in slots, of one layer."""

    keys: torch.Tensor
    """[Hk, m, D]"""
    values: torch.Tensor
    """[Hk, m, Dv]"""
    positions: torch.Tensor
    """[m]; -1 is the summary."""
    biases: torch.Tensor
    """[Hk, m]"""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a sequence keeps in one layer, read once for all of a slice's tokens."""

    raw: _RawEntries
    stored: list[_CodedRows]
    """Of each KV head."""
