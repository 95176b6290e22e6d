"""`swarm bench single-stream`: what distribution costs one stream of tokens, against plain transformers."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console

if TYPE_CHECKING:
    from swarm.cli.bench.single_stream_measure import CaseFigures

__all__ = ["single_stream"]


def single_stream(
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often each case is measured.")] = 5,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Length of the prompt.")
    ] = 32,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", min=3, help="Tokens generated in each measurement.")
    ] = 64,
    hops: Annotated[
        list[int] | None,
        typer.Option(
            "--hops",
            metavar="N",
            min=1,
            help="Measure this many hops; may be repeated.",
            show_default="1, 2, 3",
        ),
    ] = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure milliseconds per token of the built-in model: plain transformers, then 1, 2 and 3 hops.

    All in one run, in turns, one thread in every process, the same greedy tokens. CPU time is summed over
    all processes that take part, so it holds on busy machines too, where wall time does not.
    """
    # Before torch is imported: threads that wait for work would count as CPU time.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    prepare_process(verbose)
    with json_only(json):
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.cli.bench.single_stream_measure import measure
            from swarm.cli.machine import hardware_to_json, versions_to_json

            figures = measure(
                hop_counts=sorted(set(hops or (1, 2, 3))),
                num_rounds=rounds,
                num_prompt_tokens=prompt_tokens,
                num_new_tokens=new_tokens,
                report=progress,
            )
        results = [case.to_json() for case in figures]
        report: dict[str, Any] = {
            "bench": "single-stream",
            "hardware": hardware_to_json(),
            "versions": versions_to_json(),
            "command": " ".join(["swarm", *sys.argv[1:]]),
            "settings": {"rounds": rounds, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "threads": 1},
            "results": results,
        }
        if json:
            print_json(report)
        else:
            _print_table(figures, report)


def _print_table(figures: list[CaseFigures], report: dict[str, Any]) -> None:
    from rich.table import Table

    console = results_console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("case")
    names = ("wall ms/token", "CPU ms/token", "of it client", "CPU ratio", "ms/hop outside blocks", "best")
    for name in names:
        table.add_column(name, justify="right")
    for case in figures:
        outside = (case.wall_ms_outside_blocks_per_hop, case.wall_ms_outside_blocks_per_hop_best)
        table.add_row(
            case.case,
            f"{case.wall_ms_per_token:.2f}",
            f"{case.cpu_ms_per_token:.2f}",
            f"{case.client_cpu_ms_per_token:.2f}",
            f"{case.cpu_ratio_to_local:.3f}",
            *("" if value_ms is None else f"{value_ms:.2f}" for value_ms in outside),
        )
    console.print(table)
    hardware = report["hardware"]
    console.print(f"{hardware['cpu']} ({hardware['cpu_features']}), one thread per process", style="dim")
