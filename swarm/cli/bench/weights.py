"""`swarm bench weights`: what each precision of weights costs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.bench.local_bench import limit_threads, report_to_json
from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.cli.bench.weights_quality import Quality
    from swarm.models.progress import ProgressReporter
    from swarm.models.source import ModelSource
    from swarm.weights import Precision

__all__ = ["weights"]

_SESSION_COUNTS = (1, 8, 64)


def weights(
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="What to load, time and read text with.")
    ] = "smollm2-135m-instruct",
    precisions: Annotated[
        str, typer.Option("--weights", metavar="LIST", help="Precisions to compare; fp32 is always among them.")
    ] = "fp32,bf16,int8,nf4",
    hidden: Annotated[
        int, typer.Option("--hidden", metavar="N", min=0, help="Width of a random model to time as well; 0 for none.")
    ] = 2048,
    blocks: Annotated[
        int, typer.Option("--blocks", metavar="N", min=1, help="Blocks of the random model: 12 take 1 GiB in bf16.")
    ] = 12,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=0, help="Tokens of real text to predict; 0 for none.")
    ] = 20_480,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text (or .gz).", show_default="Python's language reference"),
    ] = None,
    window: Annotated[int, typer.Option("--window", metavar="N", min=2, help="Tokens that are read together.")] = 512,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often steps are timed.")] = 7,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu or cuda:0.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads.")] = 1,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Compare precisions: bytes per weight, load times, decoding steps of 1, 8 and 64 sessions, and perplexity.

    Times are CPU times of this process, measured in turns, so they hold on busy machines too. Steps are those of
    sessions without earlier tokens, because only weights differ. Perplexity is that of real text, against fp32.
    """
    limit_threads(threads)
    prepare_process(verbose)
    with json_only(json):
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            import torch

            from swarm.models import resolve_model
            from swarm.weights import Precision, parse_precision

            torch.set_num_threads(threads)
            chosen = [Precision.FP32]
            chosen += [found for found in map(parse_precision, precisions.split(",")) if found is not Precision.FP32]
            if len(set(chosen)) != len(chosen):
                raise BadInputError(f"--weights {precisions} names a precision twice")
            source = resolve_model(model, report=progress)
            results = _measure_model(source, chosen, device, rounds, tokens, text, window, progress)
            if hidden:
                results += _measure_random(hidden, blocks, chosen, device, rounds, progress)
        settings = {"model": model, "rounds": rounds, "threads": threads, "device": device, "window_tokens": window}
        settings["text"] = "Python's language reference" if text is None else text.name
        if json:
            print_json(report_to_json("weights", settings=settings, results=results))
        else:
            _print_table(results)


def _measure_model(
    source: ModelSource,
    precisions: list[Precision],
    device: str,
    rounds: int,
    num_tokens: int,
    text: Path | None,
    window_tokens: int,
    report: ProgressReporter,
) -> list[dict[str, Any]]:
    from swarm.cli.bench.weights_quality import compare_losses, cut_windows, measure_losses, read_text
    from swarm.models import load_tokenizer
    from swarm.weights import Precision

    windows = []
    if num_tokens:
        tokenizer = load_tokenizer(source.name, report=report)
        windows = cut_windows(tokenizer, read_text(text), num_tokens=num_tokens, window_tokens=window_tokens)
    models, results = _time_all(source, source.name, precisions, device, rounds, report)
    if windows:
        spans = {str(precision): models[precision] for precision in precisions}
        losses = measure_losses(source, spans, windows, report)
        reference = losses[str(Precision.FP32)]
        for result in results:
            quality = compare_losses(losses[result["weights"]], reference, tokens_per_window=window_tokens - 1)
            result |= _quality_to_json(quality)
    return results


def _measure_random(
    hidden_size: int, num_blocks: int, precisions: list[Precision], device: str, rounds: int, report: ProgressReporter
) -> list[dict[str, Any]]:
    import tempfile

    from swarm.cli.bench.weights_measure import open_random_model

    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as folder:
        report.start("making a random model", None, "")
        source = open_random_model(Path(folder), hidden_size=hidden_size, num_blocks=num_blocks)
        _, results = _time_all(source, f"random llama {hidden_size}", precisions, device, rounds, report)
    return results


def _time_all(
    source: ModelSource, case: str, precisions: list[Precision], device: str, rounds: int, report: ProgressReporter
) -> tuple[dict[Precision, Any], list[dict[str, Any]]]:
    """Models by precision, and a result for each."""
    from swarm.cli.bench.weights_measure import load_at, time_decoding
    from swarm.weights import Precision

    models: dict[Precision, Any] = {}
    loads = {}
    for precision in precisions:
        models[precision], loads[precision] = load_at(source, precision, device, report)
    steps, read_bytes_per_s = time_decoding(models, session_counts=_SESSION_COUNTS, num_rounds=rounds, report=report)
    results: list[dict[str, Any]] = []
    for precision in precisions:
        account = models[precision].count_weights()
        weight_format = models[precision].weight_format
        load, step = loads[precision], steps[precision]
        fp32 = steps[Precision.FP32]
        results.append(
            {
                "case": case,
                "weights": str(precision),
                "format": None if weight_format is None else weight_format.summary,
                "hidden_size": models[precision].hidden_size,
                "num_blocks": source.num_blocks,
                "num_weights": account.num_weights,
                "bytes_per_weight": round(account.bytes_per_weight, 4),
                "load_cold_s": round(load.cold_s, 3),
                "load_cold_cpu_s": round(load.cold_cpu_s, 3),
                "load_cached_s": None if load.cached_s is None else round(load.cached_s, 3),
                "load_cached_cpu_s": None if load.cached_cpu_s is None else round(load.cached_cpu_s, 3),
                **{f"decode_ms_{count}": round(step.decode_ms[count], 3) for count in _SESSION_COUNTS},
                **{
                    f"decode_ratio_to_fp32_{count}": round(step.decode_ms[count] / fp32.decode_ms[count], 3)
                    for count in _SESSION_COUNTS
                },
                "memory_bandwidth_share": round(step.bandwidth_share, 3),
                "read_gb_per_s": round(read_bytes_per_s / 1e9, 2),
            }
        )
    return models, results


def _quality_to_json(quality: Quality) -> dict[str, Any]:
    return {
        "num_tokens": quality.num_tokens,
        "perplexity": round(quality.perplexity, 4),
        "perplexity_ratio": round(quality.perplexity_ratio, 5),
        "perplexity_ratio_standard_error": round(quality.ratio_standard_error, 5),
    }


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from swarm.cli.machine import describe_cpu

    console = results_console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("case")
    table.add_column("weights")
    counts = [f"{count} tok ms" for count in _SESSION_COUNTS]
    for name in ("bytes/weight", "cold load s", "cached s", *counts, "of bandwidth", "perplexity"):
        table.add_column(name, justify="right")
    for result in results:
        cached_s, ratio = result["load_cached_s"], result.get("perplexity_ratio")
        table.add_row(
            result["case"],
            result["weights"],
            f"{result['bytes_per_weight']:.3f}",
            f"{result['load_cold_s']:.1f}",
            "" if cached_s is None else f"{cached_s:.2f}",
            *(f"{result[f'decode_ms_{count}']:.1f}" for count in _SESSION_COUNTS),
            f"{result['memory_bandwidth_share']:.0%}",
            "" if ratio is None else f"× {ratio:.4f} ± {result['perplexity_ratio_standard_error']:.4f}",
        )
    console.print(table)
    console.print(f"{describe_cpu()}; a plain sum reads {results[0]['read_gb_per_s']:.1f} GB/s", style="dim")
