"""4-bit weights on CPUs, through torch's packed int4 kernel. This is the one file that meets it.

For the few rows of decoding, the kernel reads 4-bit codes and multiplies with bf16 inputs, three to four times as
fast as fp32 weights; for more rows, weights are unpacked to fp32 slice by slice and multiplied by an ordinary matrix
product, which is faster then. Both round inputs and outputs to bf16, so that a row's result hardly depends on how many
rows come with it.

Codes share a scale in groups of 64; the matrices that are most sensitive for their size have groups of 32, as many as
fit 0.6 bytes per weight.

The kernel is private to torch. Its packing is done here, and the kernel is compared with plain arithmetic before its
first use; where it is missing or answers otherwise, everything goes the unpacking way, from the same stored tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch.nn.functional import pad

from swarm.weights.formats import MatrixShape, TensorLayout, WeightFormat
from swarm.weights.precision import Precision
from swarm.weights.uniform4 import GroupedCodes, fit_groups, restore_groups

__all__ = ["PackedInt4", "packed_int4_format"]

logger = logging.getLogger(__name__)

# Letters in shapes: T rows, K input features, N output features, both padded; L weights of a group; B outputs of a
# tile. A tile's packed byte [tile, k, b] holds the codes of outputs b (low half) and b + B / 2 (high half).

_COARSE = 64
"""Weights of a group: 0.5625 bytes per weight."""
_FINE = 32
"""0.625 bytes per weight."""
_MAX_BYTES_PER_WEIGHT = 0.597
"""Of a block's matrices together; with norms and biases it stays below 0.6."""
_OUT_MULTIPLE = 64
_TILE_SIZES = (64, 32)
"""How many outputs the kernel interleaves: with AVX-512, and with AVX2."""
_MAX_KERNEL_ROWS = 32
"""The kernel's time grows with every row; from here on unpacking was faster (docs/performance.md)."""
_SLICE_WEIGHTS = 1 << 18
"""Weights unpacked at a time: 1 MiB of fp32 stays in a processor's cache."""
_TEST_TOLERANCE = 1e-2
"""For outputs that are rounded to bf16, relative to the largest."""


class PackedInt4(WeightFormat):
    """Codes of 4 bits, evenly spaced, with a bf16 scale and middle for each group along the inputs."""

    precision = Precision.NF4
    summary = "4-bit codes in groups of 64 and 32, no worse than NF4"

    def __init__(self, *, tile_size: int, has_kernel: bool, group_length: int = _COARSE) -> None:
        """Not for callers; use `packed_int4_format`."""
        self.name = f"int4-fitted{group_length}-tile{tile_size}"
        self.has_kernel = has_kernel
        self._tile_size = tile_size
        self._group_length = group_length

    def refine(self, sizes: Sequence[int]) -> list[WeightFormat]:
        """Groups of 32 for the smallest matrices first, and of equally large ones the last.

        An error counts as much in a small matrix as in a large one and costs fewer bytes to reduce: keys and values
        come first. Of the MLP's matrices the last one adds to the residual stream and has the longest-tailed inputs.
        """
        if self._group_length != _COARSE:
            return [self] * len(sizes)
        fine = PackedInt4(tile_size=self._tile_size, has_kernel=self.has_kernel, group_length=_FINE)
        formats: list[WeightFormat] = [self] * len(sizes)
        coarse_cost, fine_cost = 0.5 + 4 / _COARSE, 0.5 + 4 / _FINE
        room_bytes = (_MAX_BYTES_PER_WEIGHT - coarse_cost) * sum(sizes)
        for index in sorted(range(len(sizes)), key=lambda index: (sizes[index], -index)):
            room_bytes -= (fine_cost - coarse_cost) * sizes[index]
            if room_bytes < 0:
                break
            formats[index] = fine
        return formats

    def layout(self, shape: MatrixShape) -> dict[str, TensorLayout]:
        num_outputs, num_inputs, group_length = self._padded(shape)
        return {
            "codes": TensorLayout((num_outputs, num_inputs // 2), torch.uint8),
            "scales_and_middles": TensorLayout((num_inputs // group_length, num_outputs, 2), torch.bfloat16),
        }

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = MatrixShape(*weight.shape)
        num_outputs, num_inputs, group_length = self._padded(shape)
        if (num_outputs, num_inputs) != shape:
            weight = pad(weight, (0, num_inputs - shape.in_features, 0, num_outputs - shape.out_features))
        fitted = fit_groups(weight, group_length)
        return {
            "codes": _pack(fitted.codes.flatten(1), self._tile_size),
            "scales_and_middles": torch.stack([fitted.scales.T, fitted.middles.T], dim=2).contiguous(),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape) -> torch.Tensor:
        num_outputs, num_inputs, group_length = self._padded(shape)
        codes = _unpack(tensors["codes"], self._tile_size).view(num_outputs, num_inputs // group_length, group_length)
        scales, middles = tensors["scales_and_middles"].unbind(2)
        weight = restore_groups(GroupedCodes(codes, scales.T, middles.T))
        return weight[: shape.out_features, : shape.in_features]

    def multiply(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor) -> torch.Tensor:
        num_outputs, num_inputs, group_length = self._padded(shape)
        inputs = rows.to(torch.bfloat16)
        if num_inputs != shape.in_features:
            inputs = pad(inputs, (0, num_inputs - shape.in_features))
        codes, scales_and_middles = tensors["codes"], tensors["scales_and_middles"]
        if self.has_kernel and len(rows) <= _MAX_KERNEL_ROWS:
            outputs = _multiply_packed(inputs, codes, group_length, scales_and_middles)
        else:
            outputs = self._multiply_unpacked(inputs, codes, group_length, scales_and_middles)
        if num_outputs != shape.out_features:
            outputs = outputs[:, : shape.out_features]
        return outputs.to(rows.dtype)

    def _padded(self, shape: MatrixShape) -> tuple[int, int, int]:
        """Outputs and inputs as stored, and the length of a group: a shorter one where that spares padding."""
        num_outputs = -(-shape.out_features // _OUT_MULTIPLE) * _OUT_MULTIPLE
        for group_length in (self._group_length, _FINE):
            if shape.in_features % group_length == 0:
                return num_outputs, shape.in_features, group_length
        return num_outputs, -(-shape.in_features // _FINE) * _FINE, _FINE

    def _multiply_unpacked(
        self, inputs: torch.Tensor, codes: torch.Tensor, group_length: int, scales_and_middles: torch.Tensor
    ) -> torch.Tensor:
        """As the kernel: inputs [T, K] bf16 to [T, N] bf16.

        A group's middle adds (sum of its inputs) * middle, so middles cost one small product for all of them.
        """
        num_rows, num_inputs = inputs.shape
        num_outputs = len(codes)
        tile, half = self._tile_size, self._tile_size // 2
        exact = inputs.float()
        scales = scales_and_middles[..., 0].float()
        bases = scales_and_middles[..., 1].float() - 8 * scales
        outputs = torch.mm(exact.view(num_rows, -1, group_length).sum(2), bases)
        packed = codes.view(num_outputs // tile, num_inputs, half).transpose(0, 1)  # [K, tiles, B / 2]
        slice_length = max(_SLICE_WEIGHTS // num_outputs // group_length, 1) * group_length
        buffer = torch.empty(min(slice_length, num_inputs), num_outputs // tile, tile, dtype=torch.float32)
        for start in range(0, num_inputs, slice_length):
            part = packed[start : start + slice_length]
            length = len(part)
            weights = buffer[:length]
            weights[..., :half].copy_(part & 15)
            weights[..., half:].copy_(part >> 4)
            groups = slice(start // group_length, (start + length) // group_length)
            weights.view(-1, group_length, num_outputs).mul_(scales[groups, None])
            outputs.addmm_(exact[:, start : start + length], weights.view(length, num_outputs))
        return outputs.to(torch.bfloat16)


def _pack(codes: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Codes [N, K] uint8 as the kernel reads them, [N, K / 2] uint8."""
    num_outputs, num_inputs = codes.shape
    tiles = codes.view(num_outputs // tile_size, 2, tile_size // 2, num_inputs)
    packed = tiles[:, 0] | (tiles[:, 1] << 4)  # [tiles, B / 2, K]
    return packed.transpose(1, 2).contiguous().view(num_outputs, num_inputs // 2)


def _unpack(packed: torch.Tensor, tile_size: int) -> torch.Tensor:
    """The opposite of `_pack`."""
    num_outputs, num_inputs = packed.shape[0], packed.shape[1] * 2
    tiles = packed.view(num_outputs // tile_size, num_inputs, tile_size // 2).transpose(1, 2)
    return torch.stack([tiles & 15, tiles >> 4], dim=1).reshape(num_outputs, num_inputs)


def _multiply_packed(
    inputs: torch.Tensor, codes: torch.Tensor, group_length: int, scales_and_middles: torch.Tensor
) -> torch.Tensor:
    outputs: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, codes, group_length, scales_and_middles)
    return outputs


@cache
def packed_int4_format() -> PackedInt4:
    """The format for this machine, with the kernel if it proves right here."""
    for tile_size in _TILE_SIZES:
        if _kernel_reads(tile_size):
            return PackedInt4(tile_size=tile_size, has_kernel=True)
    logger.warning(
        "torch's packed int4 kernel is missing or other than expected; 4-bit weights are unpacked for each use, slowly"
    )
    return PackedInt4(tile_size=_TILE_SIZES[0], has_kernel=False)


@torch.inference_mode()
def _kernel_reads(tile_size: int) -> bool:
    """Whether the kernel gives the plain product for what `_pack` packs, for both group lengths and several rows."""
    generator = torch.Generator().manual_seed(0)
    try:
        for group_length in (_COARSE, _FINE):
            plain = PackedInt4(tile_size=tile_size, has_kernel=False, group_length=group_length)
            shape = MatrixShape(192, 256)
            tensors = plain.encode(torch.randn(shape, generator=generator))
            weight = plain.decode(tensors, shape)
            for num_rows in (1, 2, 5, 32):
                inputs = torch.randn(num_rows, shape.in_features, generator=generator).bfloat16()
                expected = inputs.float() @ weight.T
                found = _multiply_packed(inputs, tensors["codes"], group_length, tensors["scales_and_middles"])
                if found.shape != expected.shape or found.dtype is not torch.bfloat16:
                    return False
                if not (found.float() - expected).abs().max() <= _TEST_TOLERANCE * expected.abs().max():
                    return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        logger.info("torch's packed int4 kernel with tiles of %d outputs: %s", tile_size, error)
        return False
    return True
