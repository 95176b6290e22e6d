"""GEAR and KIVI as published, to compare with: 16-bit groups of codes, low-rank and sparse terms, a 16-bit buffer.

Arithmetic and bytes are those of the papers (KIVI 2402.02750, GEAR 2403.05527); nothing is packed, as no server uses
this. The codes can also be those of swarm.kvpolicy.row_codecs, to see what the other terms add to them.
"""

# Letters: Hk KV heads, n tokens of a block, t new tokens, D, Dv head dimensions, g tokens or numbers of a group.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from swarm.kvpolicy.reference_model import AttentionCall, attend_causally
from swarm.kvpolicy.row_codecs import RowCodec

__all__ = ["GearCache", "GearSettings"]

_POWER_ITERATIONS: Final = 3
_TABLE_ENTRY_BYTES: Final = 4
_OUTLIER_BYTES: Final = 4
"""A 16-bit number and a 16-bit place."""


@dataclass(frozen=True, kw_only=True)
class GearSettings:
    """One of the published combinations."""

    bits: float
    """Of one number; whole where groups are coded, any where the codes are ours."""
    has_groups: bool = True
    """Groups as in KIVI (keys by channel, values by token); else rows as swarm.kvpolicy.row_codecs makes them."""
    group_size: int = 64
    prefill_rank: int = 0
    """Of the low-rank term of what a prompt leaves; 0 for none."""
    block_rank: int = 0
    """Likewise, of every later block."""
    outlier_share: float = 0.0
    """Numbers of a key channel, and of a token's values, that are kept in 16 bit."""
    buffer_tokens: int = 64
    """Newest tokens in 16 bit; compressed together when they are that many."""
    num_sinks: int = 0
    """First positions that stay in 16 bit; our codes do not fit them."""


@dataclass
class _Layer:
    keys: torch.Tensor
    """[Hk, n, D] as they are read: decoded, then the buffer."""
    values: torch.Tensor
    num_coded: int = 0
    """Tokens that are no longer in the buffer, sinks among them."""
    coded_bytes: int = 0
    codec: RowCodec | None = field(default=None, repr=False)


class GearCache:
    """One sequence under published settings."""

    def __init__(self, settings: GearSettings, codecs: Mapping[int, RowCodec] | None = None) -> None:
        """`codecs` by absolute layer where `settings` has no groups."""
        self._settings = settings
        self._codecs = codecs or {}
        self._layers: dict[int, _Layer] = {}
        self.stream_lengths: list[int] = []
        """Empty: all tokens go through all layers."""

    def take_prompt(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys [Hk, n, D] and values [Hk, n, Dv] of a prompt that was attended in full, compressed in one block."""
        own = _Layer(keys.half().float(), values.half().float(), codec=self._codecs.get(layer))
        self._layers[layer] = own
        own.num_coded = self._settings.num_sinks
        whole = (keys.shape[1] - own.num_coded) // self._settings.buffer_tokens * self._settings.buffer_tokens
        self._compress(own, whole, self._settings.prefill_rank)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Append new tokens, attend from them, and compress what fills a block: outputs [Hq, t, Dv]."""
        own = self._layers[call.layer]
        own.keys = torch.cat((own.keys, call.keys.half().float()), dim=1)
        own.values = torch.cat((own.values, call.values.half().float()), dim=1)
        output = attend_causally(call, own.keys, own.values)
        while own.keys.shape[1] - own.num_coded >= self._settings.buffer_tokens:
            self._compress(own, self._settings.buffer_tokens, self._settings.block_rank)
        return output

    def keys_of(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys [n, D], values [n, Dv], positions [n] and score biases [n] of a head."""
        own = self._layers[layer]
        num_tokens = own.keys.shape[1]
        return own.keys[head], own.values[head], torch.arange(num_tokens), torch.zeros(num_tokens)

    def count_bytes(self) -> int:
        """Bytes held: codes, scales, factors, outliers, four of page table a block, and the buffer."""
        total = 0
        for own in self._layers.values():
            buffered = own.keys.shape[1] - own.num_coded + self._settings.num_sinks
            width = len(own.keys) * (own.keys.shape[2] + own.values.shape[2])
            total += own.coded_bytes + 2 * width * buffered
        return total

    def _compress(self, own: _Layer, num_tokens: int, rank: int) -> None:
        """The next `num_tokens` of the buffer, as one block."""
        if num_tokens == 0:
            return
        first, end = own.num_coded, own.num_coded + num_tokens
        keys, values = own.keys[:, first:end], own.values[:, first:end]
        key_outliers = _find_outliers(keys, self._settings.outlier_share, dim=1)
        # A token's values are one vector over all heads.
        value_outliers = _find_outliers(_join_heads(values), self._settings.outlier_share, dim=1)
        value_outliers = _split_heads(value_outliers, len(values))
        plain_keys = _fill_with_mean(keys, key_outliers, dim=1)
        plain_values = _fill_with_mean(values, value_outliers, dim=2)
        if own.codec is not None:
            coded_keys, coded_values = _through_codec(own.codec, plain_keys, plain_values)
            own.coded_bytes += len(keys) * num_tokens * own.codec.row_bytes
        else:
            bits, size = int(self._settings.bits), self._settings.group_size
            coded_keys, key_bytes = _round_groups(plain_keys.transpose(1, 2), bits, size)
            coded_keys = coded_keys.transpose(1, 2)
            coded_values, value_bytes = _round_groups(plain_values, bits, size)
            own.coded_bytes += key_bytes + value_bytes
        for plain, coded in ((plain_keys, coded_keys), (plain_values, coded_values)):
            if rank:
                low_rank, num_bytes = _approximate(plain - coded, rank)
                coded += low_rank
                own.coded_bytes += num_bytes
        own.keys[:, first:end] = torch.where(key_outliers, keys, coded_keys)
        own.values[:, first:end] = torch.where(value_outliers, values, coded_values)
        own.coded_bytes += _OUTLIER_BYTES * int(key_outliers.sum() + value_outliers.sum())
        own.coded_bytes += _TABLE_ENTRY_BYTES * (num_tokens // self._settings.buffer_tokens) * len(keys)
        own.num_coded = end


def _join_heads(numbers: torch.Tensor) -> torch.Tensor:
    """[Hk, n, Dv] to [n, Hk * Dv]."""
    return numbers.transpose(0, 1).reshape(numbers.shape[1], -1)


def _split_heads(numbers: torch.Tensor, num_heads: int) -> torch.Tensor:
    return numbers.reshape(len(numbers), num_heads, -1).transpose(0, 1)


def _find_outliers(numbers: torch.Tensor, share: float, *, dim: int) -> torch.Tensor:
    """Bool like `numbers`: the largest and the smallest of every vector along `dim`, half the share each."""
    found = torch.zeros(numbers.shape, dtype=torch.bool)
    count = round(numbers.shape[dim] * share / 2)
    if count:
        for largest in (True, False):
            found.scatter_(dim, numbers.topk(count, dim=dim, largest=largest).indices, True)
    return found


def _fill_with_mean(numbers: torch.Tensor, outliers: torch.Tensor, *, dim: int) -> torch.Tensor:
    rest = (~outliers).sum(dim=dim, keepdim=True).clamp_min(1)
    mean = numbers.masked_fill(outliers, 0.0).sum(dim=dim, keepdim=True) / rest
    return torch.where(outliers, mean.expand_as(numbers), numbers)


def _round_groups(numbers: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, int]:
    """[.., m] rounded evenly between least and largest of every group along the last axis, and bytes."""
    length = numbers.shape[-1]
    size = min(size, length)
    groups = numbers.reshape(*numbers.shape[:-1], length // size, size)
    least = groups.amin(dim=-1, keepdim=True).half().float()
    step = ((groups.amax(dim=-1, keepdim=True) - least) / ((1 << bits) - 1)).half().float().clamp_min(1e-8)
    codes = ((groups - least) / step).round().clamp(0, (1 << bits) - 1)
    num_bytes = numbers.numel() * bits // 8 + 4 * least.numel()
    return (codes * step + least).reshape(numbers.shape), num_bytes


def _through_codec(codec: RowCodec, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_heads, num_tokens, _ = keys.shape
    heads = torch.arange(num_heads).repeat_interleave(num_tokens)
    rows = codec.encode(keys.flatten(0, 1), values.flatten(0, 1), heads)
    coded_keys, coded_values = codec.decode(rows, heads)
    return coded_keys.reshape(keys.shape), coded_values.reshape(values.shape)


def _approximate(residual: torch.Tensor, rank: int) -> tuple[torch.Tensor, int]:
    """The best product of 16-bit factors of that rank for every head of [Hk, n, D], by power iteration; and bytes."""
    num_heads, num_tokens, dim = residual.shape
    right = torch.randn(num_heads, dim, rank, generator=torch.Generator().manual_seed(rank))
    left = residual @ right
    for _ in range(_POWER_ITERATIONS):
        left = torch.linalg.qr(residual @ torch.linalg.qr(right).Q).Q
        right = residual.transpose(1, 2) @ left
    product = left.half().float() @ right.half().float().transpose(1, 2)
    return product, 2 * num_heads * rank * (num_tokens + dim)
