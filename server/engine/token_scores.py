"""Has every new token scored when it comes, from what its attention module is given."""

# Letters: T tokens of all sequences, Hk KV heads, H hidden size.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from swarm.errors import UnsupportedModelError
from swarm.kvpolicy.scorers import NewTokens
from swarm.server.engine.ragged_attention import StepPlan, current_plan

if TYPE_CHECKING:
    from swarm.kvpolicy.layer_settings import LayerSettings

__all__ = ["attach_scorers"]


def attach_scorers(blocks: Iterable[torch.nn.Module], settings: Sequence[LayerSettings]) -> None:
    """Have each block put `scores[layer]` [Hk, T] float32 into step plans that want scores; once for a span.

    Layers with a sliding window drop by position and are not scored, but for zeros.

    Args:
        blocks: of the span.
        settings: of each of them.

    Raises:
        UnsupportedModelError: a block has no attention module, or several.
    """
    attentions = [_find_attention(block) for block in blocks]
    for layer, (attention, own) in enumerate(zip(attentions, settings, strict=True)):
        if own.policy.pruning is not None:
            attention.register_forward_pre_hook(_ScoreTokens(layer, own), with_kwargs=True)


def _find_attention(block: torch.nn.Module) -> torch.nn.Module:
    found = [module for module in block.modules() if hasattr(module, "layer_idx") and module is not block]
    innermost = [module for module in found if not any(hasattr(part, "layer_idx") for part in _parts_of(module))]
    attentions = [module for module in innermost if "attention" in type(module).__name__.lower()] or innermost
    if len(attentions) != 1:
        raise UnsupportedModelError(
            f"{type(block).__name__} has {len(attentions)} attention modules, where tokens are scored at one"
        )
    return attentions[0]


def _parts_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (part for part in module.modules() if part is not module)


class _ScoreTokens:
    """A hook that runs before an attention module."""

    def __init__(self, layer: int, settings: LayerSettings) -> None:
        """`layer` counts from the span's start."""
        self._layer = layer
        self._settings = settings

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = current_plan.get()
        if not isinstance(plan, StepPlan) or plan.scores is None:
            return
        hidden: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        hidden = hidden[0]
        assert plan.positions is not None
        heads = self._settings.num_kv_heads
        if self._settings.window:
            plan.scores[self._layer] = torch.zeros(heads, len(hidden), device=hidden.device)
            return
        new = NewTokens(
            layer=self._settings.layer,
            positions=plan.positions,
            hidden=hidden,
            num_kv_heads=heads,
        )
        plan.scores[self._layer] = self._settings.scorer.score_new(new)
