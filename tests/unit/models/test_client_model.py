"""The client's part of every family, joined with spans, is the whole model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache, GenerationConfig

from swarm.datatypes import Span
from swarm.models.client_model import load_client_parts
from swarm.models.source import ModelSource, resolve_model
from swarm.models.span import SpanModel, load_span
from swarm.models.span_cache import SpanCache
from tests.tiny_models import FAMILIES, NUM_BLOCKS, VOCAB_SIZE, save_tiny_model

SPANS = (Span(start=0, end=1), Span(start=1, end=4), Span(start=4, end=6))
RETURN_TUPLES = {"falcon", "bloom"}


class ChainLayer(torch.nn.Module):
    """Stands for the remote blocks: runs local spans, one after the other."""

    def __init__(self, spans: list[SpanModel], returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["spans"] = spans
        self.returns_tuple = returns_tuple
        self.caches: list[SpanCache] | None = None
        self.masks: list[Any] = []

    @property
    def position(self) -> int:
        return self.caches[0].length if self.caches else 0

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = self.position
        position_ids = torch.arange(start, start + hidden_states.shape[1]).expand(hidden_states.shape[:2])
        if "position_ids" in kwargs:
            assert torch.equal(kwargs["position_ids"].expand_as(position_ids), position_ids)
        self.masks.append(kwargs.get("attention_mask"))
        for index, span in enumerate(self.__dict__["spans"]):
            hidden_states = span(hidden_states, position_ids, cache=self.caches[index] if self.caches else None)
        return (hidden_states,) if self.returns_tuple else hidden_states


class RemoteLength(DynamicCache):
    """Tells generation code how far the remote caches are, and holds nothing."""

    def __init__(self, layer: ChainLayer) -> None:
        super().__init__()
        self.layer = layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layer.position

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.layer.position + query_length, 0


def join(source: ModelSource, **settings: Any) -> tuple[Any, ChainLayer]:
    spans = [load_span(source, span) for span in SPANS]
    made: list[ChainLayer] = []

    def make_layer(original: type[torch.nn.Module], returns_tuple: bool) -> torch.nn.Module:
        assert issubclass(original, torch.nn.Module)
        made.append(ChainLayer(spans, returns_tuple))
        return made[0]

    return load_client_parts(source, make_layer=make_layer, **settings), made[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_client_and_spans_give_the_logits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """Embedding scales, norms, soft caps and heads stay the model's own, for every family."""
    model: Any = save_tiny_model(family, tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    client, layer = join(source)
    ids = torch.randint(0, VOCAB_SIZE, (2, 28), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(client(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)

        layer.caches = [span.new_cache() for span in layer.__dict__["spans"]]
        steps = [(0, 20)] + [(index, index + 1) for index in range(20, 28)]
        logits = [client(ids[:, a:b], past_key_values=RemoteLength(layer), use_cache=True).logits for a, b in steps]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=3e-5, rtol=3e-5)
    assert layer.returns_tuple == (family in RETURN_TUPLES)
    if family not in RETURN_TUPLES:
        assert layer.masks == [None] * len(layer.masks), "masks are the servers' business"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_any_block_is_read(family: str, tmp_path: Path) -> None:
    """A client runs on a laptop: it must fetch and hold embeddings and head only."""
    model = save_tiny_model(family, tmp_path / "m", num_shards=12)
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    outside = {name for name, _ in model.named_parameters() if not any(part.isdigit() for part in name.split("."))}
    with source.open_tensors(lambda name: not any(part.isdigit() for part in name.split("."))) as slices:
        outside_files = set(source.location.fetch(lambda name: name in slices, _Silent()).values())
    for path in source.folder.glob("*.safetensors"):
        if path.name not in outside_files:
            path.write_bytes(b"not a safetensors file")
    client = load_client_parts(source, make_layer=lambda original, returns_tuple: torch.nn.Identity())
    assert {name for name, _ in client.named_parameters()} == outside


class _Silent:
    def start(self, description: str, total: int | None, unit: str) -> None: ...
    def advance(self, amount: int) -> None: ...
    def finish(self) -> None: ...


def test_the_config_tells_of_one_layer_and_the_source_of_all(tmp_path: Path) -> None:
    """Generation code sizes caches by the config it sees; the route is sized by the source."""
    save_tiny_model("gemma3_text", tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    client, _ = join(source)
    assert client.config.num_hidden_layers == 1
    assert client.config.layer_types == ["sliding_attention"]
    assert source.num_blocks == NUM_BLOCKS
    assert len(source.config.layer_types) == NUM_BLOCKS


def test_generation_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    """End tokens and sampling defaults come with a model, and must not be lost on the way."""
    save_tiny_model("llama", tmp_path / "m")
    GenerationConfig(eos_token_id=[2, 5], top_k=7, do_sample=True).save_pretrained(tmp_path / "m")
    client, _ = join(resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache"))
    assert client.generation_config.eos_token_id == [2, 5]
    assert client.generation_config.top_k == 7


def test_greedy_generation_gives_the_same_tokens(tmp_path: Path) -> None:
    """The result is a GenerationMixin: transformers' own generate drives it."""
    model: Any = save_tiny_model("qwen3", tmp_path / "m")
    client, layer = join(resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache"))
    ids = torch.randint(3, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    layer.caches = [span.new_cache() for span in layer.__dict__["spans"]]
    result = client.generate(ids, past_key_values=RemoteLength(layer), **settings)
    assert result.tolist() == expected.tolist()


def test_gradients_reach_the_embeddings(tmp_path: Path) -> None:
    """Prompt tuning trains what lies before the remote blocks."""
    model: Any = save_tiny_model("llama", tmp_path / "m")
    client, _ = join(resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache"))
    ids = torch.randint(0, VOCAB_SIZE, (1, 10), generator=torch.Generator().manual_seed(6))
    gradients = []
    for whole in (model, client):
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = whole(inputs_embeds=inputs, labels=ids, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, inputs)[0])
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-4


def test_a_classifier_gets_a_new_head_on_the_same_body(tmp_path: Path) -> None:
    """A checkpoint of a language model has no classification head; everything else it must have."""
    save_tiny_model("llama", tmp_path / "m")
    client, _ = join(
        resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache"), auto_class=AutoModelForSequenceClassification
    )
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    assert client(ids, use_cache=False).logits.shape == (2, 2)
    assert not client.score.weight.is_meta
