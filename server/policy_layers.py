"""What a server compresses its span's caches by: a policy, put together for the layers it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from swarm.errors import BadInputError, UnsupportedModelError
from swarm.kvcache.compressed_layout import CompressedLayout
from swarm.kvcache.footprint import Footprint
from swarm.kvpolicy.settings import KVPolicy

if TYPE_CHECKING:
    from swarm.kvpolicy.calibration_file import Calibration
    from swarm.kvpolicy.layer_settings import LayerSettings

__all__ = ["PolicyLayers", "PolicyWish"]


class StoredShape(Protocol):
    """What one token of one layer stores."""

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def key_dim(self) -> int: ...

    @property
    def value_dim(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class PolicyLayers:
    """A compressing policy for the layers of one span."""

    policy: KVPolicy
    settings: tuple[LayerSettings, ...]
    """Of each layer of the span, first to last."""
    footprint: Footprint
    """Of all layers of the span."""
    rules_hash: str
    """Equal on servers that keep the same of a cache in the same form."""
    row_values: int
    """Values of one uncompressed token's place in a page: a little more than it needs, if tiles fit better so."""

    @property
    def layout(self) -> CompressedLayout:
        """How pages are cut for sequences in all layers."""
        return self.footprint.layout

    @property
    def page_bytes(self) -> int:
        """Of one layer's page."""
        return self.footprint.page_bytes

    @property
    def position_bytes(self) -> int:
        """Of a stored token; 0 where positions need not be stored."""
        return self.footprint.position_bytes

    @property
    def has_scores(self) -> bool:
        """Whether tokens are stored with scores."""
        return self.footprint.has_scores


@dataclass(frozen=True, kw_only=True)
class PolicyWish:
    """The policy that a server was told to serve, before its layers are there."""

    policy: KVPolicy
    num_layers: int
    """Of the whole model."""
    first_layer: int
    """Absolute, of the span."""
    max_positions: int
    """Context length of the model."""
    calibration: Calibration | None = None

    def in_bits(self, bits: float) -> PolicyWish:
        """The same, but for how finely is stored what is kept."""
        if self.policy.quantisation is None:
            return self
        quantisation = replace(self.policy.quantisation, key_bits=bits, value_bits=bits)
        return replace(self, policy=replace(self.policy, quantisation=quantisation))

    def build(
        self, shapes: Sequence[StoredShape], windows: Sequence[int], *, page_tokens: int, itemsize: int
    ) -> PolicyLayers:
        """Put the policy together for layers of these shapes and windows (0 is none), first to last.

        Args:
            page_tokens: uncompressed tokens of a page.
            itemsize: bytes of an uncompressed value.

        Raises:
            UnsupportedModelError: the layers can not be compressed; the message says why, as half a sentence.
        """
        from swarm.kvpolicy.layers import ModelShape, build_layers
        from swarm.kvpolicy.rules_hash import hash_rules

        if any(_numbers(shape) != _numbers(shapes[0]) for shape in shapes):
            raise UnsupportedModelError("its layers store tokens of different sizes")
        heads, key_dim, value_dim = _numbers(shapes[0])
        layers = tuple(range(self.first_layer, self.first_layer + len(shapes)))
        by_layer = {layer: window for layer, window in zip(layers, windows, strict=True) if window}
        shape = ModelShape(
            num_layers=self.num_layers, num_kv_heads=heads, key_dim=key_dim, value_dim=value_dim, windows=by_layer
        )
        try:
            settings = build_layers(self.policy, shape, self.calibration, layers)
        except (BadInputError, ValueError) as error:
            raise UnsupportedModelError(str(error)) from error
        footprint = Footprint.with_fitting_pages(
            self.policy,
            settings[layers[0]].curve,
            layers=layers,
            num_kv_heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            row_bytes=settings[layers[0]].codec.row_bytes,
            page_tokens=page_tokens,
            itemsize=itemsize,
            max_positions=self.max_positions,
            windows=by_layer,
        )
        return PolicyLayers(
            policy=self.policy,
            settings=tuple(settings[layer] for layer in layers),
            footprint=footprint,
            rules_hash=hash_rules(self.policy, self.calibration),
            row_values=footprint.page_bytes // (page_tokens * itemsize),
        )


def _numbers(shape: StoredShape) -> tuple[int, int, int]:
    return shape.num_kv_heads, shape.key_dim, shape.value_dim
