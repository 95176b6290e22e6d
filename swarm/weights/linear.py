"""Stands in the place of nn.Linear, with its weight in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import nn

from swarm.weights.formats import MatrixShape, WeightFormat
from swarm.weights.matrix import QuantisedMatrix

__all__ = ["QuantisedLinear"]


class QuantisedLinear(nn.Module):
    """A linear layer whose weight tensors are buffers, so they move, are counted and are saved like others."""

    bias: nn.Parameter | None

    def __init__(
        self,
        format: WeightFormat,
        shape: MatrixShape,
        tensors: Mapping[str, torch.Tensor],
        bias: nn.Parameter | None = None,
    ) -> None:
        """`tensors` as `format.encode` made them for a weight of `shape`; `bias` [N]."""
        super().__init__()
        self.format = format
        self.shape = shape
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)
        self._matrix: QuantisedMatrix | None = None

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @property
    def matrix(self) -> QuantisedMatrix:
        """The weight, over this module's buffers as they are now."""
        matrix = self._matrix
        if matrix is None:
            tensors = {name: self.get_buffer(name) for name in self.format.layout(self.shape)}
            matrix = self._matrix = QuantisedMatrix(self.format, self.shape, tensors)
        return matrix

    @property
    def weight(self) -> torch.Tensor:
        """The restored weight [N, K], computed at each access: for foreign code that looks at it."""
        return self.matrix.restore()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N], same dtype."""
        output = self.matrix.multiply(input)
        return output if self.bias is None else output + self.bias

    def forget_matrix(self) -> None:
        """After buffers were put in place of others."""
        self._matrix = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.forget_matrix()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format.name}"
