"""A short run of `swarm bench chaos`: real processes harmed by plan, and not one wrong token."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli_processes import run_swarm

SEED = 159
"""A plan in which each kind of fault comes once."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chaos_gives_right_tokens_and_leaves_nothing(tmp_path: Path) -> None:
    """Every session ends with the tokens of plain transformers or a clear error, and no session, page, file, thread or
    process is left."""
    done = run_swarm(
        *("bench", "chaos", "--minutes", "0.75", "--seed", str(SEED), "--servers", "4", "--clients", "2"),
        *("--scripts", "short,chat,rewind,beams", "--faults", "kill,stop,cut,leave", "--pause", "6"),
        *("--logs", tmp_path, "--json"),
        timeout_s=580,
    )
    assert done.out, done.err
    report = done.json
    assert report["bench"] == "chaos"
    assert {"hardware", "versions", "command", "results"} <= report.keys()
    whole = report["results"][0]
    assert whole["wrong_tokens"] == 0, whole["bad_sessions"]
    assert whole["leaks"] == []
    assert whole["problems"] == []
    assert (whole["hung_sessions"], whole["late_errors"], whole["untyped_errors"]) == (0, 0, 0), whole["bad_sessions"]
    assert done.exit_code == 0, done.err
    assert whole["faults"] >= 3
    assert whole["tokens"] >= 100
    assert {fault["case"] for fault in report["results"][1:]} <= {"kill", "stop", "cut", "leave"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_failover_figures_of_a_tiny_model(tiny_model: Path) -> None:
    """The long measurement of docs/performance.md works: two of three servers are lost, and figures come out."""
    done = run_swarm(
        *("bench", "failover", "--model", tiny_model, "--cases", "undisturbed,two", "--json"), timeout_s=280
    )
    assert done.exit_code == 0, done.err
    undisturbed, two = done.json["results"]
    assert (undisturbed["case"], undisturbed["single"][0]["failovers"]) == ("undisturbed", 0)
    assert two["identical"] is True
    assert two["wrongly_blamed"] == 0
    assert two["single"][0]["failovers"] >= 1
    assert two["stall_max_s"] > 0


def test_an_unknown_case_is_refused(tiny_model: Path) -> None:
    """Before six servers are started for nothing."""
    done = run_swarm("bench", "failover", "--model", tiny_model, "--cases", "earthquake")
    assert done.exit_code == 2
    assert "earthquake" in done.sentence and "replacement" in done.sentence
