"""Stores keys and values of single tokens in few bits, so that a token can be dropped or moved without touching others.

A head's numbers are first turned into coordinates in which every one has unit size and the first matter most; each
coordinate is then rounded to good levels for a normal distribution, in the bits its rank has. Where the model
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
        self.key_dim, self.value_dim = key_dim, value_dim
        self.row_bytes = 2 * (key_dim + value_dim)

    def encode(self, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """As RowCodec says."""
        return torch.cat((keys.half(), values.half()), dim=1).contiguous().view(torch.uint8)

    def decode(self, rows: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As RowCodec says."""
        keys = rows[:, : 2 * self.key_dim].contiguous().view(torch.float16).float()
        return keys, rows[:, 2 * self.key_dim :].contiguous().view(torch.float16).float()


class TokenCodec:
    """Rows of bytes for (key, value) pairs of one layer; a row is whole in itself.

    A row is [key codes | value codes | key scales | value scales]; a scale for what is stored in more than two bits
    and one for the rest, because tokens that matter most are unusual in few coordinates.
    """

    def __init__(self, keys: Axes, values: Axes, key_layout: BitLayout, value_layout: BitLayout) -> None:
        self.keys, self.values = keys, values
        self.key_layout, self.value_layout = key_layout, value_layout
        self._key_levels = _LevelTable(key_layout)
        self._value_levels = _LevelTable(value_layout)
        self.row_bytes = key_layout.num_bytes + value_layout.num_bytes + 2 * _SCALES_PER_VECTOR

    def encode(self, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """As RowCodec says."""
        return self.encode_coordinates(
            _to_coordinates(self.keys, keys, heads), _to_coordinates(self.values, values, heads)
        )

    def encode_coordinates(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Rows [R, row_bytes] of float32 coordinates [R, D] and [R, Dv], as `decode_coordinates` gives them."""
        key_codes, key_scales = _to_codes(self._key_levels, keys)
        value_codes, value_scales = _to_codes(self._value_levels, values)
        parts = (self.key_layout.pack(key_codes), self.value_layout.pack(value_codes), key_scales, value_scales)
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
        middle = self.key_layout.num_bytes
        end = middle + self.value_layout.num_bytes
        scales = _scale_values(rows[:, end:])
        keys = self._key_levels.look_up(self.key_layout.unpack(rows[:, :middle]))
        values = self._value_levels.look_up(self.value_layout.unpack(rows[:, middle:end]))
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
        sizes = [part.mean(dim=1) if part.shape[1] else part.new_ones(len(part)) for part in (fine, coarse)]
        return torch.stack(sizes, dim=1).sqrt()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales [R, 2] to [R, D], one for every coordinate."""
        num_coarse = self._num_coarse + self._num_none
        parts = (scales[:, :1].expand(-1, self._num_fine), scales[:, 1:].expand(-1, num_coarse))
        return torch.cat(parts, dim=1)

    def round(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Coordinates [R, D] to codes [R, D] uint8."""
        codes = torch.zeros(coordinates.shape, dtype=torch.uint8, device=coordinates.device)
        for width, first, end in self._runs:
            if width:
                levels = normal_levels(width).to(coordinates.device)
                borders = (levels[1:] + levels[:-1]) / 2
                codes[:, first:end] = _count_below(coordinates[:, first:end], borders)
        return codes

    def look_up(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [R, D] to float32 [R, D]."""
        values = torch.zeros(codes.shape, device=codes.device)
        for width, first, end in self._runs:
            if width:
                centred = codes[:, first:end].float() - ((1 << width) - 1) / 2
                values[:, first:end] = _evaluate(centred, width)
        return values


def _count_below(numbers: torch.Tensor, borders: torch.Tensor) -> torch.Tensor:
    """How many borders [b], ascending, lie below each of numbers [...]: uint8."""
    if len(borders) > 15:
        return torch.bucketize(numbers.contiguous(), borders).to(torch.uint8)
    counts = torch.zeros(numbers.shape, dtype=torch.uint8, device=numbers.device)
    for border in borders:  # few of them: whole vectors of numbers are compared, instead of searching one by one
        counts += numbers > border
    return counts


def _to_codes(levels: _LevelTable, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _scale_codes(levels.measure(coordinates))
    return levels.round(coordinates / levels.spread(_scale_values(scales))), scales


def _to_coordinates(axes: Axes, numbers: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    centred = numbers.float() - axes.mean[heads]
    coordinates = torch.zeros_like(centred)
    for head in range(len(axes.mean)):
        rows = heads == head
        coordinates[rows] = centred[rows] @ axes.encode[head]
    return coordinates


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


_LEVEL_POLYNOMIALS: Final[dict[int, tuple[float, ...]]] = {
    1: (1.59576911,),
    2: (0.892907971, 0.0506893533),
    3: (0.490332673, 0.00479890776, 0.000436853288),
    4: (0.262101753, 0.000153612421, 2.9307045e-05),
    5: (0.136239219, -5.36800055e-05, 1.44860608e-06),
    6: (0.0699295893, -1.46793236e-05, 6.03423624e-08),
    7: (0.0349881503, -2.62863739e-06, 2.33290455e-09),
    8: (0.0158190945, -4.71044254e-07, 9.3557107e-11),
}
"""By width: a level is t * (c0 + c1 t² + c2 t⁴) of the centred code t = code - (2 ** width - 1) / 2."""


def level_polynomial(width: int) -> tuple[float, ...]:
    """Coefficients c of a width's levels t * (c[0] + c[1] t² + ...), t the code less the middle of all codes.

    The polynomial with the least squared error for a standard normal, found by Lloyd's and Max's rounds; what it
    loses against free levels is 0.2 % of the error at 4 bit, nothing at 2. In return whole vectors of codes are
    decoded at once, where looking levels up goes one by one.
    """
    return _LEVEL_POLYNOMIALS[width]


@functools.cache
def normal_levels(width: int) -> torch.Tensor:
    """[2 ** width] float32, ascending: the levels of a width of 0 to 8 bits."""
    if width == 0:
        return torch.zeros(1)
    middle = ((1 << width) - 1) / 2
    codes = torch.arange(1 << width, dtype=torch.float64) - middle
    return _evaluate(codes, width).float()


def _evaluate(centred: torch.Tensor, width: int) -> torch.Tensor:
    """Levels of centred codes, in their dtype."""
    square = centred.square()
    coefficients = level_polynomial(width)
    value = torch.full_like(centred, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * square + coefficient
    return value * centred


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
