"""What attention needs to know of each layer's codec, as tensors on the server's device."""

# Letters: R rows, Hk KV heads, D, Dv key and value dimensions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swarm.kvpolicy.row_codecs import Axes, RawCodec, TokenCodec

if TYPE_CHECKING:
    from swarm.kvpolicy.layer_settings import LayerSettings
    from swarm.kvpolicy.row_codecs import RowCodec

__all__ = ["CodedLayer", "code_layers"]


@dataclass(frozen=True, kw_only=True)
class CodedLayer:
    """One layer's codec, turned into products with queries and outputs."""

    codec: RowCodec
    query_turn: torch.Tensor
    """float32 [Hk, D, D + 1]: a query to code coordinates, and what the mean key adds to all its scores."""
    output_turn: torch.Tensor
    """float32 [Hk, Dv + 1, Dv]: back from weighted sums of code coordinates and the sum of the weights."""

    def decode_coordinates(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 key and value coordinates, [R, D] and [R, Dv], of rows [R, row_bytes] of any heads."""
        if isinstance(self.codec, TokenCodec):
            return self.codec.decode_coordinates(rows)
        return self.codec.decode(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device))


def code_layers(settings: Sequence[LayerSettings], device: torch.device) -> list[CodedLayer]:
    """One for each layer."""
    return [_code_layer(layer.codec, layer.num_kv_heads, device) for layer in settings]


def _code_layer(codec: RowCodec, num_heads: int, device: torch.device) -> CodedLayer:
    if isinstance(codec, TokenCodec):
        keys, values = codec.keys, codec.values
    elif isinstance(codec, RawCodec):
        keys, values = _same(num_heads, codec.key_dim), _same(num_heads, codec.value_dim)
    else:
        raise TypeError(f"attention knows no rows of {type(codec).__name__}")
    return CodedLayer(
        codec=codec,
        query_turn=torch.cat((keys.decode.transpose(1, 2), keys.mean[:, :, None]), dim=2).to(device).contiguous(),
        output_turn=torch.cat((values.decode, values.mean[:, None]), dim=1).to(device).contiguous(),
    )


def _same(num_heads: int, dim: int) -> Axes:
    """Coordinates that are the numbers themselves."""
    unit = torch.eye(dim).expand(num_heads, dim, dim)
    return Axes(mean=torch.zeros(num_heads, dim), encode=unit, decode=unit)
