"""`swarm bench failover`: how long a session stands still when servers are lost at chosen tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.bench.local_bench import limit_threads, report_to_json
from swarm.cli.failures import FAILURE
from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import complain, json_only, print_json, results_console

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["failover"]


def failover(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="What to serve.")] = "smollm2-135m-instruct",
    cases: Annotated[
        str,
        typer.Option(
            "--cases",
            metavar="NAME,...",
            help="undisturbed, kill, freeze, two, replacement, split, gap, leave.",
            show_default="all",
        ),
    ] = "",
    tokens: Annotated[
        int,
        typer.Option("--tokens", metavar="N", min=1, max=40, help="At how many tokens each server is killed."),
    ] = 12,
    deadline: Annotated[
        float,
        typer.Option("--deadline", metavar="SECONDS", min=1.0, help="After which a step must end with a clear error."),
    ] = 120.0,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads of each process.")] = 1,
    logs: Annotated[
        Path | None,
        typer.Option("--logs", metavar="FOLDER", help="Where servers log what they do.", show_default="nowhere"),
    ] = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Kill each server of a route at each of some tokens: first, last, where pages end. Lose servers in other ways.

    A swarm of its own serves the model: three spans, two servers for each. Every answer is compared with that of
    plain transformers. Ends with exit code 1 when one differs.
    """
    limit_threads(threads)
    prepare_process(verbose)
    with json_only(json):
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.cli.bench.failover_measure import (
                FailoverSettings,
                check_cases,
                loss_spans,
                measure_failover,
                results_to_json,
            )
            from swarm.cli.chaos.scripts import LOSS_SCRIPT
            from swarm.cli.chaos.trial_swarm import open_trial_swarm
            from swarm.models import resolve_model

            settings = FailoverSettings(cases=check_cases(cases), num_tokens=tokens)
            num_blocks = resolve_model(model, report=progress).num_blocks
            with open_trial_swarm(
                model,
                loss_spans(num_blocks),
                scripts=[LOSS_SCRIPT],
                deadline_s=deadline,
                with_proxies=False,
                report=progress,
                num_threads=threads,
                log_folder=logs,
            ) as trial:
                results = results_to_json(measure_failover(trial, settings, report=progress))
        if json:
            asked = {"model": model, "tokens": tokens, "deadline_s": deadline, "threads": threads}
            print_json(report_to_json("failover", settings=asked, results=results))
        else:
            _print_table(results)
        if not all(result["identical"] for result in results):
            complain("an answer differs from that of plain transformers, or did not come; see the report")
            raise typer.Exit(FAILURE)


def _print_table(results: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from swarm.cli.machine import describe_cpu

    console = results_console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = (
        "case",
        "losses",
        "identical",
        "rest kept",
        "wrongly blamed",
        "median s",
        "p95 s",
        "max s",
        "recomputed tokens",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "case" else "right")
    for result in results:
        table.add_row(
            result["case"],
            str(result["losses"]),
            "yes" if result["identical"] else "NO",
            "yes" if result["rest_kept"] else "no",
            str(result["wrongly_blamed"]),
            *(f"{result[name]:.2f}" for name in ("stall_median_s", "stall_p95_s", "stall_max_s")),
            ", ".join(map(str, result["recomputed_tokens"])),
        )
    console.print(table)
    console.print(describe_cpu(), style="dim")
