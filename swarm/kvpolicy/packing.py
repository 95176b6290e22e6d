"""Packs small unsigned codes of mixed widths into rows of bytes, and back, with whole-tensor shifts and masks."""

# Letters: R rows (tokens of one KV head), D numbers of a row.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["BitLayout"]

_PLANE_WIDTHS = (8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class _Plane:
    """Bits [shift, shift + width) of the first `count` codes."""

    width: int
    shift: int
    first: int
    end: int

    @property
    def num_bytes(self) -> int:
        return (self.end - self.first) * self.width // 8


class BitLayout:
    """How many bits each number of a row takes: widths fall along the row, 0 at its end for numbers left out.

    A width is stored as planes of 8, 4, 2 and 1 bits, each plane whole bytes, so that unpacking is a few
    shifts and masks over contiguous bytes whatever the mix.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        """Raises ValueError when widths rise, leave 0..8, or a plane is no whole number of bytes."""
        self.widths = tuple(widths)
        if any(not 0 <= width <= 8 for width in self.widths) or list(self.widths) != sorted(self.widths, reverse=True):
            raise ValueError(f"widths are {self.widths}; give 0 to 8 bits each, never rising")
        self._planes = self._find_planes()
        for plane in self._planes:
            if (plane.end - plane.first) * plane.width % 8:
                raise ValueError(f"{plane.end - plane.first} numbers of {plane.width} bits fill no whole bytes")
        self.num_bytes = sum(plane.num_bytes for plane in self._planes)

    @classmethod
    def of_groups(cls, dim: int, groups: Sequence[tuple[int, int]]) -> BitLayout:
        """From (numbers, bits) pairs; what they do not reach of `dim` numbers takes 0 bits."""
        widths = [width for count, width in groups for _ in range(count)]
        return cls(widths + [0] * (dim - len(widths)))

    def _find_planes(self) -> list[_Plane]:
        planes: list[_Plane] = []
        first = 0
        while first < len(self.widths) and self.widths[first] > 0:
            end = first
            while end < len(self.widths) and self.widths[end] == self.widths[first]:
                end += 1
            shift = 0
            for width in _PLANE_WIDTHS:
                if self.widths[first] & width:
                    planes.append(_Plane(width, shift, first, end))
                    shift += width
            first = end
        return planes

    @property
    def dim(self) -> int:
        """Numbers of a row, those of width 0 included."""
        return len(self.widths)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [R, D] uint8, each below 2 ** its width, to [R, num_bytes] uint8."""
        parts = []
        for plane in self._planes:
            per_byte = 8 // plane.width
            values = (codes[:, plane.first : plane.end] >> plane.shift) & ((1 << plane.width) - 1)
            # The n-th part of a plane sits in the n-th bits of its bytes: unpacking concatenates, never interleaves.
            lanes = values.reshape(len(codes), per_byte, plane.num_bytes)
            packed = lanes[:, 0].clone()
            for lane in range(1, per_byte):
                packed |= lanes[:, lane] << (lane * plane.width)
            parts.append(packed)
        return torch.cat(parts, dim=1) if parts else codes.new_empty(len(codes), 0)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """The codes [R, D] uint8 of packed rows [R, num_bytes]; 0 where the width is 0."""
        codes = rows.new_empty(len(rows), self.dim)
        codes[:, len(self.widths) - self.widths.count(0) :] = 0
        start = 0
        for plane in self._planes:
            packed = rows[:, start : start + plane.num_bytes]
            start += plane.num_bytes
            mask = (1 << plane.width) - 1
            for lane in range(8 // plane.width):
                values = packed >> (lane * plane.width) if lane else packed
                if plane.width < 8:
                    values = values & mask
                first = plane.first + lane * plane.num_bytes
                target = codes[:, first : first + plane.num_bytes]
                if plane.shift:
                    target |= values << plane.shift
                else:
                    target.copy_(values)
        return codes
