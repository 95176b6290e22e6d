"""Forward and backward over whole sequences, without any state left behind."""

# Letters: T tokens of all sequences, H hidden size.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm.models.adapters.rows import adapters_for_rows
from swarm.server.engine.work import BackwardWork, ForwardWork

if TYPE_CHECKING:
    from swarm.datatypes import AdapterHash
    from swarm.models import SpanModel
    from swarm.models.narrowed import NarrowedSpan

__all__ = ["run_stateless"]


def run_stateless(model: SpanModel | NarrowedSpan, work: ForwardWork | BackwardWork) -> torch.Tensor:
    """Outputs of each whole sequence, or the gradient of its inputs by recomputing: [T, H]."""
    counts = list(work.counts)
    inputs = work.hidden.to(device=model.device, dtype=model.dtype).split(counts)
    adapter = work.adapter
    if isinstance(work, ForwardWork):
        with torch.inference_mode():
            return torch.cat([_run_whole(model, hidden, adapter) for hidden in inputs])
    gradients = work.gradient.to(device=model.device, dtype=model.dtype).split(counts)
    return torch.cat(
        [_input_gradient(model, hidden, gradient, adapter) for hidden, gradient in zip(inputs, gradients, strict=True)]
    )


def _run_whole(model: SpanModel | NarrowedSpan, hidden: torch.Tensor, adapter: AdapterHash) -> torch.Tensor:
    positions = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(0)
    with adapters_for_rows([(adapter, len(hidden))]):
        return model(hidden.unsqueeze(0), positions).squeeze(0)


def _input_gradient(
    model: SpanModel | NarrowedSpan, hidden: torch.Tensor, gradient: torch.Tensor, adapter: AdapterHash
) -> torch.Tensor:
    hidden = hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = _run_whole(model, hidden, adapter)
    (input_gradient,) = torch.autograd.grad(output, hidden, gradient)
    return input_gradient
