"""`swarm bench prefill`: what a long prompt does to a session that is decoding beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.bench.local_bench import limit_threads, open_bench_swarm, report_to_json, to_result
from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console
from swarm.errors import LengthLimitError

if TYPE_CHECKING:
    from swarm.cli.bench.prefill_measure import PrefillFigures

__all__ = ["prefill"]


def prefill(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="What to serve.")] = "smollm2-135m-instruct",
    servers: Annotated[
        int, typer.Option("--servers", metavar="N", min=1, help="How many servers share the model.")
    ] = 1,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Length of the long prompt.")
    ] = 7900,
    decoder_tokens: Annotated[
        int, typer.Option("--decoder-tokens", metavar="N", min=1, help="Prompt length of the decoding session.")
    ] = 128,
    alone_tokens: Annotated[
        int, typer.Option("--alone-tokens", metavar="N", min=2, help="Tokens it decodes before the prompt comes.")
    ] = 100,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often it is measured.")] = 1,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads of each process.")] = 1,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure the time to the first token of a long prompt, and the gaps of a session that decodes beside it.

    A swarm of its own serves the model. The prompt runs alone first, then beside a session that has been
    decoding; that session's gaps between tokens are compared with those before the prompt came.
    """
    limit_threads(threads)
    prepare_process(verbose)
    with json_only(json):
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.cli.bench.prefill_measure import measure_prefill

            with open_bench_swarm(model, num_servers=servers, num_threads=threads, report=progress) as swarm:
                limit = swarm.model.source.max_positions
                if limit is not None and max(prompt_tokens, decoder_tokens + alone_tokens) + 1 > limit:
                    raise LengthLimitError(
                        f"{model} holds {limit} tokens; lower --prompt-tokens, --decoder-tokens or --alone-tokens"
                    )
                figures = measure_prefill(
                    swarm,
                    num_prompt_tokens=prompt_tokens,
                    num_decoder_tokens=decoder_tokens,
                    num_alone_gaps=alone_tokens,
                    num_rounds=rounds,
                    report=progress,
                )
        settings = {
            "model": model,
            "servers": servers,
            "decoder_tokens": decoder_tokens,
            "rounds": rounds,
            "threads": threads,
        }
        if json:
            print_json(report_to_json("prefill", settings=settings, results=[to_result(figures)]))
        else:
            _print_table(figures)


def _print_table(figures: PrefillFigures) -> None:
    from rich.table import Table

    from swarm.cli.machine import describe_cpu

    console = results_console()
    console.print(
        f"first token of {figures.prompt_tokens} tokens after {figures.seconds_to_first_token_alone:.1f} s alone"
        f" ({figures.prefill_tokens_per_s_alone:.0f} tokens/s), {figures.seconds_to_first_token:.1f} s beside a decoder"
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("decoder's gap, ms", "p50", "p95", "max", "gaps"):
        table.add_column(name, justify="left" if name.startswith("decoder") else "right")
    alone = (figures.gap_p50_ms_alone, figures.gap_p95_ms_alone, figures.gap_max_ms_alone)
    beside = (figures.gap_p50_ms, figures.gap_p95_ms, figures.gap_max_ms)
    table.add_row("alone", *(f"{value:.1f}" for value in alone), str(figures.num_gaps_alone))
    table.add_row("beside the prompt", *(f"{value:.1f}" for value in beside), str(figures.num_gaps))
    table.add_row("ratio", f"{figures.gap_p50_ratio:.2f}", f"{figures.gap_p95_ratio:.2f}", "", "")
    console.print(table)
    console.print(describe_cpu(), style="dim")
