"""Standard output is for results, and with --json for exactly one object."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from swarm.cli.progress import TerminalProgress
from swarm.cli.terminal import complain, json_only, print_json, say


def test_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever parses the output must not trip over a library that prints."""
    with json_only(True):
        sys.stdout.write("chatter of a library\n")
        say("a remark")
        print_json({"a": "ü", "b": None})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": "ü", "b": None}
    assert shown.out.count("\n") == 1
    assert shown.err == "chatter of a library\na remark\n"


def test_standard_output_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Also after an error: what follows in the same process would vanish otherwise."""
    with pytest.raises(ValueError, match="x"), json_only(True):
        raise ValueError("x")
    sys.stdout.write("afterwards\n")
    assert capsys.readouterr().out == "afterwards\n"


def test_messages_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup here (`[::1]:80`), and long lines stay whole so that they can be copied."""
    long_address = "/ip4/1.2.3.4/tcp/1/p2p/" + "x" * 200
    complain(f"nobody answers at [::1]:80 or {long_address}")
    assert capsys.readouterr().err == f"error: nobody answers at [::1]:80 or {long_address}\n"


def test_progress_in_a_log_is_one_line_for_each_long_task(capsys: pytest.CaptureFixture[str]) -> None:
    """Log files of services must not fill with bars; that something long has begun is worth a line."""
    with TerminalProgress() as progress:
        progress.start("loading libraries", None, "")
        progress.start("fetching the model", 1000, "bytes")
        progress.advance(500)
        progress.finish()
    assert capsys.readouterr().err == "Fetching the model ...\n"


def test_bars_give_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a bar is shown it catches all output; an answer streamed through it would appear in whole lines only."""
    screen = io.StringIO()
    monkeypatch.setattr("swarm.cli.progress.stderr_console", lambda: Console(file=screen, force_terminal=True))
    stdout = sys.stdout
    with TerminalProgress() as progress:
        progress.start("servers online", 3, "servers")
        progress.advance(2)
        progress.start("fetching", 2_000_000, "bytes")
        progress.advance(1_000_000)
        assert sys.stdout is not stdout
        progress.finish()
        assert sys.stdout is stdout
        progress.start("loading", None, "")
    assert sys.stdout is stdout
    assert "Servers online" in screen.getvalue()
    assert "Fetching" in screen.getvalue()
