"""A server's KV memory driven without a model: every token's keys and values follow from its name."""

# Letters: L layers, Hk KV heads, D head dimension, T tokens.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from swarm.datatypes import Span
from swarm.kvpolicy.settings import KVPolicy, PruningSettings, QuantisationSettings
from swarm.kvpolicy.streaming import fits_tail, next_cut
from swarm.server.engine.compressed_sequence import CompressedSequence, Compression
from swarm.server.engine.compressed_store import CompressedStore
from swarm.server.engine.compression import Compressor
from swarm.server.engine.engine import NotNow
from swarm.server.engine.held_session import PlainSequence
from swarm.server.engine.page_store import KVShape, PageStore
from swarm.server.engine.session_memory import MemoryConfig, PreparedItem, SessionMemory
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.policy_layers import PolicyWish
from swarm.server.session_mirror import SequenceStep

__all__ = ["NUM_LAYERS", "PAGE_TOKENS", "PRUNING", "QUANTISING", "SPAN", "Clock", "MemoryServer"]

NUM_LAYERS = 3
SPAN = Span(start=5, end=5 + NUM_LAYERS)
PAGE_TOKENS = 4
SHAPE = KVShape(num_kv_heads=2, key_dim=8, value_dim=4)
WINDOW = 24
PRUNING = KVPolicy(
    name="pyramid",
    preset="test",
    pruning=PruningSettings(keep_ratio=0.5, recent_tokens=8, scorer="window", extra_tokens=8),
    num_sinks=2,
    block_tokens=4,
    tail_tokens=4,
    chunk_tokens=64,
)
QUANTISING = KVPolicy(
    name="gear",
    preset="test",
    quantisation=QuantisationSettings(key_bits=8, value_bits=8),
    num_sinks=2,
    block_tokens=4,
    tail_tokens=4,
    chunk_tokens=64,
)
_NAMES = 4096
_generator = torch.Generator().manual_seed(3)
_KEYS = torch.randn(_NAMES, NUM_LAYERS, SHAPE.num_kv_heads, SHAPE.key_dim, generator=_generator).half().float()
_VALUES = torch.randn(_NAMES, NUM_LAYERS, SHAPE.num_kv_heads, SHAPE.value_dim, generator=_generator).half().float()
_SCORES = torch.randn(_NAMES, NUM_LAYERS, SHAPE.num_kv_heads, generator=_generator).half()


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class MemoryServer:
    """A memory under a policy, and of every session the tokens that its sequences must hold."""

    def __init__(
        self,
        policy: KVPolicy = PRUNING,
        *,
        num_pages: int = 200,
        num_padding_values: int = 0,
        config: MemoryConfig | None = None,
    ) -> None:
        wish = PolicyWish(policy=policy, num_layers=20, first_layer=SPAN.start, max_positions=4096)
        layers = wish.build([SHAPE] * NUM_LAYERS, [0, WINDOW, 0], page_tokens=PAGE_TOKENS, itemsize=4)
        self.page_store = PageStore(
            [SHAPE] * NUM_LAYERS,
            memory_bytes=num_pages * (layers.page_bytes + num_padding_values * PAGE_TOKENS * 4),
            page_tokens=PAGE_TOKENS,
            dtype=torch.float32,
            device="cpu",
            row_values=layers.row_values + num_padding_values,
        )
        self.page_store.bytes_as(torch.uint8).fill_(0xAB)  # what others left behind
        codec_bytes = layers.settings[0].codec.row_bytes
        self.store = CompressedStore(
            self.page_store,
            policy=policy,
            row_bytes=codec_bytes,
            position_bytes=layers.position_bytes,
            has_scores=layers.has_scores,
        )
        self.footprint = layers.footprint
        self.settings = layers.settings
        self.clock = Clock()
        self.memory = SessionMemory(
            self.page_store,
            config or MemoryConfig(page_tokens=PAGE_TOKENS, prefix_memory_bytes=0),
            compression=Compression(
                self.store,
                Compressor(self.store, layers.settings, [0.35] * NUM_LAYERS),
                SPAN.start,
                layers.footprint.bytes_per_token,
                query_values=2 * SHAPE.num_kv_heads * SHAPE.key_dim,
            ),
            now_s=self.clock,
        )
        self.policy = policy
        self.tokens: dict[SessionKey, dict[int, list[int]]] = {}
        """Names of the tokens of each sequence."""
        self._next_name = 0

    def new_names(self, count: int) -> list[int]:
        """Of tokens that were never used."""
        names = [(self._next_name + index) % _NAMES for index in range(count)]
        self._next_name += count
        return names

    def step(
        self, key: SessionKey, items: Sequence[SequenceStep], *, compresses: bool, names: Sequence[Sequence[int]] = ()
    ) -> bool:
        """One part of a step as a backend runs it; False when there is no room. Raises what `prepare` raises."""
        num_tokens = sum(item.count for item in items)
        work = StepWork(key, SPAN, items, torch.zeros(num_tokens, 1), lambda output, error: None, compresses=compresses)
        prepared = self.memory.prepare(work, protected=())
        if isinstance(prepared, NotNow):
            return False
        held = self.tokens.setdefault(key, {})
        parents = {item.sequence: held.get(item.parent, [])[: item.start] for item in items}
        new = list(names) or [self.new_names(item.count) for item in items]
        for part, more in zip(prepared, new, strict=True):
            held[part.item.sequence] = [*parents[part.item.sequence], *more]
            self._write(part, list(more))
        for part in prepared:
            if part.compressed is not None and part.plan is not None and part.plan.ends_staging:
                assert self.memory._compression is not None
                self.memory._compression.events.finish(part.compressed, part.plan)
        self.memory.record(work, prepared, torch.zeros(num_tokens, 1))
        self.memory.update_free()
        return True

    def feed(self, key: SessionKey, count: int, *, compresses: bool = True, is_unfinished: bool = False) -> None:
        """More tokens for sequence 0, in as many parts as an engine cuts them into."""
        while count:
            start = len(self.tokens.get(key, {}).get(0, []))
            part = min(count, next_cut(self.policy, start) - start) if compresses else count
            if compresses and start and self.fits(key, start, count):
                part = count
            goes_on = part < count or is_unfinished
            item = SequenceStep(0, 0, start, part, is_unfinished=goes_on)
            assert self.step(key, [item], compresses=compresses), "no room"
            count -= part

    def fits(self, key: SessionKey, start: int, count: int) -> bool:
        """Whether a step goes into the ring as a whole."""
        held = self.memory._sessions[key].sequences[0]
        assert isinstance(held, CompressedSequence)
        return fits_tail(self.policy, held.table.tail, start, count)

    def _write(self, part: PreparedItem, names: list[int]) -> None:
        """What attention writes: keys, values and scores of a part's tokens."""
        if not names:
            return
        keys, values, scores = _KEYS[names], _VALUES[names], _SCORES[names]
        if part.compressed is None or part.plan is None:
            self._write_pages(part, part.item.start, keys, values)
            return
        table = part.compressed.table
        if part.plan.is_staged:
            self._write_pages(part, part.item.start - table.staged_start, keys, values)
            queries = keys.transpose(0, 1).transpose(1, 2).repeat(1, 2, 1, 1)
            part.compressed.add_staged(scores.permute(1, 2, 0) if self.store.has_scores else None, queries)
            return
        positions = np.arange(part.item.start, part.item.start + part.item.count)
        pages, slots = self.store.token_places(table, positions)
        self.store.write_slots(pages, slots, keys.transpose(0, 1), values.transpose(0, 1), scores.transpose(0, 1))

    def _write_pages(self, part: PreparedItem, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = part.table.slots(start, start + len(keys))
        for layer in range(NUM_LAYERS):
            self.page_store.write(layer, torch.from_numpy(slots[layer]), keys[:, layer], values[:, layer])

    # -- checks --------------------------------------------------------------------------------

    def check(self) -> None:
        """Every sequence that is here holds what it must, and every page has the owners it should have."""
        self.memory.check_integrity()
        for key, sequences in self.tokens.items():
            session = self.memory._sessions[key]
            if session.spilled is not None:
                continue
            for sequence, names in sequences.items():
                held = session.sequences[sequence]
                assert held.length == len(names)
                if isinstance(held, PlainSequence):
                    self._check_plain(held, names)
                else:
                    for layer in range(NUM_LAYERS):
                        self._check_layer(held, names, layer)

    def _check_plain(self, held: PlainSequence, names: list[int]) -> None:
        if not names:
            return
        slots = torch.from_numpy(held.table.slots(0, len(names)))
        for layer in range(NUM_LAYERS):
            keys, values = self.page_store.gather(layer, slots[layer][None])
            assert torch.equal(keys[0].transpose(0, 1), _KEYS[names][:, layer])
            assert torch.equal(values[0].transpose(0, 1), _VALUES[names][:, layer])

    def _check_layer(self, held: CompressedSequence, names: list[int], layer: int) -> None:
        table, sinks = held.table, self.policy.num_sinks
        wanted_keys, wanted_values = _KEYS[names][:, layer], _VALUES[names][:, layer]
        end_of_slots = table.staged_start if table.tail.is_staging else table.length
        in_slots = [*range(min(sinks, end_of_slots)), *range(table.tail.stored_end, end_of_slots)]
        if in_slots:
            pages, slots = self.store.token_places(table, np.array(in_slots))
            keys, values, scores = self.store.read_slots(pages[layer], slots[layer])
            assert torch.equal(keys.float(), wanted_keys[in_slots])
            assert torch.equal(values.float(), wanted_values[in_slots])
            if scores is not None:
                assert torch.equal(scores[sinks:], _SCORES[names][in_slots][sinks:, layer])
        num_stored = table.tail.stored_end - sinks
        for head in range(SHAPE.num_kv_heads):
            rows, positions, _ = self.store.read_head(table, layer, head)
            if positions is None:
                positions = torch.arange(sinks, sinks + len(rows))
            assert len(set(positions.tolist())) == len(positions)
            if len(positions):
                assert sinks <= int(positions.min()) <= int(positions.max()) < table.tail.stored_end
            heads = torch.full((len(rows),), head)
            keys, values = self.settings[layer].codec.decode(rows, heads)
            tolerance = 0.0 if self.policy.quantisation is None else 0.3
            if len(rows):
                assert (keys - wanted_keys[positions, head]).abs().max() <= tolerance
                assert (values - wanted_values[positions, head]).abs().max() <= tolerance
            num_dropped = int(table.num_dropped[layer, head])
            if not self.settings[layer].window:
                assert len(rows) + num_dropped == num_stored
            else:
                # Nothing within the window of the next query is missing.
                first_seen = max(sinks, table.tail.compressed_at - WINDOW + 1)
                assert set(range(first_seen, table.tail.stored_end)) <= set(positions.tolist())
            if num_dropped:
                is_dropped = torch.ones(table.tail.stored_end, dtype=torch.bool)
                is_dropped[:sinks] = False
                is_dropped[positions] = False
                pages, slots = self.store.slot_places(table, np.array([layer]), np.array([0]))
                mean_keys, _, _ = self.store.read_slots(pages, slots)
                mean = wanted_keys[: table.tail.stored_end][is_dropped][:, head].mean(dim=0)
                assert (mean_keys[0, head].float() - mean).abs().max() < 0.05
