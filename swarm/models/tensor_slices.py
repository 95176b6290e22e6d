"""Cuts the matrices of a loaded span to one of several processes' part, after transformers' own tensor-parallel plans.

A plan (`base_model_tp_plan` of a config) says for each matrix of a block how it is cut: by outputs, so that every
process computes its own heads or features, or by inputs, so that their sums make the whole (Megatron-LM, arXiv
1909.08053; DeepSpeed-Inference uses the same cut). Only the plan is transformers'; the cut gives plain tensors, so
paged attention, streams and the engine meet ordinary modules with fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from swarm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from swarm.models.span import SpanModel

__all__ = ["SliceGroup", "refusal_of_slices", "slice_span"]

# Letters in shapes: T rows, N output features, K input features, E experts, R processes.

_PREFIX = "layers.*."
_UNCHANGED = frozenset({"replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params"})
"""Styles of modules that every process has whole."""


class SliceGroup(Protocol):
    """The processes that share a span. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process' number, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by the sum of all processes' tensors; returns it."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """All processes' tensors, of equal shape, by rank."""


def refusal_of_slices(config: Any, size: int) -> str | None:
    """Why a model can not be cut for `size` processes, from its config alone; None if nothing speaks against it."""
    text_config = config.get_text_config(decoder=True)
    plan = _plan_of(text_config)
    name = getattr(text_config, "model_type", "this model")
    if not plan:
        return f"transformers has no tensor-parallel plan for {name}; spread its layers over the devices instead"
    odd = sorted(set(plan.values()) - _UNCHANGED - _CUTS.keys())
    if odd:
        return f"the tensor-parallel plan of {name} has styles that are not known here ({', '.join(odd)})"
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    if heads % size:
        return f"{name} has {heads} KV heads, which {size} devices can not share evenly"
    return None


def slice_span(model: SpanModel, group: SliceGroup) -> None:
    """Keep this process' part of each block, in place; `model` then works in step with the other processes'.

    Weights must be floats: matrices in few bits would have to be cut before they were put into them.

    Raises:
        UnsupportedModelError: the family has no plan, or its sizes can not be shared by so many; nothing is cut then.
    """
    reason = refusal_of_slices(model.config, group.size)
    if reason is not None:
        raise UnsupportedModelError(reason)
    plan = _plan_of(model.config)
    wanted = [(block, path, style) for block in model.blocks for path, style in plan.items() if _has(block, path)]
    for block, path, style in wanted:
        problem = _problem(block, path, style, group.size)
        if problem:
            raise UnsupportedModelError(f"{model.architecture} can not be shared by {group.size} devices: {problem}")
    with torch.no_grad():
        for block, path, style in wanted:
            if style not in _UNCHANGED:
                owner_path, _, name = path.rpartition(".")
                _CUTS[style](block.get_submodule(owner_path), name, group)


def _plan_of(config: Any) -> dict[str, str]:
    """Styles by path within a block."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return {path.removeprefix(_PREFIX): style for path, style in plan.items() if path.startswith(_PREFIX)}


def _has(block: nn.Module, path: str) -> bool:
    """Dense blocks lack the experts that the plan names, and the other way round."""
    owner: Any = block
    for name in path.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            return False
    return True


def _problem(block: nn.Module, path: str, style: str, size: int) -> str:
    """Why something can not be cut, or nothing."""
    owner_path, _, name = path.rpartition(".")
    owner = block.get_submodule(owner_path)
    target = getattr(owner, name)
    if style in _UNCHANGED or style == "moe_tp_experts":
        return ""
    if isinstance(target, nn.Linear):
        features = target.in_features if style.startswith("rowwise") else target.out_features
        head_dim = getattr(owner, "head_dim", None) or getattr(owner, "head_size", None)
        unit = int(head_dim) if style == "colwise" and isinstance(head_dim, int) else 1
    elif isinstance(target, nn.Parameter) and target.ndim == 3 and not getattr(owner, "is_transposed", False):
        features = target.shape[-1] if style == "rowwise" else target.shape[-2]
        unit = 2 if style == "packed_colwise" else 1
    else:
        return f"{path} is a {type(target).__name__}, which can not be cut"
    return "" if features % (size * unit) == 0 else f"{path} has {features} features in units of {unit}"


# -- cuts ----------------------------------------------------------------------------------------


def _cut_outputs(owner: nn.Module, name: str, group: SliceGroup) -> None:
    """A linear layer that computes this process' outputs only, or the same for a parameter [E, N, K] of experts."""
    target = getattr(owner, name)
    if isinstance(target, nn.Linear):
        _keep_outputs(target, group)
        target.register_forward_pre_hook(_gradient_summing_hook(group))
    else:
        setattr(owner, name, _parameter(target.chunk(group.size, dim=-2)[group.rank]))


def _cut_paired_outputs(owner: nn.Module, name: str, group: SliceGroup) -> None:
    """As `_cut_outputs` for two matrices on top of each other (gate and up): a part of each."""
    target = getattr(owner, name)
    halves = target.chunk(2, dim=-2)
    setattr(owner, name, _parameter(torch.cat([half.chunk(group.size, dim=-2)[group.rank] for half in halves], dim=-2)))


def _cut_outputs_and_gather(owner: nn.Module, name: str, group: SliceGroup) -> None:
    layer = owner.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    _keep_outputs(layer, group)
    layer.register_forward_pre_hook(_gradient_summing_hook(group))
    setattr(owner, name, _GatheredLinear(layer, group))


def _cut_inputs(owner: nn.Module, name: str, group: SliceGroup) -> None:
    """A linear layer whose input is cut already, or a parameter [E, N, K] of experts, whose sum their module makes."""
    target = getattr(owner, name)
    if isinstance(target, nn.Linear):
        setattr(owner, name, _SummedLinear(target, group, cuts_input=False))
    else:
        setattr(owner, name, _parameter(target.chunk(group.size, dim=-1)[group.rank]))


def _cut_inputs_here(owner: nn.Module, name: str, group: SliceGroup) -> None:
    layer = owner.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    setattr(owner, name, _SummedLinear(layer, group, cuts_input=True))


def _sum_experts(owner: nn.Module, name: str, group: SliceGroup) -> None:
    experts = owner.get_submodule(name)
    experts.register_forward_pre_hook(_gradient_summing_hook(group))
    experts.register_forward_hook(lambda module, args, output: _sum(output, group))


_CUTS: dict[str, Callable[[nn.Module, str, SliceGroup], None]] = {
    "colwise": _cut_outputs,
    "colwise_gather_output": _cut_outputs_and_gather,
    "colwise_rep": _cut_outputs_and_gather,
    "rowwise": _cut_inputs,
    "rowwise_split_input": _cut_inputs_here,
    "rowwise_rep": _cut_inputs_here,
    "packed_colwise": _cut_paired_outputs,
    "moe_tp_experts": _sum_experts,
}
"""What is done for each style of transformers' plans."""


def _keep_outputs(layer: nn.Linear, group: SliceGroup) -> None:
    layer.weight = _parameter(layer.weight.chunk(group.size)[group.rank])
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias.chunk(group.size)[group.rank])
    layer.out_features = layer.weight.shape[0]


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    # Memory of its own: a view would keep the whole matrix.
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


class _SummedLinear(nn.Module):
    """A linear layer over this process' part of the inputs; the processes' sums make the output."""

    def __init__(self, layer: nn.Linear, group: SliceGroup, *, cuts_input: bool) -> None:
        super().__init__()
        self.register_parameter("bias", layer.bias)
        layer.register_parameter("bias", None)
        layer.weight = _parameter(layer.weight.chunk(group.size, dim=1)[group.rank])
        layer.in_features = layer.weight.shape[1]
        self.part = layer
        self._group = group
        self._cuts_input = cuts_input

    @property
    def weight(self) -> torch.Tensor:
        """This process' part: for foreign code that asks for its dtype or device."""
        return self.part.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K / R], or [..., K] where the input is cut here, to [..., N]."""
        own = input
        if self._cuts_input:
            own = _sum_gradients(input, self._group).chunk(self._group.size, dim=-1)[self._group.rank]
        output = _sum(self.part(own), self._group)
        bias = self._parameters["bias"]
        return output if bias is None else output + bias


class _GatheredLinear(nn.Module):
    """A linear layer that computes this process' outputs and asks the others for theirs."""

    def __init__(self, layer: nn.Linear, group: SliceGroup) -> None:
        super().__init__()
        self.part = layer
        self._group = group

    @property
    def weight(self) -> torch.Tensor:
        """This process' part: for foreign code that asks for its dtype or device."""
        return self.part.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N]."""
        gathered: torch.Tensor = _Gather.apply(self.part(input), self._group)  # type: ignore[no-untyped-call]
        return gathered


# -- sums, and their gradients -------------------------------------------------------------------


def _sum(tensor: torch.Tensor, group: SliceGroup) -> torch.Tensor:
    if tensor.requires_grad and torch.is_grad_enabled():
        summed: torch.Tensor = _Sum.apply(tensor, group)  # type: ignore[no-untyped-call]
        return summed
    return group.sum(tensor)


def _sum_gradients(tensor: torch.Tensor, group: SliceGroup) -> torch.Tensor:
    """The tensor itself, whose gradient is the sum of what all processes find."""
    if tensor.requires_grad and torch.is_grad_enabled():
        shared: torch.Tensor = _SumOfGradients.apply(tensor, group)  # type: ignore[no-untyped-call]
        return shared
    return tensor


def _gradient_summing_hook(group: SliceGroup) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def share(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_shared(args, group))

    return share


def _shared(args: tuple[Any, ...], group: SliceGroup) -> Iterator[Any]:
    for value in args:
        yield _sum_gradients(value, group) if isinstance(value, torch.Tensor) else value


class _Sum(torch.autograd.Function):
    """Every process has the whole sum, so each one's part gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: SliceGroup) -> torch.Tensor:
        return group.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SumOfGradients(torch.autograd.Function):
    """Every process has the whole tensor but uses it for its own part only."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: SliceGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.sum(gradient.clone(memory_format=torch.contiguous_format)), None


class _Gather(torch.autograd.Function):
    """All processes' parts side by side; what comes after is the same everywhere, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: SliceGroup) -> torch.Tensor:
        ctx.group = group
        return torch.cat(group.gather(tensor.contiguous()), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.chunk(ctx.group.size, dim=-1)[ctx.group.rank], None
