"""PyramidInfer as released (2405.12532), to compare with: tokens leave the hidden stream while a prompt is read.

The 7B file's settings. What a layer drops, deeper layers never compute; all heads of a layer keep the same tokens.
"""

# Letters: Hq query heads, Hk KV heads, m tokens in the stream, w recent ones, t new tokens, D, Dv head dimensions.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from swarm.errors import UnsupportedModelError
from swarm.kvpolicy.reference_model import AttentionCall, ReferenceModel, attend_causally

__all__ = ["PyramidInferCache"]

_RECENT_SHARE: Final = 0.2
_PROMPT_FLOOR: Final = 0.9
_ANSWER_FLOOR: Final = 0.1
_ANSWER_SHARE: Final = 0.9
_NEWEST_WEIGHT: Final = 1.2
"""What the newest query of the window counts, where the oldest counts 1."""
_LEAST_CONTEXT: Final = 64
_NUM_SINKS: Final = 4
_BLOCK_TOKENS: Final = 16


@dataclass
class _Layer:
    keys: torch.Tensor
    """[Hk, m, D]"""
    values: torch.Tensor
    positions: torch.Tensor
    """[m] int64"""
    queries: torch.Tensor
    """[Hq, w, D], the newest"""
    num_settled: int
    """Keys that will not be judged again."""


class PyramidInferCache:
    """One sequence: its prompt is read with ever fewer tokens, its answer pruned block by block."""

    def __init__(self, model: ReferenceModel) -> None:
        self._model = model
        self._layers: dict[int, _Layer] = {}
        self._stream = torch.zeros(0, dtype=torch.int64)
        """Positions of the prompt that are still in the hidden stream."""
        self._next: torch.Tensor | None = None
        """Which of them the next layer gets."""
        self._num_recent = 0
        self.stream_lengths: list[int] = []
        """Tokens that entered each layer, in order; what a hop would send on."""

    def read_prompt(self, token_ids: Sequence[int]) -> None:
        """Run a whole prompt from position 0.

        Raises:
            UnsupportedModelError: rows can not be taken out of this model's hidden stream from outside.
        """
        decoder: Any = self._model.model.base_model
        layers = getattr(decoder, "layers", None)
        if layers is None:
            raise UnsupportedModelError(
                f"{self._model.model.config.model_type} has no list of layers to drop tokens between"
            )
        self._stream = torch.arange(len(token_ids))
        self._num_recent = 1 + int(_RECENT_SHARE * len(token_ids))
        handles = [layer.register_forward_pre_hook(self._shorten, with_kwargs=True) for layer in layers]
        try:
            self._model.run_hidden(token_ids, 0, self._read)
        finally:
            for handle in handles:
                handle.remove()

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Append new tokens, attend from them, prune what leaves the window: outputs [Hq, t, Dv]."""
        own = self._layers[call.layer]
        first = int(own.positions[-1]) + 1
        own.keys = torch.cat((own.keys, call.keys.half().float()), dim=1)
        own.values = torch.cat((own.values, call.values.half().float()), dim=1)
        own.positions = torch.cat((own.positions, torch.arange(first, first + call.keys.shape[1])))
        own.queries = torch.cat((own.queries, call.queries), dim=1)[:, -self._num_recent :]
        output = attend_causally(call, own.keys, own.values)
        while len(own.positions) - self._num_recent - own.num_settled >= _BLOCK_TOKENS:
            self._prune_block(call, own)
        return output

    def keys_of(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys [m, D], values [m, Dv], positions [m] and score biases [m] of a head."""
        own = self._layers[layer]
        return own.keys[head], own.values[head], own.positions, torch.zeros(len(own.positions))

    def count_bytes(self) -> int:
        """16-bit keys and values, and two bytes of position for a token of a layer; scores are not counted."""
        return sum(2 * (own.keys.numel() + own.values.numel() + len(own.positions)) for own in self._layers.values())

    def _shorten(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: only the rows that the layer before has left."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._next is not None:
            hidden = hidden[:, self._next]
            self._stream = self._stream[self._next]
            self._next = None
        self.stream_lengths.append(len(self._stream))
        changed = dict(kwargs)
        cosines, sines = kwargs["position_embeddings"]
        changed["position_embeddings"] = (cosines[:, self._stream], sines[:, self._stream])
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = kwargs["position_ids"][:, self._stream]
        if args:
            return (hidden, *args[1:]), changed
        changed["hidden_states"] = hidden
        return args, changed

    def _read(self, call: AttentionCall) -> torch.Tensor:
        """The attention of a prompt's tokens that are still there, and the choice of those that go on."""
        num_recent = min(self._num_recent, call.keys.shape[1])
        num_context = call.keys.shape[1] - num_recent
        queries = call.queries[:, -num_recent:]
        self._layers[call.layer] = _Layer(
            keys=call.keys.half().float(),
            values=call.values.half().float(),
            positions=self._stream.clone(),
            queries=queries,
            num_settled=num_context,
        )
        num_kept = math.floor(num_context * _cosine(_PROMPT_FLOOR, call.layer, self._model.shape.num_layers))
        if _LEAST_CONTEXT < num_kept < num_context:
            scores = _attention_received(queries, call.keys, call.scaling)[:num_context]
            scores[:_NUM_SINKS] = torch.inf
            kept = scores.topk(num_kept).indices.sort().values
            self._next = torch.cat((kept, torch.arange(num_context, num_context + num_recent)))
        return attend_causally(call, call.keys, call.values)

    def _prune_block(self, call: AttentionCall, own: _Layer) -> None:
        """The oldest block that has left the window keeps its best tokens."""
        share = _ANSWER_SHARE * _cosine(_ANSWER_FLOOR, call.layer, self._model.shape.num_layers)
        num_kept = max(1, math.floor(_BLOCK_TOKENS * share))
        first, end = own.num_settled, own.num_settled + _BLOCK_TOKENS
        scores = _attention_received(own.queries, own.keys, call.scaling)[first:end]
        best = scores.topk(num_kept).indices.sort().values + first
        kept = torch.cat((torch.arange(first), best, torch.arange(end, len(own.positions))))
        own.keys, own.values, own.positions = own.keys[:, kept], own.values[:, kept], own.positions[kept]
        own.num_settled = first + num_kept


def _cosine(floor: float, layer: int, num_layers: int) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * layer / num_layers)) / 2


def _attention_received(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """[m]: mean over heads and, weighted, over the newest queries [Hq, w, D] of what each key [Hk, m, D] gets."""
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    group = len(queries) // len(keys)
    is_seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    weights = torch.linspace(1.0, _NEWEST_WEIGHT, num_queries)
    received = torch.zeros(num_keys)
    for head in range(len(queries)):
        scores = (queries[head] @ keys[head // group].transpose(0, 1) * scaling).masked_fill(~is_seen, -torch.inf)
        received += weights @ scores.softmax(dim=-1)
    return received / (len(queries) * num_queries)
