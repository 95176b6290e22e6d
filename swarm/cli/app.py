"""Puts the commands together, and runs one so that every outcome becomes an exit code and at most one sentence."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from swarm.cli.bench import bench_app
from swarm.cli.bootstrap import bootstrap
from swarm.cli.calibrate import calibrate
from swarm.cli.chat import chat
from swarm.cli.demo import demo
from swarm.cli.doctor import doctor
from swarm.cli.failures import INTERRUPTED, exit_code_for, sentence_for
from swarm.cli.generate import generate
from swarm.cli.serve import serve
from swarm.cli.status import status
from swarm.cli.terminal import complain
from swarm.version import __version__

__all__ = ["app", "run"]

app = typer.Typer(
    name="swarm",
    no_args_is_help=True,
    add_completion=False,
    # Ours are sentences, see swarm.cli.failures.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"swarm {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: swarm demo")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run one large language model together, each machine holding some of its blocks."""


app.command(epilog='Example: swarm demo --prompt "Why do bees swarm?"')(demo)
app.command(epilog="Example: swarm bootstrap --port 31330 --identity bootstrap.key")(bootstrap)
app.command(epilog="Example: swarm serve smollm2-135m-instruct --join ADDRESS --blocks 0:15")(serve)
app.command(epilog="Example: swarm status smollm2-135m-instruct --join ADDRESS")(status)
app.command(epilog='Example: swarm generate smollm2-135m-instruct --join ADDRESS --prompt "Hello!"')(generate)
app.command(epilog="Example: swarm chat smollm2-135m-instruct --join ADDRESS")(chat)
app.command(epilog="Example: swarm calibrate smollm2-135m-instruct --text book.txt")(calibrate)
app.command(epilog="Example: swarm doctor --join ADDRESS")(doctor)
app.add_typer(bench_app, name="bench")


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` (without the program's name) ask for; returns its exit code."""
    try:
        outcome = typer.main.get_command(app).main(args=list(arguments), prog_name="swarm", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("SWARM_DEBUG") == "1":
            traceback.print_exc()
        complain(sentence_for(error))
        return exit_code_for(error)
    # Exit codes come back as numbers; commands themselves return nothing.
    return outcome if isinstance(outcome, int) else 0
