"""What `auto` stands for, and that its reason is told."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from swarm.errors import MissingDependencyError
from swarm.weights import automatic
from swarm.weights.automatic import choose_automatically, measure_relative_times
from swarm.weights.precision import Precision

FAST_BF16 = {Precision.BF16: {1: 0.5, 8: 0.5, 64: 0.6}, Precision.NF4: {1: 0.25, 8: 0.4, 64: 1.2}}
SLOW_BF16 = {Precision.BF16: {1: 0.9, 8: 0.8, 64: 1.6}, Precision.NF4: {1: 0.25, 8: 0.4, 64: 1.2}}


def measured(times: Mapping[Precision, Mapping[int, float]]) -> dict[str, object]:
    return {"measure": lambda hidden_size: times}


@pytest.mark.parametrize(
    ("published", "has_units", "times", "chosen"),
    [
        (torch.bfloat16, True, FAST_BF16, Precision.BF16),
        (torch.bfloat16, True, SLOW_BF16, Precision.FP32),
        (torch.bfloat16, False, FAST_BF16, Precision.FP32),
        (torch.float32, True, FAST_BF16, Precision.FP32),
        (None, True, FAST_BF16, Precision.FP32),
    ],
)
def test_a_cpu_serves_the_fastest_precision_that_loses_nothing(
    published: torch.dtype | None,
    has_units: bool,
    times: Mapping[Precision, Mapping[int, float]],
    chosen: Precision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody's answers change because an operator said nothing."""
    monkeypatch.setattr(automatic, "has_bf16_units", lambda: has_units)
    found = choose_automatically("cpu", hidden_size=64, published_dtype=published, measure=lambda hidden_size: times)
    assert found.precision is chosen
    assert found.reason.startswith(str(chosen)) and "\n" not in found.reason
    assert "nf4 4.0" in found.reason  # so that people know what they could have


def test_a_gpu_serves_nf4_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is what a swarm is short of."""
    monkeypatch.setattr(automatic, "format_for", lambda precision, device: object())
    assert choose_automatically("cuda:0", hidden_size=64).precision is Precision.NF4

    def lacks(precision: Precision, device: str) -> object:
        raise MissingDependencyError("no bitsandbytes")

    monkeypatch.setattr(automatic, "format_for", lacks)
    found = choose_automatically("cuda:0", hidden_size=64)
    assert found.precision is Precision.BF16
    assert "bitsandbytes" in found.reason


def test_the_machine_is_really_measured() -> None:
    """A ratio for each precision and each number of rows, none of them absurd."""
    times = measure_relative_times(256)
    assert times.keys() == {Precision.BF16, Precision.INT8, Precision.NF4}
    for by_rows in times.values():
        assert by_rows.keys() == {1, 8, 64}
        assert all(0.001 < ratio < 1000 for ratio in by_rows.values())
