"""Layers of a 70B model's shape at each precision: one decoding step against the limit that memory sets; for a GPU.

python benchmarks/weights_layer.py [--layers 4] [--weights bf16,int8,nf4,nf4-double] [--device cuda] [--json]

Needs torch, transformers and bitsandbytes only. Random weights; the default shape is that of a 70B model's layers
(hidden size 8192, 64 heads, 8 KV heads, MLP 28672). A step is measured twice: launched operation by operation, and
replayed from a CUDA graph, which leaves out what launching costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from swarm.datatypes import Span
from swarm.models.anatomy import cut_config, keep_span
from swarm.models.span import SpanModel
from swarm.weights.blocks import quantise_block
from swarm.weights.choice import format_for
from swarm.weights.formats import WeightFormat
from swarm.weights.precision import Precision

READ_BYTES = 4 << 30
"""Summed up to measure memory; a GPU's cache holds a hundredth of it."""
NUM_WARM_UP = 5


def build_span(arguments: argparse.Namespace, weights: str) -> SpanModel:
    """Layers of the wanted shape; each is put into few bits before the next is made."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.mlp,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
    )
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    span = Span(start=0, end=arguments.layers)
    anatomy = keep_span(model, model.config, span)
    cut_config(model.config, span)
    weight_format: WeightFormat | None = None
    if weights != "bf16":
        precision = Precision(weights.removesuffix("-double"))
        weight_format = format_for(precision, arguments.device, double_quantised=weights.endswith("-double"))
    if weight_format is not None:
        for block in anatomy.stack:
            quantise_block(block, weight_format)
    loaded = SpanModel(
        model,
        anatomy,
        span=span,
        layer_types=("full_attention",) * arguments.layers,
        dtype=dtype,
        weight_format=weight_format,
    )
    loaded.eval()
    return loaded


def seconds_of(run: Callable[[], object], device: torch.device, num_rounds: int) -> float:
    """Median time of one call, device included."""
    times_s: list[float] = []
    for _ in range(NUM_WARM_UP + num_rounds):
        wait_for(device)
        started_s = time.perf_counter()
        run()
        wait_for(device)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s[NUM_WARM_UP:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bytes_per_s(device: torch.device, num_rounds: int) -> float:
    """How fast a plain sum reads memory."""
    size_bytes = READ_BYTES if device.type == "cuda" else READ_BYTES >> 4
    numbers = torch.ones(size_bytes // 4, device=device)
    return size_bytes / seconds_of(numbers.sum, device, num_rounds)


def record_graph(run: Callable[[], object]) -> Callable[[], object] | None:
    """`run` as a CUDA graph; None where its operations can not be recorded."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    except RuntimeError as error:
        print(f"not recorded as a CUDA graph: {str(error).splitlines()[0]}")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=28_672)
    parser.add_argument("--weights", default="bf16,int8,nf4,nf4-double")
    parser.add_argument("--sessions", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    limit_bytes_per_s = read_bytes_per_s(device, arguments.rounds)
    results: list[dict[str, Any]] = []
    for weights in arguments.weights.split(","):
        model = build_span(arguments, weights)
        account = model.count_weights()
        for num_sessions in map(int, arguments.sessions.split(",")):
            hidden = torch.randn(num_sessions, 1, model.hidden_size, device=device, dtype=model.dtype)
            positions = torch.zeros(num_sessions, 1, dtype=torch.long, device=device)

            def step(
                model: SpanModel = model, hidden: torch.Tensor = hidden, positions: torch.Tensor = positions
            ) -> torch.Tensor:
                return model(hidden, positions)

            with torch.inference_mode():
                launched_s = seconds_of(step, device, arguments.rounds)
                # LLM.int8 looks at its inputs on the host, which no graph can record.
                is_recordable = device.type == "cuda" and not weights.startswith("int8")
                replay = record_graph(step) if is_recordable else None
                replayed_s = None if replay is None else seconds_of(replay, device, arguments.rounds)
            best_s = launched_s if replayed_s is None else min(launched_s, replayed_s)
            results.append(
                {
                    "weights": weights,
                    "num_sessions": num_sessions,
                    "bytes_per_weight": round(account.bytes_per_weight, 4),
                    "ms_per_layer": round(launched_s * 1e3 / arguments.layers, 4),
                    "ms_per_layer_from_graph": None
                    if replayed_s is None
                    else round(replayed_s * 1e3 / arguments.layers, 4),
                    "limit_ms_per_layer": round(account.size_bytes / limit_bytes_per_s * 1e3 / arguments.layers, 4),
                    "memory_bandwidth_share": round(account.size_bytes / limit_bytes_per_s / best_s, 3),
                }
            )
        del model
    report = {
        "bench": "weights-layer",
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {name: getattr(arguments, name) for name in ("layers", "hidden", "heads", "kv_heads", "mlp")},
        "read_gb_per_s": round(limit_bytes_per_s / 1e9, 1),
        "results": results,
    }
    if arguments.json:
        print(json.dumps(report))
        return
    print(f"{report['hardware']}, memory is read at {report['read_gb_per_s']} GB/s; ms per layer")
    for result in results:
        print(
            f"{result['weights']:>10} {result['num_sessions']:3d} sessions: {result['ms_per_layer']:.3f} launched, "
            f"{result['ms_per_layer_from_graph'] or float('nan'):.3f} from a graph, "
            f"{result['limit_ms_per_layer']:.3f} at the limit ({result['memory_bandwidth_share']:.0%})"
        )


if __name__ == "__main__":
    main()
