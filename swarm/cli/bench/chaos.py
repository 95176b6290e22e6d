"""`swarm bench chaos`: whether sessions get the right tokens while servers are killed, frozen and cut off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.bench.local_bench import limit_threads, report_to_json
from swarm.cli.failures import FAILURE
from swarm.cli.local_swarm import split_blocks
from swarm.cli.options import JsonOption, VerboseOption, parse_blocks
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import complain, json_only, print_json, results_console, say
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm.datatypes import Span

__all__ = ["chaos", "parse_servers"]


def chaos(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="What to serve.")] = "smollm2-135m-instruct",
    minutes: Annotated[
        float, typer.Option("--minutes", metavar="M", min=0.1, help="How long to harm the swarm.")
    ] = 10.0,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of the plan: same seed, same faults.")] = 0,
    servers: Annotated[
        str,
        typer.Option(
            "--servers",
            metavar="N|A:B,...",
            help="An even number of servers, of which two hold each block, or the blocks of each.",
        ),
    ] = "6",
    clients: Annotated[int, typer.Option("--clients", metavar="N", min=1, help="Sessions at the same time.")] = 3,
    faults: Annotated[
        str, typer.Option("--faults", metavar="KIND,...", help="Kinds of faults.", show_default="all")
    ] = "",
    scripts: Annotated[
        str, typer.Option("--scripts", metavar="NAME,...", help="What sessions do.", show_default="all")
    ] = "",
    pause: Annotated[
        float, typer.Option("--pause", metavar="SECONDS", min=0.1, help="Between two faults, on average.")
    ] = 8.0,
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
    """Harm a swarm by a plan made from a seed, and check every token that its sessions get.

    A swarm of its own serves the model, every server a process behind a proxy. Servers are killed, frozen, cut off,
    slowed down, told to leave, started again and joined by others, while clients hold short conversations. Each must
    end with exactly the tokens of plain transformers, or with a clear error before its deadline. Afterwards
    nothing may be left: no session, page, file, thread or process. Ends with exit code 1 when that does not hold.
    """
    limit_threads(threads)
    prepare_process(verbose)
    with json_only(json):
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.cli.bench.chaos_measure import ChaosSettings, measure_chaos
            from swarm.cli.chaos.faults import FaultKind, FaultSettings, parse_kinds
            from swarm.cli.chaos.scripts import check_script_names
            from swarm.models import resolve_model

            settings = ChaosSettings(
                seed=seed,
                duration_s=minutes * 60,
                num_clients=clients,
                deadline_s=deadline,
                faults=FaultSettings(
                    duration_s=minutes * 60,
                    mean_pause_s=pause,
                    kinds=parse_kinds(faults) if faults else tuple(FaultKind),
                ),
                script_names=check_script_names(scripts),
            )
            num_blocks = resolve_model(model, report=progress).num_blocks
            report = measure_chaos(
                model,
                parse_servers(servers, num_blocks),
                settings,
                report=progress,
                num_threads=threads,
                log_folder=logs,
            )
        results = report.to_results()
        if json:
            asked = {
                "model": model,
                "minutes": minutes,
                "seed": seed,
                "servers": servers,
                "clients": clients,
                "pause_s": pause,
                "deadline_s": deadline,
                "threads": threads,
            }
            print_json(report_to_json("chaos", settings=asked, results=results))
        else:
            _print_report(results)
        if not report.is_clean:
            complain("a promise was broken: see wrong_tokens, leaks, problems and the errors in the report")
            raise typer.Exit(FAILURE)


def parse_servers(text: str, num_blocks: int) -> list[Span]:
    """`6` as three spans held twice, `0:10,10:30,0:30` as these. Raises BadInputError for anything else."""
    if ":" in text:
        return [parse_blocks(part) for part in text.split(",")]
    if not text.strip().isdecimal() or int(text) < 2 or int(text) % 2:
        raise BadInputError(f"--servers {text} is no even number from 2; or give the blocks of each, like 0:10,10:30")
    return split_blocks(num_blocks, int(text) // 2) * 2


def _print_report(results: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from swarm.cli.machine import describe_cpu

    console = results_console()
    whole = results[0]
    console.print(
        f"{whole['sessions']} sessions, {whole['tokens']} right tokens, {whole['wrong_tokens']} wrong ones,"
        f" {whole['recoveries']} recoveries, errors {whole['typed_errors'] or 'none'}"
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("fault", "times", "stalls", "median s", "p95 s", "max s"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for case in results:
        lengths = (case["stall_median_s"], case["stall_p95_s"], case["stall_max_s"])
        table.add_row(
            case["case"],
            str(case["faults"]),
            str(case["num_stalls"]),
            *("" if value is None else f"{value:.2f}" for value in lengths),
        )
    console.print(table)
    for line in (*whole["leaks"], *whole["problems"]):
        say(line, style="bold red")
    for session in whole["bad_sessions"]:
        say(f"{session['script']} at {session['from_s']} s: {session['error']} {session['message']}", style="dim")
    console.print(describe_cpu(), style="dim")
