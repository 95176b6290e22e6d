"""Spans of every family give what the whole model gives, and read nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from swarm.datatypes import Span
from swarm.errors import BadInputError, ModelFilesError, UnsupportedModelError
from swarm.models.anatomy import dissect
from swarm.models.source import ModelSource, resolve_model
from swarm.models.span import SpanModel, load_span
from swarm.models.span_cache import SpanCache
from tests.tiny_models import FAMILIES, NUM_BLOCKS, VOCAB_SIZE, save_tiny_model

SPANS = (Span(start=0, end=1), Span(start=1, end=4), Span(start=4, end=6))
TOLERANCE = 1e-5
"""Relative. Most families are equal to the bit; windows are masked here, but cut off in the whole model."""
NUM_PREFILL = 20
NUM_STEPS = 8
NUM_TOKENS = NUM_PREFILL + NUM_STEPS


def build(family: str, tmp_path: Path) -> tuple[PreTrainedModel, ModelSource]:
    model = save_tiny_model(family, tmp_path / family)
    return model, resolve_model(str(tmp_path / family), cache_dir=tmp_path / "cache")


def load_spans(source: ModelSource) -> list[SpanModel]:
    return [load_span(source, span) for span in SPANS]


def run_chain(
    spans: list[SpanModel], hidden: torch.Tensor, position_ids: torch.Tensor, caches: list[SpanCache] | None = None
) -> torch.Tensor:
    for index, span in enumerate(spans):
        hidden = span(hidden, position_ids, cache=caches[index] if caches else None)
    return hidden


@contextmanager
def taps(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """What goes into the first block of a whole model and comes out of its last, call by call."""
    seen: dict[str, torch.Tensor] = {}

    def take_input(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["in"] = args[0] if args else kwargs["hidden_states"]

    def take_output(block: Any, args: tuple[Any, ...], output: Any) -> None:
        seen["out"] = output[0] if isinstance(output, tuple) else output

    stack = dissect(model, model.config).stack
    handles = [
        stack[0].register_forward_pre_hook(take_input, with_kwargs=True),
        stack[-1].register_forward_hook(take_output),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def token_ids(num_tokens: int = NUM_TOKENS, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, num_tokens), generator=torch.Generator().manual_seed(7))


def positions(start: int, end: int, batch: int = 1) -> torch.Tensor:
    return torch.arange(start, end).expand(batch, -1)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_chained_spans_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    """The one promise of the loader: any family, cut unevenly, prefill and cached steps, same numbers."""
    model, source = build(family, tmp_path)
    spans = load_spans(source)
    caches = [span.new_cache() for span in spans]
    ids = token_ids()
    chunks = [(0, NUM_PREFILL)] + [(i, i + 1) for i in range(NUM_PREFILL, NUM_TOKENS)]
    kv = DynamicCache(config=model.config)
    with torch.inference_mode(), taps(model) as seen:
        for start, end in chunks:
            model(ids[:, start:end], past_key_values=kv, use_cache=True)
            if start == 0:
                uncached = run_chain(spans, seen["in"], positions(0, end))
                assert relative_error(uncached, seen["out"]) <= TOLERANCE
                # A comparison that can not fail proves nothing: without blocks 1:4 it must.
                skipping = run_chain([spans[0], spans[2]], seen["in"], positions(0, end))
                assert relative_error(skipping, seen["out"]) > 1e-2
            result = run_chain(spans, seen["in"], positions(start, end), caches)
            assert result.shape == seen["out"].shape
            assert relative_error(result, seen["out"]) <= TOLERANCE, f"positions {start}:{end}"
    assert [cache.length for cache in caches] == [NUM_TOKENS] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_rewinding_is_exact(family: str, tmp_path: Path) -> None:
    """Speculative decoding, beams and recovery all set a position back, past the sliding window too."""
    _, source = build(family, tmp_path)
    span = load_span(source, Span(start=1, end=4))
    hidden = torch.randn(1, NUM_TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = span(hidden, positions(0, NUM_TOKENS))
        cache = span.new_cache()
        span(torch.randn_like(hidden), positions(0, NUM_TOKENS), cache=cache)
        cache.crop(0)
        assert cache.length == 0
        span(hidden, positions(0, NUM_TOKENS), cache=cache)
        # 22 positions back is far more than the window of 8.
        cache.crop(6)
        assert cache.length == 6
        again = span(hidden[:, 6:], positions(6, NUM_TOKENS), cache=cache)
    assert relative_error(again, whole[:, 6:]) <= TOLERANCE


def test_a_cloned_cache_goes_its_own_way(tmp_path: Path) -> None:
    """Beams share a past and differ afterwards; one must not see the other's tokens."""
    _, source = build("mistral", tmp_path)
    span = load_span(source, Span(start=2, end=5))
    hidden = torch.randn(1, 12, span.hidden_size)
    with torch.inference_mode():
        cache = span.new_cache()
        span(hidden[:, :10], positions(0, 10), cache=cache)
        twin = cache.clone()
        span(torch.randn_like(hidden[:, 10:]), positions(10, 12), cache=twin)
        twin.crop(3)
        result = span(hidden[:, 10:], positions(10, 12), cache=cache)
        expected = span(hidden, positions(0, 12))[:, 10:]
    assert twin.length == 3
    assert relative_error(result, expected) <= TOLERANCE
    assert cache.size_bytes == 4 * twin.size_bytes


def test_a_cache_can_not_be_cropped_to_more_than_it_holds(tmp_path: Path) -> None:
    """A wrong position must be an error, not a silently shorter answer."""
    _, source = build("llama", tmp_path)
    cache = load_span(source, Span(start=0, end=1)).new_cache()
    with pytest.raises(ValueError, match="0 positions to 4"):
        cache.crop(4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon", "bloom", "qwen3_moe"])
def test_gradients_pass_through_a_span(family: str, tmp_path: Path) -> None:
    """Fine-tuning needs the gradient of a span's input, equal to that of the same blocks in the whole model."""
    model, source = build(family, tmp_path)
    spans = load_spans(source)
    model.requires_grad_(False)
    with taps(model) as seen:
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, torch.nn.Module)
        inputs = embeddings(token_ids()).requires_grad_()
        model(inputs_embeds=inputs, use_cache=False)
        expected_in, expected_out = seen["in"], seen["out"]
    weights = torch.randn(expected_out.shape, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad((expected_out * weights).sum(), expected_in)
    hidden = expected_in.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad((run_chain(spans, hidden, positions(0, NUM_TOKENS)) * weights).sum(), hidden)
    assert relative_error(result, expected) <= 1e-5
    assert all(not parameter.requires_grad for span in spans for parameter in span.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_shards_of_the_span_are_opened(family: str, tmp_path: Path) -> None:
    """A machine with little disk holds the files of its own blocks only; others may not even exist."""
    save_tiny_model(family, tmp_path / "m", num_shards=12)
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    span = Span(start=2, end=3)
    needed = set(source.location.fetch(lambda name: ".2." in name, _Silent()).values())
    everything = {path.name for path in source.folder.glob("*.safetensors")}
    assert 0 < len(needed) < len(everything)
    for name in everything - needed:
        (source.folder / name).write_bytes(b"not a safetensors file")
    loaded = load_span(source, span)
    assert loaded.num_layers == 1
    with pytest.raises(ModelFilesError, match="damaged or incomplete"):
        load_span(source, Span(start=0, end=NUM_BLOCKS))


class _Silent:
    def start(self, description: str, total: int | None, unit: str) -> None: ...
    def advance(self, amount: int) -> None: ...
    def finish(self) -> None: ...


def test_a_span_holds_the_weights_of_its_blocks_only(tmp_path: Path) -> None:
    """Memory is what a contributor gives: no embedding, head or other block may take any."""
    model, source = build("llama", tmp_path)
    span = load_span(source, Span(start=1, end=4))
    block_size = sum(parameter.numel() for parameter in dissect(model, model.config).stack[1].parameters())
    assert sum(parameter.numel() for parameter in span.parameters()) == 3 * block_size


def test_facts_about_a_span(tmp_path: Path) -> None:
    """The engine plans with these."""
    _, source = build("gemma2", tmp_path)
    span = load_span(source, Span(start=1, end=4), dtype=torch.bfloat16)
    assert (span.hidden_size, span.num_layers, span.dtype) == (32, 3, torch.bfloat16)
    assert span.device == torch.device("cpu")
    assert span.layer_types == ("full_attention", "sliding_attention", "full_attention")
    assert span.config.num_hidden_layers == 3
    assert source.config.num_hidden_layers == NUM_BLOCKS, "the source's own config must stay whole"
    assert {getattr(module, "layer_idx", None) for module in span.blocks.modules()} - {None} == {0, 1, 2}
    assert not span.training
    assert "gemma2 blocks 1:4" in repr(span)
    output = span(torch.randn(1, 5, 32, dtype=torch.bfloat16), positions(0, 5), cache=span.new_cache())
    assert output.dtype == torch.bfloat16


def test_blocks_outside_the_model_are_refused(tmp_path: Path) -> None:
    """`--blocks 4:9` of a model with 6 blocks must say what there is."""
    _, source = build("llama", tmp_path)
    with pytest.raises(BadInputError, match=r"blocks 4:9 are outside .* blocks 0:6"):
        load_span(source, Span(start=4, end=9))


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    """Weights of another model under this config must not be loaded, in part or at random."""
    save_tiny_model("llama", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelFilesError, match=r"is \[32, 48\], but .* should be \[32, 40\]"):
        load_span(source, Span(start=0, end=1))


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    """Transformers would initialise them at random and carry on; a swarm must not."""
    save_tiny_model("qwen2", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 7'))
    text = config.read_text()
    start = text.index('"layer_types"')
    config.write_text(text[:start] + text[text.index("],", start) + 2 :])
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    with pytest.raises(ModelFilesError, match=r"lack .* tensors that blocks 5:7 need"):
        load_span(source, Span(start=5, end=7))


@pytest.fixture
def recording_attention() -> tuple[str, list[dict[str, Any]]]:
    """A registered attention function without mask function that writes down what it is given."""
    calls: list[dict[str, Any]] = []

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        calls.append({"layer_idx": module.layer_idx, "mask": attention_mask, "shape": tuple(query.shape)})
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("swarm_test_recording", attend)
    return "swarm_test_recording", calls


WITH_OWN_ATTENTION = ("falcon", "bloom")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_OWN_ATTENTION])
def test_a_registered_attention_sees_local_block_numbers_and_no_mask(
    family: str, tmp_path: Path, recording_attention: tuple[str, list[dict[str, Any]]]
) -> None:
    """The batching engine packs sessions into one row, keeps its own pages per block, and masks by itself."""
    name, calls = recording_attention
    _, source = build(family, tmp_path)
    span = load_span(source, Span(start=3, end=6), attention=name)
    assert span.attention == name
    # Two sessions of 3 and 2 tokens at unrelated positions.
    packed = torch.tensor([[4, 5, 6, 0, 1]])
    with torch.inference_mode():
        output = span(torch.randn(1, 5, span.hidden_size), packed)
    assert output.shape == (1, 5, span.hidden_size)
    assert [call["layer_idx"] for call in calls] == [0, 1, 2]
    assert all(call["mask"] is None for call in calls)


@pytest.mark.parametrize("family", WITH_OWN_ATTENTION)
def test_families_with_their_own_attention_say_so(family: str, tmp_path: Path) -> None:
    """The engine must know who can not share a batch, rather than compute nonsense for them."""
    _, source = build(family, tmp_path)
    span = load_span(source, Span(start=3, end=6))
    assert not span.supports_custom_attention
    with pytest.raises(UnsupportedModelError, match=f"{family} has attention code of its own"):
        span.set_attention("flex_attention")


def test_an_unknown_attention_is_refused(tmp_path: Path) -> None:
    """A name that nobody registered must be named."""
    _, source = build("llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match="no_such_attention"):
        load_span(source, Span(start=0, end=1), attention="no_such_attention")


def test_padding_is_hidden_by_the_mask(tmp_path: Path) -> None:
    """A padded batch through the slow path gives each row what it gets alone."""
    _, source = build("llama", tmp_path)
    span = load_span(source, Span(start=0, end=3))
    hidden = torch.randn(2, 6, span.hidden_size)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        batch = span(hidden, position_ids, attention_mask=mask)
        alone = span(hidden[:1, 2:], positions(0, 4))
    assert relative_error(batch[:1, 2:], alone) <= TOLERANCE


def test_blocks_can_be_called_by_themselves(tmp_path: Path) -> None:
    """Hooks for the span's own calls must not meddle with a block that is profiled or fine-tuned alone."""
    _, source = build("llama", tmp_path)
    span = load_span(source, Span(start=0, end=2))
    rotary: Callable[..., Any] = span.model.get_decoder().rotary_emb
    hidden = torch.randn(1, 3, span.hidden_size)
    first = span.blocks[0](hidden, position_embeddings=rotary(hidden, positions(0, 3)))
    assert first.shape == hidden.shape
