"""A part of a loaded span: the same weights, run over fewer blocks.

A route may need only blocks 20:25 of a server that holds 15:25. Blocks left out give way, for the
time of a call, to modules that hand hidden states on, so that every block keeps its place and its
number, which decoders use to look up masks and caches.

Letters in shapes: B batch, T new tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.models.anatomy import BlockStack
from swarm.models.span import SpanModel
from swarm.models.span_cache import SpanCache

__all__ = ["NarrowedSpan", "narrow"]


class _Skipped(nn.Module):
    """Stands in the place of a block that is left out."""

    def __init__(self, model: SpanModel, index: int) -> None:
        super().__init__()
        # Outside the module registry: of the block only attributes are read (attention types and the like).
        self.__dict__["_model"] = model
        self.__dict__["_block"] = model.blocks[index]
        self._is_first = index == 0
        self._is_last = index == model.num_layers - 1

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model: SpanModel = self.__dict__["_model"]
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._is_first:
            hidden = model.hidden_in
        if self._is_last:
            model.hidden_out = hidden
        return (hidden, *[None] * (model.output_arity - 1)) if model.output_arity else hidden


class NarrowedSpan:
    """Looks like a SpanModel to whoever runs it."""

    def __init__(self, model: SpanModel, span: Span) -> None:
        """Not for callers; use `narrow`."""
        self._model = model
        self.span = span
        self._first = span.start - model.span.start
        self._end = span.end - model.span.start
        self._stack = BlockStack(
            [
                block if self._first <= index < self._end else _Skipped(model, index)
                for index, block in enumerate(model.blocks)
            ]
        )

    @property
    def hidden_size(self) -> int:
        return self._model.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        return self._model.device

    def new_cache(self) -> SpanCache:
        """An empty cache for the blocks that run."""
        return SpanCache(self._model.layer_types, first=self._first, end=self._end)

    def __call__(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, *, cache: SpanCache | None = None
    ) -> torch.Tensor:
        """As SpanModel.forward: [B, T, H] to [B, T, H]."""
        return self._model.forward_through(self._stack, hidden, position_ids, cache=cache)


def narrow(model: SpanModel, span: Span) -> SpanModel | NarrowedSpan:
    """The part of a loaded span that runs the blocks of `span`; the span itself when that is all of it.

    Raises:
        BadInputError: `span` reaches outside what is loaded.
    """
    if span == model.span:
        return model
    if not model.span.contains_span(span):
        raise BadInputError(f"blocks {span} are outside the loaded blocks {model.span}")
    return NarrowedSpan(model, span)
