"""Measures what a KV policy saves and what it costs in quality, over the reference cache.

Every context is read once with a full cache; each policy is given that reading and compresses it before it sees what
follows. What follows comes in small steps, so that compression goes on as in a long answer.
"""

# Letters: Hq, Hk query and KV heads, t new tokens, n keys, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from swarm.cli.bench.kv_asking import Answers, ask, peek_compressed, peek_full
from swarm.cli.bench.kv_texts import Document, HiddenCodes
from swarm.kvpolicy.layers import build_layers
from swarm.kvpolicy.reference_cache import ReferenceCache
from swarm.kvpolicy.reference_model import (
    AttentionCall,
    FullCache,
    ReferenceModel,
    cache_attention,
)
from swarm.kvpolicy.streaming import event_after

if TYPE_CHECKING:
    from swarm.kvpolicy.calibration_file import Calibration
    from swarm.kvpolicy.settings import KVPolicy
    from swarm.models.progress import ProgressReporter

__all__ = ["KVFigures", "Reading", "measure_policies", "with_random_scorer"]

_STEP_TOKENS: Final = 16
"""What follows a context comes in steps of this size: one compression event each."""
_PART_TOKENS: Final = 512
_QUERY_TOKENS: Final = 64


@dataclass(frozen=True, kw_only=True)
class KVFigures:
    """One policy against the 16-bit full cache."""

    policy: str
    context_tokens: int
    kv_ratio: float
    """Bytes of everything a session holds at the context's end, over those of a 16-bit full cache."""
    times_smaller: float
    kept_share: float
    """Entries (token, layer, KV head) that are held in any form."""
    perplexity_ratio: float
    perplexity_ratio_error: float
    """Standard error over documents."""
    mean_kl_nats: float
    mean_kl_nats_error: float
    top_token_agreement: float
    retrieval_ratio: float | None
    """Digits right over those of the full cache."""
    retrieval_exact_ratio: float | None
    num_documents: int
    num_code_texts: int
    greedy_kl_nats: float | None
    """Mean divergence along the full model's own greedy answer, one token a step."""
    greedy_agreed_tokens: float | None
    """Tokens until a greedy answer differs from the full model's, on average."""
    step_time_ratio: float | None = None
    """Of the engine, which measures it; the reference cache is not built for speed."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A context as a full cache has read it."""

    token_ids: list[int]
    cache: FullCache
    hidden: dict[int, torch.Tensor]
    """[n, hidden size] by layer"""
    queries: dict[int, dict[int, torch.Tensor]]
    """[Hq, up to 64, D] by layer, the newest at every end of a part, by that position"""
    scaling: dict[int, float]


def read(model: ReferenceModel, token_ids: Sequence[int], report: ProgressReporter) -> Reading:
    """Run a context from its start, attending to everything."""
    cache = FullCache()
    hidden: dict[int, list[torch.Tensor]] = {}
    queries: dict[int, dict[int, torch.Tensor]] = {}
    scaling: dict[int, float] = {}

    def attend(call: AttentionCall) -> torch.Tensor:
        hidden.setdefault(call.layer, []).append(call.hidden)
        scaling[call.layer] = call.scaling
        output = cache.attend(call)
        end = cache.keys[call.layer].shape[1]
        # A copy, or the whole part would be held for its last few rows.
        queries.setdefault(call.layer, {})[end] = call.queries[:, -_QUERY_TOKENS:].clone()
        return output

    for start in range(0, len(token_ids), _PART_TOKENS):
        part = token_ids[start : start + _PART_TOKENS]
        model.run_hidden(part, start, attend)
        report.advance(len(part))
    joined = {layer: torch.cat(parts) for layer, parts in hidden.items()}
    return Reading(token_ids=list(token_ids), cache=cache, hidden=joined, queries=queries, scaling=scaling)


class _Candidate:
    """One policy, able to take over a reading."""

    def __init__(self, model: ReferenceModel, policy: KVPolicy, calibration: Calibration | None) -> None:
        self.name = policy.preset
        self.policy = policy
        self._settings = build_layers(policy, model.shape, calibration, range(model.shape.num_layers))

    def take_over(self, model: ReferenceModel, reading: Reading) -> ReferenceCache:
        """The policy's cache of a reading.

        Up to the first cut of a long step attention is full under every policy, so that much of the reading is taken
        over as it is; what follows is run again over the compressed cache.
        """
        cache = ReferenceCache(self._settings)
        num_first = min(len(reading.token_ids), self.policy.chunk_tokens)
        for layer, part in cache.layers.items():
            part.append(
                reading.cache.keys[layer][:, :num_first],
                reading.cache.values[layer][:, :num_first],
                reading.hidden[layer][:num_first],
            )
            event = event_after(self.policy, part.stored_end, part.length)
            if event is not None:
                part.compress(event, reading.queries[layer][num_first], reading.scaling[layer])
        if num_first < len(reading.token_ids):
            model.step(cache, self.policy, reading.token_ids[num_first:], num_first)
        return cache


def with_random_scorer(policy: KVPolicy) -> KVPolicy:
    """The control: the same budgets, any tokens."""
    assert policy.pruning is not None
    return replace(policy, preset=f"{policy.preset}, random tokens", pruning=replace(policy.pruning, scorer="random"))


@dataclass
class _Scores:
    """Sums of one policy; lists are by document."""

    kls: list[float]
    losses: list[float]
    agreements: list[float]
    answers: list[Answers]
    greedy_kls: list[float]
    greedy_agreed: list[float]
    num_bytes: int = 0
    num_kept: int = 0
    num_tokens: int = 0


def _no_scores() -> _Scores:
    return _Scores([], [], [], [], [], [])


def measure_policies(
    model: ReferenceModel,
    policies: Sequence[KVPolicy],
    calibration: Calibration | None,
    *,
    documents: Sequence[Document],
    codes: Sequence[HiddenCodes],
    greedy_tokens: int,
    report: ProgressReporter,
) -> list[KVFigures]:
    """Figures of an 8-bit float cache and of every policy, in that order."""
    candidates = [_Candidate(model, policy, calibration) for policy in policies]
    scores = {name: _no_scores() for name in ("full", "fp8", *(candidate.name for candidate in candidates))}
    num_runs = len(candidates) + 2
    total = sum(len(each.context) + len(each.continuation) * num_runs for each in documents)
    total += sum(len(each.context) + _count_asked(each) * num_runs for each in codes)
    report.start("Measuring", total, "tokens")
    with torch.no_grad():
        for document in documents:
            _judge_document(model, candidates, document, scores, greedy_tokens, report)
        for hidden_codes in codes:
            _judge_codes(model, candidates, hidden_codes, scores, report)
    report.finish()
    shape = model.shape
    full_bytes = 2 * shape.num_layers * shape.num_kv_heads * (shape.key_dim + shape.value_dim)
    context_tokens = len(documents[0].context)
    return [
        _to_figures(
            name, scores[name], scores["full"], full_bytes, shape.num_layers * shape.num_kv_heads, context_tokens
        )
        for name in ("fp8", *(candidate.name for candidate in candidates))
    ]


def _count_asked(codes: HiddenCodes) -> int:
    return sum(len(question) + len(answer) for question, answer in zip(codes.questions, codes.answers, strict=True))


# -- continuing a text -----------------------------------------------------------------------------


def _judge_document(
    model: ReferenceModel,
    candidates: Sequence[_Candidate],
    document: Document,
    scores: dict[str, _Scores],
    greedy_tokens: int,
    report: ProgressReporter,
) -> None:
    reading = read(model, document.context, report)
    num_context = len(document.context)
    expected = model.run(document.continuation, num_context, reading.cache.attend).log_softmax(dim=-1)
    reading.cache.cut(num_context)
    answer, answer_expected = _answer_greedily(model, reading, document.continuation[0], greedy_tokens)
    _compare(scores["full"], document, expected, expected)
    report.advance(len(document.continuation))
    eighth = _round_to_fp8(reading.cache)
    seen = model.run(document.continuation, num_context, eighth.attend).log_softmax(dim=-1)
    _compare(scores["fp8"], document, expected, seen)
    report.advance(len(document.continuation))
    for candidate in candidates:
        own = scores[candidate.name]
        cache = candidate.take_over(model, reading)
        own.num_bytes += cache.count_bytes()
        own.num_kept += sum(len(cache.layers[layer].keys_of(head)[0]) for layer, head in _all_heads(model))
        own.num_tokens += num_context
        seen = _follow(model, cache, document.continuation, num_context, _STEP_TOKENS).log_softmax(dim=-1)
        _compare(own, document, expected, seen)
        if answer:
            cache = candidate.take_over(model, reading)
            seen = _follow(model, cache, answer, num_context, 1).log_softmax(dim=-1)
            own.greedy_kls.append(float(_divergence(answer_expected, seen).mean()))
            differs = (seen.argmax(dim=-1) != answer_expected.argmax(dim=-1)).nonzero()
            own.greedy_agreed.append(float(differs[0, 0]) if len(differs) else float(len(answer)))
        report.advance(len(document.continuation))


def _all_heads(model: ReferenceModel) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.shape.num_layers) for head in range(model.shape.num_kv_heads)]


def _follow(
    model: ReferenceModel, cache: ReferenceCache, token_ids: Sequence[int], start: int, step_tokens: int
) -> torch.Tensor:
    """Logits [t, V] of tokens fed in small steps, the cache going on compressing."""
    parts = []
    for first in range(0, len(token_ids), step_tokens):
        part = token_ids[first : first + step_tokens]
        parts.append(model.run(part, start + first, cache_attention(cache)))
    return torch.cat(parts)


def _answer_greedily(
    model: ReferenceModel, reading: Reading, first_token: int, num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """What the full model says after a context: tokens fed, and log-probabilities [t, V] after each."""
    if num_tokens == 0:
        return [], torch.zeros(0)
    num_context = len(reading.token_ids)
    fed, parts = [first_token], []
    for index in range(num_tokens):
        logits = model.run([fed[-1]], num_context + index, reading.cache.attend)
        parts.append(logits.log_softmax(dim=-1))
        fed.append(int(logits[0].argmax()))
    reading.cache.cut(num_context)
    return fed[:-1], torch.cat(parts)


def _divergence(expected: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """KL(full || ours) [t] of log-probabilities [t, V]."""
    return (expected.exp() * (expected - seen)).sum(dim=-1)


def _compare(own: _Scores, document: Document, expected: torch.Tensor, seen: torch.Tensor) -> None:
    targets = torch.tensor(document.continuation[1:])[:, None]
    own.kls.append(float(_divergence(expected, seen).mean()))
    own.losses.append(float(-seen[:-1].gather(1, targets).mean()))
    own.agreements.append(float((expected.argmax(dim=-1) == seen.argmax(dim=-1)).float().mean()))


def _round_to_fp8(cache: FullCache) -> FullCache:
    """The production default elsewhere: 8-bit floats, one scale per head."""
    rounded = FullCache()
    for layer in cache.keys:
        for source, target in ((cache.keys, rounded.keys), (cache.values, rounded.values)):
            scale = source[layer].abs().amax(dim=(1, 2), keepdim=True) / 448.0
            target[layer] = (source[layer] / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded


# -- finding codes ---------------------------------------------------------------------------------


def _judge_codes(
    model: ReferenceModel,
    candidates: Sequence[_Candidate],
    codes: HiddenCodes,
    scores: dict[str, _Scores],
    report: ProgressReporter,
) -> None:
    reading = read(model, codes.context, report)
    asked = _count_asked(codes)
    for name, cache in (("full", reading.cache), ("fp8", _round_to_fp8(reading.cache))):
        scores[name].answers.append(ask(model, codes, peek_full(cache)))
        report.advance(asked)
    for candidate in candidates:
        compressed = candidate.take_over(model, reading)
        scores[candidate.name].answers.append(ask(model, codes, peek_compressed(compressed.layers)))
        report.advance(asked)


# -- summing up ------------------------------------------------------------------------------------


def _to_figures(
    name: str, own: _Scores, full: _Scores, full_bytes_per_token: int, num_heads: int, context_tokens: int
) -> KVFigures:
    changes = [ours - theirs for ours, theirs in zip(own.losses, full.losses, strict=True)]
    kv_ratio = own.num_bytes / (full_bytes_per_token * own.num_tokens) if own.num_tokens else 0.5
    perplexity_ratio = math.exp(_mean(changes))
    return KVFigures(
        policy=name,
        context_tokens=context_tokens,
        kv_ratio=kv_ratio,
        times_smaller=1 / kv_ratio,
        kept_share=own.num_kept / (num_heads * own.num_tokens) if own.num_tokens else 1.0,
        perplexity_ratio=perplexity_ratio,
        perplexity_ratio_error=perplexity_ratio * _standard_error(changes),
        mean_kl_nats=_mean(own.kls),
        mean_kl_nats_error=_standard_error(own.kls),
        top_token_agreement=_mean(own.agreements),
        retrieval_ratio=_found(own, full, lambda answers: answers.digits),
        retrieval_exact_ratio=_found(own, full, lambda answers: answers.exact),
        num_documents=len(own.kls),
        num_code_texts=len(own.answers),
        greedy_kl_nats=_mean(own.greedy_kls) if own.greedy_kls else None,
        greedy_agreed_tokens=_mean(own.greedy_agreed) if own.greedy_agreed else None,
    )


def _found(own: _Scores, full: _Scores, share: Callable[[Answers], float]) -> float | None:
    """What was found over what the full cache finds."""
    if not own.answers:
        return None
    return _mean([share(each) for each in own.answers]) / max(_mean([share(each) for each in full.answers]), 1e-9)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
