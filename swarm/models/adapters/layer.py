"""The hook that adds adapters' products to what one linear layer answers, row by row.

The precision of the layer does not matter: the hook sees only what goes in and what comes out. Rows are grouped by
adapter, so a layer takes one small pair of products for each adapter in a batch (the idea of SGMV: Punica, Chen
et al. 2023).
"""

# Letters: T rows of a batch; I inputs of a layer, O its outputs, R rank.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from swarm.datatypes import AdapterHash
from swarm.models.adapters.rows import AdapterPlan, current_adapter_plan, plan_adapters

__all__ = ["AdaptedLayer", "Factors", "sizes_of_linear"]


@dataclass(frozen=True)
class Factors:
    """One adapter's two matrices for one layer."""

    a: torch.Tensor
    """[I, R]"""
    b: torch.Tensor
    """[R, O], scaled."""

    @property
    def size_bytes(self) -> int:
        return self.a.numel() * self.a.element_size() + self.b.numel() * self.b.element_size()


class AdaptedLayer:
    """The hook on one linear layer."""

    def __init__(self, module: nn.Module, in_features: int, out_features: int) -> None:
        self._in_features = in_features
        self._out_features = out_features
        self.factors: dict[AdapterHash, Factors] = {}
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        plan = current_adapter_plan.get()
        if plan is None or not any(part.adapter in self.factors for part in plan.parts):
            return None
        inputs = args[0].reshape(-1, self._in_features)
        rows = output.reshape(-1, self._out_features)
        if len(inputs) != plan.num_rows:
            plan = self._plan_for(len(inputs), plan)
        summed = self._sum(plan, inputs, rows) if torch.is_grad_enabled() else self._add(plan, inputs, rows)
        return summed.reshape(output.shape)

    @staticmethod
    def _plan_for(num_rows: int, plan: AdapterPlan) -> AdapterPlan:
        """The plan of a layer that sees other rows than the batch has.

        Some attention keeps compressed keys and values and expands them anew in each step (deepseek's): its layers
        see every cached position, which is right as long as they all belong to one session. What fails here runs
        again, one session at a time.
        """
        adapter = plan.for_all
        if adapter is None:
            raise RuntimeError(f"an adapted layer sees {num_rows} rows of a batch of {plan.num_rows}")
        return plan_adapters([(adapter, num_rows)])

    def _add(self, plan: AdapterPlan, inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The products added in place to outputs [T, O] that nobody else has seen yet."""
        for part in plan.parts:
            factors = self.factors.get(part.adapter)
            if factors is None:
                continue
            chosen = slice(part.first_row, part.end_row)
            hidden = inputs[chosen].to(factors.a.dtype) @ factors.a
            if rows.dtype is factors.b.dtype:
                rows[chosen].addmm_(hidden, factors.b)
            else:
                rows[chosen].add_((hidden @ factors.b).to(rows.dtype))
        return rows

    def _sum(self, plan: AdapterPlan, inputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """As `_add`, differentiable with respect to inputs [T, I] and outputs [T, O]."""
        pieces: list[torch.Tensor] = []
        row = 0
        for part in plan.parts:
            factors = self.factors.get(part.adapter)
            if factors is None:
                continue
            chosen = slice(part.first_row, part.end_row)
            product = inputs[chosen].to(factors.a.dtype) @ factors.a @ factors.b
            pieces += [rows[row : part.first_row], rows[chosen] + product.to(rows.dtype)]
            row = part.end_row
        return torch.cat([*pieces, rows[row:]])


def sizes_of_linear(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised ones and transformers' Conv1D (gpt2) included."""
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return in_features, out_features
    if type(module).__name__ == "Conv1D" and isinstance(weight := getattr(module, "weight", None), torch.Tensor):
        return int(weight.shape[0]), int(weight.shape[1])
    return None
