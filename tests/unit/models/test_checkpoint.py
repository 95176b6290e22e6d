"""Reading tensors by name out of safetensors folders, and refusing folders that are not sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swarm.errors import ModelFilesError
from swarm.models.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    block_of_tensor,
    is_complete,
    open_tensors,
    parse_index,
    read_weight_map,
    renumber_tensor,
)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.7.mlp.experts.3.w1.weight", 7),
        ("transformer.h.12.attn.c_attn.weight", 12),
        ("h.0.input_layernorm.weight", 0),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_a_tensors_name_tells_its_block(name: str, block: int | None) -> None:
    """The loader chooses what to read by name alone, before any model is built."""
    assert block_of_tensor(name) == block


def test_renumbering_moves_the_block_number_only() -> None:
    """Block 7 is block 0 of a span that starts at 7, and expert 3 stays expert 3."""
    assert renumber_tensor("model.layers.7.mlp.experts.3.w1.weight", 7) == "model.layers.0.mlp.experts.3.w1.weight"
    assert renumber_tensor("lm_head.weight", 7) == "lm_head.weight"


def test_only_named_files_are_opened(tmp_path: Path) -> None:
    """A server that holds two blocks must not need, or touch, the files of the others."""
    save_file({"a": torch.arange(3.0)}, tmp_path / "one.safetensors")
    with open_tensors(tmp_path, {"a": "one.safetensors"}) as slices:
        assert torch.equal(slices["a"][:], torch.arange(3.0))
    with pytest.raises(ModelFilesError, match="is missing"), open_tensors(tmp_path, {"b": "two.safetensors"}):
        pass


def test_a_tensor_that_the_file_lacks_is_reported(tmp_path: Path) -> None:
    """Index and files of different versions must not end in randomly initialised weights."""
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelFilesError, match="lacks the tensor b"), open_tensors(tmp_path, {"b": "one.safetensors"}):
        pass


def test_a_truncated_file_is_reported(tmp_path: Path) -> None:
    """A download that broke off must never be half used."""
    path = tmp_path / SINGLE_FILE
    save_file({"a": torch.zeros(1000)}, path)
    assert is_complete(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert not is_complete(path)
    with pytest.raises(ModelFilesError, match="damaged or incomplete"):
        read_weight_map(tmp_path)


def test_an_index_may_not_point_outside_its_folder() -> None:
    """An index comes from strangers: it must not make us open other files of this machine."""
    data = json.dumps({"weight_map": {"a": "../../secret.safetensors"}}).encode()
    with pytest.raises(ModelFilesError, match="secret"):
        parse_index(data, where="index")


@pytest.mark.parametrize("data", [b"", b"[]", b'{"weight_map": 3}', b'{"metadata": {}}'])
def test_a_damaged_index_is_one_sentence(data: bytes) -> None:
    """Whatever is wrong with the index, the user hears that it is the index."""
    with pytest.raises(ModelFilesError, match="damaged or no safetensors index"):
        parse_index(data, where="index")


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Unpickling runs code of strangers, so such models are refused, and the way out is named."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelFilesError, match=r"pickled weights.*safetensors format"):
        read_weight_map(tmp_path)


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """Transformers prefers the single file; reading another one would be another model."""
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"b": "b.safetensors"}}))
    assert read_weight_map(tmp_path) == {"a": SINGLE_FILE}
