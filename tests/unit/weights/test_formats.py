"""Every format stores what it promises and multiplies, forwards and backwards, with exactly that."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from swarm.errors import MissingDependencyError
from swarm.weights import bitsandbytes_formats
from swarm.weights.bitsandbytes_formats import BitsAndBytesNf4
from swarm.weights.choice import format_for, hidden_dtype_for
from swarm.weights.formats import MatrixShape, WeightFormat
from swarm.weights.matrix import QuantisedMatrix
from swarm.weights.packed_int4 import PackedInt4, packed_int4_format
from swarm.weights.packed_int8 import packed_int8_format
from swarm.weights.precision import Precision
from tests.weight_formats import ERRORS, cpu_formats

MakeFormat = Callable[[], WeightFormat]
SHAPES = (MatrixShape(192, 256), MatrixShape(100, 96), MatrixShape(17, 70), MatrixShape(576, 192))
"""Fitting every tile and group, and fitting none."""
PRODUCT_TOLERANCE = 2e-2
"""Of products with restored weights, relative to the largest output: inputs and outputs are rounded to 16 or 8 bits."""


def stored(make: MakeFormat, shape: MatrixShape) -> tuple[QuantisedMatrix, torch.Tensor]:
    """A matrix and what it was made from."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape.num_weights)) * 0.05
    weight_format = make()
    if isinstance(weight_format, BitsAndBytesNf4) and shape.in_features % 64 == 32:
        pytest.skip("bitsandbytes restores such matrices wrongly on CPUs, where it is not used")
    return QuantisedMatrix(weight_format, shape, weight_format.encode(weight)), weight


@pytest.mark.parametrize("make", cpu_formats())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_tensors_are_as_announced(make: MakeFormat, shape: MatrixShape) -> None:
    """Files are checked against the layout, and capacity is planned with it."""
    matrix, _ = stored(make, shape)
    layout = matrix.format.layout(shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in matrix.tensors.items()} == layout
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in matrix.tensors.values())
    assert matrix.format.size_bytes(shape) == size_bytes


@pytest.mark.parametrize("make", cpu_formats())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_restored_weights_err_no_more_than_promised(make: MakeFormat, shape: MatrixShape) -> None:
    """A precision is a promise about this error: nf4's is that of NF4 in blocks of 64, whatever the codes."""
    matrix, weight = stored(make, shape)
    restored = matrix.restore().float()
    assert restored.shape == weight.shape
    error = float((restored - weight).norm() / weight.norm())
    limit = ERRORS[matrix.format.precision.value]
    # In a matrix of a thousand weights the error wanders by a few percent.
    assert error < limit * (1.0 if shape.num_weights > 50_000 else 1.05)


@pytest.mark.parametrize("make", cpu_formats())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 33, 100])
def test_products_are_those_of_restored_weights(make: MakeFormat, shape: MatrixShape, num_rows: int) -> None:
    """Few rows and many take different ways, which must not give different answers."""
    matrix, _ = stored(make, shape)
    inputs = torch.randn(num_rows, shape.in_features, generator=torch.Generator().manual_seed(num_rows))
    expected = inputs @ matrix.restore().float().T
    found = matrix.multiply(inputs)
    assert found.shape == expected.shape and found.dtype is inputs.dtype
    assert float((found - expected).abs().max()) < PRODUCT_TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("make", cpu_formats())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", [2, 40])
def test_gradients_are_those_of_restored_weights(make: MakeFormat, shape: MatrixShape, num_rows: int) -> None:
    """Fine-tuning trains what comes before frozen blocks; kernels for few bits have no gradient of their own."""
    matrix, _ = stored(make, shape)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, num_rows, shape.in_features, generator=generator, requires_grad=True)
    gradient = torch.randn(1, num_rows, shape.out_features, generator=generator)
    matrix.multiply(inputs).backward(gradient)
    expected = gradient @ matrix.restore().float()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [packed_int4_format, packed_int8_format])
def test_a_row_hardly_depends_on_how_many_come_with_it(make: MakeFormat) -> None:
    """A token computed again in a longer piece, after a failure, should find the keys and values it had."""
    matrix, _ = stored(make, MatrixShape(256, 512))
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    together = matrix.multiply(rows)
    alone = torch.cat([matrix.multiply(row[None]) for row in rows])
    share_changed = float((together != alone).float().mean())
    assert share_changed < 0.01
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))


def test_the_kernels_of_this_machine_are_used() -> None:
    """Without them decoding takes ten times as long: a new torch that changes them should be noticed here."""
    assert packed_int4_format().has_kernel
    assert packed_int8_format().has_kernel


def test_a_kernel_that_answers_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are private to torch; a change of their layout must cost speed, not answers."""
    import swarm.weights.packed_int4 as packed_int4

    monkeypatch.setattr(packed_int4, "_multiply_packed", lambda inputs, codes, length, scales: inputs[:, : len(codes)])
    assert not packed_int4._kernel_reads(64)

    def missing(*args: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed_int4, "_multiply_packed", missing)
    assert not packed_int4._kernel_reads(64)


def test_four_bits_take_no_more_than_six_tenths_of_a_byte() -> None:
    """The point of them: blocks' sizes decide how many a volunteer can hold. The shapes are those of llama 3 8B."""
    sizes = [4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, *[14336 * 4096] * 3]
    shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    formats = packed_int4_format().refine(sizes)
    size_bytes = sum(chosen.size_bytes(MatrixShape(*shape)) for chosen, shape in zip(formats, shapes, strict=True))
    assert size_bytes / sum(sizes) <= 0.6
    lengths = [chosen._group_length for chosen in formats if isinstance(chosen, PackedInt4)]
    assert lengths == [32, 32, 32, 32, 64, 64, 32]


def test_weights_that_are_all_equal_are_kept() -> None:
    """Pruned models have groups of zeros, whose range is nothing to divide by."""
    weight_format = packed_int4_format()
    for value in (0.0, 0.5, -3.0):
        tensors = weight_format.encode(torch.full((64, 64), value))
        restored = weight_format.decode(tensors, MatrixShape(64, 64))
        torch.testing.assert_close(restored, torch.full((64, 64), value), rtol=1e-2, atol=0.0)


def test_without_bitsandbytes_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional package; its absence is no traceback."""
    bitsandbytes_formats._library.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"swarm-inference\[cuda\]"):
        BitsAndBytesNf4()
    with pytest.raises(MissingDependencyError, match="--weights bf16"):
        format_for(Precision.INT8, "cuda:0")


def test_floats_need_no_format() -> None:
    """Their matrices stay transformers' own."""
    assert format_for(Precision.FP32, "cpu") is None
    assert format_for(Precision.BF16, "cuda:0") is None
    assert hidden_dtype_for(Precision.NF4, "cpu") is torch.float32
    assert hidden_dtype_for(Precision.NF4, "cuda:0") is torch.bfloat16
