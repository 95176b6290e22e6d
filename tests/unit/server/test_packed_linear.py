"""Packed weights are used only where they exist, give the same result, and are faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swarm.server.engine import packed_linear
from swarm.server.engine.packed_linear import pack_large_linears


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Sequential:
    """Two large matrices and a small one, on a machine where packing is faster."""
    monkeypatch.setattr(packed_linear, "_MIN_WEIGHTS", 2**12)
    times = iter([1.0, 2.0])  # packed first, plain second
    monkeypatch.setattr(packed_linear, "_best_time_s", lambda run: next(times))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 96, bias=False), nn.Linear(96, 4))
    return model.requires_grad_(False)


def require_operators() -> None:
    try:
        packed_linear.pack(torch.zeros(64, 64))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        pytest.skip(f"torch has no packed operators here: {error}")


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 48, 49, 200])
def test_results_equal_the_plain_layer_for_any_number_of_rows(model: nn.Sequential, num_rows: int) -> None:
    """A faster wrong answer is no gain; both layouts must agree on both sides of each limit."""
    require_operators()
    rows = torch.randn(1, num_rows, 96)
    with torch.inference_mode():
        plain = model(rows)
        assert pack_large_linears(model, max_bytes=2**30) == 2
        assert torch.allclose(model(rows), plain, rtol=1e-4, atol=1e-5)


def test_only_batches_within_the_limits_use_the_packed_copy(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row and long inputs are faster through the plain matrix."""
    require_operators()
    pack_large_linears(model, max_bytes=2**30)
    used: list[int] = []
    real = packed_linear.multiply_packed

    def spy(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        used.append(input.numel() // input.shape[-1])
        return real(input, packed, bias)

    monkeypatch.setattr(packed_linear, "multiply_packed", spy)
    with torch.inference_mode():
        for num_rows in (1, 2, 3, 48, 49):
            model(torch.randn(num_rows, 96))
    assert used == [3, 3, 48, 48]


def test_gradients_take_the_plain_path(model: nn.Sequential) -> None:
    """Training runs through the same modules, and the packed operator has no derivative."""
    require_operators()
    rows = torch.randn(8, 96)

    def gradient() -> torch.Tensor:
        inputs = rows.clone().requires_grad_()
        (result,) = torch.autograd.grad(model(inputs).square().sum(), inputs)
        return result

    before = gradient()
    pack_large_linears(model, max_bytes=2**30)
    assert torch.equal(gradient(), before)


def test_memory_bounds_what_is_packed(model: nn.Sequential) -> None:
    """The copies must not push out what the machine needs for sessions."""
    require_operators()
    assert pack_large_linears(model, max_bytes=96 * 128 * 4) == 1


def test_a_machine_without_the_operators_goes_on_without(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are private to torch and may be gone with the next release."""

    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(packed_linear, "pack", missing)
    assert pack_large_linears(model, max_bytes=2**30) == 0
    assert all(type(module) is nn.Linear for module in model)


def test_wrong_results_are_noticed_before_anything_is_packed(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faulty kernel on one kind of processor must not reach a user."""
    monkeypatch.setattr(packed_linear, "pack", lambda weight: weight)
    monkeypatch.setattr(packed_linear, "multiply_packed", lambda rows, packed, bias: rows @ packed.T + 1)
    assert pack_large_linears(model, max_bytes=2**30) == 0


def test_no_gain_no_packing(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the memory for nothing is refused."""
    require_operators()
    monkeypatch.setattr(packed_linear, "_best_time_s", lambda run: 1.0)
    assert pack_large_linears(model, max_bytes=2**30) == 0
