"""KV policies for contexts of a few hundred tokens."""

from __future__ import annotations

from dataclasses import replace

from swarm.kvpolicy.settings import PRESETS, KVPolicy

__all__ = ["small_policy"]


def small_policy(preset: str) -> KVPolicy:
    """A preset that drops and cuts within the few tokens of a test."""
    policy = PRESETS[preset]
    pruning = policy.pruning
    if pruning is not None:
        pruning = replace(pruning, keep_ratio=0.5, recent_tokens=16, extra_tokens=0)
    return replace(policy, pruning=pruning, chunk_tokens=128)
