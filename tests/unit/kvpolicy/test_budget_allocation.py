"""Budgets go to whom they help most, and every head chooses its tokens in the way that was measured to suit it."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.kvpolicy.budget_allocation import allocate_budgets
from swarm.kvpolicy.loss_measure import KeepGrid

GRID = KeepGrid(weights=(0.0, 1.0), recent=(16, 64), shares=(0.0, 0.25, 0.5, 0.75), num_sinks=4, num_tail=16)
FALLING = np.array([1.0, 0.3, 0.1, 0.05])


def _losses(scale: np.ndarray) -> np.ndarray:
    """[L, Hk, W, R, S]: every head loses alike under every way, `scale` [L, Hk] times as much."""
    return np.broadcast_to(scale[:, :, None, None, None] * FALLING, (*scale.shape, 2, 2, 4)).copy()


def test_who_loses_more_gets_more_and_the_mean_is_kept() -> None:
    """Memory is promised by the mean, and spent where it counts."""
    curve, _ = allocate_budgets(GRID, _losses(np.array([[1.0, 8.0], [0.01, 1.0]])), (0.2, 0.5, 1.0), [False, False])
    for ratio in (0.2, 0.35, 0.5):
        shares = [[curve.share(layer, head, ratio) for head in range(2)] for layer in range(2)]
        assert np.mean(shares) == pytest.approx(ratio)
        assert shares[0][1] > shares[0][0] >= shares[1][1] >= shares[1][0]
    assert curve.share(1, 0, 1.0) == 1.0


def test_layers_with_a_window_take_no_part() -> None:
    """They drop by position alone; what others get must not depend on them."""
    curve, _ = allocate_budgets(GRID, _losses(np.array([[1.0], [0.0]])), (0.25,), [False, True])
    assert curve.share(0, 0, 0.25) == pytest.approx(0.25)
    assert curve.share(1, 0, 0.25) == 1.0


def test_each_head_has_the_weight_and_the_window_that_lose_least() -> None:
    """One head looks where it just looked, the other at what stands close by."""
    losses = _losses(np.ones((1, 2)))
    losses[0, 0, 1] /= 2
    losses[0, 1, :, 1] /= 2
    losses[0, 1, :, 1, 0] = np.inf
    curve, weights = allocate_budgets(GRID, losses, (0.3, 0.5), [False])
    assert weights.tolist() == [[1.0, 0.0]]
    assert curve.num_recent(0, 0, 0.4) == 16
    assert curve.num_recent(0, 1, 0.4) == 64


def test_a_window_without_room_is_not_chosen() -> None:
    """Its loss is not known there, and it would take the whole budget."""
    losses = _losses(np.array([[1.0, 100.0]]))
    losses[0, :, :, 1] /= 2
    losses[0, :, :, 1, :2] = np.inf
    curve, _ = allocate_budgets(GRID, losses, (0.1,), [False])
    assert curve.share(0, 0, 0.1) < 0.25
    assert curve.num_recent(0, 0, 0.1) == 16
