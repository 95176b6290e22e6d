"""Adapters on a loaded span, with PEFT as the yardstick."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from swarm.datatypes import AdapterHash, Span
from swarm.errors import BadInputError, SwarmError, UnsupportedModelError
from swarm.models import SpanModel, load_span, resolve_model
from swarm.models.adapters.bank import AdapterBank
from swarm.models.adapters.rows import NO_ADAPTER, adapters_for_rows
from swarm.models.adapters.source import AdapterSource, open_adapter
from swarm.models.anatomy import dissect
from swarm.weights.linear import QuantisedLinear
from swarm.weights.precision import Precision
from tests.tiny_adapters import LINEARS, peft_model, save_raw_adapter, save_tiny_adapter
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(start=1, end=5)
NUM_TOKENS = 9


def opened(folder: Path, name: str = "mine") -> AdapterSource:
    return open_adapter(name, folder, cache_dir=folder.parent / "cache")


def run(
    span: SpanModel, hidden: torch.Tensor, counts: Iterable[tuple[AdapterHash, int]] = ((NO_ADAPTER, NUM_TOKENS),)
) -> torch.Tensor:
    """hidden [B, T, H] through the span, with adapters for so many rows each."""
    with adapters_for_rows(counts):
        outputs: torch.Tensor = span(hidden, torch.arange(hidden.shape[1]).repeat(len(hidden), 1))
        return outputs


class Reference:
    """What goes into and comes out of SPAN in a whole model, as PEFT runs it."""

    def __init__(self, adapted: Any, ids: torch.Tensor) -> None:
        model: PreTrainedModel = adapted.get_base_model()
        stack = dissect(model, model.config).stack
        first, last = stack[SPAN.start], stack[SPAN.end - 1]
        handles = [
            first.register_forward_pre_hook(self._keep_inputs, with_kwargs=True),
            last.register_forward_hook(self._keep_outputs),
        ]
        with torch.no_grad():
            adapted(ids)
        for handle in handles:
            handle.remove()

    def _keep_inputs(self, block: Any, args: Any, kwargs: Any) -> None:
        self.inputs: torch.Tensor = (args[0] if args else kwargs["hidden_states"]).clone()

    def _keep_outputs(self, block: Any, args: Any, outputs: Any) -> None:
        self.outputs: torch.Tensor = (outputs[0] if isinstance(outputs, tuple) else outputs).clone()


def prompt(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def llama(folder: Path) -> PreTrainedModel:
    return save_tiny_model("llama", folder / "llama")


@pytest.fixture
def span(llama: PreTrainedModel, folder: Path) -> SpanModel:
    return load_span(resolve_model(str(folder / "llama")), SPAN)


@pytest.fixture
def bank(span: SpanModel) -> AdapterBank:
    return AdapterBank(span, num_blocks=NUM_BLOCKS)


@pytest.fixture(scope="module")
def red(llama: PreTrainedModel, folder: Path) -> Any:
    return save_tiny_adapter(llama, folder / "red", seed=1, target_modules=list(LINEARS["llama"]))


@pytest.fixture(scope="module")
def blue(llama: PreTrainedModel, folder: Path) -> Any:
    return save_tiny_adapter(llama, folder / "blue", seed=2, target_modules=["q_proj", "up_proj"], r=2)


@pytest.mark.parametrize("family", LINEARS)
def test_a_span_with_an_adapter_equals_peft(family: str, tmp_path: Path) -> None:
    """No family has code of its own here: whatever PEFT can adapt by name works."""
    model = save_tiny_model(family, tmp_path / "model")
    adapted = save_tiny_adapter(model, tmp_path / "adapter", seed=1, target_modules=list(LINEARS[family]))
    span = load_span(resolve_model(str(tmp_path / "model")), SPAN)
    bank = AdapterBank(span, num_blocks=NUM_BLOCKS)
    info = bank.add(opened(tmp_path / "adapter"))
    reference = Reference(adapted, prompt())
    with torch.inference_mode():
        found = run(span, reference.inputs, [(info.adapter_hash, NUM_TOKENS)])
        plain = run(span, reference.inputs)
    assert (found - reference.outputs).abs().max() < 1e-4
    assert (found - plain).abs().max() > 0.1, "the adapter makes no difference, so the test shows nothing"


SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": list(LINEARS["llama"]),
        "rank_pattern": {"up_proj": 3, r"layers\.2\.self_attn\.q_proj": 1},
        "alpha_pattern": {r"^model.layers.[23].mlp.down_proj": 1, "q_proj": 20},
    },
    "regular expression": {"target_modules": r".*\.(?:2|4)\.mlp\.(up|down)_proj"},
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2, 5]},
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_mean_what_they_mean_to_peft(
    case: str, llama: PreTrainedModel, span: SpanModel, bank: AdapterBank, tmp_path: Path
) -> None:
    """Rank, scale and choice of modules have many spellings; PEFT itself reads the folder for comparison."""
    save_tiny_adapter(llama, tmp_path / "adapter", seed=4, **SETTINGS[case])
    info = bank.add(opened(tmp_path / "adapter"))
    reference = Reference(peft_model(llama, tmp_path / "adapter"), prompt())
    with torch.inference_mode():
        found = run(span, reference.inputs, [(info.adapter_hash, NUM_TOKENS)])
    assert (found - reference.outputs).abs().max() < 1e-4


def test_rows_of_one_batch_use_different_adapters(
    span: SpanModel, bank: AdapterBank, red: Any, blue: Any, folder: Path
) -> None:
    """Sessions with different adapters, and with none, share every matrix product but the small ones."""
    hashes = [bank.add(opened(folder / name, name)).adapter_hash for name in ("red", "blue")]
    chosen = [hashes[0], NO_ADAPTER, hashes[1], hashes[0]]
    hidden = torch.randn(4, NUM_TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = run(span, hidden, [(adapter, NUM_TOKENS) for adapter in chosen])
        alone = [run(span, hidden[[row]], [(adapter, NUM_TOKENS)]) for row, adapter in enumerate(chosen)]
    assert (together - torch.cat(alone)).abs().max() < 1e-4


def test_without_a_plan_nothing_changes(span: SpanModel, bank: AdapterBank, red: Any, folder: Path) -> None:
    """Who chose no adapter gets the model, bit for bit."""
    hidden = torch.randn(1, NUM_TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = run(span, hidden)
        bank.add(opened(folder / "red"))
        assert torch.equal(run(span, hidden), before)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.NF4])
def test_on_top_of_few_bits(precision: Precision, llama: PreTrainedModel, red: Any, folder: Path) -> None:
    """An adapter of a model in few bits is as exact as it is: compared with PEFT over the restored weights."""
    span = load_span(resolve_model(str(folder / "llama")), SPAN, weights=precision)
    info = AdapterBank(span, num_blocks=NUM_BLOCKS).add(opened(folder / "red"))
    restored = copy.deepcopy(llama)
    for number, block in enumerate(span.blocks, start=SPAN.start):
        for path, layer in block.named_modules():
            if isinstance(layer, QuantisedLinear):
                name = f"model.layers.{number}.{path}.weight"
                restored.get_parameter(name).data.copy_(layer.weight)
    reference = Reference(peft_model(restored, folder / "red"), prompt())
    inputs = reference.inputs.clone().requires_grad_()
    found = run(span, inputs, [(info.adapter_hash, NUM_TOKENS)])
    assert (found - reference.outputs).abs().max() < 3e-2 * reference.outputs.abs().max()
    with torch.inference_mode():
        plain = run(span, reference.inputs)
    assert (plain - reference.outputs).abs().max() > 0.3 * reference.outputs.abs().max()
    found.square().sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.isfinite().all()


def test_gradients_of_the_inputs(span: SpanModel, bank: AdapterBank, red: Any, folder: Path) -> None:
    """Prompts and heads are tuned through adapted blocks too."""
    info = bank.add(opened(folder / "red"))
    reference = Reference(red, prompt())
    model = red.get_base_model()
    position_embeddings = model.model.rotary_emb(reference.inputs, torch.arange(NUM_TOKENS).unsqueeze(0))
    expected_of = reference.inputs.clone().requires_grad_()
    hidden = expected_of
    for block in model.model.layers[SPAN.start : SPAN.end]:
        hidden = block(hidden, position_embeddings=position_embeddings)
    hidden.square().sum().backward()

    found_of = reference.inputs.clone().requires_grad_()
    run(span, found_of, [(info.adapter_hash, NUM_TOKENS)]).square().sum().backward()
    assert found_of.grad is not None
    assert expected_of.grad is not None
    assert (found_of.grad - expected_of.grad).abs().max() <= 1e-4 * expected_of.grad.abs().max()


def test_gradients_of_mixed_rows(span: SpanModel, bank: AdapterBank, red: Any, blue: Any, folder: Path) -> None:
    """Each row's gradient passes through its own adapter."""
    hashes = [bank.add(opened(folder / name, name)).adapter_hash for name in ("red", "blue")]
    chosen = [NO_ADAPTER, hashes[1], hashes[0]]
    hidden = torch.randn(3, NUM_TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0))
    together = hidden.clone().requires_grad_()
    run(span, together, [(adapter, NUM_TOKENS) for adapter in chosen]).square().sum().backward()
    for row, adapter in enumerate(chosen):
        alone = hidden[[row]].clone().requires_grad_()
        run(span, alone, [(adapter, NUM_TOKENS)]).square().sum().backward()
        assert alone.grad is not None
        assert together.grad is not None
        assert (together.grad[[row]] - alone.grad).abs().max() <= 1e-4 * alone.grad.abs().max()


def test_only_the_span_is_kept(bank: AdapterBank, red: Any, folder: Path) -> None:
    """A server of a few blocks holds that share of an adapter."""
    bank.add(opened(folder / "red"))
    whole_bytes = sum(parameter.numel() * 4 for name, parameter in red.named_parameters() if ".lora_" in name)
    assert bank.size_bytes == whole_bytes * len(SPAN) // NUM_BLOCKS


def test_remove(span: SpanModel, bank: AdapterBank, red: Any, folder: Path) -> None:
    """Two names may stand for one adapter, which stays until both are gone; then no hook is left to slow others."""
    for name in ("red", "rouge"):
        bank.add(opened(folder / "red", name))
    size_bytes = bank.size_bytes
    bank.remove("red")
    assert (bank.size_bytes, [info.name for info in bank.adapters]) == (size_bytes, ["rouge"])
    bank.remove("rouge")
    assert (bank.size_bytes, bank.adapters) == (0, ())
    assert not any(module._forward_hooks for module in span.blocks[0].modules())


def test_equal_names_are_refused(bank: AdapterBank, red: Any, blue: Any, folder: Path) -> None:
    """A name chooses one adapter."""
    bank.add(opened(folder / "red"))
    with pytest.raises(BadInputError, match="two adapters are named mine"):
        bank.add(opened(folder / "blue"))


def pair(module: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(2, inputs), f"{module}.lora_B.weight": torch.ones(outputs, 2)}


FOREIGN: dict[str, tuple[dict[str, torch.Tensor], type[SwarmError], str]] = {
    "other sizes": (pair("model.layers.2.self_attn.q_proj", 64, 32), BadInputError, "64 inputs"),
    "more blocks": (pair("model.layers.6.self_attn.q_proj", 32, 32), BadInputError, "block 6"),
    "other modules": (pair("model.layers.2.attention.wq", 32, 32), BadInputError, r"attention\.wq"),
    "another stack": (pair("vision_tower.layers.2.self_attn.q_proj", 32, 32), UnsupportedModelError, "vision_tower"),
    "no linear layer": (pair("model.layers.2.mlp.act_fn", 48, 48), UnsupportedModelError, "SiLU"),
    "a norm": (pair("model.layers.2.input_layernorm", 32, 32), UnsupportedModelError, "LlamaRMSNorm"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_adapters_of_other_models(case: str, span: SpanModel, bank: AdapterBank, tmp_path: Path) -> None:
    """An adapter says which tensors it has, and the blocks say whether they fit; nothing stays behind."""
    tensors, kind, complaint = FOREIGN[case]
    source = opened(save_raw_adapter(tmp_path / "adapter", tensors, target_modules=".*"))
    with pytest.raises(kind, match=complaint):
        bank.add(source)
    assert (bank.adapters, bank.size_bytes) == ((), 0)
    assert not any(module._forward_hooks for module in span.blocks[1].modules())


def test_experts_are_refused(tmp_path: Path) -> None:
    """An expert sees some tokens in an order of its own, so nobody could tell whose rows they are."""
    save_tiny_model("qwen3_moe", tmp_path / "model")
    span = load_span(resolve_model(str(tmp_path / "model")), SPAN)
    bank = AdapterBank(span, num_blocks=NUM_BLOCKS)
    tensors = pair("model.layers.2.mlp.experts.1.up_proj", 32, 16)
    with pytest.raises(SwarmError, match=r"experts\.1"):
        bank.add(opened(save_raw_adapter(tmp_path / "adapter", tensors, target_modules=".*")))


def test_adapters_of_the_bare_decoder_and_of_models_with_eyes(bank: AdapterBank, tmp_path: Path) -> None:
    """The same blocks have several names, depending on the class the adapter was trained in."""
    for number, stack in enumerate(("layers", "model.language_model.layers")):
        tensors = pair(f"{stack}.2.self_attn.q_proj", 32, 32)
        bank.add(opened(save_raw_adapter(tmp_path / str(number), tensors), f"a{number}"))
    assert bank.size_bytes > 0


def test_blocks_that_an_adapter_leaves_alone(span: SpanModel, bank: AdapterBank, tmp_path: Path) -> None:
    """An adapter of a few layers is offered by servers of the others too: routes need it on every hop."""
    info = bank.add(opened(save_raw_adapter(tmp_path / "a", pair("model.layers.5.self_attn.q_proj", 32, 32))))
    assert (bank.adapters, bank.size_bytes) == ((info,), 0)
    hidden = torch.randn(1, NUM_TOKENS, span.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(run(span, hidden, [(info.adapter_hash, NUM_TOKENS)]), run(span, hidden))
