"""What one layer's cache is kept by."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.kvpolicy.budget import BudgetCurve
from swarm.kvpolicy.row_codecs import RowCodec
from swarm.kvpolicy.scorers import Scorer
from swarm.kvpolicy.settings import KVPolicy

__all__ = ["LayerSettings"]


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What a layer is and what it is kept by."""

    layer: int
    """Absolute."""
    policy: KVPolicy
    curve: BudgetCurve
    scorer: Scorer
    codec: RowCodec
    num_kv_heads: int
    window: int = 0
    """Positions a query sees, itself included; 0 for all. Such layers drop by position alone."""

    @property
    def judges(self) -> bool:
        """Whether what its newest queries attend to is looked at."""
        return self.policy.pruning is not None and not self.window and self.scorer.query_tokens > 0

    @property
    def has_summary(self) -> bool:
        """Whether each KV head keeps one entry for all it has dropped."""
        return self.policy.pruning is not None and self.policy.pruning.has_summary and not self.window
