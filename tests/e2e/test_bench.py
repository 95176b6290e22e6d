"""The benchmarks of a whole swarm run and print what they promise."""

from __future__ import annotations

from pathlib import Path

from tests.cli_processes import run_swarm


def test_concurrency_measures_two_clients(tiny_model: Path) -> None:
    """Every figure comes from real servers: a benchmark nobody runs soon measures nothing."""
    done = run_swarm(
        *("bench", "concurrency", "--model", tiny_model, "--servers", "2", "--clients", "1,2"),
        *("--prompt-tokens", "20", "--new-tokens", "6", "--rounds", "1", "--json"),
        timeout_s=110,
    )
    assert done.exit_code == 0, done.err
    report = done.json
    assert report["bench"] == "concurrency"
    assert {"hardware", "versions", "command", "results"} <= report.keys()
    one, two = report["results"]
    assert (one["num_clients"], two["num_clients"]) == (1, 2)
    assert one["ratio_to_one_client"] == 1.0
    # Two servers, 26 tokens per client in pages of 16.
    assert two["kv_used_bytes"] == 2 * one["kv_used_bytes"] > 0
    assert 0 < two["kv_wasted_ratio"] < 0.5
    assert two["kv_shared_bytes"] == 0


def test_prefill_measures_gaps(tiny_model: Path) -> None:
    """As above."""
    done = run_swarm(
        *("bench", "prefill", "--model", tiny_model, "--prompt-tokens", "400", "--decoder-tokens", "16"),
        *("--alone-tokens", "20", "--json"),
        timeout_s=110,
    )
    assert done.exit_code == 0, done.err
    (result,) = done.json["results"]
    assert result["prompt_tokens"] == 400
    assert result["num_gaps_alone"] >= 20
    assert result["gap_p95_ms"] > 0


def test_a_prompt_beyond_the_context_is_refused(tiny_model: Path) -> None:
    """One sentence that names the limit and the option."""
    done = run_swarm("bench", "prefill", "--model", tiny_model, "--prompt-tokens", "600", timeout_s=110)
    assert done.exit_code == 2
    assert "512" in done.sentence and "--prompt-tokens" in done.sentence
