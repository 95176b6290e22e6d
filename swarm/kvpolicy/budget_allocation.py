"""Turns what was measured of every KV head into a budget curve: who keeps how much, and which of its tokens."""

# Letters: L layers, Hk KV heads, W weights, R recent windows, S shares of a KeepGrid.

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.kvpolicy.budget import BudgetCurve

if TYPE_CHECKING:
    from swarm.kvpolicy.loss_measure import KeepGrid

__all__ = ["allocate_budgets"]

_DECIDING_RATIO = 0.5
"""Up to this mean share weights are chosen: where nearly everything is kept all of them do."""


def allocate_budgets(
    grid: KeepGrid, losses: npt.NDArray[np.float64], ratios: Sequence[float], is_fixed: Sequence[bool]
) -> tuple[BudgetCurve, npt.NDArray[np.float64]]:
    """The curve with the least summed loss at every ratio, and the weight [L, Hk] that serves each head best.

    A head has one weight, since scores are remembered, and at every ratio the window that suits its share.

    Args:
        losses: [L, Hk, W, R, S], as swarm.kvpolicy.loss_measure gives them.
        ratios: means to write the curve down for, ascending.
        is_fixed: layers that take no part (sliding windows), by absolute index.
    """
    by_weight = losses.min(axis=3)
    shares = _share_out(grid.shares, by_weight.min(axis=2), ratios, is_fixed)
    picked = _pick_weights(grid.shares, by_weight, shares, ratios)
    by_window = np.take_along_axis(losses, picked[:, :, None, None, None], axis=2)[:, :, 0]
    shares = _share_out(grid.shares, by_window.min(axis=2), ratios, is_fixed)
    recent = np.full(shares.shape, grid.recent[0])
    for place in np.ndindex(shares.shape):
        layer, head, _ = place
        if not is_fixed[layer]:
            at_share = [_look_up(grid.shares, row, float(shares[place])) for row in by_window[layer, head]]
            recent[place] = grid.recent[int(np.argmin(at_share))]
    curve = BudgetCurve(
        ratios=tuple(ratios),
        shares=tuple(tuple(tuple(row) for row in heads) for heads in shares.tolist()),
        recent=tuple(tuple(tuple(row) for row in heads) for heads in recent.tolist()),
    )
    return curve, np.array(grid.weights)[picked]


def _pick_weights(
    shares: Sequence[float],
    losses: npt.NDArray[np.float64],
    budgets: npt.NDArray[np.float64],
    ratios: Sequence[float],
) -> npt.NDArray[np.int64]:
    """Which weight [L, Hk] loses least under budgets [L, Hk, ratios], losses being [L, Hk, W, S]."""
    num_layers, num_heads, num_weights, _ = losses.shape
    at_budget = np.zeros((num_layers, num_heads, num_weights, len(ratios)))
    for layer, head, weight, index in np.ndindex(at_budget.shape):
        row = losses[layer, head, weight]
        at_budget[layer, head, weight, index] = _look_up(shares, row, float(budgets[layer, head, index]))
    # Every ratio counts alike, although what is lost falls by orders of magnitude.
    whole = at_budget.min(axis=2).sum(axis=(0, 1))
    counts = np.array([ratio <= _DECIDING_RATIO for ratio in ratios]) / np.maximum(whole, 1e-12)
    return np.asarray((at_budget * counts).sum(axis=3).argmin(axis=2))


def _look_up(shares: Sequence[float], losses: npt.NDArray[np.float64], share: float) -> float:
    """A row of losses at a share, linear in between; nothing is lost where all is kept."""
    places = [*shares, 1.0]
    values: list[float] = [*losses.tolist(), 0.0]
    for (start, low), (end, high) in itertools.pairwise(zip(places, values, strict=True)):
        if start <= share < end:
            part = (share - start) / (end - start)
            return low if math.isinf(low) else low + (high - low) * part
    return values[0] if share < places[0] else 0.0


def _share_out(
    shares: Sequence[float], losses: npt.NDArray[np.float64], ratios: Sequence[float], is_fixed: Sequence[bool]
) -> npt.NDArray[np.float64]:
    """Budgets [L, Hk, ratios] for losses [L, Hk, S]: always the next share to whom it helps most.

    Losses are made convex first, so that going by the steepest step is best.
    """
    num_layers, num_heads, _ = losses.shape
    free = [(layer, head) for layer in range(num_layers) if not is_fixed[layer] for head in range(num_heads)]
    steps: list[tuple[float, int, int, float, float]] = []
    for layer, head in free:
        points = _convex(shares, losses[layer, head].tolist())
        steps += [
            ((low - high) / (end - start), layer, head, start, end)
            for (start, low), (end, high) in itertools.pairwise(points)
        ]
    # Ties to the earlier layer: the same curve on every machine.
    steps.sort(key=lambda step: (-step[0], *step[1:]))
    budgets = np.ones((num_layers, num_heads, len(ratios)))
    for index, ratio in enumerate(ratios):
        for (layer, head), share in _fill(free, steps, ratio, least=min(shares[0], ratio)).items():
            budgets[layer, head, index] = share
    return budgets


def _fill(
    free: Sequence[tuple[int, int]],
    steps: Sequence[tuple[float, int, int, float, float]],
    ratio: float,
    *,
    least: float,
) -> dict[tuple[int, int], float]:
    budgets = dict.fromkeys(free, least)
    left = ratio * len(free) - least * len(free)
    for _, layer, head, start, end in steps:
        if left <= 0:
            break
        extra = min(end - max(start, budgets[layer, head]), left)
        if extra > 0:
            budgets[layer, head] += extra
            left -= extra
    return {place: min(share, 1.0) for place, share in budgets.items()}


def _convex(shares: Sequence[float], losses: Sequence[float]) -> list[tuple[float, float]]:
    """The lower convex hull of (share, loss), falling, ending at (1, 0)."""
    points: list[tuple[float, float]] = []
    lowest = math.inf
    for share, loss in [*zip(shares, losses, strict=True), (1.0, 0.0)]:
        lowest = min(lowest, loss)
        while len(points) >= 2 and _slope(points[-2], points[-1]) >= _slope(points[-1], (share, lowest)):
            points.pop()
        points.append((share, lowest))
    return points


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
