"""How a command line becomes an outcome: help, one sentence, an exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swarm.cli.app import run

COMMANDS = ("demo", "bootstrap", "serve", "status", "generate", "chat", "doctor", "bench", "bench single-stream")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help is the manual that people really read, and an example is what they copy from it."""
    assert run([*command.split(), "--help"]) == 0
    assert f"Example: swarm {command}" in " ".join(capsys.readouterr().out.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is missing there is never found."""
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command.split()[0] in shown for command in COMMANDS)


def test_help_loads_no_heavy_library() -> None:
    """Seconds of imports before a page of help would feel broken."""
    program = (
        "import json, sys, time, swarm.cli.app as app\n"
        "app.run(['serve', '--help'])\n"
        "heavy = ('torch', 'transformers', 'grpc', 'hivemind', 'numpy')\n"
        "print(json.dumps([[name for name in heavy if name in sys.modules], time.process_time()]))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    loaded, cpu_s = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    assert cpu_s < 1.0


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The first thing asked for in a bug report."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("swarm ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve"], "missing argument 'MODEL'; see `swarm serve --help`"),
        (["srve"], "no such command 'srve'"),
        (["status", "m"], "missing option '--join'"),
        (["serve", "m", "--port", "70000"], "less than or equal to 65535"),
        (["generate", "m", "--join", "grpc://h:1", "--prompt", "p", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["serve", "m"], "--new-swarm"),
        (["serve", "m", "--join", "grpc://h:1", "--new-swarm"], "exclude each other"),
        (["serve", "m", "--new-swarm", "--blocks", "3-5"], "--blocks 3-5 is not a span; give START:END"),
        (["serve", "m", "--new-swarm", "--blocks", "5:5"], "blocks 5:5 are not a span"),
        (["serve", "m", "--join", "h:1"], "did you mean grpc://h:1?"),
        (["serve", "m", "--new-swarm", "--kv", "foo"], "there is no KV policy 'foo'; known are none, pyramid, gear,"),
        (["doctor", "m", "--kv", "foo"], "there is no KV policy 'foo'"),
        (["status", "m", "--join", "/ip4/1.2.3.4/tcp/1"], "lacks the peer id"),
        (["bootstrap", "--join", "nowhere"], "is not an address to join at"),
        (["doctor", "--join", "nowhere"], "is not an address to join at"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever mistypes an option learns what was wrong and what to do, quickly, and nothing else."""
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err


def test_ctrl_c_is_130_and_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt is no error: the person at the keyboard knows what happened."""

    def interrupt(join: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("swarm.cli.status.check_join_addresses", interrupt)
    assert run(["status", "m", "--join", "grpc://h:1"]) == 130
    assert capsys.readouterr() == ("", "")


def test_our_own_failure_is_one_sentence_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug must not pour a traceback over somebody who can do nothing with it, unless they ask."""

    def fail(join: object) -> None:
        raise RuntimeError("broken\ninside")

    monkeypatch.setattr("swarm.cli.status.check_join_addresses", fail)
    monkeypatch.delenv("SWARM_DEBUG", raising=False)
    assert run(["status", "m", "--join", "grpc://h:1"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: swarm itself failed (RuntimeError: broken inside); run it again with SWARM_DEBUG=1")
    assert "Traceback" not in shown
    monkeypatch.setenv("SWARM_DEBUG", "1")
    assert run(["status", "m", "--join", "grpc://h:1"]) == 1
    assert "Traceback" in capsys.readouterr().err
