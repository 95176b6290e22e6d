"""The KV cache of one sequence batch in one span, for the path that runs a session at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from swarm.errors import UnsupportedModelError

__all__ = ["CACHEABLE_LAYER_TYPES", "SpanCache"]

CACHEABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types (as in a config's `layer_types`) whose cache can be rewound to any earlier length."""


class SpanCache:
    """Keys and values of a span's blocks, all of them at all positions so far.

    Blocks with a sliding window keep every position too, and leave it to the model's own mask to
    hide the old ones: only so can the cache be rewound to any earlier length.

    Tensors in here are replaced, never written to, which is why `clone` may share them.
    """

    def __init__(self, layer_types: Sequence[str], *, first: int = 0, end: int | None = None) -> None:
        """An empty cache with one layer per entry of `layer_types`; only layers [first, end) will be filled.

        Raises:
            UnsupportedModelError: for a layer type that is not in CACHEABLE_LAYER_TYPES.
        """
        unknown = sorted(set(layer_types) - CACHEABLE_LAYER_TYPES)
        if unknown:
            raise UnsupportedModelError(
                f"blocks of type {', '.join(unknown)} keep a state that can not be rewound, so they are not served yet"
            )
        end = len(layer_types) if end is None else end
        layers = [DynamicLayer() for _ in range(first, end)]
        # transformers asks layer 0 (or the first of a type) how long the cache is, so the places of layers
        # that stay empty show a filled one.
        self.kv = _cache_of([layers[0]] * first + layers + [layers[-1]] * (len(layer_types) - end))
        """What transformers' modules read and extend; layer i belongs to the span's i-th block."""

    def __repr__(self) -> str:
        return f"<SpanCache {len(self.kv.layers)} layers, {self.length} positions>"

    @property
    def length(self) -> int:
        """Number of positions held."""
        return int(self.kv.get_seq_length())

    @property
    def size_bytes(self) -> int:
        """Memory held by keys and values."""
        tensors = [tensor for layer in self._filled_layers() for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises:
            ValueError: `length` is negative or more than is held.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"can not crop a cache of {self.length} positions to {length}")
        if length == self.length:
            return
        for layer in self._filled_layers():
            # A copy, so that the memory of what is forgotten is given back.
            layer.keys = layer.keys[..., :length, :].clone()
            layer.values = layer.values[..., :length, :].clone()

    def clone(self) -> SpanCache:
        """An independent cache with the same content, at the cost of a few references."""
        twin = SpanCache.__new__(SpanCache)
        copies = {id(layer): copy.copy(layer) for layer in self.kv.layers}
        twin.kv = _cache_of([copies[id(layer)] for layer in self.kv.layers])
        return twin

    def _filled_layers(self) -> list[Any]:
        layers: list[Any] = self.kv.layers
        return list({id(layer): layer for layer in layers if layer.is_initialized}.values())


def _cache_of(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache
