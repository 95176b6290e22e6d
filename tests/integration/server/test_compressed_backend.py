"""A server that compresses sessions gives what the plain form of the policy gives, whoever shares its batches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.datatypes import Span
from swarm.kvcache.compressed_table import CompressedTable, PartPlan
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.reference_model import ReferenceModel, wrap_model
from swarm.kvpolicy.settings import PRESETS, KVPolicy
from swarm.models import DEMO_MODEL, SpanModel, load_span, resolve_model
from swarm.server.engine.choosing import choose_backend
from swarm.server.engine.compressed_sequence import CompressedSequence
from swarm.server.engine.compression import Compressor
from swarm.server.engine.page_store import PageStore
from swarm.server.engine.ragged import RaggedBackend, probe_layers
from swarm.server.engine.work import StepWork
from swarm.server.policy_layers import PolicyWish
from swarm.server.session_mirror import SequenceStep
from swarm.server.span_loading import make_wish
from tests.engine_sessions import load_tiny_span
from tests.small_policies import small_policy
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(start=0, end=NUM_BLOCKS)
FAMILIES = ["llama", "gpt_neox", "gemma2", "gpt_oss"]
"""Grouped heads, as many KV heads as query heads, capped scores and windows, learned sinks and windows."""
TOLERANCE = 0.04
"""Relative: a number at the border of two 4-bit codes may fall to either side."""


class Reference:
    """A whole model with the policy in its plainest form, and what goes into and comes out of its blocks."""

    def __init__(self, model: Any, policy: KVPolicy, wish: PolicyWish, span_model: SpanModel) -> None:
        self.model: ReferenceModel = wrap_model(model)
        self.policy = policy
        layers = probe_layers(span_model)
        built = wish.build(
            [layer.shape for layer in layers], [layer.window for layer in layers], page_tokens=16, itemsize=4
        )
        self.policy_layers = built
        self._settings = dict(enumerate(built.settings))
        blocks = model.base_model.layers
        blocks[0].register_forward_pre_hook(self._take_input, with_kwargs=True)
        blocks[-1].register_forward_hook(self._take_output)
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []

    def _take_input(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs.append((args[0] if args else kwargs["hidden_states"])[0])

    def _take_output(self, module: Any, args: Any, output: Any) -> None:
        self._outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    def new_cache(self) -> ReferenceCache:
        return ReferenceCache(self._settings)

    @torch.no_grad()
    def step(
        self, cache: ReferenceCache, tokens: Sequence[int], start: int, *, is_unfinished: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the blocks are given, and give."""
        self._inputs.clear()
        self._outputs.clear()
        self.model.step(cache, self.policy, tokens, start, is_unfinished=is_unfinished)
        return torch.cat(self._inputs), torch.cat(self._outputs)


def work(name: bytes, hidden: torch.Tensor, start: int, *, compresses: bool, is_unfinished: bool = False) -> StepWork:
    item = SequenceStep(0, 0, start, len(hidden), is_unfinished)
    return StepWork((name, 1), SPAN, [item], hidden, lambda output, error: None, compresses=compresses)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def kept_positions(backend: RaggedBackend, name: bytes) -> dict[int, list[set[int]]]:
    """By layer and head, of a session's only sequence."""
    table = backend.memory._sessions[name, 1].sequences[0].table
    store = backend.memory.compressed
    assert store is not None and isinstance(table, CompressedTable)
    found: dict[int, list[set[int]]] = {}
    for layer in range(table.layout.num_layers):
        heads = [store.read_head(table, layer, head)[1] for head in range(table.layout.num_kv_heads)]
        found[layer] = [set(positions.tolist()) if positions is not None else set() for positions in heads]
    return found


MakeSetting = Callable[..., tuple[Reference, RaggedBackend]]


@pytest.fixture(scope="module")
def make_setting(tmp_path_factory: pytest.TempPathFactory) -> MakeSetting:
    def make(family: str, preset: str, **options: Any) -> tuple[Reference, RaggedBackend]:
        folder = tmp_path_factory.mktemp(family)
        whole = save_tiny_model(family, folder)
        model = load_span(resolve_model(str(folder)), SPAN)
        policy = small_policy(preset)
        wish = PolicyWish(policy=policy, num_layers=NUM_BLOCKS, first_layer=0, max_positions=512)
        backend = RaggedBackend(model, memory_bytes=2**24)  # sets the attention that is probed
        reference = Reference(whole, policy, wish, model)
        backend = RaggedBackend(model, memory_bytes=2**24, policy_layers=reference.policy_layers, **options)
        return reference, backend

    return make


Turn = tuple[int, bool]
"""Tokens of a step, and whether it is unfinished."""
HISTORIES: dict[bytes, list[Turn]] = {
    b"a": [(50, True), (30, True), (7, False), *[(1, False)] * 41, (60, False), (1, False), (1, False)],
    b"b": [(20, False), *[(1, False)] * 30, (4, False), (3, False), (1, False)],
    b"c": [(100, True), (28, True), (40, False), *[(1, False)] * 36],
}


@pytest.mark.parametrize("allows_kernel", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["pyramid+gear", "gear", "pyramid"])
def test_sessions_in_one_batch_equal_the_plain_form_alone(
    make_setting: MakeSetting, family: str, preset: str, allows_kernel: bool
) -> None:
    """What was measured of a policy holds for what a server does, at every step of prompts, answers and turns."""
    reference, backend = make_setting(family, preset, allows_kernel=allows_kernel)
    generator = torch.Generator().manual_seed(3)
    vocabulary = reference.model.model.config.get_text_config().vocab_size
    caches = {name: reference.new_cache() for name in HISTORIES}
    starts = dict.fromkeys(HISTORIES, 0)
    exact_start = 0
    for round_number in range(max(map(len, HISTORIES.values()))):
        works, expected = [], []
        for name, history in HISTORIES.items():
            if round_number >= len(history):
                continue
            count, is_unfinished = history[round_number]
            tokens = torch.randint(vocabulary, (count,), generator=generator).tolist()
            start = starts[name]
            hidden, outputs = reference.step(caches[name], tokens, start, is_unfinished=is_unfinished)
            starts[name] += count
            if start % 128 + count > 128:
                raise AssertionError("the test's steps cross no chunk's border")
            works.append(work(name, hidden, start, compresses=True, is_unfinished=is_unfinished))
            expected.append(outputs)
        # An exact session among them.
        count = 5 if exact_start == 0 else 1
        works.append(work(b"x", torch.randn(count, works[0].hidden.shape[1]), exact_start, compresses=False))
        exact_start += count
        for found, outputs in zip(backend.run_steps(works), expected, strict=False):
            assert isinstance(found, torch.Tensor), found
            assert relative_error(found, outputs) < TOLERANCE, (round_number, relative_error(found, outputs))
        backend.memory.check_integrity()
    if reference.policy.pruning is not None:
        for name, cache in caches.items():
            found_kept = kept_positions(backend, name)
            for layer, heads in cache.kept_positions().items():
                for wanted, kept in zip(heads, found_kept[layer], strict=True):
                    assert len(wanted) == len(kept)
                    assert len(kept & set(wanted)) >= 0.99 * len(wanted) - 1, (name, layer)
    for name in (*HISTORIES, b"x"):
        backend.forget((name, 1))
    pool = backend.store.pool
    assert pool.num_free + pool.num_reclaimable == pool.num_pages


def test_a_batch_that_fails_at_its_very_end_runs_again_as_if_it_never_had(
    make_setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and queries remembered twice would have other tokens judged than there are."""
    _, backend = make_setting("llama", "pyramid+gear")
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(40, backend._model.hidden_size, generator=generator)
    add_staged = CompressedSequence.add_staged
    num_calls = 0

    def fail_once(self: CompressedSequence, *noted: torch.Tensor | None) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise RuntimeError("no memory")
        add_staged(self, *noted)

    monkeypatch.setattr(CompressedSequence, "add_staged", fail_once)
    for first in (0, 20):
        works = [
            work(name, hidden[first : first + 20], first, compresses=True, is_unfinished=True) for name in (b"a", b"b")
        ]
        found = backend.run_steps(works)
        assert isinstance(found[0], torch.Tensor) and isinstance(found[1], torch.Tensor)
        assert torch.equal(found[0], found[1]) or relative_error(found[0], found[1]) < 1e-5
    assert num_calls == 2 + 2 + 2
    for name in (b"a", b"b"):
        sequence = backend.memory._sessions[name, 1].sequences[0]
        assert isinstance(sequence, CompressedSequence)
        assert sequence.staged_scores is not None and sequence.staged_queries is not None
        assert sequence.staged_scores.shape[2] == sequence.staged_queries.shape[2] == 40


# -- the self-test before a server compresses --------------------------------------------------


def wish_for(preset: str) -> PolicyWish:
    return PolicyWish(policy=PRESETS[preset], num_layers=NUM_BLOCKS, first_layer=0, max_positions=2048)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_every_preset_passes_the_self_test(family: str, preset: str, tmp_path: Path) -> None:
    """A self-test that is too strict would take a policy from its users without a fault."""
    model = load_tiny_span(family, tmp_path / "model")
    chosen = choose_backend(model, memory_bytes=2**22, wish=wish_for(preset))
    assert chosen.is_batching and not chosen.kv_problem


@pytest.mark.parametrize(
    ("start", "end", "dtype", "presets"),
    [
        (0, 30, torch.bfloat16, ["pyramid", "smallest"]),
        (5, 25, torch.bfloat16, ["gear"]),
        (20, 30, torch.bfloat16, ["pyramid+gear"]),
        (10, 20, torch.float32, ["gear-2bit"]),
    ],
)
def test_any_blocks_of_a_real_model_pass_the_self_test(
    start: int, end: int, dtype: torch.dtype, presets: list[str]
) -> None:
    """Deep blocks magnify rounding and coarse codes where they are asked about noise; that is not a fault."""
    source, span = resolve_model(DEMO_MODEL), Span(start=start, end=end)
    for preset in presets:
        model = load_span(source, span, dtype=dtype)
        wish = make_wish(source, span, PRESETS[preset])
        assert choose_backend(model, memory_bytes=2**26, wish=wish).kv_problem == ""


def test_only_the_chosen_backend_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes all of the KV memory: one that was only tried must be gone before the next is built."""
    made: list[weakref.ref[PageStore]] = []
    alive: list[int] = []
    real = RaggedBackend.__init__

    def note(self: RaggedBackend, *arguments: Any, **options: Any) -> None:
        alive.append(sum(each() is not None for each in made))
        real(self, *arguments, **options)
        made.append(weakref.ref(self.store))

    monkeypatch.setattr(RaggedBackend, "__init__", note)
    model = load_tiny_span("llama", tmp_path / "model")
    gc.disable()
    try:
        chosen = choose_backend(model, memory_bytes=2**22, wish=wish_for("pyramid+gear"))
    finally:
        gc.enable()
    assert not chosen.kv_problem
    assert alive == [0, 0, 0]


def swap_heads(sequence: CompressedSequence) -> None:
    """What an event of a family that orders heads otherwise might do."""
    sequence.table.tiles[:] = sequence.table.tiles[:, ::-1].copy()


def fail(sequence: CompressedSequence) -> None:
    raise RuntimeError("no such thing here")


@pytest.mark.parametrize("preset", ["pyramid", "pyramid+gear", "gear-2bit"])
@pytest.mark.parametrize(("fault", "words"), [(swap_heads, "differ by"), (fail, "no such thing here")])
@pytest.mark.parametrize("step", ["settle", "finish"])
def test_a_family_that_fails_at_events_is_served_exactly(
    fault: Callable[[CompressedSequence], None],
    words: str,
    step: str,
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the server would offer a policy and then fail, or garble, every real prompt."""
    real = getattr(Compressor, step)

    def fail_then(self: Compressor, sequence: CompressedSequence, argument: int | PartPlan) -> None:
        was_stored = sequence.table.tail.stored_end
        real(self, sequence, argument)
        if sequence.table.tail.stored_end > was_stored:
            fault(sequence)

    monkeypatch.setattr(Compressor, step, fail_then)
    model = load_tiny_span("llama", tmp_path / "model")
    chosen = choose_backend(model, memory_bytes=2**22, wish=wish_for(preset))
    assert chosen.is_batching and words in chosen.kv_problem
    assert isinstance(chosen.backend, RaggedBackend) and not chosen.backend.policy.compresses
