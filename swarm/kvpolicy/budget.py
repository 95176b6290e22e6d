"""How many tokens each layer and KV head keeps: a curve that belongs to the model, times the context's length."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.kvpolicy.settings import KVPolicy, PruningSettings

__all__ = [
    "BudgetCurve",
    "count_kept",
    "count_recent",
    "default_curve",
    "linear_curve",
    "pyramidinfer_curve",
    "uniform_curve",
]


_MAX_RECENT: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class BudgetCurve:
    """Share of its tokens that each (layer, KV head) keeps, at several mean shares of the whole model."""

    ratios: tuple[float, ...]
    """Mean shares, ascending, in (0, 1]."""
    shares: tuple[tuple[tuple[float, ...], ...], ...]
    """[layers of the whole model][KV heads][ratios], each in [0, 1], ascending along the last axis."""
    recent: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    """Of the same shape, newest tokens that are never dropped; None leaves that to the policy."""

    def __post_init__(self) -> None:
        if not self.ratios or any(a >= b for a, b in zip(self.ratios, self.ratios[1:], strict=False)):
            raise BadInputError("a budget curve needs ratios that rise; measure it again with `swarm calibrate`")
        if not self.shares or not self.shares[0] or any(len(heads) != len(self.shares[0]) for heads in self.shares):
            raise BadInputError(
                "a budget curve needs the same KV heads, one or more, for every layer;"
                " measure it again with `swarm calibrate`"
            )
        for heads in self.shares:
            for row in heads:
                if len(row) != len(self.ratios) or not all(0 <= share <= 1 for share in row):
                    raise BadInputError(
                        "a budget curve needs one share from 0 to 1 for every ratio;"
                        " measure it again with `swarm calibrate`"
                    )
        if self.recent is not None and not self._fits(self.recent):
            raise BadInputError(
                "a budget curve needs a count of recent tokens, 0 or more, for every share;"
                " measure it again with `swarm calibrate`"
            )

    def _fits(self, recent: Sequence[Sequence[Sequence[int]]]) -> bool:
        lengths = [[len(row) for row in heads] for heads in recent]
        is_valid = all(0 <= count <= _MAX_RECENT for heads in recent for row in heads for count in row)
        return is_valid and lengths == [[len(row) for row in heads] for heads in self.shares]

    @property
    def num_layers(self) -> int:
        return len(self.shares)

    def share(self, layer: int, head: int, ratio: float) -> float:
        """Share that a KV head of an absolute layer keeps where the model's mean is `ratio`: linear in between."""
        return self._look_up((0.0, *self.shares[layer][head], 1.0), ratio)

    def num_recent(self, layer: int, head: int, ratio: float) -> int | None:
        """Newest tokens that such a head never drops; None where the policy says how many."""
        if self.recent is None:
            return None
        row = self.recent[layer][head]
        return int(self._look_up((row[0], *row, row[-1]), ratio))

    def _look_up(self, row: Sequence[float], ratio: float) -> float:
        """Of numbers at ratio 0, at every ratio of the curve, and at 1."""
        places = (0.0, *self.ratios, 1.0)
        above = bisect.bisect_left(self.ratios, ratio) + 1
        if above <= len(self.ratios) and places[above] == ratio:
            return row[above]
        low, high = row[above - 1], row[above]
        return low + (high - low) * (ratio - places[above - 1]) / (places[above] - places[above - 1])


def count_kept(policy: KVPolicy, curve: BudgetCurve, layer: int, head: int, num_tokens: int) -> int:
    """Tokens that a KV head keeps of the `num_tokens` between the sinks and the tail.

    Needs nothing but the absolute layer, so a layer keeps the same whoever holds it. Whole blocks, so that pages
    are full; `num_tokens` is a whole number of blocks as well.
    """
    pruning = policy.pruning
    if pruning is None:
        return num_tokens
    wanted = curve.share(layer, head, _mean_share(pruning, num_tokens)) * num_tokens
    blocks = math.floor(wanted / policy.block_tokens + 0.5)
    recent = count_recent(pruning, curve, layer, head, num_tokens) - policy.tail_tokens
    blocks = max(blocks, math.ceil(max(recent, 0) / policy.block_tokens))
    return min(num_tokens, blocks * policy.block_tokens)


def count_recent(pruning: PruningSettings, curve: BudgetCurve, layer: int, head: int, num_tokens: int) -> int:
    """Newest positions, of a context of `num_tokens`, that a KV head never drops."""
    measured = curve.num_recent(layer, head, _mean_share(pruning, num_tokens))
    return pruning.num_recent(num_tokens) if measured is None else measured


def _mean_share(pruning: PruningSettings, num_tokens: int) -> float:
    return min(1.0, pruning.keep_ratio + pruning.extra_tokens / max(num_tokens, 1))


def default_curve(num_layers: int, num_kv_heads: int) -> BudgetCurve:
    """For a model that was never measured: falls gently with depth, alike for all heads of a layer."""
    return linear_curve(num_layers, num_kv_heads, slope=0.25)


def uniform_curve(num_layers: int, num_kv_heads: int) -> BudgetCurve:
    """The same for everybody."""
    return linear_curve(num_layers, num_kv_heads, slope=0.0)


def linear_curve(num_layers: int, num_kv_heads: int, *, slope: float) -> BudgetCurve:
    """Budgets that fall linearly from (1 + slope) to (1 - slope) times the mean."""
    ratios = tuple(step / 20 for step in range(1, 21))
    weights = [1 + slope * (1 - 2 * layer / max(num_layers - 1, 1)) for layer in range(num_layers)]
    by_ratio = [_fill([weight * ratio for weight in weights], ratio) for ratio in ratios]
    return _same_for_heads(ratios, by_ratio, num_kv_heads)


def pyramidinfer_curve(num_layers: int, num_kv_heads: int, *, floor: float, recent_share: float) -> BudgetCurve:
    """PyramidInfer's published cosine schedule (arXiv 2405.12532): one fixed shape, so its own mean is its one ratio.

    Each layer passes on the share floor + (1 - floor)(1 + cos(pi i / L)) / 2 of the context before the recent part.
    """
    context, shares = 1.0, []
    for layer in range(num_layers):
        shares.append(recent_share + (1 - recent_share) * context)
        context *= floor + (1 - floor) * (1 + math.cos(math.pi * layer / num_layers)) / 2
    return _same_for_heads((sum(shares) / num_layers,), [shares], num_kv_heads)


def _fill(shares: Sequence[float], ratio: float) -> list[float]:
    """Shares of at most 1 with mean `ratio`: what full layers can not take goes to the others."""
    filled = [min(share, 1.0) for share in shares]
    for _ in range(len(filled)):
        lacking = ratio * len(filled) - sum(filled)
        open_layers = [index for index, share in enumerate(filled) if share < 1.0]
        if lacking < 1e-12 or not open_layers:
            break
        for index in open_layers:
            filled[index] = min(1.0, filled[index] + lacking / len(open_layers))
    return filled


def _same_for_heads(ratios: tuple[float, ...], by_ratio: Sequence[Sequence[float]], num_kv_heads: int) -> BudgetCurve:
    num_layers = len(by_ratio[0])
    shares = tuple(
        (tuple(by_ratio[step][layer] for step in range(len(ratios))),) * num_kv_heads for layer in range(num_layers)
    )
    return BudgetCurve(ratios=ratios, shares=shares)
