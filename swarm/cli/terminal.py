"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["complain", "json_only", "print_json", "results_console", "say", "stderr_console", "write_text"]

_MIN_TABLE_WIDTH: Final = 120
_results: TextIO | None = None


@functools.cache
def stderr_console() -> Console:
    """For progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@functools.cache
def results_console() -> Console:
    """For tables on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    # A narrow terminal breaks long lines itself; columns squeezed to a few letters would say less.
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    return console


def say(text: str = "", *, style: str | None = None) -> None:
    """A remark on standard error. Long lines are not broken, so that addresses can be copied."""
    stderr_console().print(text, style=style, markup=False, soft_wrap=True)


def complain(sentence: str) -> None:
    """An error on standard error; nothing for an empty sentence."""
    if sentence:
        console = stderr_console()
        console.print("error: ", style="bold red", end="")
        console.print(sentence, markup=False, soft_wrap=True)


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command, on one line, at once."""
    stream = _results or sys.stdout
    stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


@contextlib.contextmanager
def json_only(is_json: bool) -> Iterator[None]:
    """Keep standard output for `print_json` alone: what libraries print goes to standard error meanwhile."""
    global _results
    if not is_json:
        yield
        return
    _results, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, _results = _results, None


def write_text(text: str) -> None:
    """A piece of an answer on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
