"""How the single-stream benchmark turns runs into figures."""

from __future__ import annotations

import pytest

from swarm.cli.bench.single_stream_measure import _Round, summarise


def make_rounds(*figures: tuple[float, float, float], token_ids: tuple[int, ...] = (1, 2)) -> list[_Round]:
    """Rounds of (wall, CPU, client CPU) milliseconds."""
    return [
        _Round(wall_ms=wall, cpu_ms=cpu, client_cpu_ms=client, token_ids=token_ids) for wall, cpu, client in figures
    ]


LOCAL = make_rounds((10.0, 10.0, 10.0), (20.0, 20.0, 20.0), (10.0, 10.0, 10.0))


def test_ratios_compare_within_a_round() -> None:
    """When the machine is slow in one round, both sides are slow: only their ratio means something."""
    figures = summarise("2 hops", 2, make_rounds((12.0, 11.0, 3.0), (24.0, 22.0, 6.0), (12.0, 11.0, 3.0)), LOCAL)
    assert figures.cpu_ratio_to_local == pytest.approx(1.1)
    assert figures.wall_ratio_to_local == pytest.approx(1.2)
    assert figures.client_cpu_ms_per_token == 3.0
    assert figures.wall_ms_outside_layers_per_hop == pytest.approx(1.0)


def test_plain_transformers_is_its_own_yardstick() -> None:
    """It has no hops, so nothing is said about them."""
    figures = summarise("transformers", 0, LOCAL, LOCAL)
    assert figures.cpu_ratio_to_local == 1.0
    assert "wall_ms_outside_layers_per_hop" not in figures.to_json()


def test_other_tokens_are_reported() -> None:
    """A speed measured on other tokens is no comparison."""
    other = make_rounds(*[(1.0, 1.0, 1.0)] * 3, token_ids=(1, 3))
    assert not summarise("1 hop", 1, other, LOCAL).is_same_tokens
