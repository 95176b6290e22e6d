"""What the doctor finds, and what it advises."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from swarm.cli import examination, examination_of_swarm
from swarm.cli.app import run
from swarm.cli.examination import Finding, judge_packages
from swarm.cli.examination_of_model import PrecisionRow, fit_precisions, judge_fit
from swarm.kvpolicy.calibration_file import calibration_path
from swarm.kvpolicy.settings import find_policy
from swarm.models.block_sizes import measure_model_shape
from swarm.models.source import default_cache_dir, resolve_model
from swarm.server.capacity_plan import DeviceMemory
from swarm.server.preparing import CPU_KV_BYTES
from swarm.weights import Precision
from tests.tiny_models import NUM_BLOCKS, build_tiny_config, save_tiny_model


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


def make_row(weights: str, num_blocks: int) -> PrecisionRow:
    return PrecisionRow(
        weights=weights,
        block_bytes=2**20,
        num_blocks=num_blocks,
        kv_bytes=2**20,
        kv_tokens=1000,
        sentence=f"{num_blocks} blocks in {weights}",
    )


def test_a_model_is_judged_by_the_most_precise_way_to_hold_all_of_it() -> None:
    """People want one command to copy; fewer bits only where they hold more."""
    rows = [make_row("fp32", 4), make_row("bf16", 8), make_row("int8", 8), make_row("nf4", 8)]
    finding = judge_fit("m", 8, rows)
    assert (finding.verdict, finding.seen) == ("ok", "m: 8 blocks in bf16")
    assert finding.advice == "swarm serve m --weights bf16"
    partly = judge_fit("m", 80, rows[:2])
    assert partly.advice == "swarm serve m --weights bf16 --num-blocks 8"
    assert judge_fit("m", 80, [make_row("nf4", 0)]).verdict == "problem"


def test_a_model_is_examined_without_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether 140 GB fit is asked before they are downloaded: a config.json must be enough."""
    monkeypatch.setattr(examination, "examine_machine", list)
    build_tiny_config("llama").save_pretrained(tmp_path / "model")
    assert run(["doctor", str(tmp_path / "model"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["num_blocks"] == NUM_BLOCKS
    fits = {row["weights"]: row for row in report["model"]["fits"]}
    assert list(fits) == ["fp32", "bf16", "int8", "nf4"]
    assert fits["fp32"]["num_blocks"] == NUM_BLOCKS
    assert fits["fp32"]["kv_tokens"] > 0
    run(["doctor", "--model", str(tmp_path / "model")])
    shown = capsys.readouterr().out
    assert "blocks that fit" in shown
    assert "6 of 6" in shown


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


def test_kv_tokens_are_counted_under_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many more people fit is why somebody would want a policy; the command to copy must name it."""
    monkeypatch.setattr(examination, "examine_machine", list)
    build_tiny_config("llama").save_pretrained(tmp_path / "m")
    token_bytes = []
    for policy in ("none", "pyramid+gear"):
        run(["doctor", str(tmp_path / "m"), "--json", "--kv", policy])
        report = json.loads(capsys.readouterr().out)
        assert report["model"]["kv_policy"] == policy
        token_bytes += [
            row["kv_bytes"] / row["kv_tokens"] for row in report["model"]["fits"] if row["weights"] == "fp32"
        ]
        advice = next(check["advice"] for check in report["checks"] if check["subject"] == "model")
        assert ("--kv pyramid+gear" in advice) == (policy != "none")
    assert token_bytes[0] > 4 * token_bytes[1]


def test_a_damaged_calibration_is_not_a_lack_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server would refuse to start for it, and no smaller model would help."""
    monkeypatch.setattr(examination, "examine_machine", list)
    monkeypatch.setattr(examination_of_swarm, "examine_address", lambda address, source: [])
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    save_tiny_model("llama", tmp_path / "m")
    path = calibration_path(default_cache_dir() / "kv", resolve_model(str(tmp_path / "m")).model_hash)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert run(["doctor", str(tmp_path / "m"), "--json", "--kv", "gear", "--join", "grpc://127.0.0.1:9"]) == 1
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check["verdict"] == "problem"
    assert "swarm calibrate" in check["seen"] and "smaller model" not in check["advice"]


@pytest.mark.parametrize(
    ("num_blocks", "policy", "is_limited"),
    [(6, "gear", False), (6000, "gear", True), (6000, "none", False)],
)
def test_inputs_that_will_not_fit_while_they_are_read_are_told_of(
    num_blocks: int, policy: str, is_limited: bool
) -> None:
    """The KV tokens planned are those of compressed sessions, and would promise prompts of any length."""
    shape = measure_model_shape(build_tiny_config("llama"))
    shape = replace(shape, blocks=shape.blocks[:1] * num_blocks)
    memory = DeviceMemory(name="main memory", free_bytes=2**36, total_bytes=2**36, is_host=True)
    rows = fit_precisions(shape, "cpu", memory, policy=find_policy(policy))
    finding = judge_fit("m", num_blocks, rows, kv_policy=policy)
    assert finding.verdict == ("warn" if is_limited else "ok")
    told = re.search(r"more than about (\d[\d,]*) tokens of one do not fit 1.00 GiB of KV .* (\d+)MiB", finding.seen)
    assert bool(told) == bool(rows[0].note) == bool(rows[0].to_json()["note"]) == is_limited
    if told is not None:
        exact_bytes = num_blocks * shape.sizes(Precision.FP32, "cpu").kv_bytes_per_token
        longest, enough_bytes = int(told[1].replace(",", "")), int(told[2]) * 2**20
        assert 0.5 * CPU_KV_BYTES < longest * exact_bytes < CPU_KV_BYTES < enough_bytes
        assert find_policy(policy).chunk_tokens * exact_bytes < enough_bytes


def test_a_policy_without_a_model_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says how a model's tokens are counted; ignored, it would look as if it had been examined."""
    monkeypatch.setattr(examination, "examine_machine", list)
    assert run(["doctor", "--kv", "gear"]) == 2
    assert "swarm doctor MODEL --kv gear" in capsys.readouterr().err
