"""`swarm doctor`: what this machine can offer, and what stands in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.failures import FAILURE
from swarm.cli.options import JsonOption, OptionalJoinOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console

if TYPE_CHECKING:
    from swarm.cli.examination import Finding

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warn": "yellow", "problem": "bold red"}


def doctor(
    join: OptionalJoinOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Also estimate how many of this model's blocks fit here, and who serves it at --join.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Examine this machine: software, processor, memory, disk, ports, and with --join a swarm's address.

    Every line is ok, warn or problem, with what to do about it. Exit code 1 when there is a problem.
    """
    prepare_process(verbose)
    with json_only(json):
        from swarm.cli.open_client import check_join_addresses

        check_join_addresses(join or ())
        with TerminalProgress() as progress:
            progress.start("Examining this machine", None, "")
            from swarm.cli.examination import examine_machine
            from swarm.cli.examination_of_swarm import examine_address, examine_model

            findings = examine_machine()
            source = None
            if model is not None:
                progress.start(f"Looking at {model}", None, "")
                source, finding = examine_model(model, progress)
                findings.append(finding)
            for address in join or ():
                progress.start(f"Reaching {address}", None, "")
                findings += examine_address(address, source)
        has_problem = any(finding.verdict == "problem" for finding in findings)
        if json:
            print_json({"ok": not has_problem, "checks": [finding.to_json() for finding in findings]})
        else:
            _print_findings(findings)
        if has_problem:
            raise typer.Exit(FAILURE)


def _print_findings(findings: list[Finding]) -> None:
    from rich.text import Text

    console = results_console()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        verdict = (f"{finding.verdict:<8}", _STYLES[finding.verdict])
        console.print(Text.assemble(verdict, f"{finding.subject:<{width}}  {finding.seen}"), soft_wrap=True)
        if finding.advice:
            # Unbroken lines: commands in them are copied.
            console.print(Text(f"{'':8}{'':{width}}  → {finding.advice}", style="italic"), soft_wrap=True)
