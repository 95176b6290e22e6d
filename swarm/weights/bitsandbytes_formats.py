"""NF4 and 8-bit weights on NVIDIA GPUs, through bitsandbytes. This is the one file that meets it.

bitsandbytes keeps what belongs to a matrix in objects of its own; they are made anew from the stored tensors for each
product, which costs microseconds and lets stored tensors move and be cached like any others.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from swarm.errors import MissingDependencyError
from swarm.weights.formats import MatrixShape, TensorLayout, WeightFormat
from swarm.weights.precision import Precision

__all__ = ["BitsAndBytesInt8", "BitsAndBytesNf4"]

# Letters in shapes: T rows, K input features, N output features.

_BLOCK_WEIGHTS = 64
"""Weights of a row of memory that share a scale."""
_NESTED_BLOCK_SCALES = 256
"""Scales that share a scale of their own when they are quantised too; the kernels know this length only."""
_OUTLIER_THRESHOLD = 6.0
"""Inputs beyond it are multiplied in 16 bit (LLM.int8, arXiv 2208.07339)."""


@cache
def _library() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed, or does not run here.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"4-bit and 8-bit weights on a GPU need bitsandbytes, which can not be used here ({error}); "
            "pip install 'swarm-inference[cuda]', or choose --weights bf16"
        ) from error


@cache
def _levels(device: torch.device) -> Any:
    """The 16 values of NF4."""
    return _library().functional.get_4bit_type("nf4", device=device)


@cache
def _scale_levels(device: torch.device) -> torch.Tensor:
    """The 256 values that quantised scales take."""
    levels: torch.Tensor = _library().functional.create_dynamic_map().to(device)
    return levels


class BitsAndBytesNf4(WeightFormat):
    """NF4 in blocks of 64 weights; with `double_quantised`, scales take one byte instead of four."""

    precision = Precision.NF4

    def __init__(self, *, double_quantised: bool = False) -> None:
        """Raises MissingDependencyError without bitsandbytes."""
        _library()
        self.is_double_quantised = double_quantised
        self.name = "bnb-nf4-double" if double_quantised else "bnb-nf4"
        self.summary = "NF4 in blocks of 64" + (", scales in 8 bit" if double_quantised else "")

    def layout(self, shape: MatrixShape) -> dict[str, TensorLayout]:
        num_blocks = -(-shape.num_weights // _BLOCK_WEIGHTS)
        codes = TensorLayout((-(-shape.num_weights // 2), 1), torch.uint8)
        if not self.is_double_quantised:
            return {"codes": codes, "scales": TensorLayout((num_blocks,), torch.float32)}
        return {
            "codes": codes,
            "scales": TensorLayout((num_blocks,), torch.uint8),
            "nested_scales": TensorLayout((-(-num_blocks // _NESTED_BLOCK_SCALES),), torch.float32),
            "mean_scale": TensorLayout((), torch.float32),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, state = _library().functional.quantize_4bit(
            weight.contiguous(),
            blocksize=_BLOCK_WEIGHTS,
            compress_statistics=self.is_double_quantised,
            quant_type="nf4",
        )
        tensors: dict[str, torch.Tensor] = {"codes": codes, "scales": state.absmax}
        if self.is_double_quantised:
            tensors |= {"nested_scales": state.state2.absmax, "mean_scale": state.offset.float()}
        return tensors

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape) -> torch.Tensor:
        dtype = torch.bfloat16 if tensors["codes"].device.type == "cuda" else torch.float32
        return self._decode(tensors, shape, dtype)

    def multiply(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor) -> torch.Tensor:
        codes = tensors["codes"]
        with torch.no_grad():
            state = self._state(tensors, shape, rows.dtype)
            product: torch.Tensor = _library().matmul_4bit(rows, codes.t(), quant_state=state)
        return product

    def multiply_backward(
        self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor
    ) -> torch.Tensor:
        return torch.mm(rows, self._decode(tensors, shape, rows.dtype))

    def _decode(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, dtype: torch.dtype) -> torch.Tensor:
        state = self._state(tensors, shape, dtype)
        weight: torch.Tensor = _library().functional.dequantize_4bit(tensors["codes"], state)
        return weight

    def _state(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, dtype: torch.dtype) -> Any:
        """bitsandbytes' own description of a matrix; `dtype` is that of restored weights."""
        make: Any = _library().functional.QuantState
        device = tensors["codes"].device
        nested: dict[str, Any] = {}
        if self.is_double_quantised:
            nested["offset"] = tensors["mean_scale"]
            nested["state2"] = make(
                absmax=tensors["nested_scales"],
                blocksize=_NESTED_BLOCK_SCALES,
                code=_scale_levels(device),
                dtype=torch.float32,
            )
        return make(
            absmax=tensors["scales"],
            shape=torch.Size(shape),
            code=_levels(device),
            blocksize=_BLOCK_WEIGHTS,
            quant_type="nf4",
            dtype=dtype,
            **nested,
        )


class BitsAndBytesInt8(WeightFormat):
    """LLM.int8: codes with one scale per output; inputs are rounded to 8 bits too, except outliers."""

    precision = Precision.INT8
    name = "bnb-int8"
    summary = "8-bit codes with one scale per output, outlying inputs in 16 bit"

    def __init__(self) -> None:
        """Raises MissingDependencyError without bitsandbytes."""
        _library()

    def layout(self, shape: MatrixShape) -> dict[str, TensorLayout]:
        return {
            "codes": TensorLayout((shape.out_features, shape.in_features), torch.int8),
            "scales": TensorLayout((shape.out_features,), torch.float32),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scales, _ = _library().functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"codes": codes, "scales": scales}

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape) -> torch.Tensor:
        dtype = torch.bfloat16 if tensors["codes"].device.type == "cuda" else torch.float32
        return (tensors["codes"].float() * (tensors["scales"] / 127.0)[:, None]).to(dtype)

    def multiply(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor) -> torch.Tensor:
        library = _library()
        state = library.MatmulLtState()
        state.CB, state.SCB = tensors["codes"], tensors["scales"]
        state.threshold = _OUTLIER_THRESHOLD
        state.has_fp16_weights = False
        state.is_training = False
        with torch.no_grad():
            # It computes in fp16 whatever it is given, and complains at each call about anything else.
            product: torch.Tensor = library.matmul(
                rows.to(torch.float16), state.CB, state=state, threshold=_OUTLIER_THRESHOLD
            )
        return product.to(rows.dtype)
