"""`swarm calibrate` from the command line: a file that servers find, or one sentence that says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from swarm.cli.app import run
from swarm.kvpolicy.calibration_file import calibration_path, find_calibration, find_curve
from swarm.models.source import default_cache_dir, resolve_model
from tests import tiny_models
from tests.tiny_models import NUM_BLOCKS, save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

SENTENCE = "Servers keep what a model needs of its past, and forget the rest. "


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 20)
    return path


def save_model(folder: Path, family: str = "llama") -> Path:
    save_tiny_model(family, folder)
    save_tiny_tokenizer(folder)
    return folder


def calibrate(model: Path, text: Path, *more: str) -> int:
    return run(["calibrate", str(model), "--text", str(text), "--stretches", "2", "--stretch-tokens", "256", *more])


def test_the_file_is_found_by_the_models_hash(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody should have to tell a server where its calibration lies."""
    model = save_model(tmp_path / "model")
    assert calibrate(model, text, "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert "Calibrating" in shown.err
    source = resolve_model(str(model))
    path = calibration_path(default_cache_dir() / "kv", source.model_hash)
    assert result == {"model": str(model), "model_hash": source.model_hash, "file": str(path), "stretches": 2}
    found = find_calibration(source.model_hash, cache_dir=default_cache_dir())
    assert found is not None and found.curve.num_layers == NUM_BLOCKS
    assert find_curve(source.model_hash, cache_dir=default_cache_dir()) == found.curve
    # Written aside and moved: nothing else is left, and nobody reads half a file.
    assert list(path.parent.iterdir()) == [path]


def test_the_same_text_gives_the_same_file(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The documented command must lead to the file that is shipped."""
    model = save_model(tmp_path / "model")
    for name in ("a", "b"):
        assert calibrate(model, text, "--out", str(tmp_path / name)) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    shown = capsys.readouterr().out
    assert "share of tokens" in shown and str(tmp_path / "b") in shown.replace("\n", "")


def test_a_run_that_fails_leaves_the_old_file(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of measuring are not lost to a full disk the next time."""
    model, out = save_model(tmp_path / "model"), tmp_path / "kv" / "curve"
    assert calibrate(model, text, "--out", str(out)) == 0
    before = out.read_bytes()

    def refuse(source: str, target: str) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("swarm.models.fingerprint.os.replace", refuse)
    assert calibrate(model, text, "--out", str(out)) == 1
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can not be read (No such file or directory); give a text file with --text"),
        (b"", "has no text in it"),
        (b"\xff\xfe\xfa", "is no UTF-8 text"),
        (SENTENCE.encode(), "give at least 256"),
    ],
)
def test_a_text_that_will_not_do_is_said(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of these is mended by giving another file."""
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert said in fail(capsys, calibrate(save_model(tmp_path / "model"), path))


def test_stretches_beyond_the_models_length_are_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stretch is read twice, which users can not know."""
    code = calibrate(save_model(tmp_path / "model"), text, "--stretch-tokens", "300")
    assert "lower --stretch-tokens" in fail(capsys, code)


def test_a_stretch_that_is_advised_is_accepted(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advice that leads to the next refusal is none."""
    model = save_model(tmp_path / "model")
    advised = re.search(
        r"lower --stretch-tokens to (\d+)", fail(capsys, calibrate(model, text, "--stretch-tokens", "300"))
    )
    assert advised is not None
    assert calibrate(model, text, "--stretch-tokens", advised[1]) == 0
    capsys.readouterr()
    monkeypatch.setattr("tests.tiny_models._COMMON", tiny_models._COMMON | {"max_position_embeddings": 400})
    short = save_model(tmp_path / "short")
    said = fail(capsys, calibrate(short, text))
    assert "holds 400 tokens" in said and "lower" not in said


@pytest.mark.parametrize(
    ("out", "said"), [("folder", "is a folder"), ("file/curve", "choose another place with --out")]
)
def test_a_place_that_can_not_be_written_is_found_before_measuring(
    out: str, said: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of work would be lost at their very end; and nothing is written outside of what was named."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    code = calibrate(save_model(tmp_path / "model"), text, "--out", str(tmp_path / out))
    shown = capsys.readouterr().err
    assert code in (1, 2)
    assert said in shown and str(tmp_path / out) in shown and "Calibrating" not in shown


def test_models_that_can_not_be_compressed_are_named(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their servers work with --kv none, and the sentence says so."""
    code = calibrate(save_model(tmp_path / "model", "bloom"), text)
    said = fail(capsys, code, exit_code=None)
    assert "bloom" in said and "--kv none" in said


def fail(capsys: pytest.CaptureFixture[str], code: int, *, exit_code: int | None = 2) -> str:
    """The sentence a failed command has said, which must be all it says."""
    assert code == exit_code or (exit_code is None and code in (1, 2))
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in shown.err
    return errors[0]
