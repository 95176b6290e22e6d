"""Spans at every precision: they load, prove themselves, batch, give gradients, and come back from the disk."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from swarm.datatypes import Span
from swarm.errors import ModelFilesError
from swarm.models import ModelSource, SpanModel, check_span, load_span, resolve_model
from swarm.models.narrowed import narrow
from swarm.server.engine.choosing import choose_backend
from swarm.weights import Precision, WeightCache
from swarm.weights.accounting import count_weights
from swarm.weights.experts import QuantisedExperts
from swarm.weights.linear import QuantisedLinear
from tests.tiny_models import FAMILIES, save_tiny_model

SPAN = Span(start=1, end=5)
LOSSY = (Precision.INT8, Precision.NF4)
HIDDEN_TOLERANCE = 4e-2
"""Of hidden states, relative to their size, against fp32 arithmetic with the same restored weights: products round
their inputs and outputs to bf16, seven of them in each of four blocks."""
GRADIENT_TOLERANCE = 5e-2
"""Of the gradient of one token's hidden state, relative to its size."""


def find_source(family: str, tmp_path: Path) -> ModelSource:
    if not (tmp_path / family).exists():
        save_tiny_model(family, tmp_path / family)
    return resolve_model(str(tmp_path / family), cache_dir=tmp_path / "cache")


def run(model: SpanModel, hidden: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(hidden.shape[1])[None]
    output: torch.Tensor = model(hidden.to(model.dtype), positions)
    return output.float()


def some_hidden(model: SpanModel, count: int = 20) -> torch.Tensor:
    return torch.randn(1, count, model.hidden_size, generator=torch.Generator().manual_seed(5))


def restore(source: ModelSource, model: SpanModel) -> SpanModel:
    """An fp32 span with exactly the weights that `model` multiplies with."""
    restored = load_span(source, model.span)
    for path, module in model.blocks.named_modules():
        if isinstance(module, QuantisedLinear):
            restored.blocks.get_submodule(path).get_parameter("weight").data.copy_(module.matrix.restore())
        elif isinstance(module, QuantisedExperts):
            parameter = restored.blocks.get_parameter(path)
            for expert in range(len(parameter)):
                weight = module[expert].matrix.restore()
                parameter.data[expert].copy_(weight.T if module.is_transposed else weight)
    return restored


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", LOSSY, ids=str)
def test_every_family_computes_with_its_restored_weights(family: str, precision: Precision, tmp_path: Path) -> None:
    """Linear layers of any make, stacked experts, transposed ones: nothing may be multiplied otherwise, or left out."""
    source = find_source(family, tmp_path)
    model = load_span(source, SPAN, weights=precision)
    assert model.precision is precision
    account = model.count_weights()
    assert account.num_weights == load_span(source, SPAN).count_weights().num_weights
    assert account.num_quantised > 0.9 * account.num_weights
    report = check_span(model)
    assert report.ok, report.reason
    hidden = some_hidden(model)
    with torch.inference_mode():
        expected = run(restore(source, model), hidden)
        found = run(model, hidden)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if any(isinstance(module, QuantisedExperts) for module in model.modules()):
        # Where two experts are nearly equal, 16-bit rounding may choose another: for few tokens, not for most.
        assert float(errors.median()) < HIDDEN_TOLERANCE
    else:
        assert float(errors.max()) < HIDDEN_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "falcon"])
def test_bf16_stays_near_fp32(family: str, tmp_path: Path) -> None:
    """Half the memory, the same model."""
    source = find_source(family, tmp_path)
    model = load_span(source, SPAN, weights=Precision.BF16)
    assert model.precision is Precision.BF16 and model.dtype is torch.bfloat16
    with torch.inference_mode():
        expected, found = run(load_span(source, SPAN), some_hidden(model)), run(model, some_hidden(model))
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 5e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("precision", LOSSY, ids=str)
def test_sessions_share_batches(family: str, precision: Precision, tmp_path: Path) -> None:
    """The engine's own start-up test lets few bits batch like any other weights."""
    model = load_span(find_source(family, tmp_path), SPAN, weights=precision)
    chosen = choose_backend(model, memory_bytes=2**22)
    assert chosen.is_batching, chosen.reason


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("precision", LOSSY, ids=str)
def test_gradients_of_inputs_are_those_of_restored_weights(family: str, precision: Precision, tmp_path: Path) -> None:
    """Prompt tuning through a 4-bit server must go downhill."""
    source = find_source(family, tmp_path)
    model = load_span(source, SPAN, weights=precision)
    gradients = []
    for span in (model, restore(source, model)):
        hidden = some_hidden(model).requires_grad_()
        output = run(span, hidden)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(6)))
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    found, expected = gradients
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < GRADIENT_TOLERANCE


def test_parts_of_a_span_run(tmp_path: Path) -> None:
    """Routes use parts of what a server holds."""
    source = find_source("llama", tmp_path)
    model = load_span(source, SPAN, weights=Precision.NF4)
    part = Span(start=2, end=4)
    hidden = some_hidden(model)
    positions = torch.arange(hidden.shape[1])[None]
    with torch.inference_mode():
        alone = load_span(source, part, weights=Precision.NF4)(hidden, positions)
        assert torch.equal(narrow(model, part)(hidden, positions), alone)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "bloom"])
def test_the_second_start_reads_stored_blocks_only(family: str, tmp_path: Path) -> None:
    """Same numbers, without the checkpoint's weights: they may even be gone."""
    source = find_source(family, tmp_path)
    first = load_span(source, SPAN, weights=Precision.NF4, weight_cache=WeightCache(tmp_path / "weights"))
    for path in (tmp_path / family).glob("*.safetensors"):
        path.unlink()
    second = load_span(source, SPAN, weights=Precision.NF4, weight_cache=WeightCache(tmp_path / "weights"))
    assert count_weights(second) == count_weights(first)
    with torch.inference_mode():
        hidden = some_hidden(first)
        assert torch.equal(run(second, hidden), run(first, hidden))
    assert check_span(second).ok


def test_another_span_reuses_stored_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that moves to neighbouring blocks makes only the new ones."""
    source = find_source("llama", tmp_path)
    load_span(source, SPAN, weights=Precision.NF4, weight_cache=WeightCache(tmp_path / "weights"))
    moved = Span(start=3, end=6)
    with caplog.at_level(logging.INFO, "swarm.models.streaming"):
        found = load_span(source, moved, weights=Precision.NF4, weight_cache=WeightCache(tmp_path / "weights"))
    assert "2 of 3 blocks were stored" in caplog.text
    with torch.inference_mode():
        hidden = some_hidden(found)
        assert torch.equal(run(found, hidden), run(load_span(source, moved, weights=Precision.NF4), hidden))


def test_damaged_blocks_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that a disk does to the cache may change an answer."""
    source = find_source("llama", tmp_path)
    cache_folder = tmp_path / "weights"
    first = load_span(source, SPAN, weights=Precision.NF4, weight_cache=WeightCache(cache_folder))
    truncated, altered, other_shape, _ = sorted(cache_folder.rglob("*.safetensors"))
    truncated.write_bytes(truncated.read_bytes()[:-10])
    data = bytearray(altered.read_bytes())
    data[-1] ^= 1
    altered.write_bytes(data)
    # Right checksum, wrong content: a block of another model under this one's name.
    with safe_open(str(other_shape), "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor[:1] for name, tensor in load_file(other_shape).items()}, other_shape, metadata=metadata)
    with caplog.at_level("WARNING"):
        second = load_span(source, SPAN, weights=Precision.NF4, weight_cache=WeightCache(cache_folder))
    assert caplog.text.count("made anew") == 3
    with torch.inference_mode():
        assert torch.equal(run(second, some_hidden(first)), run(first, some_hidden(first)))
    third = WeightCache(cache_folder)
    caplog.clear()
    load_span(source, SPAN, weights=Precision.NF4, weight_cache=third)
    assert "anew" not in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "wrong shape", "not numbers", "pickled", "missing"])
def test_bad_checkpoints_are_one_sentence_and_leave_nothing(damage: str, tmp_path: Path) -> None:
    """What a download did wrong is said, nothing is unpickled, and no nonsense is kept for the next start."""
    find_source("llama", tmp_path)
    folder = tmp_path / "llama"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.2.mlp.up_proj.weight"
    file = folder / index[name]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage in ("wrong shape", "not numbers"):
        tensors = load_file(file)
        tensors[name] = tensors[name][:, :-1].contiguous() if damage == "wrong shape" else tensors[name] * torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    elif damage == "pickled":
        shutil.rmtree(folder)
        save_tiny_model("llama", folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04this would run code")
    else:
        file.unlink()

    def load() -> SpanModel:
        source = resolve_model(str(folder), cache_dir=tmp_path / "other-cache")
        cache = WeightCache(tmp_path / "weights")
        return load_span(source, Span(start=2, end=3), weights=Precision.NF4, weight_cache=cache)

    with pytest.raises(ModelFilesError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    if damage == "not numbers":
        assert "block 2" in message and "up_proj" in message
    if damage == "pickled":
        assert "pickled" in message
    assert not list((tmp_path / "weights").rglob("*.safetensors"))


def test_loading_tells_how_far_it_is(tmp_path: Path) -> None:
    """Putting a large model into few bits takes minutes."""

    class Recorder:
        def __init__(self) -> None:
            self.tasks: list[list[object]] = []

        def start(self, description: str, total: int | None, unit: str) -> None:
            self.tasks.append([description, total, 0])

        def advance(self, amount: int) -> None:
            done = self.tasks[-1][2]
            assert isinstance(done, int)
            self.tasks[-1][2] = done + amount

        def finish(self) -> None:
            pass

    recorder = Recorder()
    load_span(find_source("llama", tmp_path), SPAN, weights=Precision.INT8, report=recorder)
    assert recorder.tasks[-1] == ["loading blocks 1:5", 4, 4]
