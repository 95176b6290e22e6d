"""Servers that would read each other's codes wrongly must notice."""

from __future__ import annotations

from dataclasses import replace

import torch

from swarm.kvpolicy.budget import default_curve
from swarm.kvpolicy.calibration_file import Calibration
from swarm.kvpolicy.rules_hash import RULES_HASH_CHARS, hash_rules
from swarm.kvpolicy.settings import PRESETS, PruningSettings


def calibration(seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return Calibration(
        model_hash="ab" * 16,
        curve=default_curve(2, 1),
        key_sizes=(2.0, 1.0),
        value_sizes=(2.0, 1.0),
        scorer_weights=torch.randn(2, 5, 1, generator=generator).half(),
        received_mean=torch.zeros(2, 1),
        received_weight=torch.zeros(2, 1),
        key_mean=torch.zeros(2, 1, 2),
        key_axes=torch.eye(2).expand(2, 1, 2, 2).half(),
        value_mean=torch.zeros(2, 1, 2),
        value_axes=torch.eye(2).expand(2, 1, 2, 2).half(),
    )


def test_the_hash_is_the_same_for_the_same_rules() -> None:
    """Two machines that read the same file must agree."""
    policy = PRESETS["pyramid+gear"]
    assert hash_rules(policy, calibration()) == hash_rules(policy, calibration())
    assert len(hash_rules(policy, None)) == RULES_HASH_CHARS


def test_everything_that_matters_changes_the_hash() -> None:
    """A preset's name says nothing of a release that tuned it, or of a user who measured the model anew."""
    policy = PRESETS["pyramid+gear"]
    assert policy.pruning is not None
    measured = calibration()
    tuned = replace(policy, pruning=replace(policy.pruning, keep_ratio=0.25))
    hashes = {
        hash_rules(policy, measured),
        hash_rules(policy, None),
        hash_rules(tuned, measured),
        hash_rules(policy, replace(measured, received_weight=torch.ones(2, 1))),
        hash_rules(policy, replace(measured, curve=replace(measured.curve, recent=(((64,) * 20,),) * 2))),
        hash_rules(replace(policy, pruning=PruningSettings(keep_ratio=policy.pruning.keep_ratio)), measured),
        hash_rules(policy, calibration(seed=1)),
        hash_rules(policy, replace(measured, key_sizes=(2.0, 1.5))),
        hash_rules(policy, replace(measured, value_axes=measured.value_axes * 2)),
        hash_rules(policy, replace(measured, received_mean=torch.ones(2, 1))),
        *(hash_rules(other, measured) for other in PRESETS.values()),
    }
    assert len(hashes) == 8 + len(PRESETS)
