"""A row's result is the same beside any others; where that can not be had, everything works as before."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from swarm.server.engine import rowwise
from swarm.server.engine.packed_linear import PackedLinear
from swarm.server.engine.rowwise import make_rows_independent, pack_matrices


@pytest.fixture
def model() -> nn.Sequential:
    """Matrices, an activation, and what looks like one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 1056), nn.SiLU(), nn.Linear(1056, 96, bias=False), nn.Softmax(dim=-1))
    return model.requires_grad_(False)


@pytest.fixture(params=[1, 2, 3, 7])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_rows_are_the_same_in_any_company(model: nn.Sequential, num_threads: int) -> None:
    rows = torch.randn(1, 150, 96)
    with torch.inference_mode():
        plain = model(rows)
        if not make_rows_independent(model, max_bytes=2**30):
            pytest.skip("products here depend on the number of rows")
        every = model(rows)
        assert torch.allclose(every, plain, rtol=1e-4, atol=1e-6)
        for first, count in ((0, 1), (149, 1), (7, 2), (3, 31), (20, 75), (1, 149)):
            assert torch.equal(model(rows[:, first : first + count]), every[:, first : first + count])


def test_bf16_rows_are_the_same_in_any_company(model: nn.Sequential) -> None:
    """Models are mostly published so, and CPUs with units for it serve them so."""
    model.to(torch.bfloat16)
    rows = torch.randn(1, 150, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        if not make_rows_independent(model, max_bytes=2**30):
            pytest.skip("products here depend on the number of rows")
        every = model(rows)
        assert every.dtype is torch.bfloat16
        for first, count in ((0, 1), (7, 2), (20, 75)):
            assert torch.equal(model(rows[:, first : first + count]), every[:, first : first + count])


def test_shapes_are_kept(model: nn.Sequential) -> None:
    """One row is computed as two, and long inputs in blocks; neither may show."""
    if not make_rows_independent(model, max_bytes=2**30):
        pytest.skip("products here depend on the number of rows")
    with torch.inference_mode():
        for shape in ((96,), (1, 96), (1, 1, 96), (2, 3, 96), (0, 96), (1, 40, 96)):
            assert model(torch.randn(shape)).shape == shape


def test_gradients_are_those_of_the_plain_matrices(model: nn.Sequential) -> None:
    """Training runs through the same modules, and the packed operator has no derivative."""
    rows = torch.randn(8, 96)

    def gradient() -> torch.Tensor:
        inputs = rows.clone().requires_grad_()
        (result,) = torch.autograd.grad(model(inputs).square().sum(), inputs)
        return result

    before = gradient()
    make_rows_independent(model, max_bytes=2**30)
    assert torch.equal(gradient(), before)


def test_all_or_nothing_within_the_memory(model: nn.Sequential) -> None:
    """Half of the matrices would cost memory and give nothing."""
    assert not make_rows_independent(model, max_bytes=2 * 96 * 1056 * 4 - 1)
    assert [type(module) for module in model] == [nn.Linear, nn.SiLU, nn.Linear, nn.Softmax]


def test_memory_that_is_reserved_is_not_taken(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV pages are touched later than weights are packed; by then the memory must still be there."""
    free_bytes = 10 * 2 * 96 * 1056 * 4
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free_bytes))
    pack_matrices(model, for_compressing=True, reserved_bytes=free_bytes * 9 // 10)
    assert type(model[0]) is nn.Linear
    pack_matrices(model, for_compressing=True, reserved_bytes=free_bytes // 2)
    assert isinstance(model[0], PackedLinear) or not make_rows_independent(model, max_bytes=2**30)


def test_a_machine_without_the_operators_goes_on_without(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are private to torch and may be gone with the next release."""

    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(rowwise, "pack", missing)
    assert not make_rows_independent(model, max_bytes=2**30)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("fault", ["wrong", "depends on the number of rows"])
def test_faulty_products_are_noticed_before_anything_is_changed(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def multiply(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        products = nn.functional.linear(rows, packed, bias)
        return products + 1 if fault == "wrong" else products * (1 + 1e-6 * len(rows))

    monkeypatch.setattr(rowwise, "pack", lambda weight: weight)
    monkeypatch.setattr(rowwise, "multiply_packed", multiply)
    assert not make_rows_independent(model, max_bytes=2**30)
    assert type(model[0]) is nn.Linear


def test_experts_and_other_classes_are_left_alone() -> None:
    """Their matrices are no nn.Linear, or of another dtype; a model of such alone has nothing to change."""
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.float16), nn.Embedding(8, 32))
    assert not make_rows_independent(model, max_bytes=2**30)
