"""8-bit weights on CPUs, through torch's int8 kernel. This is the one file that meets it.

One byte per weight and one scale per output. For few rows the kernel multiplies with bf16 inputs; for more, weights are
widened to fp32 slice by slice and multiplied by an ordinary matrix product. Both round inputs and outputs to bf16.
The kernel is private to torch and compared with plain arithmetic before its first use; without it, everything goes
the widening way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch.nn.functional import pad

from swarm.weights.formats import MatrixShape, TensorLayout, WeightFormat
from swarm.weights.precision import Precision

__all__ = ["PackedInt8", "packed_int8_format"]

logger = logging.getLogger(__name__)

# Letters in shapes: T rows, K input features, N output features (padded).

_MAX_CODE = 127
_MULTIPLE = 16
"""Of inputs and outputs as stored: the kernel reads that many at a time."""
_MAX_KERNEL_ROWS = 32
_SLICE_WEIGHTS = 1 << 18
_TEST_TOLERANCE = 1e-2


class PackedInt8(WeightFormat):
    """Codes -127 to 127 with a bf16 scale for each output."""

    precision = Precision.INT8
    summary = "8-bit codes with one scale per output"
    name = "int8-by-output"

    def __init__(self, *, has_kernel: bool) -> None:
        """Not for callers; use `packed_int8_format`."""
        self.has_kernel = has_kernel

    def layout(self, shape: MatrixShape) -> dict[str, TensorLayout]:
        num_outputs, num_inputs = _padded(shape)
        return {
            "codes": TensorLayout((num_outputs, num_inputs), torch.int8),
            "scales": TensorLayout((num_outputs,), torch.bfloat16),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = MatrixShape(*weight.shape)
        num_outputs, num_inputs = _padded(shape)
        codes = torch.zeros(num_outputs, num_inputs, dtype=torch.int8, device=weight.device)
        scales = torch.zeros(num_outputs, dtype=torch.bfloat16, device=weight.device)
        step = max(_SLICE_WEIGHTS // shape.in_features, 1)
        for start in range(0, shape.out_features, step):
            exact = weight[start : start + step].float()
            end = start + len(exact)
            scale = (exact.abs().amax(1) / _MAX_CODE).bfloat16()
            scales[start:end] = scale
            # Rounded scales may be too small for the largest weight: it is cut by less than half a percent.
            steps = exact / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            codes[start:end, : shape.in_features] = steps.round_().clamp_(-_MAX_CODE, _MAX_CODE).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape) -> torch.Tensor:
        weight = tensors["codes"].float() * tensors["scales"].float()[:, None]
        return weight[: shape.out_features, : shape.in_features]

    def multiply(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor) -> torch.Tensor:
        num_outputs, num_inputs = _padded(shape)
        inputs = rows.to(torch.bfloat16)
        if num_inputs != shape.in_features:
            inputs = pad(inputs, (0, num_inputs - shape.in_features))
        if self.has_kernel and len(rows) <= _MAX_KERNEL_ROWS:
            outputs = _multiply_packed(inputs, tensors["codes"], tensors["scales"])
        else:
            outputs = _multiply_widened(inputs, tensors["codes"], tensors["scales"])
        if num_outputs != shape.out_features:
            outputs = outputs[:, : shape.out_features]
        return outputs.to(rows.dtype)


def _padded(shape: MatrixShape) -> tuple[int, int]:
    return -(-shape.out_features // _MULTIPLE) * _MULTIPLE, -(-shape.in_features // _MULTIPLE) * _MULTIPLE


def _multiply_packed(inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    outputs: torch.Tensor = torch.ops.aten._weight_int8pack_mm(inputs.contiguous(), codes, scales)
    return outputs


def _multiply_widened(inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As the kernel: inputs [T, K] bf16 to [T, N] bf16."""
    exact = inputs.float()
    num_outputs, num_inputs = codes.shape
    outputs = torch.empty(len(inputs), num_outputs, dtype=torch.float32)
    step = max(_SLICE_WEIGHTS // num_inputs, 1)
    for start in range(0, num_outputs, step):
        part = codes[start : start + step].float()
        torch.mm(exact, part.T, out=outputs[:, start : start + step])
    return outputs.mul_(scales.float()).to(torch.bfloat16)


@cache
def packed_int8_format() -> PackedInt8:
    """The format for this machine, with the kernel if it proves right here."""
    has_kernel = _kernel_is_right()
    if not has_kernel:
        logger.warning(
            "torch's int8 kernel is missing or other than expected; 8-bit weights are widened for each use, slowly"
        )
    return PackedInt8(has_kernel=has_kernel)


@torch.inference_mode()
def _kernel_is_right() -> bool:
    generator = torch.Generator().manual_seed(0)
    plain = PackedInt8(has_kernel=False)
    try:
        for num_outputs, num_inputs in ((192, 256), (48, 80)):
            tensors = plain.encode(torch.randn(num_outputs, num_inputs, generator=generator))
            decoded = plain.decode(tensors, MatrixShape(num_outputs, num_inputs))
            for num_rows in (1, 2, 5, 32):
                inputs = torch.randn(num_rows, num_inputs, generator=generator).bfloat16()
                expected = inputs.float() @ decoded.T
                found = _multiply_packed(inputs, tensors["codes"], tensors["scales"])
                if found.shape != expected.shape or found.dtype is not torch.bfloat16:
                    return False
                if not (found.float() - expected).abs().max() <= _TEST_TOLERANCE * expected.abs().max():
                    return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        logger.info("torch's int8 kernel: %s", error)
        return False
    return True
