"""Finds out what layers of a span are given, by running a few tokens through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from swarm.models.span import SpanModel

__all__ = ["NUM_PROBE_TOKENS", "LayerInput", "probe_layers"]

NUM_PROBE_TOKENS: Final = 3


class LayerInput(NamedTuple):
    """What a layer was given; `num_rows` is NUM_PROBE_TOKENS where it sees every token."""

    num_rows: int
    dtype: torch.dtype
    device: torch.device


_current_probe: ContextVar[dict[str, LayerInput] | None] = ContextVar("swarm_adapter_probe", default=None)


@torch.inference_mode()
def probe_layers(model: SpanModel, layers: Mapping[str, nn.Module]) -> dict[str, LayerInput]:
    """What each of `layers`, parts of `model`, is given, by the same names; those that were not called are missing."""
    seen: dict[str, LayerInput] = {}
    with _watching(layers):
        token = _current_probe.set(seen)
        try:
            hidden = torch.zeros(1, NUM_PROBE_TOKENS, model.hidden_size, dtype=model.dtype, device=model.device)
            model(hidden, torch.arange(NUM_PROBE_TOKENS, device=model.device).unsqueeze(0))
        finally:
            _current_probe.reset(token)
    return seen


@contextmanager
def _watching(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have these layers tell the current probe what they are given; other threads' calls are not told."""

    def watch(name: str, layer: nn.Module) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            seen = _current_probe.get()
            if seen is not None and args and isinstance(args[0], torch.Tensor):
                num_rows = args[0].numel() // max(args[0].shape[-1], 1)
                seen[name] = LayerInput(num_rows, args[0].dtype, args[0].device)

        return layer.register_forward_pre_hook(note)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
