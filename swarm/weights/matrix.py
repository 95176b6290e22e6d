"""One matrix in few bits, differentiable with respect to what it is multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from swarm.weights.formats import MatrixShape, WeightFormat

__all__ = ["QuantisedMatrix"]


class QuantisedMatrix:
    """A weight [N, K] as some tensors and the format that reads them. Shares the tensors it is given."""

    __slots__ = ("format", "shape", "tensors")

    def __init__(self, format: WeightFormat, shape: MatrixShape, tensors: Mapping[str, torch.Tensor]) -> None:
        self.format = format
        self.shape = shape
        self.tensors = dict(tensors)

    def __repr__(self) -> str:
        return f"<QuantisedMatrix {self.shape.out_features}x{self.shape.in_features} {self.format.name}>"

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs [..., K] times the weight transposed: [..., N], same dtype.

        The gradient with respect to `inputs` is that of the same product with the restored weights.
        """
        rows = inputs.reshape(-1, self.shape.in_features)
        if rows.requires_grad and torch.is_grad_enabled():
            outputs: torch.Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        else:
            outputs = self._multiply_rows(rows)
        return outputs.view(*inputs.shape[:-1], self.shape.out_features)

    def restore(self) -> torch.Tensor:
        """The weights [N, K] that are multiplied with."""
        return self.format.decode(self.tensors, self.shape)

    def _multiply_rows(self, rows: torch.Tensor) -> torch.Tensor:
        if not len(rows):
            return rows.new_zeros(0, self.shape.out_features)
        return self.format.multiply(self.tensors, self.shape, rows)


class _Product(torch.autograd.Function):
    """Kernels for few bits have no gradient of their own."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, matrix: QuantisedMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix._multiply_rows(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        matrix: QuantisedMatrix = ctx.matrix
        return matrix.format.multiply_backward(matrix.tensors, matrix.shape, gradient), None
