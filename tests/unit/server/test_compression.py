"""Events over pages against the reference cache: same tokens kept, same bytes, whatever the history."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvpolicy.budget import BudgetCurve
from swarm.kvpolicy.calibration_file import Calibration
from swarm.kvpolicy.layer_settings import LayerSettings
from swarm.kvpolicy.layers import ModelShape, build_layers
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.scorers import NewTokens, WindowScorer
from swarm.kvpolicy.selection import find_dropped, find_nth, select_kept
from swarm.kvpolicy.settings import KVPolicy, PruningSettings, QuantisationSettings
from swarm.kvpolicy.streaming import can_rewind, cut_step
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compressed_store import CompressedStore
from swarm.server.engine.compression import Compressor
from swarm.server.engine.page_store import KVShape, PageStore

LAYERS, HEADS, QUERY_HEADS, DIM, HIDDEN = 4, 2, 4, 16, 24
PAGE_TOKENS = 16
SCALING = DIM**-0.5


def _policy(
    *, scorer: str | None = "blended", bits: float | None = 4, keep_ratio: float = 0.3, chunk_tokens: int = 256
) -> KVPolicy:
    return KVPolicy(
        name="pyramid+gear",
        preset="test",
        pruning=PruningSettings(keep_ratio=keep_ratio, recent_tokens=32, extra_tokens=8, scorer=scorer)
        if scorer
        else None,
        quantisation=QuantisationSettings(key_bits=bits, value_bits=bits) if bits else None,
        chunk_tokens=chunk_tokens,
    )


def _calibration(seed: int = 0, *, curve: BudgetCurve | None = None) -> Calibration:
    """Of a model that never was: every number is random, shapes are right."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    ratios = (0.1, 0.3, 0.6)
    weights = [[0.5 + 0.5 * ((3 * layer + 2 * head) % 3) for head in range(HEADS)] for layer in range(LAYERS)]
    shares = tuple(tuple(tuple(min(1.0, weight * ratio) for ratio in ratios) for weight in heads) for heads in weights)
    recent = tuple(tuple((16 + 8 * head, 24 + 8 * layer, 40) for head in range(HEADS)) for layer in range(LAYERS))
    return Calibration(
        model_hash="a" * 64,
        curve=curve or BudgetCurve(ratios=ratios, shares=shares, recent=recent),
        key_sizes=[1.0 / (1 + rank) for rank in range(DIM)],
        value_sizes=[1.0 / (1 + rank) for rank in range(DIM)],
        scorer_weights=normal(LAYERS, HIDDEN + 1, HEADS).half(),
        received_mean=normal(LAYERS, HEADS) - 6,
        received_weight=normal(LAYERS, HEADS).abs(),
        key_mean=normal(LAYERS, HEADS, DIM),
        key_axes=(torch.eye(DIM) + 0.2 * normal(LAYERS, HEADS, DIM, DIM)).half(),
        value_mean=normal(LAYERS, HEADS, DIM),
        value_axes=(torch.eye(DIM) + 0.2 * normal(LAYERS, HEADS, DIM, DIM)).half(),
    )


def _settings(
    policy: KVPolicy, calibration: Calibration | None, windows: dict[int, int] | None = None
) -> list[LayerSettings]:
    shape = ModelShape(num_layers=LAYERS, num_kv_heads=HEADS, key_dim=DIM, value_dim=DIM, windows=windows or {})
    return list(build_layers(policy, shape, calibration, range(LAYERS)).values())


@dataclass(frozen=True)
class _Tokens:
    """What all layers of a model would hand over for some positions."""

    keys: torch.Tensor
    """[L, Hk, t, D] of float16's precision"""
    values: torch.Tensor
    queries: torch.Tensor
    """[L, Hq, t, D] likewise"""
    hidden: torch.Tensor
    """[L, t, HIDDEN]"""

    def part(self, start: int, end: int) -> _Tokens:
        return _Tokens(
            self.keys[:, :, start:end],
            self.values[:, :, start:end],
            self.queries[:, :, start:end],
            self.hidden[:, start:end],
        )


def _tokens(count: int, seed: int = 0) -> _Tokens:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half().float()

    return _Tokens(
        normal(LAYERS, HEADS, count, DIM),
        normal(LAYERS, HEADS, count, DIM),
        normal(LAYERS, QUERY_HEADS, count, DIM),
        normal(LAYERS, count, HIDDEN),
    )


class _Engine:
    """The part of an engine that stores tokens and lets events happen, for the layers [first, end)."""

    def __init__(
        self, settings: Sequence[LayerSettings], *, first: int = 0, end: int = LAYERS, num_pages: int = 3000
    ) -> None:
        self.settings = settings[first:end]
        self.first = first
        policy = self.settings[0].policy
        shape = KVShape(HEADS, DIM, DIM)
        page_bytes = PAGE_TOKENS * shape.values_per_token * 4
        self.pages = PageStore(
            [shape] * (end - first),
            memory_bytes=page_bytes * num_pages,
            page_tokens=PAGE_TOKENS,
            dtype=torch.float32,
            device="cpu",
        )
        self.pages.bytes_as(torch.uint8).fill_(255)  # NaN in every dtype: what was never written must not matter
        has_windows = any(each.window for each in self.settings)
        self.store = CompressedStore(
            self.pages,
            policy=policy,
            row_bytes=self.settings[0].codec.row_bytes,
            position_bytes=2 if policy.pruning is not None or has_windows else 0,
            has_scores=policy.pruning is not None,
        )
        self.sequences: list[CompressedSequence] = []
        self.compressor = Compressor(self.store, self.settings, [SCALING] * len(self.settings))

    def new(self) -> CompressedSequence:
        sequence = CompressedSequence(self.store, self.store.new_table(len(self.settings)), first_layer=0)
        self.sequences.append(sequence)
        return sequence

    def step(self, sequence: CompressedSequence, tokens: _Tokens, start: int, *, is_unfinished: bool = False) -> None:
        policy = self.store.policy
        count = tokens.keys.shape[2]
        done = 0
        for part in cut_step(policy, start, count):
            goes_on = is_unfinished or done + part < count
            self._run_part(sequence, tokens.part(done, done + part), start + done, is_unfinished=goes_on)
            done += part

    def _run_part(self, sequence: CompressedSequence, tokens: _Tokens, start: int, *, is_unfinished: bool) -> None:
        table, count = sequence.table, tokens.keys.shape[2]
        if start < table.length:
            sequence.rewind(start)
        self.compressor.settle(sequence, start)
        assert table.length == start
        plan = table.plan(start, count, is_unfinished=is_unfinished)
        bound = self.compressor.max_new_tiles(sequence, plan.end) if plan.ends_staging else 0
        table.reserve(table.pages_wanted(plan, bound))
        num_free = self.pages.pool.num_free
        self.pages.copy_pages(table.grow(plan))
        own = slice(self.first, self.first + len(self.settings))
        scores = torch.stack(
            [
                each.scorer.score_new(
                    NewTokens(
                        layer=each.layer,
                        positions=torch.arange(start, start + count),
                        hidden=tokens.hidden[each.layer],
                        num_kv_heads=HEADS,
                    )
                )
                for each in self.settings
            ]
        ).half()
        keys, values = tokens.keys[own].transpose(1, 2), tokens.values[own].transpose(1, 2)
        if plan.is_staged:
            slots = torch.from_numpy(table.staged.slots(start - table.staged_start, plan.end - table.staged_start))
            for layer in range(len(self.settings)):
                self.pages.write(layer, slots[layer], keys[layer], values[layer])
            sequence.add_staged(scores if self.store.has_scores else None, tokens.queries[own])
        else:
            places = self.store.token_places(table, np.arange(start, plan.end))
            self.store.write_slots(*places, keys, values, scores.transpose(1, 2))
        if plan.ends_staging:
            self.compressor.finish(sequence, plan)
            assert self.pages.pool.num_free >= num_free, "an event took pages that were not reserved for it"
        table.check_integrity()
        self.pages.pool.check_integrity([each.owned_pages() for each in self.sequences])


class _Oracle:
    def __init__(self, settings: Sequence[LayerSettings]) -> None:
        self.policy = settings[0].policy
        self.cache = ReferenceCache({each.layer: each for each in settings})

    def step(self, tokens: _Tokens, start: int, *, is_unfinished: bool = False) -> None:
        if start < self.length:
            self.cache.rewind(start)
        count, done = tokens.keys.shape[2], 0
        for part in cut_step(self.policy, start, count):
            own = tokens.part(done, done + part)
            done += part
            for layer in self.cache.layers:
                self.cache.attend(
                    layer,
                    own.queries[layer],
                    own.keys[layer],
                    own.values[layer],
                    own.hidden[layer],
                    scaling=SCALING,
                    is_unfinished=is_unfinished or done < count,
                )

    @property
    def length(self) -> int:
        return next(iter(self.cache.layers.values())).length


def _check_equal(engine: _Engine, sequence: CompressedSequence, oracle: _Oracle) -> None:
    store, table = engine.store, sequence.table
    assert table.length == oracle.length
    for local, settings in enumerate(engine.settings):
        cache = oracle.cache.layers[settings.layer]
        assert table.tail == cache.tail
        for head, expected in enumerate(cache.heads):
            rows, positions, scores = store.read_head(table, local, head)
            assert len(rows) == len(expected.rows)
            assert int(table.num_dropped[local, head]) == expected.num_dropped
            order = torch.arange(len(rows))
            if positions is not None:
                order = positions.argsort()
                assert positions[order].tolist() == expected.positions.tolist()
            if scores is not None and settings.has_summary:
                assert torch.equal(scores[order], expected.scores)
            assert torch.equal(rows[order], expected.rows)
            if expected.num_dropped and settings.has_summary:
                places = store.slot_places(table, np.array([local]), np.array([0]))
                key, value, _ = store.read_slots(*places)
                torch.testing.assert_close(key[0, head].float(), expected.summary_key, atol=2e-3, rtol=2e-3)
                torch.testing.assert_close(value[0, head].float(), expected.summary_value, atol=2e-3, rtol=2e-3)
        if not table.tail.is_staging:
            sinks = min(settings.policy.num_sinks, table.length)
            raw = np.concatenate((np.arange(sinks), np.arange(table.tail.stored_end, table.length)))
            keys, values, scores = store.read_slots(*store.token_places(table, raw))
            assert cache.raw_keys is not None and cache.raw_values is not None and cache.raw_scores is not None
            assert torch.equal(keys[local].transpose(0, 1), cache.raw_keys)
            assert torch.equal(values[local].transpose(0, 1), cache.raw_values)
            if scores is not None:
                assert torch.equal(scores[local].transpose(0, 1), cache.raw_scores)


HISTORY = [
    (150, True),
    (90, True),
    (100, False),
    *[(1, False)] * 18,
    (5, False),
    (30, False),
    (3, False),
    *[(7, False)] * 5,
    (60, False),
    *[(1, False)] * 4,
    (300, False),
    *[(2, False)] * 9,
]
"""(tokens, whether more of the input follow): a prompt in parts, answers, second turns, a turn beyond a chunk."""


def _run_both(
    settings: Sequence[LayerSettings], history: Sequence[tuple[int, bool]] = HISTORY, seed: int = 0
) -> tuple[_Engine, CompressedSequence, _Oracle]:
    engine, oracle = _Engine(settings), _Oracle(settings)
    sequence = engine.new()
    start = 0
    for index, (count, is_unfinished) in enumerate(history):
        tokens = _tokens(count, seed=1000 * seed + index)
        engine.step(sequence, tokens, start, is_unfinished=is_unfinished)
        oracle.step(tokens, start, is_unfinished=is_unfinished)
        start += count
        if count > 2 or index % 8 == 0:
            _check_equal(engine, sequence, oracle)
    return engine, sequence, oracle


@pytest.mark.parametrize("scorer", ["random", "blended", "window"])
@pytest.mark.parametrize("bits", [4, None])
def test_events_are_those_of_the_reference(scorer: str, bits: float | None) -> None:
    """Quality was measured on the reference; a server that keeps other tokens has other quality."""
    calibration = _calibration() if scorer == "blended" else None
    engine, sequence, _ = _run_both(_settings(_policy(scorer=scorer, bits=bits), calibration))
    assert int(sequence.table.num_dropped.sum()) > 0
    sequence.free()
    assert engine.pages.pool.num_free == engine.pages.pool.num_pages


def test_a_policy_that_drops_nothing_stores_every_token() -> None:
    """`gear` keeps no positions, no scores and no summary: whole tiles are appended, and nothing else is touched."""
    engine, sequence, _ = _run_both(_settings(_policy(scorer=None), None))
    assert int(sequence.table.num_dropped.sum()) == 0
    assert engine.store.positions is None and engine.store.scores is None


@pytest.mark.parametrize("scorer", ["random", None])
def test_windows_drop_whole_tiles_from_the_front(scorer: str | None) -> None:
    """A sliding layer needs all that its window shows and nothing behind it, under every policy."""
    windows = {1: 40, 2: 130, 3: 1}
    engine, sequence, _ = _run_both(_settings(_policy(scorer=scorer), None, windows))
    table = sequence.table
    for layer, window in windows.items():
        for head in range(HEADS):
            _, positions, _ = engine.store.read_head(table, layer, head)
            assert positions is not None
            seen = [place for place in range(4, table.tail.stored_end) if place > table.tail.compressed_at - window]
            first = min(seen, default=table.tail.stored_end)
            assert positions.tolist() == list(range(first - (first - 4) % 16, table.tail.stored_end))


def test_budgets_that_shrink_give_tiles_back() -> None:
    """A curve may want fewer tokens of a longer context; rows at the end then move to the front."""
    ratios = (0.25, 0.6, 0.7)
    shares = (((0.05, 0.1, 0.95), (0.4, 0.5, 0.9)),) * LAYERS
    calibration = _calibration(curve=BudgetCurve(ratios=ratios, shares=shares))
    pruning = PruningSettings(keep_ratio=0.25, recent_tokens=32, extra_tokens=64)
    settings = _settings(replace(_policy(), pruning=pruning), calibration)
    engine, oracle = _Engine(settings), _Oracle(settings)
    sequence, start, most = engine.new(), 0, 0
    for index, count in enumerate([70, *[8] * 12, 90, *[4] * 20]):
        tokens = _tokens(count, seed=index)
        engine.step(sequence, tokens, start)
        oracle.step(tokens, start)
        start += count
        _check_equal(engine, sequence, oracle)
        most = max(most, int(sequence.table.num_tiles[0, 0]))
    assert int(sequence.table.num_tiles[0, 0]) < most - 2


@pytest.mark.parametrize("first", [0, 1, 2])
def test_servers_of_any_layers_keep_the_same(first: int) -> None:
    """A replacement may hold other layers than the server it stands in for."""
    settings = _settings(_policy(), _calibration(), {2: 60})
    whole, part, end = _Engine(settings), _Engine(settings, first=first, end=first + 2), first + 2
    sequences = whole.new(), part.new()
    start = 0
    for index, (count, is_unfinished) in enumerate(HISTORY):
        for engine, sequence in zip((whole, part), sequences, strict=True):
            engine.step(sequence, _tokens(count, seed=index), start, is_unfinished=is_unfinished)
        start += count
    for layer in range(first, end):
        for head in range(HEADS):
            held = whole.store.read_head(sequences[0].table, layer, head)
            other = part.store.read_head(sequences[1].table, layer - first, head)
            for one, two in zip(held, other, strict=True):
                assert one is not None and two is not None
                assert torch.equal(one, two)


def test_a_span_of_a_servers_layers_is_compressed_by_its_own_rules() -> None:
    """Sessions may run through some of a server's blocks only."""
    settings = _settings(_policy(), _calibration())
    engine, oracle = _Engine(settings), _Oracle(settings)
    sequence = CompressedSequence(engine.store, engine.store.new_table(2), first_layer=1)
    engine.sequences.append(sequence)
    engine.settings, engine.first = settings[1:3], 1
    start = 0
    for index, (count, is_unfinished) in enumerate(HISTORY[:30]):
        tokens = _tokens(count, seed=index)
        engine.step(sequence, tokens, start, is_unfinished=is_unfinished)
        oracle.step(tokens, start, is_unfinished=is_unfinished)
        start += count
    _check_equal(engine, sequence, oracle)


def test_forks_and_rewinds_never_touch_what_others_hold() -> None:
    """Beams share pages until one of them is compressed; a token taken back leaves nothing behind."""
    settings = _settings(_policy(scorer="random"), None)
    engine = _Engine(settings)
    pairs = [(engine.new(), _Oracle(settings))]
    generator = np.random.default_rng(5)
    lengths = [0]
    for index in range(80):
        which = int(generator.integers(len(pairs)))
        sequence, oracle = pairs[which]
        start = lengths[which]
        action = generator.random()
        if action < 0.1 and start > 0 and len(pairs) < 4:
            twin = _Oracle(settings)
            twin.cache = copy.deepcopy(oracle.cache)
            pairs.append((sequence.fork(start), twin))
            engine.sequences.append(pairs[-1][0])
            lengths.append(start)
            continue
        if action < 0.3 and start > 2:
            wanted = start - int(generator.integers(1, 3))
            if can_rewind(oracle.policy, sequence.table.tail, wanted):
                start = wanted
        count = int(generator.choice([1, 1, 1, 3, 20, 90]))
        tokens = _tokens(count, seed=index)
        engine.step(sequence, tokens, start)
        oracle.step(tokens, start)
        lengths[which] = start + count
        if count > 1:
            for each, expected in pairs:
                _check_equal(engine, each, expected)
    assert len(pairs) > 2
    for each, _ in pairs:
        each.free()
    assert engine.pages.pool.num_free == engine.pages.pool.num_pages


def test_a_token_that_was_never_judged_is_taken_for_an_average_one() -> None:
    """Without a calibration an answer would otherwise forget itself at once, for want of queries to judge it by."""
    scorer = WindowScorer(None)
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0, 5.0, 0.0])
    is_new = torch.tensor([False, False, False, True, True, False, True])
    owners = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    assert scorer.rescore_unseen(scores, is_new, owners).tolist() == [3.0, 1.0, 2.0, 2.0, 0.0, 5.0, 5.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), unique=True), st.lists(st.integers(-1, 9), min_size=4))
def test_the_nth_key_is_the_one_that_sorting_finds(entries: list[tuple[int, int]], places: list[int]) -> None:
    """All choices rest on it."""
    owners, keys = (np.array([entry[column] for entry in entries], dtype=np.int64) for column in (0, 1))
    found = find_nth(keys, owners, np.array(places[:4]))
    for owner, place in enumerate(places[:4]):
        own = sorted(keys[owners == owner].tolist())
        assert found[owner] == (own[min(place, len(own) - 1)] if own and place >= 0 else -1)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-2.0, -0.0, 0.0, 1.5, math.inf, -math.inf, math.nan]))))
def test_choosing_for_all_heads_at_once_is_choosing_for_each(entries: list[tuple[int, float]]) -> None:
    """Ties, infinities and what is not a number fall alike, or servers that batch otherwise would differ."""
    scores = torch.tensor([score for _, score in entries])
    owners = torch.tensor([owner for owner, _ in entries], dtype=torch.int64)
    positions = torch.arange(len(entries))
    counts = np.bincount(owners.numpy(), minlength=4)
    num_dropped = counts // 2
    protected_from = np.array([20, 3, 0, 8])
    found = find_dropped(scores, positions, owners, num_dropped, protected_from=protected_from)
    for owner, first in enumerate(protected_from.tolist()):
        own = owners == owner
        kept = select_kept(scores[own], positions[own], int(counts[owner] - num_dropped[owner]), protected_from=first)
        assert positions[own][kept].tolist() == positions[own & torch.from_numpy(~found)].tolist()
