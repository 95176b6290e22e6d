"""Slices of a span, working in step, give what the whole span gives; here each runs in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import UnsupportedModelError
from swarm.models import SpanModel, load_span, resolve_model
from swarm.models.tensor_slices import refusal_of_slices, slice_span
from swarm.weights import Precision
from tests.tiny_models import FAMILIES, NUM_BLOCKS, build_tiny_config, save_tiny_model

SPAN = Span(start=0, end=NUM_BLOCKS)
TOLERANCE = 1e-5
WITHOUT_PLAN = ("gpt_oss", "falcon", "bloom")
TIMEOUT_S = 60.0


class Meeting:
    """Where the threads of a group leave tensors for each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left: list[torch.Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.num_exchanges = 0


class ThreadGroup:
    """A SliceGroup of threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.left[self.rank] = tensor.detach().clone()
        self._meeting.barrier.wait()
        found = list(self._meeting.left)
        self._meeting.num_exchanges += self.rank == 0
        self._meeting.barrier.wait()
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(0))


def load(folder: Path, family: str) -> SpanModel:
    if not folder.exists():
        save_tiny_model(family, folder)
    return load_span(resolve_model(str(folder)), SPAN)


def run_together(runs: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    with ThreadPoolExecutor(len(runs)) as threads:
        return [future.result(TIMEOUT_S) for future in [threads.submit(run) for run in runs]]


def twin_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def run_forward(model: SpanModel, hidden: torch.Tensor) -> torch.Tensor:
    """Outputs, or their gradient where `hidden` wants one."""
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    if not hidden.requires_grad:
        with torch.inference_mode():
            output: torch.Tensor = model(hidden, positions)
            return output.clone()
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (gradient,) = torch.autograd.grad((model(hidden, positions) * weights).sum(), hidden)
    return gradient


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_PLAN])
def test_slices_of_every_family_with_a_plan_make_the_whole(family: str, tmp_path: Path) -> None:
    """Cut by heads, by features, by halves of experts, with outputs gathered or inputs cut: all must add up."""
    whole = load(tmp_path / "m", family)
    meeting = Meeting(2)
    slices = [load(tmp_path / "m", family) for _ in range(2)]
    for rank, model in enumerate(slices):
        slice_span(model, ThreadGroup(meeting, rank))
    bytes_whole = sum(parameter.numel() for parameter in whole.blocks.parameters())
    bytes_slice = sum(parameter.numel() for parameter in slices[0].blocks.parameters())
    assert bytes_slice < 0.8 * bytes_whole
    hidden = torch.randn(1, 11, whole.hidden_size)
    for inputs in (hidden, hidden.clone().requires_grad_()):
        expected = run_forward(whole, inputs)
        found = run_together([partial(run_forward, model, twin_of(inputs)) for model in slices])
        for output in found:
            assert float((output - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
        assert torch.equal(found[0], found[1])
    assert meeting.num_exchanges > 0


@pytest.mark.parametrize(
    ("family", "size", "reason"),
    [
        ("falcon", 2, "no tensor-parallel plan"),
        ("gpt_oss", 2, "no tensor-parallel plan"),
        ("llama", 3, "2 KV heads, which 3 devices can not share"),
        ("llama", 2, None),
    ],
)
def test_what_can_not_be_cut_is_known_from_the_config(family: str, size: int, reason: str | None) -> None:
    """Before anything is loaded, with what to do instead."""
    found = refusal_of_slices(build_tiny_config(family), size)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_weights_in_few_bits_are_refused_and_left_alone(tmp_path: Path) -> None:
    """Half a cut would be worse than none: nothing may have changed when the answer is no."""
    save_tiny_model("llama", tmp_path / "m")
    model = load_span(resolve_model(str(tmp_path / "m")), SPAN, weights=Precision.INT8)
    before = run_forward(model, torch.ones(1, 3, model.hidden_size))
    with pytest.raises(UnsupportedModelError, match=r"q_proj is a QuantisedLinear, which can not be cut"):
        slice_span(model, ThreadGroup(Meeting(2), 0))
    assert torch.equal(run_forward(model, torch.ones(1, 3, model.hidden_size)), before)
