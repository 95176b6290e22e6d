"""Measures what a model needs of its KV cache: budgets per (layer, KV head), a scorer, axes of keys and values.

The model reads stretches of text, then reads each again while the first reading is its cache. How strongly the second
reading looks a token up is that token's importance to a head (KVzip, 2505.23416): what is needed to say the
text again serves any question about it. The scorer is a linear fit of the logarithm of importances to hidden states;
the axes are principal axes of keys weighted by the queries that meet them, and of values. Then every stretch is read
a third time, to measure what each head loses under that scorer: budgets, and how a head chooses, follow from that.
"""

# Letters: L layers, Hk KV heads, G = Hq / Hk, n tokens of a stretch, t of a part, D, Dv dimensions, E hidden size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from swarm.errors import BadInputError
from swarm.kvpolicy.budget import default_curve
from swarm.kvpolicy.budget_allocation import allocate_budgets
from swarm.kvpolicy.calibration_file import Calibration
from swarm.kvpolicy.loss_measure import KeepGrid, measure_losses
from swarm.kvpolicy.reference_model import AttentionCall, FullCache, ReferenceModel, attend_causally
from swarm.kvpolicy.scorers import BlendedScorer, NewTokens, attention_received

if TYPE_CHECKING:
    from swarm.models.progress import ProgressReporter

__all__ = ["GRID", "RATIOS", "CalibrationRun", "Stretch", "calibrate", "choose_stretches"]

RATIOS: Final = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Mean shares at which curves are written down."""
GRID: Final = KeepGrid(
    weights=(0.0, 0.2, 0.4, 0.8, 1.6),
    recent=(16, 32, 64, 96, 128, 192, 288),
    shares=(0.0, 0.015, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75),
    num_sinks=4,
    num_tail=16,
)
"""Ways of choosing tokens at which each head's loss is measured."""
_REPEATING_WEIGHT: Final = 6.0
"""What losses at repeating count beside losses at continuing: the one is rare, but all or nothing."""
_CONTINUED_TOKENS: Final = 128
_PART_TOKENS: Final = 512
_MIN_IMPORTANCE: Final = 1e-6
_NUM_SINKS: Final = GRID.num_sinks
_WINDOW: Final = 64
_RIDGE: Final = 0.1


class Stretch:
    """One piece of text, read twice."""

    def __init__(self, num_layers: int) -> None:
        self.hidden: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        """Parts [t, E] by layer"""
        self.queries: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        """Parts [Hq, t, D]"""
        self.cache = FullCache()
        self.importance: list[torch.Tensor] = []
        """[Hk, n] by layer: the largest weight that the second reading gives a token"""
        self.scaling: list[float] = [1.0] * num_layers


def read_twice(
    model: ReferenceModel, token_ids: Sequence[int], again: Sequence[int], report: ProgressReporter
) -> Stretch:
    """Run `token_ids`, then `again` + every part of them once more; progress is in tokens, twice their number."""
    num_layers = model.shape.num_layers
    stretch = Stretch(num_layers)

    def first_reading(call: AttentionCall) -> torch.Tensor:
        stretch.hidden[call.layer].append(call.hidden)
        stretch.queries[call.layer].append(call.queries)
        stretch.scaling[call.layer] = call.scaling
        return stretch.cache.attend(call)

    for start in range(0, len(token_ids), _PART_TOKENS):
        part = token_ids[start : start + _PART_TOKENS]
        model.run_hidden(part, start, first_reading)
        report.advance(len(part))
    num_tokens = len(token_ids)
    stretch.importance = [torch.zeros(model.shape.num_kv_heads, num_tokens) for _ in range(num_layers)]

    def second_reading(call: AttentionCall) -> torch.Tensor:
        keys = torch.cat((stretch.cache.keys[call.layer], call.keys), dim=1)
        values = torch.cat((stretch.cache.values[call.layer], call.values), dim=1)
        group = len(call.queries) // len(keys)
        for head in range(len(keys)):
            received = attention_received(
                call.queries[head * group : (head + 1) * group], keys[head], call.scaling, num_before=num_tokens
            )
            importance = stretch.importance[call.layer][head]
            torch.maximum(importance, received[:num_tokens], out=importance)
        return attend_causally(call, keys, values)

    for start in range(0, num_tokens, _PART_TOKENS):
        part = token_ids[start : start + _PART_TOKENS]
        model.run_hidden([*again, *part], num_tokens, second_reading)
        report.advance(len(part))
    return stretch


class CalibrationRun:
    """Sums over stretches; holds no text and no tokens."""

    def __init__(self, model: ReferenceModel) -> None:
        self._shape = model.shape
        num_layers = model.shape.num_layers
        self._normal: list[torch.Tensor | None] = [None] * num_layers
        self._targets: list[torch.Tensor] = [torch.zeros(())] * num_layers
        self._received = torch.zeros(num_layers, model.shape.num_kv_heads, dtype=torch.float64)
        self._key_moments = [_Moments(model.shape.num_kv_heads, model.shape.key_dim) for _ in range(num_layers)]
        self._value_moments = [_Moments(model.shape.num_kv_heads, model.shape.value_dim) for _ in range(num_layers)]
        self._query_moments = [_Moments(model.shape.num_kv_heads, model.shape.key_dim) for _ in range(num_layers)]
        self._num_stretches = 0

    def add(self, stretch: Stretch) -> None:
        """Take one stretch into account."""
        self._num_stretches += 1
        for layer in range(self._shape.num_layers):
            hidden = torch.cat(stretch.hidden[layer]).double()[_NUM_SINKS:]
            features = torch.cat((hidden, torch.ones(len(hidden), 1, dtype=torch.float64)), dim=1)
            targets = stretch.importance[layer][:, _NUM_SINKS:].clamp_min(_MIN_IMPORTANCE).log().double()
            normal, right = features.T @ features, features.T @ targets.T
            known = self._normal[layer]
            self._normal[layer] = normal if known is None else known + normal
            self._targets[layer] = self._targets[layer] + right
            self._add_moments(layer, stretch)

    def _add_moments(self, layer: int, stretch: Stretch) -> None:
        keys, values = stretch.cache.keys[layer], stretch.cache.values[layer]
        queries = torch.cat(stretch.queries[layer], dim=1)
        group = len(queries) // len(keys)
        self._key_moments[layer].add(keys[:, _NUM_SINKS:])
        self._value_moments[layer].add(values[:, _NUM_SINKS:])
        self._query_moments[layer].add(queries.reshape(len(keys), group * queries.shape[1], -1))
        for head in range(len(keys)):
            newest = queries[head * group : (head + 1) * group, -_WINDOW:]
            received = attention_received(
                newest, keys[head], stretch.scaling[layer], num_before=keys.shape[1] - newest.shape[1]
            )
            usual = received[_NUM_SINKS:-_WINDOW].clamp_min(_MIN_IMPORTANCE).log().mean()
            self._received[layer, head] += float(usual)

    def fit(self, model_hash: str) -> Calibration:
        """What two readings of the stretches say together; its curve and weights are still those of no model."""
        key_mean, key_axes, key_sizes = self._find_key_axes()
        value_mean, value_axes, value_sizes = self._find_value_axes()
        num_layers, num_heads = self._shape.num_layers, self._shape.num_kv_heads
        return Calibration(
            model_hash=model_hash,
            curve=default_curve(num_layers, num_heads),
            key_sizes=key_sizes,
            value_sizes=value_sizes,
            scorer_weights=torch.stack([self._fit(layer) for layer in range(num_layers)]).half(),
            received_mean=(self._received / self._num_stretches).float(),
            received_weight=torch.zeros(num_layers, num_heads),
            key_mean=key_mean,
            key_axes=key_axes,
            value_mean=value_mean,
            value_axes=value_axes,
        )

    def _fit(self, layer: int) -> torch.Tensor:
        """[E + 1, Hk]"""
        normal = self._normal[layer]
        assert normal is not None
        damped = normal + torch.diag(normal.diagonal() * _RIDGE)
        # The constant is no feature to shrink.
        damped[-1, -1] = normal[-1, -1]
        weights: torch.Tensor = torch.linalg.solve(damped, self._targets[layer])
        return weights

    def _find_key_axes(self) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        means, axes, sizes = [], [], []
        for keys, queries in zip(self._key_moments, self._query_moments, strict=True):
            weighting, inverse = _roots(queries.second())
            spread = weighting @ keys.covariance() @ weighting
            values, vectors = torch.linalg.eigh(spread)
            values, vectors = values.flip(-1).clamp_min(values.amax(-1, keepdim=True) * 1e-7), vectors.flip(-1)
            axes.append(values.sqrt().unsqueeze(-1) * vectors.transpose(1, 2) @ inverse)
            means.append(keys.mean())
            sizes.append(values)
        return torch.stack(means).float(), torch.stack(axes).half(), _typical(torch.stack(sizes))

    def _find_value_axes(self) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        means, axes, sizes = [], [], []
        for moments in self._value_moments:
            values, vectors = torch.linalg.eigh(moments.covariance())
            values, vectors = values.flip(-1).clamp_min(values.amax(-1, keepdim=True) * 1e-7), vectors.flip(-1)
            axes.append(values.sqrt().unsqueeze(-1) * vectors.transpose(1, 2))
            means.append(moments.mean())
            sizes.append(values)
        return torch.stack(means).float(), torch.stack(axes).half(), _typical(torch.stack(sizes))


class _Moments:
    """Sums of vectors and of their outer products, by head."""

    def __init__(self, num_heads: int, dim: int) -> None:
        self._count = 0
        self._sum = torch.zeros(num_heads, dim, dtype=torch.float64)
        self._products = torch.zeros(num_heads, dim, dim, dtype=torch.float64)

    def add(self, vectors: torch.Tensor) -> None:
        """[heads, n, dim]"""
        vectors = vectors.double()
        self._count += vectors.shape[1]
        self._sum += vectors.sum(dim=1)
        self._products += vectors.transpose(1, 2) @ vectors

    def mean(self) -> torch.Tensor:
        return self._sum / self._count

    def second(self) -> torch.Tensor:
        return self._products / self._count

    def covariance(self) -> torch.Tensor:
        mean = self.mean()
        covariance = self.second() - mean.unsqueeze(2) * mean.unsqueeze(1)
        # Room for text that is unlike the calibration's: no axis is believed to be empty.
        size = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
        return covariance + 1e-4 * size[:, None, None] * torch.eye(covariance.shape[-1], dtype=torch.float64)


def _roots(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots and inverse square roots of symmetric matrices [Hk, D, D], kept away from 0."""
    values, vectors = torch.linalg.eigh(matrices)
    values = values + 1e-4 * values.mean(dim=-1, keepdim=True)
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.transpose(1, 2)
    inverse = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.transpose(1, 2)
    return root, inverse


def _typical(sizes: torch.Tensor) -> list[float]:
    """[L, Hk, D] variances by rank to one list: geometric means of shares, as layers differ in scale."""
    shares = sizes / sizes.sum(dim=-1, keepdim=True)
    typical: list[float] = shares.log().mean(dim=(0, 1)).exp().tolist()
    return typical


def lose_heads(
    model: ReferenceModel, fitted: Calibration, token_ids: Sequence[int], again: Sequence[int], *, seed: int
) -> npt.NDArray[np.float64]:
    """Losses of GRID, [L, Hk, W, R, S], at the end of a stretch and at repeating a part of what came before."""
    num_continued = min(_CONTINUED_TOKENS, len(token_ids) // 4)
    num_context = len(token_ids) - num_continued
    context = FullCache()
    scorer = BlendedScorer(fitted)
    scores: list[torch.Tensor] = []

    def guess(call: AttentionCall) -> torch.Tensor:
        positions = torch.arange(len(call.hidden))  # which it does not look at
        return scorer.score_new(
            NewTokens(layer=call.layer, positions=positions, hidden=call.hidden, num_kv_heads=len(call.keys))
        )

    def read(call: AttentionCall) -> torch.Tensor:
        """Scores come as they would when the context has been read to its end."""
        output = context.attend(call)
        guesses = guess(call)
        keys = context.keys[call.layer]
        newest = call.queries[:, -scorer.query_tokens :].chunk(len(keys))
        looked_up = torch.stack(
            [
                scorer.correction(
                    call.layer,
                    head,
                    attention_received(queries, keys[head], call.scaling, num_before=num_context - queries.shape[1]),
                )
                for head, queries in enumerate(newest)
            ]
        )
        scores.append(torch.stack([guesses + weight * looked_up for weight in GRID.weights]))
        return output

    with torch.no_grad():
        model.run_hidden(token_ids[:num_context], 0, read)
    keys = [context.keys[layer] for layer in range(model.shape.num_layers)]
    values = [context.values[layer] for layer in range(model.shape.num_layers)]
    first = (num_context - num_continued) * (seed % 7) // 7
    readings = (
        (1.0, list(token_ids[num_context:]), 0),
        (_REPEATING_WEIGHT, [*again, *token_ids[first : first + num_continued]], len(again)),
    )
    total = torch.zeros(())
    for weight, reading, num_ignored in readings:
        losses = measure_losses(
            model, keys, values, scores, reading, GRID, score_new=guess, num_ignored=num_ignored, seed=seed
        )
        total = total + weight * losses
    return total.numpy()


def choose_stretches(token_ids: Sequence[int], *, num_stretches: int, stretch_tokens: int) -> list[list[int]]:
    """Stretches of equal length, spread evenly over a text.

    Raises:
        BadInputError: the text is too short for one.
    """
    if len(token_ids) < stretch_tokens:
        raise BadInputError(
            f"the text has {len(token_ids)} tokens; give at least {stretch_tokens}, better"
            f" {num_stretches * stretch_tokens}, or lower --stretch-tokens"
        )
    num_stretches = min(num_stretches, len(token_ids) // stretch_tokens)
    room = len(token_ids) - stretch_tokens
    starts = [round(room * index / max(num_stretches - 1, 1)) for index in range(num_stretches)]
    return [list(token_ids[start : start + stretch_tokens]) for start in starts]


def calibrate(
    model: ReferenceModel,
    stretches: Sequence[Sequence[int]],
    *,
    again: Sequence[int],
    model_hash: str,
    report: ProgressReporter,
) -> Calibration:
    """Read every stretch twice, measure what each head can do without, and sum up.

    Args:
        again: tokens that ask for the text to be repeated; any few will do.
    """
    if not stretches:
        raise BadInputError("there is no text to calibrate on; give a longer one")
    run = CalibrationRun(model)
    report.start("Calibrating", 3 * sum(map(len, stretches)), "tokens")
    for token_ids in stretches:
        with torch.no_grad():
            run.add(read_twice(model, token_ids, again, report))
    fitted = run.fit(model_hash)
    losses = np.zeros(())
    for seed, token_ids in enumerate(stretches):
        losses = losses + lose_heads(model, fitted, token_ids, again, seed=seed)
        report.advance(len(token_ids))
    is_fixed = [layer in model.shape.windows for layer in range(model.shape.num_layers)]
    curve, weights = allocate_budgets(GRID, losses / len(stretches), RATIOS, is_fixed)
    report.finish()
    return replace(fitted, curve=curve, received_weight=torch.from_numpy(weights).float())
