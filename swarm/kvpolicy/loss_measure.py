"""Measures how much a model's next-token distribution suffers when one KV head keeps less, for all heads at once.

To second order, the divergence between the full model's distribution and the compressed one's is half the squared
product of the change in a head's attention output with the gradient of the log-probability of a sampled token. One
backward pass gives the gradients of all heads; the changes are computed head by head, without running the model, and
for every way of choosing tokens at once: what a way keeps is one column of a matrix of zeros and ones.
"""

# Letters: Hq query heads, Hk KV heads, G = Hq / Hk, n context tokens, t tokens after it, D, Dv dimensions,
# W weights of what the newest queries attend to, R recent windows, S shares.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from swarm.kvpolicy.reference_model import AttentionCall, ReferenceModel, attend_causally

__all__ = ["KeepGrid", "measure_losses"]


_MEAN_SLACK: Final = 8


@dataclass(frozen=True, kw_only=True)
class KeepGrid:
    """The ways of choosing tokens that are tried on every KV head, each with each."""

    weights: tuple[float, ...]
    """Of what the newest queries attend to, beside a token's first score; [W]."""
    recent: tuple[int, ...]
    """Newest tokens that are kept before all others; [R], ascending, the first as small as any share allows."""
    shares: tuple[float, ...]
    """Of the context that is kept beside sinks and tail; [S], ascending, below 1."""
    num_sinks: int
    num_tail: int
    """Newest tokens that are kept whatever the budget."""


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    call: AttentionCall
    output: torch.Tensor
    """[Hq, t, Dv], with a gradient after the backward pass."""
    scores: torch.Tensor
    """[Hk, t] of the new tokens."""


def measure_losses(
    model: ReferenceModel,
    context_keys: Sequence[torch.Tensor],
    context_values: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    token_ids: Sequence[int],
    grid: KeepGrid,
    *,
    score_new: Callable[[AttentionCall], torch.Tensor],
    num_ignored: int,
    seed: int,
) -> torch.Tensor:
    """What dropping does to `token_ids` that follow a context.

    Windows move on with the tokens: what leaves them, of the context or of the tokens themselves, stays only if its
    score is as good as that of what was kept.

    Divergence in nats a token that each (layer, KV head) would cause alone, [layers, Hk, W, R, S] float64; infinite
    where a window has no room in a share.

    Args:
        context_keys: [Hk, n, D] by layer, rotated.
        context_values: [Hk, n, Dv] by layer.
        scores: [W, Hk, n] by layer, by which tokens are kept under each weight; a summary stands for the rest.
        score_new: scores [Hk, t] of the tokens that follow.
        num_ignored: first tokens whose predictions do not count.
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
        recorded[call.layer] = _Recorded(call=call, output=output, scores=score_new(call).detach())
        return output

    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        log_probabilities = model.run(token_ids, num_context, attend).log_softmax(dim=-1)[num_ignored:]
        generator = torch.Generator().manual_seed(seed)
        sampled = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        log_probabilities.gather(1, sampled).sum().backward()
    num_counted = len(token_ids) - num_ignored
    sizes = len(grid.weights), len(grid.recent), len(grid.shares)
    losses = torch.zeros(model.shape.num_layers, model.shape.num_kv_heads, *sizes, dtype=torch.float64)
    with torch.no_grad():
        for layer, part in recorded.items():
            if layer in model.shape.windows:
                continue
            for head in range(model.shape.num_kv_heads):
                change = _change(
                    part,
                    head,
                    context_keys[layer][head],
                    context_values[layer][head],
                    scores[layer][:, head].float(),
                    grid,
                )
                losses[layer, head] = change.double().square().sum(dim=0) / (2 * num_counted)
    is_too_wide = [[recent - grid.num_tail > share * num_context for share in grid.shares] for recent in grid.recent]
    return losses.masked_fill(torch.tensor(is_too_wide), torch.inf)


def _choose(grid: KeepGrid, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each way keeps of a head's n context tokens, as [n, W, R, S] of 0 and 1, and the least score it keeps.

    Args:
        scores: [W, n].

    Returns:
        the choice, and thresholds [W, R, S]: infinite where all that is kept is so for its place.
    """
    num_context = scores.shape[1]
    recency = torch.arange(num_context, dtype=torch.float32)
    counts = torch.tensor([round(share * num_context) for share in grid.shares]) + grid.num_sinks + grid.num_tail
    counts = counts.clamp_max(num_context)
    ways, thresholds = [], []
    for row in scores:
        for recent in grid.recent:
            ranked = row.clone()
            newest = num_context - max(recent, grid.num_tail)
            ranked[newest:] = row.max() + 1 + recency[newest:]
            ranked[: grid.num_sinks] = torch.inf
            ordered, order = ranked.sort(descending=True, stable=True)
            ways.append(order.argsort()[:, None] < counts)
            least = ordered[counts - 1]
            thresholds.append(torch.where(least > row.max(), torch.inf, least))
    sizes = len(scores), len(grid.recent), len(grid.shares)
    return torch.stack(ways, dim=1).view(num_context, *sizes).float(), torch.stack(thresholds).view(sizes)


def _change(
    part: _Recorded, head: int, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, grid: KeepGrid
) -> torch.Tensor:
    """First-order changes [t, W, R, S] of the sampled tokens' log-probability, by what a head keeps.

    Args:
        keys: [n, D] of the context.
        values: [n, Dv]
        scores: [W, n]
    """
    call = part.call
    gradient = part.output.grad
    assert gradient is not None
    group = len(call.queries) // len(call.keys)
    heads = slice(head * group, (head + 1) * group)
    num_new, num_context = call.queries.shape[1], len(keys)
    queries = call.queries[heads].detach().flatten(0, 1).float()
    gradients = gradient[heads].flatten(0, 1).float()
    sinks = call.sink_scores[heads].detach().float() if call.sink_scores is not None else None

    def score(against: torch.Tensor) -> torch.Tensor:
        numbers = queries @ against.T * call.scaling
        return numbers if call.softcap is None else torch.tanh(numbers / call.softcap) * call.softcap

    every_key = torch.cat((keys, call.keys[head].detach()))
    every_value = torch.cat((values, call.values[head].detach()))
    # How far each token stands behind each query; those ahead are not seen.
    ages = torch.arange(num_context, num_context + num_new)[:, None] - torch.arange(len(every_key))
    ages = ages.repeat(group, 1)
    attention = score(every_key).masked_fill(ages < 0, -torch.inf)
    # A mean of keys scores no higher than all of them do, so nothing overflows.
    largest = attention.amax(dim=1, keepdim=True)
    attention = (attention - largest).exp()
    # An output is a quotient of sums over keys; its product with the gradient is one of sums of products.
    pushes = attention * (gradients @ every_value.T)
    is_kept, thresholds = _choose(grid, scores)
    first = max(0, num_context - max(grid.recent))
    far = is_kept[:first].flatten(1)
    sizes = (group * num_new, *thresholds.shape)
    total, pushed = ((numbers[:, :first] @ far).view(sizes) for numbers in (attention, pushes))
    near_scores = torch.cat((scores[:, first:], part.scores[head].expand(len(scores), -1)), dim=1)
    near_scores[:, : max(0, grid.num_sinks - first)] = torch.inf
    for place, recent in enumerate(grid.recent):
        # Windows move by a block at a time: half a block more on average.
        is_near = ages[:, first:] < recent + _MEAN_SLACK
        for weight in range(len(scores)):
            is_good = (near_scores[weight][:, None] >= thresholds[weight, place]).float()
            for sums, numbers in ((total, attention), (pushed, pushes)):
                local = numbers[:, first:]
                inside = (local * is_near).sum(dim=1, keepdim=True)
                sums[:, weight, place] += inside + (local * ~is_near) @ is_good
    is_dropped = 1 - is_kept.flatten(1)
    num_dropped = is_dropped.sum(dim=0)
    mean_keys, mean_values = (numbers.T @ is_dropped / num_dropped.clamp_min(1) for numbers in (keys, values))
    summary = (score(mean_keys.T) - largest).exp() * num_dropped
    total += summary.view(sizes)
    pushed += (summary * (gradients @ mean_values)).view(sizes)
    if sinks is not None:
        total += (sinks.repeat_interleave(num_new)[:, None] - largest).exp()[:, :, None, None]
    before = (part.output.detach()[heads].flatten(0, 1) * gradients).sum(dim=1)
    change = pushed / total - before[:, None, None, None]
    return change.view(group, num_new, *thresholds.shape).sum(dim=0)
