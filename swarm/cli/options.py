"""Arguments and options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from swarm.datatypes import Span
from swarm.errors import BadInputError

__all__ = [
    "AdapterOption",
    "ExitWithParentOption",
    "JoinOption",
    "JsonOption",
    "ModelArgument",
    "OptionalJoinOption",
    "PolicyOption",
    "PrecisionOption",
    "VerboseOption",
    "WaitTimeoutOption",
    "parse_adapters",
    "parse_blocks",
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face id, a local folder, a GGUF file, or the built-in smollm2-135m-instruct.",
        show_default=False,
    ),
]
_JOIN_HELP = "Address of the swarm, as `swarm serve` prints it (/ip4/.../p2p/... or grpc://host:port)"
JoinOption = Annotated[
    list[str], typer.Option("--join", metavar="ADDRESS", help=f"{_JOIN_HELP}; may be repeated.", show_default=False)
]
OptionalJoinOption = Annotated[
    list[str] | None,
    typer.Option("--join", metavar="ADDRESS", help=f"{_JOIN_HELP}; may be repeated.", show_default=False),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error.")
]
ExitWithParentOption = Annotated[
    # For processes that the command line itself starts.
    bool, typer.Option("--exit-with-parent", hidden=True, help="Leave when standard input ends.")
]
VerboseOption = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Show what happens on standard error; twice for everything.",
        show_default=False,
        metavar="",
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="LoRA adapter that the servers add, one of those that `swarm status` shows.",
        show_default="the model as it is",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="nf4|int8|bf16|fp32",
        help="Use only servers whose weights are at least this precise.",
        show_default="any",
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="none|pyramid|gear|pyramid+gear",
        help="Use only servers that keep caches under this policy or preset; all offer none, which is exact.",
        show_default="as each server does",
    ),
]
WaitTimeoutOption = Annotated[
    float,
    typer.Option(
        "--wait-timeout", metavar="SECONDS", min=0.0, help="How long to wait for blocks that nobody serves yet."
    ),
]


def parse_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` each, as folders by name. Raises BadInputError for anything else, and for a name given twice."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise BadInputError(f"--adapter {text} names no folder; give NAME=FOLDER, for example poet=./adapters/poet")
        if name in folders:
            raise BadInputError(f"--adapter {name} is given twice; give each adapter a name of its own")
        folders[name] = Path(folder)
    return folders


def parse_blocks(text: str) -> Span:
    """`A:B` as the blocks from A up to but not including B. Raises BadInputError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise BadInputError(f"--blocks {text} is not a span; give START:END, for example 0:10")
    return Span(start=int(match[1]), end=int(match[2]))
