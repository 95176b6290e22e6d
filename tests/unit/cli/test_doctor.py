"""What the doctor finds, and what it advises."""

from __future__ import annotations

import json

import pytest

from swarm.cli import examination
from swarm.cli.app import run
from swarm.cli.examination import Finding, judge_packages
from swarm.cli.examination_of_swarm import BlockNeeds, blocks_that_fit

GIB = 2**30


def test_packages_are_compared_with_what_is_required() -> None:
    """Wrong versions are the commonest reason why an installation does not work."""
    required = [
        "torch==2.13.*",
        "grpcio<2,>=1.71",
        "typer>=0.15",
        'hivemind; extra == "dht"',
        'winonly; os_name == "x"',
    ]
    installed = {"torch": "2.13.0+cpu", "grpcio": "1.60.0"}
    missing, misfits = judge_packages(required, lambda package: installed.get(package))
    assert missing == ["typer"]
    assert misfits == ["grpcio 1.60.0 (needs <2,>=1.71)"]


def test_packages_of_an_extra_count_when_asked_for() -> None:
    """A server needs more than a client; a client must not be told to install it."""
    required = ['hivemind==1.1.12; extra == "dht"', 'swarm-inference[dht]; extra == "server"']
    assert judge_packages(required, lambda package: None) == ([], [])
    assert judge_packages(required, lambda package: None, extra="dht") == (["hivemind"], [])


@pytest.mark.parametrize(
    ("memory_bytes", "num_fit", "has_room"), [(GIB // 100, 0, False), (10 * GIB, 6, True), (1000 * GIB, 32, True)]
)
def test_estimate_of_blocks_leaves_room_for_the_cache(memory_bytes: int, num_fit: int, has_room: bool) -> None:
    """Blocks without room for anybody's tokens would serve nobody."""
    needs = BlockNeeds(weight_bytes=GIB, kv_bytes_per_token=8192)
    fit, num_tokens = blocks_that_fit(memory_bytes, 32, needs)
    assert fit == num_fit
    assert (num_tokens > 0) == has_room
    assert fit * (needs.weight_bytes + num_tokens * needs.kv_bytes_per_token) <= memory_bytes


def test_this_machine_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    """Every subject gets a line, whatever the machine is like, and the report is one JSON object."""
    run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    subjects = {check["subject"] for check in report["checks"]}
    assert {"Python", "packages", "torch", "processor", "GPUs", "memory", "disk", "DHT", "ports"} <= subjects
    assert all(check["verdict"] in ("ok", "warn", "problem") and check["seen"] for check in report["checks"])
    assert report["ok"] == all(check["verdict"] != "problem" for check in report["checks"])


def test_a_problem_comes_with_advice_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts that set machines up stop there, and people are told what to do."""
    findings = [
        Finding(subject="memory", verdict="ok", seen="plenty"),
        Finding(subject="ports", verdict="problem", seen="closed", advice="open the firewall"),
    ]
    monkeypatch.setattr(examination, "examine_machine", lambda: findings)
    assert run(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "problem ports   closed" in shown
    assert "→ open the firewall" in shown


def test_a_cache_that_can_not_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out here in a second instead of after a download."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    finding = examination._examine_disk()
    assert finding.verdict == "problem"
    assert "SWARM_CACHE" in finding.advice


def test_without_hivemind_asking_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no wheels for many systems: that limits a machine, it is not broken."""
    monkeypatch.setattr(examination, "find_version", lambda package: None)
    finding = examination._examine_dht()
    assert finding.verdict == "warn"
    assert "grpc://" in finding.seen
