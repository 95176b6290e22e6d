"""What a way of storing matrices in few bits must be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from swarm.weights.precision import Precision

__all__ = ["MatrixShape", "TensorLayout", "WeightFormat"]

# Letters in shapes: T rows of input, K input features, N output features.


class MatrixShape(NamedTuple):
    """Of the weight of a linear layer, which computes rows [T, K] times weight [N, K] transposed."""

    out_features: int
    in_features: int

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features


class TensorLayout(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class WeightFormat(ABC):
    """Stores weights [N, K] as a few plain tensors, and multiplies with them. Holds no state of any matrix."""

    name: str
    """Names every detail that stored tensors depend on; part of the disk cache's key."""
    precision: Precision
    """What servers announce."""
    summary: str
    """For people: what the numbers are."""

    @abstractmethod
    def layout(self, shape: MatrixShape) -> dict[str, TensorLayout]:
        """The tensors of a matrix of this shape, by name."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Store `weight` [N, K], any float dtype, finite; the tensors of `layout`, on its device."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape) -> torch.Tensor:
        """The weights [N, K] that are really multiplied with, in fp32 (CPU) or the compute dtype (CUDA)."""

    @abstractmethod
    def multiply(self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor) -> torch.Tensor:
        """rows [T, K] times the weight transposed: [T, N], in the dtype of `rows`. Not differentiable."""

    def refine(self, sizes: Sequence[int]) -> list[WeightFormat]:
        """The format for each of a block's matrices, given how many weights they have: this one, or a sibling."""
        return [self] * len(sizes)

    def multiply_backward(
        self, tensors: Mapping[str, torch.Tensor], shape: MatrixShape, rows: torch.Tensor
    ) -> torch.Tensor:
        """rows [T, N] times the weight: [T, K], in the dtype of `rows`."""
        weight = self.decode(tensors, shape)
        return torch.mm(rows.to(weight.dtype), weight).to(rows.dtype)

    def size_bytes(self, shape: MatrixShape) -> int:
        """Memory of a matrix, scales and padding included."""
        return sum(layout.size_bytes for layout in self.layout(shape).values())
