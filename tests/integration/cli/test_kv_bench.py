"""`swarm bench kv` from the command line, on a tiny model: the promised keys, a record, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.cli.app import run
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

PROMISED = (
    "policy",
    "context_tokens",
    "kv_ratio",
    "perplexity_ratio",
    "mean_kl_nats",
    "retrieval_ratio",
    "step_time_ratio",
    "prefill_wire_bytes_per_hop",
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_num_threads(1)
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    save_tiny_model("llama", folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {number} says that {number * 7919} is a number.\n" for number in range(400)))
    return path


def measure(model: Path, text: Path, *more: str) -> int:
    sizes = ["--context", "1024", "--documents", "2", "--continued", "20", "--code-texts", "1", "--greedy", "2"]
    return run(["bench", "kv", "--model", str(model), "--text", str(text), *sizes, *more])


def test_the_report_has_what_was_promised(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others read it by these keys; every figure is against the 16-bit full cache."""
    policies = "pyramid+gear,gear-published,pyramidinfer-hidden"
    assert measure(model, text, "--policies", policies, "--no-engine", "--json") == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["bench"] == "kv" and {"hardware", "versions", "command"} <= report.keys()
    results = {each["policy"]: each for each in report["results"]}
    assert list(results) == ["fp8", *policies.split(","), "pyramid+gear, random tokens"]
    for each in results.values():
        assert set(PROMISED) <= each.keys()
        assert each["context_tokens"] == 1024 and each["num_documents"] == 2
        assert 0 < each["kv_ratio"] < 1 and each["mean_kl_nats"] > 0 and each["retrieval_ratio"] is not None
        assert each["greedy_kl_nats"] is not None
    full_rows = 1024 * 32 * 4
    assert results["pyramid+gear"]["prefill_wire_bytes_per_hop"] == full_rows
    assert results["pyramidinfer-hidden"]["prefill_wire_bytes_per_hop"] < full_rows


def test_a_second_run_takes_figures_from_the_record(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of half an hour must survive a closed lid."""
    record = tmp_path / "record.jsonl"
    options = ["--policies", "gear", "--no-control", "--no-engine", "--record", str(record)]
    assert measure(model, text, *options) == 0
    first = capsys.readouterr().out

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("swarm.cli.bench.kv_measure.read", fail)
    assert measure(model, text, *options) == 0
    assert capsys.readouterr().out == first


def test_pictures_are_drawn_where_matplotlib_is(model: Path, text: Path, tmp_path: Path) -> None:
    """They stand in the documentation, and must come from the figures beside them."""
    pytest.importorskip("matplotlib")
    options = ["--policies", "gear", "--no-control", "--no-engine", "--plot", str(tmp_path / "pictures")]
    assert measure(model, text, *options) == 0
    assert (tmp_path / "pictures" / "kv-quality.svg").read_text().startswith("<?xml")


def test_the_engine_is_timed_and_its_pages_counted(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is claimed of a policy must hold for servers, not for a reference that nobody runs."""
    options = ["--policies", "pyramid+gear", "--no-control", "--engine", "--engine-codes", "1", "--json"]
    assert measure(model, text, *options) == 0
    _, figures = json.loads(capsys.readouterr().out)["results"]
    assert figures["step_time_ratio"] > 0 and figures["step_time_ratio_8_sessions"] > 0
    # Whole pages of a tiny model are coarse; and a page is never smaller than what it holds.
    assert figures["kv_ratio"] <= figures["engine_kv_ratio"] < 2 * figures["kv_ratio"]
    # Both answer the same questions over the same kept tokens.
    assert figures["engine_retrieval_ratio"] == pytest.approx(figures["retrieval_ratio"], abs=0.15)
