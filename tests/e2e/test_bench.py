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


def test_weights_compares_every_precision(tiny_model: Path) -> None:
    """As above: loading cold and from the disk, timing, and reading text, at each precision."""
    done = run_swarm(
        *("bench", "weights", "--model", tiny_model, "--hidden", "128", "--blocks", "1", "--rounds", "1"),
        *("--tokens", "500", "--window", "100", "--json"),
        timeout_s=110,
    )
    assert done.exit_code == 0, done.err
    results = done.json["results"]
    assert [result["weights"] for result in results] == ["fp32", "bf16", "int8", "nf4"] * 2
    for result in results[:4]:
        assert result["num_tokens"] >= 500
        assert 0.5 < result["perplexity_ratio"] < 2
    for result in results:
        assert result["decode_ms_1"] > 0 and result["decode_ms_64"] > 0
        assert (result["load_cached_s"] is None) == (result["weights"] in ("fp32", "bf16"))
    assert results[7]["bytes_per_weight"] < 0.65
