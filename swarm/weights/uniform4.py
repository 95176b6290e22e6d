"""Fits evenly spaced 4-bit codes to groups of weights, with the scale and the middle that err least.

Smallest-to-largest scaling leaves 7 to 20 % more error than the best fit. The fit tries a few widths, and from the
best of them alternates between rounding and least squares. On normally distributed weights the result errs less than
NF4 does in blocks of the same length, and on long-tailed ones (Student's t with 4 degrees) about as little.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["GroupedCodes", "fit_groups", "restore_groups"]

# Letters in shapes: N output features, G groups, L weights of a group.

_WIDTHS = (1.0, 0.93, 0.86, 0.79)
"""Of the codes' range, as shares of the distance from the smallest to the largest weight of a group."""
_NUM_REFINEMENTS = 4
_MIDDLE = 8
"""The code that stands for the group's middle: torch's kernels compute (code - 8) * scale + middle."""
_MAX_CODE = 15
_TINY = torch.finfo(torch.float32).tiny
_SLICE_WEIGHTS = 1 << 18
"""Weights fitted at a time: their intermediate values stay in a processor's cache, and little memory is needed."""


class GroupedCodes(NamedTuple):
    """Weights as (code - 8) * scale + middle."""

    codes: torch.Tensor
    """[N, G, L] uint8, 0 to 15."""
    scales: torch.Tensor
    """[N, G] bfloat16."""
    middles: torch.Tensor
    """[N, G] bfloat16."""


def fit_groups(weight: torch.Tensor, group_length: int) -> GroupedCodes:
    """Codes for `weight` [N, G * L], any float dtype; scales and middles are fitted as rounded to bf16."""
    num_rows, num_columns = weight.shape
    num_groups = num_columns // group_length
    grouped = weight.reshape(num_rows * num_groups, group_length)
    codes = torch.empty(grouped.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(grouped), dtype=torch.bfloat16, device=weight.device)
    middles = torch.empty_like(scales)
    step = max(_SLICE_WEIGHTS // group_length, 1)
    for start in range(0, len(grouped), step):
        part = slice(start, start + step)
        codes[part], scales[part], middles[part] = _fit(grouped[part].float())
    return GroupedCodes(
        codes.view(num_rows, num_groups, group_length),
        scales.view(num_rows, num_groups),
        middles.view(num_rows, num_groups),
    )


def restore_groups(fitted: GroupedCodes) -> torch.Tensor:
    """The weights [N, G * L] that the codes stand for, fp32."""
    steps = fitted.codes.float() - _MIDDLE
    values = steps * fitted.scales.float()[..., None] + fitted.middles.float()[..., None]
    return values.flatten(1)


def _fit(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [G, L], scales [G] and middles [G] of groups [G, L] fp32."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    centre, half_width = (low + high) / 2, (high - low) / 2
    least_error = torch.full_like(centre, torch.inf)
    scale, base = half_width, centre
    for width in _WIDTHS:
        new_scale = (half_width * (2 * width / _MAX_CODE)).clamp_min_(_TINY)
        new_base = centre - half_width * width
        difference = _round(groups, new_scale, new_base).mul_(new_scale).add_(new_base).sub_(groups)
        error = torch.linalg.vecdot(difference, difference)[:, None]
        is_better = error < least_error
        least_error = torch.where(is_better, error, least_error)
        scale, base = torch.where(is_better, new_scale, scale), torch.where(is_better, new_base, base)
    mean = groups.mean(1, keepdim=True)
    for _ in range(_NUM_REFINEMENTS):
        scale, base = _least_squares(groups, mean, _round(groups, scale, base), scale)
    # As the kernels will see them; the codes are rounded to fit that.
    middle, scale = (base + _MIDDLE * scale).bfloat16(), scale.bfloat16()
    codes = _round(groups, scale.float(), middle.float() - _MIDDLE * scale.float())
    return codes.to(torch.uint8), scale.squeeze(1), middle.squeeze(1)


def _round(groups: torch.Tensor, scale: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    # A scale may round to zero where all weights of a group are equal: any code will do then.
    return torch.sub(groups, base).mul_(1 / scale.clamp_min(_TINY)).round_().clamp_(0, _MAX_CODE)


def _least_squares(
    groups: torch.Tensor, mean: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, and value of code 0, with the least squared error for these codes; the old scale if all are one code."""
    mean_code = codes.mean(1, keepdim=True)
    spread = codes.sub_(mean_code)
    variance = torch.linalg.vecdot(spread, spread)[:, None]
    slope = torch.linalg.vecdot(spread, groups)[:, None] / variance.clamp_min(_TINY)
    scale = torch.where((variance > 0) & (slope > 0), slope, scale)
    return scale, mean - mean_code * scale
