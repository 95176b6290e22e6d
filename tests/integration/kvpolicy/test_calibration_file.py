"""Calibrations are files that people hand around: whatever is wrong with one is said in a sentence, when it is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swarm.errors import BadInputError
from swarm.kvpolicy.budget import BudgetCurve
from swarm.kvpolicy.calibration_file import Calibration, read_calibration, write_calibration

LAYERS, HEADS, DIM, HIDDEN = 2, 2, 4, 6
Parts = tuple[dict[str, torch.Tensor], dict[str, str]]


def _write(path: Path) -> Parts:
    """A good file; its tensors and what its header says."""
    from safetensors import safe_open

    axes = torch.eye(DIM).expand(LAYERS, HEADS, DIM, DIM).half()
    shares = (((0.2, 0.5),) * HEADS,) * LAYERS
    measured = Calibration(
        model_hash="a" * 64,
        curve=BudgetCurve(ratios=(0.2, 0.5), shares=shares, recent=(((16, 32),) * HEADS,) * LAYERS),
        key_sizes=[1.0] * DIM,
        value_sizes=[1.0] * DIM,
        scorer_weights=torch.zeros(LAYERS, HIDDEN + 1, HEADS).half(),
        received_mean=torch.zeros(LAYERS, HEADS),
        received_weight=torch.ones(LAYERS, HEADS),
        key_mean=torch.zeros(LAYERS, HEADS, DIM),
        key_axes=axes,
        value_mean=torch.zeros(LAYERS, HEADS, DIM),
        value_axes=axes * 2,
    )
    write_calibration(path, measured)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Windows and weights of heads belong to it."""
    path = tmp_path / "good.safetensors"
    _write(path)
    read = read_calibration(path)
    assert read.curve.num_recent(1, 1, 0.35) == 24
    assert read.received_weight.tolist() == [[1.0] * HEADS] * LAYERS


def _set_header(name: str, value: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[1][name] = value if isinstance(value, str) else json.dumps(value)

    return change


def _set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], None]:
    def set_it(parts: Parts) -> None:
        parts[0][name] = change(parts[0][name]).contiguous()

    return set_it


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_set_header("shares", []), "the same KV heads"),
        (_set_header("shares", [[[0.2, 0.5]] * 2, [[0.2, 0.5]]]), "the same KV heads"),
        (_set_header("shares", [[[5.0, 5.0]] * 2] * 2), "one share from 0 to 1"),
        (_set_header("recent", [[[16, 32]] * 2]), "recent tokens"),
        (_set_header("recent", [[[16, -1]] * 2] * 2), "recent tokens"),
        (_set_header("recent", "[[[Infinity, 1], [1, 1]], [[1, 1], [1, 1]]]"), "no usable calibration"),
        (_set_header("recent", [[[16, 10**30]] * 2] * 2), "recent tokens"),
        (_set_header("key_sizes", [-1.0] * DIM), "not above 0"),
        (_set_header("value_sizes", "[Infinity, 1, 1, 1]"), "not above 0"),
        (_set_header("ratios", "[" * 100_000), "no usable calibration"),
        (_set_header("format", "swarm-kv-1"), "swarm-kv-1, not"),
        (_set_tensor("scorer_weights", lambda numbers: numbers[:1]), "scorer_weights"),
        (_set_tensor("scorer_weights", lambda numbers: numbers[0]), "scorer_weights"),
        (_set_tensor("received_weight", lambda numbers: numbers.int()), "can not be computed with"),
        (_set_tensor("key_axes", lambda numbers: numbers * torch.nan), "can not be computed with"),
        (_set_tensor("value_axes", lambda numbers: numbers * 0), "can not be computed with"),
    ],
)
def test_a_harmed_file_is_refused_in_one_sentence(harm: Callable[[Parts], None], said: str, tmp_path: Path) -> None:
    """A server that started with it would compress nothing, or wrongly."""
    path = tmp_path / "harmed.safetensors"
    parts = _write(path)
    harm(parts)
    save_file(parts[0], path, metadata=parts[1])
    with pytest.raises(BadInputError, match=said) as caught:
        read_calibration(path)
    assert str(caught.value).count("swarm calibrate") == 1
    assert str(path) in str(caught.value)


def test_a_header_of_brackets_is_refused(tmp_path: Path) -> None:
    """Nothing of a file may make its reader fall over."""
    path = tmp_path / "deep.safetensors"
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(BadInputError, match="no usable calibration"):
        read_calibration(path)
