"""Fitted 4-bit codes err less than plain ones and than NF4."""

from __future__ import annotations

import pytest
import torch

from swarm.weights.uniform4 import fit_groups, restore_groups

_NEGATIVE = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
_POSITIVE = (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
NF4_LEVELS = torch.tensor([*_NEGATIVE, 0.0, *_POSITIVE])


def nf4_error(weight: torch.Tensor) -> float:
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / largest, (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    return relative_error((NF4_LEVELS[nearest] * largest).view_as(weight), weight)


def relative_error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("kind", ["normal", "long-tailed"])
def test_fitted_codes_are_no_worse_than_nf4(kind: str) -> None:
    """Why servers with these codes may announce nf4: no client gets less than NF4 would have given."""
    torch.manual_seed(0)
    if kind == "normal":
        weight = torch.randn(256, 1024) * 0.02
    else:
        weight = torch.distributions.StudentT(4.0).sample((256, 1024)) * 0.02
    assert relative_error(restore_groups(fit_groups(weight, 64)), weight) <= nf4_error(weight)


def test_weights_that_lie_on_a_grid_are_kept() -> None:
    """Models published in 4 bits and groups of 32 (GGUF's Q4_1, the demo model) lose almost nothing more."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 8, 32), generator=generator)
    codes[..., :2] = torch.tensor([0, 15])  # a publisher's grid spans the smallest to the largest weight
    scales = torch.rand(64, 8, 1, generator=generator) * 0.1 + 0.01
    weight = (codes * scales - 7.3 * scales).flatten(1)
    assert relative_error(restore_groups(fit_groups(weight, 32)), weight) < 5e-3


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Weights are fitted in slices; where a slice ends must not show."""
    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    together = restore_groups(fit_groups(weight, 64))
    assert torch.equal(together[256:], restore_groups(fit_groups(weight[256:], 64)))
