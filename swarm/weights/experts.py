"""Stands in the place of a 3-D parameter that holds the matrices of all experts of a block.

Transformers' experts take one matrix out of the parameter and multiply with it: `linear(x, self.up_proj[expert])`, or
`x @ self.up_proj[expert]` where the parameter is kept transposed. What this gives for `[expert]` takes part in
exactly these products, through torch's protocol for tensor-like objects, and refuses everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from swarm.weights.formats import MatrixShape, WeightFormat
from swarm.weights.matrix import QuantisedMatrix

__all__ = ["QuantisedExperts"]

_MATMULS: frozenset[Any] = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm})


class QuantisedExperts(nn.Module):
    """E matrices in few bits, each tensor of the format stacked along a first dimension."""

    def __init__(
        self,
        format: WeightFormat,
        shape: MatrixShape,
        tensors: Mapping[str, torch.Tensor],
        *,
        is_transposed: bool,
    ) -> None:
        """`shape` is that of one matrix [N, K] as in a linear layer, also if the parameter was [E, K, N]."""
        super().__init__()
        self.format = format
        self.shape = shape
        self.is_transposed = is_transposed
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._experts: dict[int, _ExpertMatrix] = {}

    def __getitem__(self, expert: int | torch.Tensor) -> _ExpertMatrix:
        index = int(expert)
        found = self._experts.get(index)
        if found is None:
            tensors = {name: self.get_buffer(name)[index] for name in self.format.layout(self.shape)}
            matrix = QuantisedMatrix(self.format, self.shape, tensors)
            found = self._experts[index] = _ExpertMatrix(matrix, self.is_transposed)
        return found

    def forget_matrix(self) -> None:
        """After buffers were put in place of others."""
        self._experts.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.forget_matrix()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved


class _ExpertMatrix:
    """What `parameter[expert]` gives: good for one kind of product and nothing else."""

    def __init__(self, matrix: QuantisedMatrix, is_transposed: bool) -> None:
        self.matrix = matrix
        self.is_transposed = is_transposed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if len(args) >= 2 and isinstance(args[1], cls) and isinstance(args[0], torch.Tensor):
            expert = args[1]
            if func is functional.linear and not expert.is_transposed:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                output = expert.matrix.multiply(args[0])
                return output if bias is None else output + bias
            if func in _MATMULS and expert.is_transposed:
                return expert.matrix.multiply(args[0])
        return NotImplemented
