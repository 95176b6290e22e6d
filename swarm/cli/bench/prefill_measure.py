"""Measures a long prompt's time to its first token, and the gaps it causes to a session decoding beside it."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.cli.bench.decoding_client import DecodingClient, random_prompt
from swarm.cli.bench.local_bench import BenchSwarm

if TYPE_CHECKING:
    from swarm.models.progress import ProgressReporter

__all__ = ["GapFigures", "PrefillFigures", "PrefillRound", "measure_prefill", "quantile", "summarise_prefill"]

_MAX_DECODED = 100_000
"""Far more than a prompt can take; the session's length is the limit before that."""


@dataclass(frozen=True, kw_only=True)
class PrefillRound:
    """One measurement."""

    alone_first_token_s: float
    """Time to the first token of the long prompt with nobody beside it."""
    beside_first_token_s: float
    """The same while another session decodes."""
    alone_gaps_s: Sequence[float]
    """Between the tokens of the decoding session, before the prompt came."""
    beside_gaps_s: Sequence[float]
    """The same while the prompt ran."""


@dataclass(frozen=True, kw_only=True)
class GapFigures:
    """Of the decoding session's gaps, all rounds together."""

    p50_ms: float
    p95_ms: float
    max_ms: float
    num_gaps: int


@dataclass(frozen=True, kw_only=True)
class PrefillFigures:
    """One entry of the results."""

    prompt_tokens: int
    seconds_to_first_token: float
    """Of the long prompt beside a decoding session; median over rounds."""
    seconds_to_first_token_alone: float
    prefill_tokens_per_s_alone: float
    gap_p50_ms_alone: float
    gap_p95_ms_alone: float
    gap_max_ms_alone: float
    gap_p50_ms: float
    """Of the decoding session beside the prompt."""
    gap_p95_ms: float
    gap_max_ms: float
    gap_p50_ratio: float
    """Beside the prompt to alone."""
    gap_p95_ratio: float
    num_gaps_alone: int
    num_gaps: int


def measure_prefill(
    swarm: BenchSwarm,
    *,
    num_prompt_tokens: int,
    num_decoder_tokens: int,
    num_alone_gaps: int,
    num_rounds: int,
    report: ProgressReporter,
) -> PrefillFigures:
    """Figures of one prompt length; `num_decoder_tokens` is the prompt length of the decoding session.

    Raises what sessions raise.
    """
    report.start("Warming up", None, "")
    with DecodingClient(swarm.model, max_length=64) as client:
        client.prefill(random_prompt(48, vocab_size=swarm.vocab_size, seed=0))
        client.decode(8)
    report.start("Measuring", 3 * num_rounds, "runs")
    rounds: list[PrefillRound] = []
    for number in range(num_rounds):
        # Prompts are never used twice: the second would be found in memory.
        alone_s = _time_to_first_token(swarm, num_prompt_tokens, seed=3 * number + 1)
        report.advance(1)
        rounds.append(
            _run_beside(
                swarm,
                alone_first_token_s=alone_s,
                num_prompt_tokens=num_prompt_tokens,
                num_decoder_tokens=num_decoder_tokens,
                num_alone_gaps=num_alone_gaps,
                seed=3 * number + 2,
            )
        )
        report.advance(2)
    report.finish()
    return summarise_prefill(num_prompt_tokens, rounds)


def _time_to_first_token(swarm: BenchSwarm, num_prompt_tokens: int, *, seed: int) -> float:
    prompt = random_prompt(num_prompt_tokens, vocab_size=swarm.vocab_size, seed=seed)
    with DecodingClient(swarm.model, max_length=num_prompt_tokens + 1) as client:
        started_s = time.perf_counter()
        client.prefill(prompt)
        return client.stamps_s[0] - started_s


def _run_beside(
    swarm: BenchSwarm,
    *,
    alone_first_token_s: float,
    num_prompt_tokens: int,
    num_decoder_tokens: int,
    num_alone_gaps: int,
    seed: int,
) -> PrefillRound:
    limit = swarm.model.source.max_positions or _MAX_DECODED
    is_over = threading.Event()
    with (
        DecodingClient(swarm.model, max_length=limit) as decoder,
        ThreadPoolExecutor(1, thread_name_prefix="bench-decoder") as pool,
    ):
        decoder.prefill(random_prompt(num_decoder_tokens, vocab_size=swarm.vocab_size, seed=seed))
        decoder.decode(num_alone_gaps + 1)
        num_alone = len(decoder.stamps_s)

        def decode_on() -> None:
            for _ in range(limit - num_decoder_tokens - num_alone):
                if is_over.is_set():
                    return
                decoder.decode(1)

        decoding: Future[None] = pool.submit(decode_on)
        started_s = time.perf_counter()
        try:
            first_token_s = _time_to_first_token(swarm, num_prompt_tokens, seed=seed + 1)
        finally:
            is_over.set()
        ended_s = started_s + first_token_s
        decoding.result()
        stamps_s = decoder.stamps_s
    return PrefillRound(
        alone_first_token_s=alone_first_token_s,
        beside_first_token_s=first_token_s,
        # The first gap goes from the prompt to the first step; it is not one of decoding.
        alone_gaps_s=gaps_within(stamps_s[1:num_alone], started_s=0.0, ended_s=started_s),
        beside_gaps_s=gaps_within(stamps_s, started_s=started_s, ended_s=ended_s),
    )


def gaps_within(stamps_s: Sequence[float], *, started_s: float, ended_s: float) -> list[float]:
    """Gaps between neighbouring stamps that lie in a period, at least in part."""
    return [
        later - earlier for earlier, later in itertools.pairwise(stamps_s) if later > started_s and earlier < ended_s
    ]


def summarise_prefill(num_prompt_tokens: int, rounds: Sequence[PrefillRound]) -> PrefillFigures:
    """Medians of the times, quantiles over the gaps of all rounds."""
    alone = _summarise_gaps([gap for one in rounds for gap in one.alone_gaps_s])
    beside = _summarise_gaps([gap for one in rounds for gap in one.beside_gaps_s])
    alone_s = statistics.median(one.alone_first_token_s for one in rounds)
    return PrefillFigures(
        prompt_tokens=num_prompt_tokens,
        seconds_to_first_token=statistics.median(one.beside_first_token_s for one in rounds),
        seconds_to_first_token_alone=alone_s,
        prefill_tokens_per_s_alone=num_prompt_tokens / alone_s,
        gap_p50_ms_alone=alone.p50_ms,
        gap_p95_ms_alone=alone.p95_ms,
        gap_max_ms_alone=alone.max_ms,
        gap_p50_ms=beside.p50_ms,
        gap_p95_ms=beside.p95_ms,
        gap_max_ms=beside.max_ms,
        gap_p50_ratio=beside.p50_ms / alone.p50_ms,
        gap_p95_ratio=beside.p95_ms / alone.p95_ms,
        num_gaps_alone=alone.num_gaps,
        num_gaps=beside.num_gaps,
    )


def _summarise_gaps(gaps_s: Sequence[float]) -> GapFigures:
    return GapFigures(
        p50_ms=quantile(gaps_s, 0.5) * 1e3,
        p95_ms=quantile(gaps_s, 0.95) * 1e3,
        max_ms=max(gaps_s) * 1e3,
        num_gaps=len(gaps_s),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed. Raises ValueError for no values."""
    if not values:
        raise ValueError("there are no values to take a quantile of")
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]
