"""How the single-stream benchmark turns runs into figures."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from swarm.cli.app import run
from swarm.cli.bench import single_stream_measure
from swarm.cli.bench.single_stream_measure import BlockTimer, CaseFigures, _Round, summarise


def make_rounds(*figures: tuple[float, float, float], token_ids: tuple[int, ...] = (1, 2)) -> list[_Round]:
    """Rounds of (wall, CPU, client CPU) milliseconds; half of the wall time is in the blocks, a quarter at best."""
    return [
        _Round(
            wall_ms=wall,
            cpu_ms=cpu,
            client_cpu_ms=client,
            in_blocks_ms=wall / 2,
            in_blocks_best_ms=wall / 4,
            token_ids=token_ids,
        )
        for wall, cpu, client in figures
    ]


LOCAL = make_rounds((10.0, 10.0, 10.0), (20.0, 20.0, 20.0), (10.0, 10.0, 10.0))


def test_ratios_compare_within_a_round() -> None:
    """When the machine is slow in one round, both sides are slow: only their ratio means something."""
    figures = summarise("2 hops", 2, make_rounds((12.0, 11.0, 3.0), (24.0, 22.0, 6.0), (12.0, 11.0, 3.0)), LOCAL)
    assert figures.cpu_ratio_to_local == pytest.approx(1.1)
    assert figures.wall_ratio_to_local == pytest.approx(1.2)
    assert figures.client_cpu_ms_per_token == 3.0
    assert figures.wall_ms_outside_blocks_per_hop == pytest.approx(0.5)
    assert figures.wall_ms_outside_blocks_per_hop_best == pytest.approx(0.25)


def test_plain_transformers_is_its_own_yardstick() -> None:
    """It has no hops, so nothing is said about them."""
    figures = summarise("transformers", 0, LOCAL, LOCAL)
    assert figures.cpu_ratio_to_local == 1.0
    assert "wall_ms_outside_blocks_per_hop" not in figures.to_json()


def test_other_tokens_are_reported() -> None:
    """A speed measured on other tokens is no comparison."""
    other = make_rounds(*[(1.0, 1.0, 1.0)] * 3, token_ids=(1, 3))
    assert not summarise("1 hop", 1, other, LOCAL).is_same_tokens


def test_time_in_blocks_begins_with_the_first_and_ends_with_the_last() -> None:
    """Embeddings and head stay outside: they run at the client, with or without a swarm."""
    modules = [torch.nn.Linear(2, 2) for _ in range(4)]
    timer = BlockTimer(modules[1], modules[2])
    for _ in range(3):
        torch.nn.Sequential(*modules)(torch.zeros(1, 2))
    assert len(timer.passes_s) == 3
    assert all(0 < pass_s < 1 for pass_s in timer.passes_s)


def test_json_has_the_promised_shape(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are kept and compared over time: by machine, by versions, by the command that gave them."""
    asked: dict[str, Any] = {}

    def measure(**options: Any) -> list[CaseFigures]:
        asked.update(options)
        return [summarise("transformers", 0, LOCAL, LOCAL), summarise("2 hops", 2, LOCAL, LOCAL)]

    monkeypatch.setattr(single_stream_measure, "measure", measure)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert run(["bench", "single-stream", "--hops", "2", "--rounds", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= {"bench", "hardware", "versions", "command", "results"}
    assert report["bench"] == "single-stream"
    assert [result["case"] for result in report["results"]] == ["transformers", "2 hops"]
    assert {"wall_ms_per_token", "cpu_ms_per_token", "cpu_ratio_to_local"} <= set(report["results"][1])
    assert (asked["hop_counts"], asked["num_rounds"]) == ([2], 3)
    assert run(["bench", "single-stream"]) == 0
    assert "2 hops" in capsys.readouterr().out
