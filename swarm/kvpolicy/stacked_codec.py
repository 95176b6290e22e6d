"""The row codecs of several layers as one, so that an event turns the rows of all their KV heads at once."""

# Letters: P (layer, KV head) pairs, n tokens of each, R rows, D, Dv head dimensions.

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.kvpolicy.row_codecs import Axes, RowCodec, TokenCodec

__all__ = ["StackedCodec"]


class StackedCodec:
    """Codecs of one kind and layout, one for each layer; pair p is KV head p % Hk of layer p // Hk."""

    def __init__(self, codecs: Sequence[RowCodec], *, device: torch.device | str) -> None:
        self._codec = codecs[0]
        self.row_bytes = self._codec.row_bytes
        self._keys: Axes | None = None
        self._values: Axes | None = None
        tokens = [codec for codec in codecs if isinstance(codec, TokenCodec)]
        if tokens:
            self._keys = _stack([codec.keys for codec in tokens], device)
            self._values = _stack([codec.values for codec in tokens], device)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, pairs: slice | torch.Tensor, is_wanted: torch.Tensor
    ) -> torch.Tensor:
        """Rows [R, row_bytes] uint8 of the wanted tokens, pair by pair.

        Args:
            keys: [P, n, D]
            values: [P, n, Dv]
            pairs: the P pairs' numbers; a slice where they follow one another, which spares copies.
            is_wanted: [P, n] bool
        """
        if isinstance(self._codec, TokenCodec) and self._keys is not None and self._values is not None:
            key_coordinates = _to_coordinates(self._keys, keys, pairs)[is_wanted]
            return self._codec.encode_coordinates(
                key_coordinates, _to_coordinates(self._values, values, pairs)[is_wanted]
            )
        keys, values = keys[is_wanted], values[is_wanted]
        return self._codec.encode(keys, values, torch.zeros(len(keys), dtype=torch.int64, device=keys.device))

    def decode(self, rows: torch.Tensor, pair: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 keys [R, D] and values [R, Dv] of rows of one pair."""
        if isinstance(self._codec, TokenCodec) and self._keys is not None and self._values is not None:
            keys, values = self._codec.decode_coordinates(rows)
            return (
                keys @ self._keys.decode[pair] + self._keys.mean[pair],
                values @ self._values.decode[pair] + self._values.mean[pair],
            )
        return self._codec.decode(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device))

    def add_up(
        self, rows: torch.Tensor, owners: torch.Tensor, pairs: slice | torch.Tensor, num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums, float32 [P, D] and [P, Dv], of the decoded rows of each pair.

        Args:
            rows: [R, row_bytes]
            owners: [R] int64, index into `pairs` of the pair that each row is of.
            pairs: the P pairs' numbers; a slice where they follow one another, which spares copies.
        """
        if isinstance(self._codec, TokenCodec) and self._keys is not None and self._values is not None:
            keys, values = self._codec.decode_coordinates(rows)
            counts = torch.bincount(owners, minlength=num_pairs).float()
            return (
                _sum_up(self._keys, keys, owners, pairs, counts),
                _sum_up(self._values, values, owners, pairs, counts),
            )
        keys, values = self._codec.decode(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
        return (
            keys.new_zeros(num_pairs, keys.shape[1]).index_add_(0, owners, keys),
            values.new_zeros(num_pairs, values.shape[1]).index_add_(0, owners, values),
        )


def _stack(axes: Sequence[Axes], device: torch.device | str) -> Axes:
    return Axes(
        mean=torch.cat([each.mean for each in axes]).to(device),
        encode=torch.cat([each.encode for each in axes]).to(device),
        decode=torch.cat([each.decode for each in axes]).to(device),
    )


def _to_coordinates(axes: Axes, numbers: torch.Tensor, pairs: slice | torch.Tensor) -> torch.Tensor:
    return torch.bmm(numbers.float() - axes.mean[pairs].unsqueeze(1), axes.encode[pairs])


def _sum_up(
    axes: Axes, coordinates: torch.Tensor, owners: torch.Tensor, pairs: slice | torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """The sum of decoded rows is the decoded sum, but for the means."""
    total = coordinates.new_zeros(len(counts), coordinates.shape[1]).index_add_(0, owners, coordinates)
    turned = torch.bmm(total.unsqueeze(1), axes.decode[pairs]).squeeze(1)
    return turned + counts.unsqueeze(1) * axes.mean[pairs]
