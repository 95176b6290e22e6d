"""Sums scores of single texts up to the figures of `swarm bench kv`, all against a 16-bit full cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.cli.bench.kv_record import CodeScores, DocumentScores

__all__ = ["KVFigures", "StoredShape", "sum_up"]


@dataclass(frozen=True, kw_only=True)
class KVFigures:
    """One way of keeping a context against the 16-bit full cache."""

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
    retrieval_ratio_error: float | None
    """Standard error over texts, of the differences to the full cache."""
    retrieval_exact_ratio: float | None
    num_documents: int
    num_code_texts: int
    greedy_kl_nats: float | None
    """Mean divergence along the full model's own greedy answer, one token a step."""
    greedy_agreed_tokens: float | None
    """Tokens until a greedy answer differs from the full model's, on average."""
    prefill_wire_bytes_per_hop: int
    """Activations that a hop sends on while a context is read, in the model's precision; mean over places to cut."""
    step_time_ratio: float | None = None
    """Decoding step of one session in the engine, over that of `none`."""
    step_time_ratio_8_sessions: float | None = None
    engine_kv_ratio: float | None = None
    """Pages that 8 sessions hold in the engine, over a 16-bit full cache of them."""
    engine_retrieval_ratio: float | None = None
    """Digits right through the engine, over those of the full cache."""


@dataclass(frozen=True, kw_only=True)
class StoredShape:
    """What sizes depend on."""

    num_heads: int
    """KV heads of all layers."""
    full_bytes_per_token: int
    """Of a 16-bit full cache."""
    row_bytes: int
    """Of one token's hidden state on the wire."""


def sum_up(
    name: str,
    documents: Mapping[str, Sequence[DocumentScores]],
    codes: Mapping[str, Sequence[CodeScores]],
    shape: StoredShape,
    *,
    full: str,
) -> KVFigures:
    """Figures of the method `name` beside those of the full cache, which has the name `full`."""
    own, reference = documents[name], documents[full]
    changes = [ours.loss_nats - theirs.loss_nats for ours, theirs in zip(own, reference, strict=True)]
    num_tokens = sum(each.num_tokens for each in own)
    kv_ratio = sum(each.num_bytes for each in own) / (shape.full_bytes_per_token * num_tokens)
    perplexity_ratio = math.exp(_mean(changes))
    kls = [each.kl_nats for each in own]
    greedy_kls = [each.greedy_kl_nats for each in own if each.greedy_kl_nats is not None]
    greedy_agreed = [each.greedy_agreed_tokens for each in own if each.greedy_agreed_tokens is not None]
    digits = [each.digits for each in codes[name]]
    full_digits = [each.digits for each in codes[full]]
    exact, full_exact = ([each.exact for each in codes[which]] for which in (name, full))
    lost = [ours - theirs for ours, theirs in zip(digits, full_digits, strict=True)]
    return KVFigures(
        policy=name,
        context_tokens=own[0].num_tokens,
        kv_ratio=kv_ratio,
        times_smaller=1 / kv_ratio,
        kept_share=sum(each.num_kept for each in own) / (shape.num_heads * num_tokens),
        perplexity_ratio=perplexity_ratio,
        perplexity_ratio_error=perplexity_ratio * _standard_error(changes),
        mean_kl_nats=_mean(kls),
        mean_kl_nats_error=_standard_error(kls),
        top_token_agreement=_mean([each.agreement for each in own]),
        retrieval_ratio=_ratio(digits, full_digits),
        retrieval_ratio_error=_standard_error(lost) / max(_mean(full_digits), 1e-9) if lost else None,
        retrieval_exact_ratio=_ratio(exact, full_exact),
        num_documents=len(own),
        num_code_texts=len(digits),
        greedy_kl_nats=_mean(greedy_kls) if greedy_kls else None,
        greedy_agreed_tokens=_mean(greedy_agreed) if greedy_agreed else None,
        prefill_wire_bytes_per_hop=round(_mean([each.hop_rows for each in own]) * shape.row_bytes),
    )


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    return _mean(ours) / max(_mean(theirs), 1e-9) if ours else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
