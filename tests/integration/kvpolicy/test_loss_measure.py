"""What calibration believes a head would lose, against a model that really loses it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from swarm.kvpolicy.loss_measure import KeepGrid, measure_losses
from swarm.kvpolicy.reference_cache import attend_over
from swarm.kvpolicy.reference_model import AttentionCall, FullCache, ReferenceModel, attend_causally, wrap_model
from tests.tiny_models import VOCAB_SIZE, build_tiny_model

CONTEXT = 120
GRID = KeepGrid(weights=(0.0, 1.0), recent=(16, 40), shares=(0.1, 0.3, 0.6), num_sinks=4, num_tail=16)


@dataclass(frozen=True)
class Read:
    """A model that has read a context, and two scores of each of its tokens."""

    model: ReferenceModel
    cache: FullCache
    scores: list[torch.Tensor]
    """[2, Hk, n] by layer"""


def read_context(family: str) -> Read:
    torch.set_num_threads(1)
    model = wrap_model(build_tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(3, VOCAB_SIZE, (CONTEXT,), generator=generator).tolist()
    cache = FullCache()
    with torch.no_grad():
        model.run_hidden(token_ids, 0, cache.attend)
    heads = model.shape.num_kv_heads
    scores = [torch.randn(2, heads, CONTEXT, generator=generator) for _ in range(model.shape.num_layers)]
    return Read(model, cache, scores)


def no_scores(call: AttentionCall) -> torch.Tensor:
    """New tokens that nobody wants once they have left the window."""
    return torch.full(call.keys.shape[:2], -100.0)


def lose(read: Read, layer: int, head: int, kept: list[int], token: int, part: float) -> torch.Tensor:
    """Log-probabilities [V] after `token` when one head has only some of its context, and a mean of the rest.

    Its output is taken a `part` of the way there, as what is measured is a slope.
    """
    dropped = sorted(set(range(CONTEXT)) - set(kept))

    def attend(call: AttentionCall) -> torch.Tensor:
        keys = torch.cat((read.cache.keys[call.layer], call.keys), dim=1)
        values = torch.cat((read.cache.values[call.layer], call.values), dim=1)
        output = attend_causally(call, keys, values)
        if call.layer != layer:
            return output
        group = len(call.queries) // len(keys)
        heads = slice(head * group, (head + 1) * group)
        order = [*kept, CONTEXT]
        biases = torch.zeros(len(order) + 1)
        biases[-1] = math.log(len(dropped))
        changed = attend_over(
            call.queries[heads],
            torch.cat((keys[head][order], keys[head][dropped].mean(dim=0, keepdim=True))),
            torch.cat((values[head][order], values[head][dropped].mean(dim=0, keepdim=True))),
            is_hidden=torch.zeros(1, len(order) + 1, dtype=torch.bool),
            biases=biases,
            scaling=call.scaling,
            softcap=call.softcap,
            sink_scores=call.sink_scores[heads] if call.sink_scores is not None else None,
        )
        output[heads] += part * (changed - output[heads])
        return output

    with torch.no_grad():
        return read.model.run([token], CONTEXT, attend).log_softmax(dim=-1)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_measured_loss_is_what_a_model_loses(family: str) -> None:
    """Budgets rest on it: of one token the loss is half the square of the change of its log-probability."""
    read = read_context(family)
    keys = [read.cache.keys[layer] for layer in range(read.model.shape.num_layers)]
    values = [read.cache.values[layer] for layer in range(read.model.shape.num_layers)]
    losses = measure_losses(
        read.model, keys, values, read.scores, [7], GRID, score_new=no_scores, num_ignored=0, seed=5
    )
    layer = next(layer for layer in range(len(keys)) if layer not in read.model.shape.windows)
    whole = lose(read, layer, 0, list(range(CONTEXT - 1)), 7, 0.0)
    sampled = int(torch.multinomial(whole.exp(), 1, generator=torch.Generator().manual_seed(5)))
    # Sinks and tail are kept whatever the share, then the recent window, then the best scores.
    score = read.scores[layer][1, 0].clone()
    score[: GRID.num_sinks] = score[-40:] = math.inf
    for share in (1, 2):
        num_kept = GRID.num_sinks + GRID.num_tail + round(GRID.shares[share] * CONTEXT)
        kept = sorted(score.argsort(descending=True)[:num_kept].tolist())
        slope = abs(float(lose(read, layer, 0, kept, 7, 0.01)[sampled] - whole[sampled])) / 0.01
        assert slope > 1e-3
        assert math.sqrt(2 * float(losses[layer, 0, 1, 1, share])) == pytest.approx(slope, rel=0.05)


def test_a_window_as_long_as_the_context_changes_nothing_for_others() -> None:
    """Short stretches are measured, too: sinks stay sinks although a window might reach them."""
    read = read_context("llama")
    keys = [read.cache.keys[layer] for layer in range(read.model.shape.num_layers)]
    values = [read.cache.values[layer] for layer in range(read.model.shape.num_layers)]
    found = [
        measure_losses(
            *(read.model, keys, values, read.scores, [7, 8]),
            replace(GRID, recent=recent),
            score_new=no_scores,
            num_ignored=0,
            seed=0,
        )
        for recent in ((16, 40), (16, 400))
    ]
    assert torch.allclose(found[0][:, :, :, 0], found[1][:, :, :, 0], rtol=1e-4)


def test_more_kept_is_less_lost_and_windows_need_room() -> None:
    """A window that a share has no room for is never chosen, and layers with a sliding window lose nothing."""
    read = read_context("llama")
    keys = [read.cache.keys[layer] for layer in range(read.model.shape.num_layers)]
    values = [read.cache.values[layer] for layer in range(read.model.shape.num_layers)]
    losses = measure_losses(
        read.model, keys, values, read.scores, [7, 8, 9], GRID, score_new=no_scores, num_ignored=1, seed=0
    )
    assert torch.isinf(losses[:, :, :, 1, 0]).all()
    assert torch.isfinite(losses[:, :, :, 0]).all()
    assert float(losses[:, :, :, 0, 0].sum()) > float(losses[:, :, :, 0, 2].sum()) > 0
