"""Loads a model at several precisions, and times loading and decoding."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from swarm.datatypes import Span
from swarm.models import load_span
from swarm.models.progress import ProgressReporter, SilentProgress
from swarm.models.source import resolve_model
from swarm.weights import Precision, WeightCache

if TYPE_CHECKING:
    from swarm.models import SpanModel
    from swarm.models.source import ModelSource

__all__ = ["LoadTimes", "StepTimes", "load_at", "make_random_model", "time_decoding"]

_BANDWIDTH_BYTES = 512 << 20
"""Read from memory to measure how fast that goes: more than processors' caches hold."""


@dataclass(frozen=True, kw_only=True)
class LoadTimes:
    """Of all blocks, with the model's files in the system's page cache."""

    cold_s: float
    cold_cpu_s: float
    cached_s: float | None
    """From blocks stored by the load before; None where precisions are not stored."""
    cached_cpu_s: float | None


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Of one decoding step of all blocks loaded, without attention to earlier tokens; medians."""

    decode_ms: Mapping[int, float]
    """CPU milliseconds by number of sessions."""
    bandwidth_share: float
    """Of one session's step: weights' bytes per CPU second, to the bytes a second that a plain sum reads."""


def make_random_model(folder: Path, *, hidden_size: int, num_blocks: int) -> None:
    """Write a llama of this width, with random bf16 weights, as a checkpoint of several files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_blocks,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(hidden_size // 256, 1),
        max_position_embeddings=2048,
    )
    config.dtype = torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="300MB")


def load_at(
    source: ModelSource, precision: Precision, device: str, report: ProgressReporter
) -> tuple[SpanModel, LoadTimes]:
    """All blocks at a precision; loaded twice where blocks are stored on disk."""
    span = Span(start=0, end=source.num_blocks)

    def load(cache: WeightCache | None) -> tuple[SpanModel, float, float]:
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        model = load_span(source, span, weights=precision, device=device, weight_cache=cache, report=report)
        return model, time.perf_counter() - started_s, time.process_time() - started_cpu_s

    if precision in (Precision.FP32, Precision.BF16):
        model, cold_s, cold_cpu_s = load(None)
        return model, LoadTimes(cold_s=cold_s, cold_cpu_s=cold_cpu_s, cached_s=None, cached_cpu_s=None)
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder:
        model, cold_s, cold_cpu_s = load(WeightCache(Path(folder), max_bytes=1 << 50))
        del model
        # A cache of its own, as the next process would have.
        model, cached_s, cached_cpu_s = load(WeightCache(Path(folder), max_bytes=1 << 50))
    return model, LoadTimes(cold_s=cold_s, cold_cpu_s=cold_cpu_s, cached_s=cached_s, cached_cpu_s=cached_cpu_s)


def open_random_model(folder: Path, *, hidden_size: int, num_blocks: int) -> ModelSource:
    """As `make_random_model`, found by its folder."""
    make_random_model(folder / "model", hidden_size=hidden_size, num_blocks=num_blocks)
    return resolve_model(str(folder / "model"), cache_dir=folder / "cache", report=SilentProgress())


@torch.inference_mode()
def time_decoding(
    models: Mapping[Precision, SpanModel],
    *,
    session_counts: Sequence[int],
    num_rounds: int,
    report: ProgressReporter,
) -> tuple[dict[Precision, StepTimes], float]:
    """Step times of each model, measured in turns, and how many bytes a second a plain sum reads meanwhile.

    CPU time of this process, which other programs' use of the machine hardly changes; with one thread it is what a
    step takes on an idle machine.
    """
    device = next(iter(models.values())).device
    numbers = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    times_s: dict[tuple[Precision, int], list[float]] = {}
    read_s: list[float] = []
    report.start("timing steps", num_rounds, "rounds")
    for _ in range(num_rounds + 1):  # the first round warms up
        read_s.append(_time_s(numbers.sum, device))
        for precision, model in models.items():
            for count in session_counts:
                hidden = torch.randn(count, 1, model.hidden_size, device=device).to(model.dtype)
                positions = torch.zeros(count, 1, dtype=torch.long, device=device)
                elapsed_s = _time_s(partial(model, hidden, positions), device)
                times_s.setdefault((precision, count), []).append(elapsed_s)
        report.advance(1)
    report.finish()
    read_bytes_per_s = _BANDWIDTH_BYTES / statistics.median(read_s[1:])
    results: dict[Precision, StepTimes] = {}
    for precision, model in models.items():
        medians = {count: statistics.median(times_s[precision, count][1:]) for count in session_counts}
        per_s = model.count_weights().size_bytes / medians[min(session_counts)]
        results[precision] = StepTimes(
            decode_ms={count: value * 1e3 for count, value in medians.items()},
            bandwidth_share=per_s / read_bytes_per_s,
        )
    return results, read_bytes_per_s


def _time_s(run: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started_s
    started_s = time.process_time()
    run()
    return time.process_time() - started_s
