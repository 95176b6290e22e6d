"""Adapter folders: what is found in them, and what is refused before a tensor is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm.errors import BadInputError, ModelFilesError, ModelNotFoundError, SwarmError, UnsupportedModelError
from swarm.models.adapters.source import AdapterSource, open_adapter
from tests.tiny_adapters import save_raw_adapter, save_tiny_adapter
from tests.tiny_models import build_tiny_model

Q_PROJ = "model.layers.3.self_attn.q_proj"


def opened(folder: Path, name: str = "mine") -> AdapterSource:
    return open_adapter(name, folder, cache_dir=folder.parent / "cache")


def pair(module: str = Q_PROJ, *, rank: int = 2, inputs: int = 32, outputs: int = 32) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, inputs),
        f"{module}.lora_B.weight": torch.ones(outputs, rank),
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "llama"
    save_tiny_adapter(build_tiny_model("llama"), folder, seed=1, target_modules=["q_proj", "down_proj"])
    return folder


def test_what_peft_writes(adapter: Path) -> None:
    """The adapters people have are what PEFT's save_pretrained wrote."""
    source = opened(adapter)
    assert len(source.modules) == 2 * 6
    module = source.modules["model.layers.3.mlp.down_proj"]
    assert (module.stack, module.block, module.path) == ("model.layers", 3, "mlp.down_proj")
    assert (module.rank, module.in_features, module.out_features, module.scale) == (4, 48, 32, 2.0)
    with source.open_factors() as reader:
        assert reader.read(module, "A").shape == (4, 48)


def test_identity_is_what_the_adapter_does(adapter: Path, tmp_path: Path) -> None:
    """Hops of one route must hold the same adapter, whatever their operators call it and wherever it lies."""
    (tmp_path / "copy").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "copy" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "elsewhere"})
    )
    same = opened(tmp_path / "copy", name="theirs")
    assert same.info.adapter_hash == opened(adapter).info.adapter_hash

    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    assert opened(tmp_path / "copy").info.adapter_hash != same.info.adapter_hash

    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "copy" / "adapter_model.safetensors")
    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps(config))
    assert opened(tmp_path / "copy").info.adapter_hash != same.info.adapter_hash


def test_pickled_adapters_are_refused(adapter: Path, tmp_path: Path) -> None:
    """Opening a pickle runs whatever its writer liked."""
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ModelFilesError, match=r"adapter_model\.bin.*can run code"):
        opened(tmp_path)


def test_folders_that_are_no_adapters(adapter: Path, tmp_path: Path) -> None:
    """Each says what is missing, so that nobody has to guess which folder was meant."""
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json is not there"):
        opened(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(ModelFilesError, match=r"no adapter_model\.safetensors"):
        opened(tmp_path)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], b"\xff" * 64):
        (tmp_path / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelFilesError, match="damaged"):
            opened(tmp_path)


@pytest.mark.parametrize("name", ["", "a b", "../etc", "x" * 33, "-x", "naïve", "a\n"])
def test_names(name: str, adapter: Path) -> None:
    """Names travel in records, in commands and in messages."""
    with pytest.raises(BadInputError, match="can not name an adapter"):
        open_adapter(name, adapter)


HOSTILE: dict[str, tuple[dict[str, torch.Tensor], type[SwarmError], str]] = {
    "one half": (dict(list(pair().items())[:1]), ModelFilesError, "only one of the two"),
    "no tensors": ({}, ModelFilesError, "no tensors"),
    "other ranks": (pair() | {f"{Q_PROJ}.lora_B.weight": torch.ones(32, 3)}, ModelFilesError, "no product"),
    "a vector": (pair() | {f"{Q_PROJ}.lora_A.weight": torch.ones(64)}, ModelFilesError, "no product"),
    "a kernel": (pair() | {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 32, 1, 1)}, ModelFilesError, "no product"),
    "unstated rank": (pair(rank=3), ModelFilesError, "rank 3"),
    "unstated module": (pair("model.layers.0.mlp.up_proj"), ModelFilesError, "target_modules"),
    "integers": (pair() | {f"{Q_PROJ}.lora_A.weight": torch.ones(2, 32, dtype=torch.int64)}, ModelFilesError, "I64"),
    "head": (pair("lm_head"), UnsupportedModelError, "outside of the model's blocks"),
    "magnitudes": (
        pair() | {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(32)},
        UnsupportedModelError,
        "magnitude_vector",
    ),
    "embedding": ({"model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}, UnsupportedModelError, "embedding_A"),
    "bias": (pair() | {f"{Q_PROJ}.lora_B.bias": torch.ones(32)}, UnsupportedModelError, "bias"),
    "whole module": ({"lm_head.weight": torch.ones(2, 9)}, UnsupportedModelError, r"lm_head\.weight"),
    "odd name": (pair("model/../layers.3.q_proj"), UnsupportedModelError, "no matrix of a plain LoRA"),
    "long name": (pair(f"model.layers.3.{'x' * 600}.q_proj"), UnsupportedModelError, "…"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tensors(case: str, tmp_path: Path) -> None:
    """Every claim of a file is checked before memory is taken for it."""
    tensors, kind, complaint = HOSTILE[case]
    with pytest.raises(kind, match=complaint):
        opened(save_raw_adapter(tmp_path / "adapter", tensors))


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    """One NaN would poison every session that chooses the adapter, and look like a fault of the server."""
    tensors = pair()
    tensors[f"{Q_PROJ}.lora_A.weight"][1, 5] = float("nan")
    source = opened(save_raw_adapter(tmp_path / "adapter", tensors))
    with source.open_factors() as reader, pytest.raises(ModelFilesError, match="no numbers"):
        reader.read(source.modules[Q_PROJ], "A")
