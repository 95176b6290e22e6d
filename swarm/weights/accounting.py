"""Counts what weights take, every scale and padding included."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from swarm.weights.experts import QuantisedExperts
from swarm.weights.linear import QuantisedLinear

__all__ = ["WeightAccount", "count_weights"]


class WeightAccount(NamedTuple):
    """Weights of some blocks."""

    num_weights: int
    """As the model was published."""
    num_quantised: int
    """Of these, in few bits."""
    size_bytes: int
    """Memory of all of them."""

    @property
    def bytes_per_weight(self) -> float:
        return self.size_bytes / max(self.num_weights, 1)


def count_weights(module: nn.Module) -> WeightAccount:
    """The weights of a module and of all inside it."""
    num_weights = num_quantised = size_bytes = 0
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            num_weights += parameter.numel()
            size_bytes += parameter.numel() * parameter.element_size()
        if isinstance(part, QuantisedLinear | QuantisedExperts):
            stored = list(part.buffers(recurse=False))
            num_matrices = len(stored[0]) if isinstance(part, QuantisedExperts) else 1
            num_weights += part.shape.num_weights * num_matrices
            num_quantised += part.shape.num_weights * num_matrices
            size_bytes += sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return WeightAccount(num_weights, num_quantised, size_bytes)
