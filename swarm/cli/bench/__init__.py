"""`swarm bench`: repeatable measurements, one module for each."""

from __future__ import annotations

import typer

from swarm.cli.bench.chaos import chaos
from swarm.cli.bench.concurrency import concurrency
from swarm.cli.bench.failover import failover
from swarm.cli.bench.kv import kv
from swarm.cli.bench.prefill import prefill
from swarm.cli.bench.single_stream import single_stream
from swarm.cli.bench.weights import weights

__all__ = ["bench_app"]

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Measure; each prints a table.")


@bench_app.callback(epilog="Example: swarm bench single-stream --json")
def _root() -> None:
    """Repeatable measurements, each printing a table, and its figures with --json."""


bench_app.command("single-stream", epilog="Example: swarm bench single-stream --rounds 5 --json")(single_stream)
bench_app.command("concurrency", epilog="Example: swarm bench concurrency --clients 1,8 --json")(concurrency)
bench_app.command("prefill", epilog="Example: swarm bench prefill --prompt-tokens 4096 --json")(prefill)
bench_app.command("chaos", epilog="Example: swarm bench chaos --minutes 30 --seed 7 --json")(chaos)
bench_app.command("failover", epilog="Example: swarm bench failover --cases kill,gap --json")(failover)
bench_app.command("weights", epilog="Example: swarm bench weights --tokens 0 --json")(weights)
bench_app.command("kv", epilog="Example: swarm bench kv --policies pyramid,gear --json")(kv)
