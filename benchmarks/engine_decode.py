"""The engine alone, without network, on random weights of a large model's layer shape; made for a GPU.

python benchmarks/engine_decode.py [--layers 4] [--context 1024] [--sessions 1,8,64,256] [--device cuda] [--json]

Needs torch, transformers and numpy only. The default shape is that of a 70B model's layers (hidden size
8192, 64 heads, 8 KV heads, MLP 28672) in bf16.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.datatypes import Span
from swarm.models.anatomy import cut_config, keep_span
from swarm.models.span import SpanModel
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.session_memory import MemoryConfig
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep

PREFILL_STEP_TOKENS = 2048
WHOLE_MODEL_LAYERS = 80


def build_span(arguments: argparse.Namespace) -> SpanModel:
    """Layers of the wanted shape with random weights, made on the device."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=131_072,
    )
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    span = Span(start=0, end=arguments.layers)
    anatomy = keep_span(model, model.config, span)
    cut_config(model.config, span)
    loaded = SpanModel(model, anatomy, span=span, layer_types=("full_attention",) * arguments.layers)
    loaded.eval()
    return loaded


class Bench:
    """Sessions of one backend, all of the same length."""

    def __init__(self, model: SpanModel, backend: RaggedBackend) -> None:
        self._model = model
        self._backend = backend
        self._generator = torch.Generator().manual_seed(0)

    def run(self, num_sessions: int, context: int, num_steps: int) -> dict[str, Any]:
        """Prefill all sessions, then time decoding steps; every session is given up at the end."""
        names = [index.to_bytes(4, "big") for index in range(num_sessions)]
        started_s = time.perf_counter()
        batch: list[StepWork] = []
        for name in names:
            for start in range(0, context, 512):
                batch.append(self._work(name, start, min(512, context - start)))
                # One session's chunks depend on each other, so each step holds one of them at most.
                is_same = start + 512 < context
                if is_same or sum(len(work.hidden) for work in batch) >= PREFILL_STEP_TOKENS:
                    self._step(batch)
                    batch = []
        if batch:
            self._step(batch)
        prefill_s = time.perf_counter() - started_s
        times_s: list[float] = []
        for step in range(num_steps + 3):
            works = [self._work(name, context + step, 1) for name in names]
            started_s = time.perf_counter()
            self._step(works)
            times_s.append(time.perf_counter() - started_s)
        for name in names:
            self._backend.forget((name, 1))
        step_s = statistics.median(times_s[3:])
        num_layers = self._model.num_layers
        return {
            "num_sessions": num_sessions,
            "context_tokens": context,
            "decode_step_ms": round(step_s * 1e3, 3),
            "decode_step_ms_per_layer": round(step_s * 1e3 / num_layers, 3),
            "decode_tokens_per_s": round(num_sessions / step_s, 1),
            "decode_tokens_per_s_of_80_layers": round(num_sessions / step_s * num_layers / WHOLE_MODEL_LAYERS, 1),
            "prefill_tokens_per_s": round(num_sessions * context / prefill_s, 1),
        }

    def _work(self, name: bytes, start: int, count: int) -> StepWork:
        hidden = torch.randn(count, self._model.hidden_size, generator=self._generator).to(self._model.dtype)
        item = SequenceStep(0, 0, start, count)
        return StepWork((name, 1), self._model.span, [item], hidden, lambda output, error: None)

    def _step(self, works: list[StepWork]) -> None:
        for result in self._backend.run_steps(works):
            if not isinstance(result, torch.Tensor):
                raise SystemExit(f"error: a step failed: {result}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=28_672)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sessions", default="1,8,64,256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kv-memory-gib", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    counts = [int(part) for part in arguments.sessions.split(",")]

    model = build_span(arguments)
    backend = RaggedBackend(
        model, memory_bytes=int(arguments.kv_memory_gib * 2**30), config=MemoryConfig(page_tokens=16)
    )
    bench = Bench(model, backend)
    bench.run(min(counts), 64, 2)  # libraries choose their kernels at the first call
    results: list[dict[str, Any]] = []
    for count in counts:
        for in_groups in (True, False):
            if count == 1 and in_groups:
                continue
            backend.attends_in_groups = in_groups
            results.append(
                {"attention": "grouped" if in_groups else "one by one"}
                | bench.run(count, arguments.context, arguments.steps)
            )
    is_cuda = arguments.device.startswith("cuda")
    report = {
        "bench": "engine-decode",
        "hardware": torch.cuda.get_device_name() if is_cuda else platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {name: getattr(arguments, name) for name in ("layers", "hidden", "heads", "kv_heads", "mlp")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "results": results,
    }
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{report['hardware']}, torch {torch.__version__}, {report['dtype']}, {report['shape']}")
    names = list(results[0])
    print(" | ".join(names))
    for result in results:
        print(" | ".join(str(result[name]).rjust(len(name)) for name in names))


if __name__ == "__main__":
    main()
