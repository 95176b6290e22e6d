"""Measures how much a model's next-token distribution suffers when one KV head keeps less, for all heads at once.

To second order, the divergence between the full model's distribution and the compressed one's is half the squared
product of the change in a head's attention output with the gradient of the log-probability of a sampled token. One
backward pass gives the gradients of all heads; the changes are computed head by head, without running the model.
"""

# Letters: Hq query heads, Hk KV heads, G = Hq / Hk, n context tokens, t tokens after it, D, Dv dimensions.

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from swarm.kvpolicy.budget import BudgetCurve
from swarm.kvpolicy.reference_cache import attend_over
from swarm.kvpolicy.reference_model import AttentionCall, ReferenceModel, attend_causally

__all__ = ["HeadLosses", "allocate_budgets", "measure_losses"]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    call: AttentionCall
    output: torch.Tensor
    """[Hq, t, Dv], with a gradient after the backward pass."""


@dataclass(frozen=True, kw_only=True)
class HeadLosses:
    """Divergence in nats a token that each (layer, KV head) would cause alone."""

    shares: tuple[float, ...]
    """Ascending shares of the context that are kept."""
    losses: torch.Tensor
    """[layers, Hk, shares] float64"""


def measure_losses(
    model: ReferenceModel,
    context_keys: Sequence[torch.Tensor],
    context_values: Sequence[torch.Tensor],
    rankings: Sequence[torch.Tensor],
    token_ids: Sequence[int],
    *,
    num_ignored: int,
    shares: tuple[float, ...],
    num_sinks: int,
    num_recent: int,
    seed: int,
) -> HeadLosses:
    """What dropping does to `token_ids` that follow a context.

    Args:
        context_keys: [Hk, n, D] by layer, rotated.
        context_values: [Hk, n, Dv] by layer.
        rankings: [Hk, n] by layer, importance by which tokens are kept; a summary stands for the rest.
        num_ignored: first tokens whose predictions do not count.
        num_recent: newest context tokens, always kept.
        seed: of the sampled tokens.
    """
    recorded: dict[int, _Recorded] = {}
    num_context = context_keys[0].shape[1]

    def attend(call: AttentionCall) -> torch.Tensor:
        keys = torch.cat((context_keys[call.layer], call.keys), dim=1)
        values = torch.cat((context_values[call.layer], call.values), dim=1)
        output = attend_causally(call, keys, values)
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        recorded[call.layer] = _Recorded(call=call, output=output)
        return output

    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        log_probabilities = model.run(token_ids, num_context, attend).log_softmax(dim=-1)[num_ignored:]
        generator = torch.Generator().manual_seed(seed)
        sampled = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        log_probabilities.gather(1, sampled).sum().backward()
    num_counted = len(token_ids) - num_ignored
    losses = torch.zeros(model.shape.num_layers, model.shape.num_kv_heads, len(shares), dtype=torch.float64)
    for layer, part in recorded.items():
        if layer in model.shape.windows:
            continue
        ranking = rankings[layer].clone()
        ranking[:, :num_sinks] = torch.inf
        ranking[:, num_context - num_recent :] = torch.inf
        for head in range(model.shape.num_kv_heads):
            order = ranking[head].argsort(descending=True, stable=True)
            keys, values = context_keys[layer][head][order], context_values[layer][head][order]
            for index, share in enumerate(shares):
                num_kept = max(int(share * num_context), num_sinks + num_recent)
                change = _change(part, head, model.shape.num_kv_heads, keys, values, num_kept)
                losses[layer, head, index] = change.square().sum() / (2 * num_counted)
    return HeadLosses(shares=shares, losses=losses)


def _change(
    part: _Recorded, head: int, num_heads: int, keys: torch.Tensor, values: torch.Tensor, num_kept: int
) -> torch.Tensor:
    """First-order change [t] of the sampled tokens' log-probability when a head keeps the first of its keys."""
    call = part.call
    group = len(call.queries) // num_heads
    heads = slice(head * group, (head + 1) * group)
    num_new, num_dropped = call.queries.shape[1], len(keys) - num_kept
    summary = num_dropped > 0
    all_keys = [*[keys[:num_kept], keys[num_kept:].mean(dim=0, keepdim=True)][: 1 + summary], call.keys[head].detach()]
    all_values = [values[:num_kept], values[num_kept:].mean(dim=0, keepdim=True)][: 1 + summary]
    all_values.append(call.values[head].detach())
    num_old = num_kept + summary
    biases = torch.zeros(num_old + num_new)
    if summary:
        biases[num_kept] = math.log(num_dropped)
    is_hidden = ~torch.ones(num_new, num_old + num_new, dtype=torch.bool).tril(num_old)
    output = attend_over(
        call.queries[heads].detach(),
        torch.cat(all_keys),
        torch.cat(all_values),
        is_hidden=is_hidden,
        biases=biases,
        scaling=call.scaling,
        softcap=call.softcap,
        sink_scores=call.sink_scores[heads].detach() if call.sink_scores is not None else None,
    )
    gradient = part.output.grad
    assert gradient is not None
    return ((output - part.output.detach()[heads]) * gradient[heads]).sum(dim=(0, 2))


def allocate_budgets(measured: HeadLosses, ratios: Sequence[float], is_fixed: Sequence[bool]) -> BudgetCurve:
    """The curve with the least summed loss at every ratio: always the next share to whom it helps most.

    Losses are made convex first, so that going by the steepest step is best.

    Args:
        ratios: means to write the curve down for, ascending.
        is_fixed: layers that take no part (sliding windows), by absolute index.
    """
    num_layers, num_heads, _ = measured.losses.shape
    free = [(layer, head) for layer in range(num_layers) if not is_fixed[layer] for head in range(num_heads)]
    steps: list[tuple[float, int, int, float, float]] = []
    for layer, head in free:
        points = _convex(measured.shares, measured.losses[layer, head].tolist())
        steps += [
            ((low - high) / (end - start), layer, head, start, end)
            for (start, low), (end, high) in itertools.pairwise(points)
        ]
    # Ties to the earlier layer: the same curve on every machine.
    steps.sort(key=lambda step: (-step[0], *step[1:]))
    table = [[[1.0] * len(ratios) for _ in range(num_heads)] for _ in range(num_layers)]
    for index, ratio in enumerate(ratios):
        for (layer, head), share in _fill(free, steps, ratio, least=min(measured.shares[0], ratio)).items():
            table[layer][head][index] = share
    return BudgetCurve(ratios=tuple(ratios), shares=tuple(tuple(tuple(row) for row in heads) for heads in table))


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
