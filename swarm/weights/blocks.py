"""Puts the large matrices of a block into few bits, and knows beforehand which.

The choice depends on the block's modules only, not on its weights, so a block on the meta device and a loaded one
agree. Norms, biases, embeddings and routers stay as they are: they are small, and errors there cost most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from swarm.weights.experts import QuantisedExperts
from swarm.weights.formats import MatrixShape, WeightFormat
from swarm.weights.linear import QuantisedLinear

__all__ = ["Target", "empty_like_targets", "find_targets", "module_tensors", "put_tensors", "quantise_block"]

# Letters in shapes: E experts, N output features, K input features.

_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate", "wg"})
"""What families call the layer that chooses experts."""
_MIN_FEATURES = 16
"""Narrower matrices are mostly padding in every format."""


class Target(NamedTuple):
    """A matrix, or all experts' matrices, to put into few bits."""

    owner_path: str
    """Module that holds it, by its path in the block."""
    name: str
    """Attribute of that module: a linear layer, or a parameter with all experts."""
    shape: MatrixShape
    """Of one matrix."""
    num_experts: int | None
    """None for a linear layer."""
    is_transposed: bool
    """Whether the parameter holds [K, N] instead of [N, K]."""

    @property
    def num_weights(self) -> int:
        return self.shape.num_weights * (self.num_experts or 1)


def find_targets(block: nn.Module) -> Iterator[Target]:
    """What can be put into few bits; works on the meta device."""
    for owner_path, owner in block.named_modules():
        for name, child in owner.named_children():
            kind: object = type(child)
            if not isinstance(child, nn.Linear) or name in _ROUTER_NAMES or not _is_plain_linear(kind):
                continue
            shape = MatrixShape(child.out_features, child.in_features)
            if min(shape) >= _MIN_FEATURES:
                yield Target(owner_path, name, shape, None, False)
        # Set by transformers' decorator for classes that hold all experts in 3-D parameters.
        is_transposed = getattr(owner, "is_transposed", None)
        if not isinstance(is_transposed, bool):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim != 3 or min(parameter.shape[1:]) < _MIN_FEATURES:
                continue
            num_experts, first, second = parameter.shape
            shape = MatrixShape(second, first) if is_transposed else MatrixShape(first, second)
            yield Target(owner_path, name, shape, num_experts, is_transposed)


def assign_formats(block: nn.Module, format: WeightFormat) -> list[tuple[Target, WeightFormat]]:
    """What to put into few bits, and how: `format` may have finer siblings for some matrices."""
    targets = list(find_targets(block))
    return list(zip(targets, format.refine([target.num_weights for target in targets]), strict=True))


def quantise_block(block: nn.Module, format: WeightFormat) -> int:
    """Replace the weights of `find_targets` in place, one by one; returns how many weights are now in few bits.

    Freed weights are not kept by anybody here, so the most memory in use at a time is the block, its stored form, and
    one matrix.

    Raises:
        ValueError: weights are not finite; the message names the matrix.
    """
    num_weights = 0
    for target, chosen in assign_formats(block, format):
        owner = block.get_submodule(target.owner_path)
        replacement: nn.Module
        if target.num_experts is None:
            layer = owner.get_submodule(target.name)
            assert isinstance(layer, nn.Linear)
            tensors = _encode(chosen, layer.weight.detach(), target)
            replacement = QuantisedLinear(chosen, target.shape, tensors, layer.bias)
        else:
            experts = owner.get_parameter(target.name).detach()
            stacked = _empty_stack(chosen, target, experts.device)
            for expert in range(target.num_experts):
                weight = experts[expert].T if target.is_transposed else experts[expert]
                for name, tensor in _encode(chosen, weight, target).items():
                    stacked[name][expert].copy_(tensor)
            replacement = QuantisedExperts(chosen, target.shape, stacked, is_transposed=target.is_transposed)
            del owner._parameters[target.name], experts
        setattr(owner, target.name, replacement)
        num_weights += target.num_weights
    return num_weights


def empty_like_targets(block: nn.Module, format: WeightFormat) -> None:
    """Replace the weights of `find_targets` by what `quantise_block` would, without values, on the meta device."""
    meta = torch.device("meta")
    for target, chosen in assign_formats(block, format):
        owner = block.get_submodule(target.owner_path)
        if target.num_experts is None:
            layer = owner.get_submodule(target.name)
            assert isinstance(layer, nn.Linear)
            layouts = chosen.layout(target.shape).items()
            tensors = {name: torch.empty(layout.shape, dtype=layout.dtype, device=meta) for name, layout in layouts}
            setattr(owner, target.name, QuantisedLinear(chosen, target.shape, tensors, layer.bias))
        else:
            stacked = _empty_stack(chosen, target, meta)
            del owner._parameters[target.name]
            experts = QuantisedExperts(chosen, target.shape, stacked, is_transposed=target.is_transposed)
            setattr(owner, target.name, experts)


def _encode(format: WeightFormat, weight: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    tensors = format.encode(weight)
    # Every format scales by what it meets, so scales tell of weights that no code can stand for.
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise ValueError(f"the weights of {target.owner_path}.{target.name} are not finite numbers")
    return tensors


def _empty_stack(format: WeightFormat, target: Target, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty((target.num_experts or 1, *layout.shape), dtype=layout.dtype, device=device)
        for name, layout in format.layout(target.shape).items()
    }


@cache
def _is_plain_linear(cls: Any) -> bool:
    """Whether a subclass of nn.Linear computes what nn.Linear does, found by trying."""
    if cls is nn.Linear:
        return True
    try:
        layer: nn.Linear = cls(5, 3, bias=True)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            inputs = torch.linspace(-2, 2, 10).view(2, 5)
            return torch.allclose(layer(inputs), linear(inputs, layer.weight, layer.bias), atol=1e-5)
    except Exception:  # foreign code with other arguments, or more parts than a weight and a bias
        return False


def module_tensors(block: nn.Module) -> Mapping[str, torch.Tensor]:
    """Every tensor of a block by its path: parameters, and buffers whether or not checkpoints hold them."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def put_tensors(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the places that `module_tensors` names.

    Raises:
        ValueError: names, shapes or kinds of numbers are not those of the block; it is unchanged then. (One float
            dtype may stand for another: families keep single weights in fp32.)
    """
    wanted = module_tensors(block)
    if wanted.keys() != tensors.keys():
        odd = sorted(wanted.keys() ^ tensors.keys())[0]
        raise ValueError(f"the tensor {odd} is on one side only")
    for name, place in wanted.items():
        found = tensors[name]
        is_alike = found.dtype == place.dtype or (found.is_floating_point() and place.is_floating_point())
        if found.shape != place.shape or not is_alike:
            raise ValueError(f"the tensor {name} is {found.dtype} {tuple(found.shape)}")
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = block.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[last] = tensor
        if isinstance(owner, QuantisedLinear | QuantisedExperts):
            owner.forget_matrix()
