"""`swarm bench concurrency`: what a token costs when several clients decode at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.bench.local_bench import limit_threads, open_bench_swarm, report_to_json, to_result
from swarm.cli.options import JsonOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm.cli.bench.concurrency_measure import ConcurrencyFigures

__all__ = ["concurrency"]

_MAX_CLIENTS = 256


def concurrency(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="What to serve.")] = "smollm2-135m-instruct",
    servers: Annotated[
        int, typer.Option("--servers", metavar="N", min=1, help="How many servers share the model.")
    ] = 1,
    clients: Annotated[
        str, typer.Option("--clients", metavar="N,N,...", help="Numbers of clients to measure.")
    ] = "1,2,4,8,16",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Length of each client's prompt.")
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", min=1, help="Tokens each client decodes after its first.")
    ] = 64,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="How often each number of clients is measured.")
    ] = 3,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="CPU threads of each process.")] = 1,
    head: Annotated[
        bool,
        typer.Option(
            "--head/--no-head",
            help="Clients choose their next tokens themselves; without, they send tokens of their prompts, as if"
            " they computed elsewhere.",
        ),
    ] = True,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure tokens/s and CPU ms per token with 1, 2, ... clients that decode at the same time.

    A swarm of its own serves the model, every server in a process; the clients, each with its own session
    and prompt, share one process. Decoding alone is timed, in turns, after all clients have their first token.
    """
    limit_threads(threads)
    prepare_process(verbose)
    with json_only(json):
        client_counts = parse_counts(clients)
        with TerminalProgress() as progress:
            progress.start("Loading libraries", None, "")
            from swarm.cli.bench.concurrency_measure import measure_concurrency

            with open_bench_swarm(model, num_servers=servers, num_threads=threads, report=progress) as swarm:
                figures = measure_concurrency(
                    swarm,
                    client_counts=client_counts,
                    num_rounds=rounds,
                    num_prompt_tokens=prompt_tokens,
                    num_new_tokens=new_tokens,
                    has_head=head,
                    report=progress,
                )
        settings = {
            "model": model,
            "servers": servers,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "threads": threads,
            "head": head,
        }
        report = report_to_json("concurrency", settings=settings, results=[to_result(one) for one in figures])
        if json:
            print_json(report)
        else:
            _print_table(figures)


def parse_counts(text: str) -> list[int]:
    """`1,2,4` as ascending numbers. Raises BadInputError for anything else."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = [0]
    if not 1 <= counts[0] <= counts[-1] <= _MAX_CLIENTS:
        raise BadInputError(f"--clients {text} is no list of numbers from 1 to {_MAX_CLIENTS}; write it like 1,2,4")
    return counts


def _print_table(figures: Sequence[ConcurrencyFigures]) -> None:
    from rich.table import Table

    from swarm.cli.machine import describe_cpu

    console = results_console()
    table = Table(box=None, header_style="dim", pad_edge=False)
    names = (
        "clients",
        "tokens/s",
        "per client",
        "slowest",
        "server CPU ms/token",
        "all CPU ms/token",
        "tokens/CPU-s vs 1",
        "tokens/batch",
        "KV MiB",
        "wasted",
        "shared MiB",
    )
    for name in names:
        table.add_column(name, justify="right")
    for case in figures:
        table.add_row(
            str(case.num_clients),
            f"{case.tokens_per_s:.1f}",
            f"{case.tokens_per_s_per_client:.1f}",
            f"{case.slowest_client_tokens_per_s:.1f}",
            f"{case.server_cpu_ms_per_token:.1f}",
            f"{case.all_cpu_ms_per_token:.1f}",
            "" if case.ratio_to_one_client is None else f"{case.ratio_to_one_client:.2f}",
            f"{case.sessions_per_batch:.1f}",
            f"{case.kv_used_bytes / 2**20:.1f}",
            f"{case.kv_wasted_ratio:.1%}",
            f"{case.kv_shared_bytes / 2**20:.1f}",
        )
    console.print(table)
    console.print(describe_cpu(), style="dim")
