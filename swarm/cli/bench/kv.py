"""`swarm bench kv`: what KV policies save and what they cost in quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.bench.local_bench import limit_threads, report_to_json, to_result
from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console, say

if TYPE_CHECKING:
    from swarm.cli.bench.kv_figures import KVFigures

__all__ = ["kv"]

_DEFAULT_POLICIES = "pyramidinfer,gear-published,gear-uncalibrated,pyramid,gear,pyramid+gear,smallest"
_NUM_CONTROLS = 3
"""Of the pruning policies asked for, the last ones are also run with random tokens."""


def kv(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="What to judge by.")] = "smollm2-135m-instruct",
    policies: Annotated[
        str, typer.Option("--policies", metavar="A,B", help="Policies or presets, with commas between.")
    ] = _DEFAULT_POLICIES,
    context: Annotated[int, typer.Option("--context", metavar="N", min=256, help="Tokens that are compressed.")] = 2048,
    documents: Annotated[int, typer.Option("--documents", metavar="N", min=1, help="Texts that are continued.")] = 4,
    continued: Annotated[
        int, typer.Option("--continued", metavar="N", min=16, help="Tokens of each continuation.")
    ] = 192,
    code_texts: Annotated[
        int, typer.Option("--code-texts", metavar="N", min=0, help="Texts with 8 hidden codes each.")
    ] = 4,
    greedy: Annotated[
        int, typer.Option("--greedy", metavar="N", min=0, help="Tokens of a greedy answer to each text.")
    ] = 0,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="Texts to use (again for more); by default Python's own sources."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="Instead of the one servers would find.")
    ] = None,
    control: Annotated[bool, typer.Option("--control/--no-control", help="Also keep random tokens.")] = True,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Remember figures of single texts there, and use what is there."),
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="Also time the engine and count its pages, for each policy.")
    ] = True,
    engine_codes: Annotated[
        int,
        typer.Option("--engine-codes", metavar="N", min=0, help="Ask the engine, too, for the codes of so many texts."),
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FOLDER", help="Draw the pictures of docs/kv-cache.md there.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads.")] = 1,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure bytes, perplexity, divergence and retrieval under KV policies, against a 16-bit full cache.

    Contexts are compressed before what follows them is seen: the rest of a text, or questions about codes hidden in it.
    `--policies` also takes methods as published, to compare with; a wrong name lists them.
    """
    limit_threads(threads)
    prepare_process(verbose)
    with json_only(json):
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            import torch

            from swarm.cli.bench.kv_figures import StoredShape, sum_up
            from swarm.cli.bench.kv_measure import FULL, measure_codes, measure_documents
            from swarm.cli.bench.kv_methods import build_methods
            from swarm.cli.bench.kv_record import ScoreRecord
            from swarm.cli.bench.kv_texts import hide_codes, load_texts, take_documents
            from swarm.kvpolicy.calibration_file import find_calibration, read_calibration
            from swarm.kvpolicy.reference_model import load_reference_model
            from swarm.models.source import default_cache_dir, load_tokenizer, resolve_model

            torch.set_num_threads(threads)
            source = resolve_model(model, report=progress)
            kept_scores = ScoreRecord(record, str(source.model_hash))
            measured = (
                read_calibration(calibration, model_hash=source.model_hash)
                if calibration is not None
                else find_calibration(source.model_hash, cache_dir=default_cache_dir())
            )
            if measured is None:
                say(f"{model} was never calibrated; `swarm calibrate` would do better than the default budgets")
            tokenizer: Any = load_tokenizer(model, report=progress)

            def tokenize(piece: str) -> list[int]:
                token_ids: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                return token_ids

            texts = [tokenize(piece) for piece in load_texts(text or [])]
            filler = [token for piece in reversed(texts) for token in piece]
            continuations = take_documents(
                texts, num_documents=documents, context_tokens=context, continued_tokens=continued
            )
            questions = [
                hide_codes(filler, tokenize, context_tokens=context, num_codes=8, seed=100 + index)
                for index in range(code_texts)
            ]
            reference = load_reference_model(source)
            methods = build_methods(
                reference,
                [name.strip() for name in policies.split(",")],
                measured,
                num_controls=_NUM_CONTROLS if control else 0,
            )
            document_scores = measure_documents(
                reference, methods, continuations, kept_scores, greedy_tokens=greedy, report=progress
            )
            code_scores = measure_codes(reference, methods, questions, kept_scores, report=progress)
            size = reference.shape
            shape = StoredShape(
                num_heads=size.num_layers * size.num_kv_heads,
                full_bytes_per_token=2 * size.num_layers * size.num_kv_heads * (size.key_dim + size.value_dim),
                row_bytes=reference.model.config.hidden_size * reference.model.dtype.itemsize,
            )
            figures = [sum_up(method.name, document_scores, code_scores, shape, full=FULL) for method in methods]
            if engine:
                from swarm.cli.bench.kv_engine import measure_engine

                figures = measure_engine(
                    source,
                    reference,
                    figures,
                    methods,
                    measured,
                    context=continuations[0].context,
                    codes=questions[:engine_codes],
                    full_digits=[each.digits for each in code_scores[FULL][:engine_codes]],
                    record=kept_scores,
                    report=progress,
                )
        if plot is not None:
            from swarm.cli.bench.kv_pictures import draw_pictures

            draw_pictures(plot, figures, measured.curve if measured is not None else None)
        settings = {"model": model, "documents": documents, "continued": continued, "code_texts": code_texts}
        if json:
            print_json(report_to_json("kv", settings=settings, results=[to_result(each) for each in figures]))
        else:
            _print_table(figures)


def _print_table(figures: Sequence[KVFigures]) -> None:
    from rich.table import Table

    from swarm.cli.machine import describe_cpu

    console = results_console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in (
        "policy",
        "KV bytes",
        "times",
        "perplexity",
        "±",
        "KL, nats",
        "±",
        "top-1",
        "digits",
        "codes",
        "step",
        "8",
    ):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for each in figures:
        table.add_row(
            each.policy,
            f"{each.kv_ratio:.1%}",
            f"{each.times_smaller:.1f}",
            f"{each.perplexity_ratio - 1:+.1%}",
            f"{each.perplexity_ratio_error:.1%}",
            f"{each.mean_kl_nats:.4f}",
            f"{each.mean_kl_nats_error:.4f}",
            f"{each.top_token_agreement:.3f}",
            "" if each.retrieval_ratio is None else f"{each.retrieval_ratio:.1%}",
            "" if each.retrieval_exact_ratio is None else f"{each.retrieval_exact_ratio:.1%}",
            "" if each.step_time_ratio is None else f"{each.step_time_ratio:.2f}",
            "" if each.step_time_ratio_8_sessions is None else f"{each.step_time_ratio_8_sessions:.2f}",
        )
    console.print(table)
    first = figures[0]
    console.print(
        f"contexts of {first.context_tokens} tokens, {first.num_documents} texts,"
        f" {first.num_code_texts} texts with codes; step: time of a decoding step against `none`, 1 and 8 sessions;"
        f" {describe_cpu()}",
        style="dim",
    )
