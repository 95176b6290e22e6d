"""How the prefill benchmark turns gaps into figures."""

from __future__ import annotations

import pytest

from swarm.cli.bench.local_bench import to_result
from swarm.cli.bench.prefill_measure import PrefillRound, gaps_within, quantile, summarise_prefill


def test_quantiles_are_measured_values() -> None:
    """A 95th percentile that lies between two gaps was nobody's experience."""
    values = [float(value) for value in range(100, 0, -1)]
    assert quantile(values, 0.5) == 50.0
    assert quantile(values, 0.95) == 95.0
    assert quantile([7.0], 0.95) == 7.0
    with pytest.raises(ValueError):
        quantile([], 0.5)


def test_gaps_count_when_the_prompt_ran_during_any_part_of_them() -> None:
    """The first and the last gap are the ones that a prompt's arrival stretches."""
    stamps_s = [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]
    assert gaps_within(stamps_s, started_s=1.5, ended_s=4.5) == [1.0, 2.0, 1.0]


def test_figures_compare_beside_with_alone() -> None:
    """The promise is a ratio: the 95th percentile of the gaps beside a prompt, to that of the gaps alone."""
    one = PrefillRound(
        alone_first_token_s=2.0,
        beside_first_token_s=5.0,
        alone_gaps_s=[0.01] * 20,
        beside_gaps_s=[0.02] * 18 + [0.03, 0.5],
    )
    figures = summarise_prefill(800, [one])
    assert figures.gap_p50_ratio == pytest.approx(2.0)
    assert figures.gap_p95_ratio == pytest.approx(3.0)
    assert figures.gap_max_ms == pytest.approx(500.0)
    assert figures.prefill_tokens_per_s_alone == 400.0
    result = to_result(figures)
    assert result["seconds_to_first_token"] == 5.0
    assert result["seconds_to_first_token_alone"] == 2.0
