"""Stores keys and values of single tokens in few bits, so that a token can be dropped or moved without touching others.

A head's numbers are first turned into coordinates in which every one has unit size and the first matter most; each
coordinate is then rounded to the best levels for a normal distribution, in the bits its rank has. Where the model
was calibrated, the coordinates are the principal axes of its keys as its own queries see them (an error along an
axis no query looks at is free), with the mean taken away; otherwise a Hadamard rotation, which makes all alike.

The coordinates need not be undone for attention: with k = y·B + m the scores are q·Bᵀ on one side and y on the
other, and q·m is the same for all keys. The same holds for values and the output.
"""

# Letters: R rows (tokens of KV heads), D head dimension, Hk KV heads.

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from swarm.kvpolicy.packing import BitLayout

__all__ = [
    "Axes",
    "RawCodec",
    "RowCodec",
    "TokenCodec",
    "hadamard_axes",
    "mix_equal_widths",
    "normal_levels",
    "plan_widths",
]

_SCALES_PER_VECTOR: Final = 2
_SCALE_STEPS: Final = 16
"""Steps of a scale per factor of two; the rounding costs nothing, as numbers are divided by the rounded scale."""
_SCALE_ZERO: Final = 160
"""Code of scale 1: room for 2**-10 below and 2**6 above."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Coordinates of one layer's keys or values: x = y @ decode + mean, y = (x - mean) @ encode; all float32."""

    mean: torch.Tensor
    """[Hk, D]"""
    encode: torch.Tensor
    """[Hk, D, D]"""
    decode: torch.Tensor
    """[Hk, D, D]"""


class RowCodec(Protocol):
    """Turns (key, value) pairs of one layer into rows of equal size, each whole in itself, so that rows can move."""

    row_bytes: int

    def encode(self, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Keys [R, D] and values [R, Dv] of KV heads [R] int64 to [R, row_bytes] uint8."""

    def decode(self, rows: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 keys [R, D] and values [R, Dv] of rows [R, row_bytes] of KV heads [R] int64."""


class RawCodec:
    """16 bit as they are, for policies that only drop."""

    def __init__(self, key_dim: int, value_dim: int) -> None:
        self._key_bytes = 2 * key_dim
        self.row_bytes = 2 * (key_dim + value_dim)

    def encode(self, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """As RowCodec says."""
        return torch.cat((keys.half(), values.half()), dim=1).contiguous().view(torch.uint8)

    def decode(self, rows: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As RowCodec says."""
        keys = rows[:, : self._key_bytes].contiguous().view(torch.float16).float()
        return keys, rows[:, self._key_bytes :].contiguous().view(torch.float16).float()


class TokenCodec:
    """Rows of bytes for (key, value) pairs of one layer; a row is whole in itself.

    A row is [key codes | value codes | key scales | value scales]; a scale for what is stored in more than two bits
    and one for the rest, because tokens that matter most are unusual in few coordinates.
    """

    def __init__(self, keys: Axes, values: Axes, key_layout: BitLayout, value_layout: BitLayout) -> None:
        self.keys, self.values = keys, values
        self._key_layout, self._value_layout = key_layout, value_layout
        self._key_levels = _LevelTable(key_layout)
        self._value_levels = _LevelTable(value_layout)
        self.row_bytes = key_layout.num_bytes + value_layout.num_bytes + 2 * _SCALES_PER_VECTOR

    def encode(self, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """As RowCodec says."""
        key_codes, key_scales = _to_codes(self.keys, self._key_levels, keys, heads)
        value_codes, value_scales = _to_codes(self.values, self._value_levels, values, heads)
        parts = (self._key_layout.pack(key_codes), self._value_layout.pack(value_codes), key_scales, value_scales)
        return torch.cat(parts, dim=1)

    def decode(self, rows: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As RowCodec says."""
        key_coordinates, value_coordinates = self.decode_coordinates(rows)
        return (
            _from_coordinates(self.keys, key_coordinates, heads),
            _from_coordinates(self.values, value_coordinates, heads),
        )

    def decode_coordinates(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same before `decode` and `mean` of the axes are applied; needs no head, so all heads at once."""
        middle = self._key_layout.num_bytes
        end = middle + self._value_layout.num_bytes
        scales = _scale_values(rows[:, end:])
        keys = self._key_levels.look_up(self._key_layout.unpack(rows[:, :middle]))
        values = self._value_levels.look_up(self._value_layout.unpack(rows[:, middle:end]))
        return (
            keys * self._key_levels.spread(scales[:, :_SCALES_PER_VECTOR]),
            values * self._value_levels.spread(scales[:, _SCALES_PER_VECTOR:]),
        )


class _LevelTable:
    """Levels of every coordinate, by its width, and which scale it has."""

    def __init__(self, layout: BitLayout) -> None:
        widths = layout.widths
        self._runs = [
            (width, widths.index(width), layout.dim - widths[::-1].index(width)) for width in sorted(set(widths))
        ]
        self._num_fine = sum(width > 2 for width in widths)
        self._num_coarse = sum(0 < width <= 2 for width in widths)
        self._num_none = layout.dim - self._num_fine - self._num_coarse

    def measure(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Root mean squares [R, 2] of the finely and the coarsely stored of coordinates [R, D]."""
        fine, coarse, _ = coordinates.square().split((self._num_fine, self._num_coarse, self._num_none), dim=1)
        sizes = [part.mean(dim=1) if part.shape[1] else torch.ones(len(part)) for part in (fine, coarse)]
        return torch.stack(sizes, dim=1).sqrt()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales [R, 2] to [R, D], one for every coordinate."""
        counts = torch.tensor([self._num_fine, self._num_coarse + self._num_none])
        return scales.repeat_interleave(counts, dim=1)

    def round(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Coordinates [R, D] to codes [R, D] uint8."""
        codes = torch.zeros(coordinates.shape, dtype=torch.uint8)
        for width, first, end in self._runs:
            if width:
                levels = normal_levels(width)
                borders = (levels[1:] + levels[:-1]) / 2
                codes[:, first:end] = torch.bucketize(coordinates[:, first:end].contiguous(), borders).to(torch.uint8)
        return codes

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [R, D] to float32 [R, D]."""
        values = torch.zeros(codes.shape)
        for width, first, end in self._runs:
            if width:
                values[:, first:end] = normal_levels(width)[codes[:, first:end].long()]
        return values


def _to_codes(
    axes: Axes, levels: _LevelTable, numbers: torch.Tensor, heads: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    centred = numbers.float() - axes.mean[heads]
    coordinates = torch.zeros_like(centred)
    for head in range(len(axes.mean)):
        rows = heads == head
        coordinates[rows] = centred[rows] @ axes.encode[head]
    scales = _scale_codes(levels.measure(coordinates))
    return levels.round(coordinates / levels.spread(_scale_values(scales))), scales


def _from_coordinates(axes: Axes, coordinates: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    numbers = torch.empty_like(coordinates)
    for head in range(len(axes.mean)):
        rows = heads == head
        numbers[rows] = coordinates[rows] @ axes.decode[head] + axes.mean[head]
    return numbers


def _scale_codes(scales: torch.Tensor) -> torch.Tensor:
    steps = torch.log2(scales.clamp_min(1e-6)) * _SCALE_STEPS + _SCALE_ZERO
    return steps.round().clamp(0, 255).to(torch.uint8)


def _scale_values(codes: torch.Tensor) -> torch.Tensor:
    return torch.exp2((codes.float() - _SCALE_ZERO) / _SCALE_STEPS)


@functools.cache
def normal_levels(width: int) -> torch.Tensor:
    """[2 ** width] float32, ascending: the levels with the least squared error for a standard normal (Lloyd, Max)."""
    if width == 0:
        return torch.zeros(1)
    count = 1 << width
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(200 if width <= 4 else 2000):
        borders = torch.cat(
            (
                torch.tensor([-math.inf], dtype=torch.float64),
                (levels[1:] + levels[:-1]) / 2,
                torch.tensor([math.inf], dtype=torch.float64),
            )
        )
        density = torch.exp(-0.5 * borders.square()) / math.sqrt(2 * math.pi)
        mass = normal.cdf(borders.clamp(-40, 40))
        levels = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    # Rounded, so that all machines hold the same levels whatever their mathematics libraries do.
    rounded: torch.Tensor = (levels * 4096).round().div(4096).float()
    return rounded


def hadamard_axes(num_kv_heads: int, dim: int) -> Axes:
    """For a model that was never measured: a rotation that spreads every number over all (blocks of 2 ** n)."""
    block = dim & -dim
    rotation = torch.ones(1, 1)
    while len(rotation) < block:
        rotation = torch.cat((torch.cat((rotation, rotation), 1), torch.cat((rotation, -rotation), 1)))
    rotation = torch.block_diag(*[rotation / math.sqrt(block)] * (dim // block))
    rotations = rotation.expand(num_kv_heads, dim, dim).contiguous()
    return Axes(mean=torch.zeros(num_kv_heads, dim), encode=rotations, decode=rotations.transpose(1, 2).contiguous())


def mix_equal_widths(axes: Axes, sizes: Sequence[float], widths: Sequence[int]) -> Axes:
    """The same space, with coordinates of one width turned into mixtures of all of them.

    Single axes have heavy tails: a token that is unusual along one would be cut off there, and such tokens are the
    ones that heads look for. A mixture is nearly normal, for which the levels are made.

    Args:
        sizes: variance of each coordinate as errors count, falling.
    """
    dim = len(widths)
    forward = torch.zeros(dim, dim, dtype=torch.float64)
    backward = torch.zeros(dim, dim, dtype=torch.float64)
    scale = torch.tensor(list(sizes), dtype=torch.float64).sqrt()
    for width in set(widths):
        first, end = widths.index(width), dim - list(widths)[::-1].index(width)
        part, rotation = scale[first:end], _dense_rotation(end - first)
        typical = part.square().mean().sqrt()
        forward[first:end, first:end] = part[:, None] * rotation / typical
        backward[first:end, first:end] = rotation.T * typical / part
    return Axes(
        mean=axes.mean,
        encode=(axes.encode.double() @ forward).float(),
        decode=(backward @ axes.decode.double()).float(),
    )


def _dense_rotation(size: int) -> torch.Tensor:
    """[size, size] float64: a cosine transform, whose rows all reach everywhere, after a fixed flip of signs."""
    index = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * (index + 0.5) * index[:, None] / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    signs = torch.tensor([1.0 if (7 * place * place + place) % 11 < 6 else -1.0 for place in range(size)])
    return rows * signs.double()


def plan_widths(sizes: Sequence[float], bits: float) -> list[int]:
    """Widths of 8, 4, 2 or 0 bits, falling, for coordinates of falling size (variance), `bits` on average or less.

    The mix with the least squared error among those whose planes are whole bytes.
    """
    dim = len(sizes)
    total = round(bits * dim)
    sums = [0.0]
    for size in sizes:
        sums.append(sums[-1] + size)
    best: tuple[float, list[int]] | None = None
    for num_8 in range(total // 8 + 1):
        for num_4 in range(0, (total - 8 * num_8) // 4 + 1, 2):
            num_2 = min((total - 8 * num_8 - 4 * num_4) // 2, dim - num_8 - num_4) // 4 * 4
            if num_2 < 0:
                continue
            borders = (0, num_8, num_8 + num_4, num_8 + num_4 + num_2, dim)
            widths = (8, 4, 2, 0)
            loss = sum(
                _error(width) * (sums[end] - sums[first])
                for width, first, end in zip(widths, borders, borders[1:], strict=False)
            )
            if best is None or loss < best[0]:
                counts = (end - first for first, end in itertools.pairwise(borders))
                best = loss, [width for width, count in zip(widths, counts, strict=True) for _ in range(count)]
    assert best is not None
    return best[1]


@functools.cache
def _error(width: int) -> float:
    """Mean squared error of a standard normal in `width` bits."""
    if width == 0:
        return 1.0
    levels = normal_levels(width).double()
    grid = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    weights = torch.exp(-0.5 * grid.square())
    nearest = levels[torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)]
    return float(((grid - nearest).square() * weights).sum() / weights.sum())
