"""What is no model gets one clear sentence, from every command that takes one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from swarm.cli.app import run
from tests.tiny_models import save_tiny_model

NOBODY = "grpc://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))


def fail(capsys: pytest.CaptureFixture[str], *arguments: str | Path, exit_code: int = 2) -> str:
    """Run a command that fails; the sentence it says, which must be all it says."""
    assert run(list(map(str, arguments))) == exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in shown.err
    return errors[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "no-such-model", "--new-swarm"),
        ("status", "no-such-model", "--join", NOBODY),
        ("generate", "no-such-model", "--join", NOBODY, "--prompt", "x"),
        ("chat", "no-such-model", "--join", NOBODY),
    ],
)
def test_unknown_model(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """The commonest mistyping; it must not look like a network problem."""
    said = fail(capsys, *arguments)
    assert "no-such-model" in said
    assert "smollm2-135m-instruct" in said


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is given, only models are read."""
    path = tmp_path / "notes.txt"
    path.write_text("not a model")
    assert "notes.txt" in fail(capsys, "serve", path, "--new-swarm")


def test_a_gguf_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name alone makes no model; a broken download looks like this too."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not GGUF at all" * 100)
    assert "model.gguf" in fail(capsys, "serve", path, "--new-swarm")


def test_a_folder_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Often the folder above or below was meant."""
    assert "config.json" in fail(capsys, "serve", tmp_path, "--new-swarm")


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Opening them could run anybody's code."""
    save_tiny_model("llama", tmp_path / "whole")
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    said = fail(capsys, "serve", folder, "--new-swarm")
    assert "pickle" in said
    assert "safetensors" in said


def test_options_a_server_does_not_offer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence names the option and what there is instead, before anything is loaded."""
    assert "--weights nf5" in fail(capsys, "serve", tmp_path, "--new-swarm", "--weights", "nf5")
    assert "--kv zip" in fail(capsys, "serve", tmp_path, "--new-swarm", "--kv", "zip")
    assert "4 GiB of RAM" in fail(capsys, "serve", tmp_path, "--new-swarm", "--kv-memory", "4 GiB of RAM")
    blocks = ("--blocks", "0:2", "--num-blocks", "3")
    assert "either --blocks or --num-blocks" in fail(capsys, "serve", tmp_path, "--new-swarm", *blocks)


def test_json_keeps_standard_output_clean_on_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A script sees either an object or nothing."""
    save_tiny_model("llama", tmp_path / "model")
    said = fail(capsys, "status", tmp_path / "model", "--join", NOBODY, "--json", exit_code=1)
    assert "127.0.0.1:1" in said
