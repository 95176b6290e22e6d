"""4-bit and 8-bit weights on a GPU: bitsandbytes multiplies with what it stored, and spans load with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.models import check_span, load_span, resolve_model
from swarm.server.engine.choosing import choose_backend
from swarm.weights.choice import format_for
from swarm.weights.disk_cache import WeightCache
from swarm.weights.formats import MatrixShape, WeightFormat
from swarm.weights.matrix import QuantisedMatrix
from swarm.weights.precision import Precision
from tests.tiny_models import save_tiny_model

pytest.importorskip("bitsandbytes")

SHAPES = (MatrixShape(256, 512), MatrixShape(192, 64), MatrixShape(1024, 1536))
ERRORS = {Precision.NF4: 0.0935, Precision.INT8: 0.0095}
PRODUCT_TOLERANCES = {Precision.NF4: 2e-2, Precision.INT8: 4e-2}
"""Relative to the largest output; inputs are bf16, and 8-bit weights have 8-bit inputs."""


def formats() -> list[WeightFormat]:
    return [
        made
        for made in (
            format_for(Precision.NF4, "cuda"),
            format_for(Precision.NF4, "cuda", double_quantised=True),
            format_for(Precision.INT8, "cuda"),
        )
        if made is not None
    ]


@pytest.mark.parametrize("index", range(3), ids=["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 100])
def test_products_and_gradients_are_those_of_restored_weights(index: int, shape: MatrixShape, num_rows: int) -> None:
    """What is stored is what is announced, and what is multiplied with, in both directions."""
    weight_format = formats()[index]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.05).to("cuda", torch.bfloat16)
    tensors = weight_format.encode(weight)
    found_layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert found_layout == weight_format.layout(shape)
    assert all(tensor.is_cuda for tensor in tensors.values())
    matrix = QuantisedMatrix(weight_format, shape, tensors)
    restored = matrix.restore().float()
    error = float((restored - weight.float()).norm() / weight.float().norm())
    assert error < ERRORS[weight_format.precision]
    inputs = torch.randn(num_rows, shape.in_features, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    outputs = matrix.multiply(inputs)
    expected = inputs.detach().float() @ restored.T
    assert outputs.dtype is torch.bfloat16
    difference = (outputs.detach().float() - expected).abs().max()
    assert float(difference) < PRODUCT_TOLERANCES[weight_format.precision] * float(expected.abs().max())
    gradient = torch.randn(num_rows, shape.out_features, generator=generator).to("cuda", torch.bfloat16)
    outputs.backward(gradient)
    assert inputs.grad is not None
    wanted = gradient.float() @ restored
    assert float((inputs.grad.float() - wanted).abs().max()) < 2e-2 * float(wanted.abs().max())


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("precision", [Precision.NF4, Precision.INT8], ids=str)
def test_spans_load_prove_themselves_and_come_back(family: str, precision: Precision, tmp_path: Path) -> None:
    """From the checkpoint and from the disk cache, the same span."""
    save_tiny_model(family, tmp_path / family)
    source = resolve_model(str(tmp_path / family), cache_dir=tmp_path / "cache")
    span = Span(start=1, end=5)
    outputs = []
    for _ in range(2):
        model = load_span(
            source, span, weights=precision, device="cuda", weight_cache=WeightCache(tmp_path / "weights")
        )
        assert model.dtype is torch.bfloat16 and model.precision is precision
        report = check_span(model)
        assert report.ok, report.reason
        hidden = torch.randn(1, 9, model.hidden_size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            outputs.append(model(hidden.to("cuda", torch.bfloat16), torch.arange(9, device="cuda")[None]))
        if family == "llama":
            assert choose_backend(model, memory_bytes=2**22).is_batching
    assert torch.equal(*outputs)
