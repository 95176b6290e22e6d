"""`swarm doctor`: what this machine can offer, and what stands in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.failures import FAILURE
from swarm.cli.options import JsonOption, OptionalJoinOption, VerboseOption
from swarm.cli.progress import TerminalProgress
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import json_only, print_json, results_console
from swarm.errors import BadInputError

if TYPE_CHECKING:
    from swarm.cli.examination import Finding
    from swarm.cli.examination_of_model import ModelReport

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warn": "yellow", "problem": "bold red"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Also say how much of this model fits here in each precision, and who serves it at --join.",
            show_default=False,
        ),
    ] = None,
    join: OptionalJoinOption = None,
    kv: Annotated[
        str,
        typer.Option(
            "--kv",
            metavar="none|gear|pyramid|pyramid+gear",
            help="Count the model's KV tokens as a server with this policy would.",
        ),
    ] = "none",
    # How the model was named before it became an argument.
    model_option: Annotated[str | None, typer.Option("--model", hidden=True)] = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Examine this machine: software, processor, memory, disk, ports; a model on it; and with --join a swarm's address.

    No weights are loaded or fetched (only the demo model arrives whole).
    Every line is ok, warn or problem, with what to do about it. Exit code 1 when there is a problem.
    """
    prepare_process(verbose)
    with json_only(json):
        from swarm.cli.open_client import check_join_addresses
        from swarm.kvpolicy.settings import find_policy

        policy = find_policy(kv)
        model = model or model_option
        if policy.compresses and model is None:
            raise BadInputError(f"--kv counts a model's KV tokens; name one: swarm doctor MODEL --kv {kv}")
        check_join_addresses(join or ())
        with TerminalProgress() as progress:
            progress.start("Examining this machine", None, "")
            from swarm.cli.examination import examine_machine
            from swarm.cli.examination_of_model import examine_model
            from swarm.cli.examination_of_swarm import examine_address

            findings = examine_machine()
            fit: ModelReport | None = None
            if model is not None:
                progress.start(f"Looking at {model}", None, "")
                fit, finding = examine_model(model, progress, wants_identity=bool(join), policy=policy)
                findings.append(finding)
            for address in join or ():
                progress.start(f"Reaching {address}", None, "")
                findings += examine_address(address, fit.source if fit is not None else None)
        has_problem = any(finding.verdict == "problem" for finding in findings)
        if json:
            report = {"ok": not has_problem, "checks": [finding.to_json() for finding in findings]}
            print_json(report | ({"model": fit.to_json()} if fit is not None else {}))
        else:
            _print_findings(findings)
            if fit is not None:
                _print_fit(fit)
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


def _print_fit(report: ModelReport) -> None:
    from rich.table import Table

    num_blocks = report.num_blocks
    policy = "" if report.kv_policy == "none" else f", KV policy {report.kv_policy}"
    table = Table(title=f"{report.name} on {report.device}{policy}", title_justify="left", box=None, pad_edge=False)
    table.add_column("--weights")
    for heading in ("MiB per block", "blocks that fit", "KV tokens beside them"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in report.rows:
        table.add_row(
            row.weights,
            "-" if row.block_bytes is None else f"{row.block_bytes / 2**20:,.1f}",
            f"{row.num_blocks} of {num_blocks}",
            f"{row.kv_tokens:,}" if row.num_blocks else "-",
            "" if row.num_blocks else row.sentence,
        )
    console = results_console()
    console.print()
    console.print(table)
