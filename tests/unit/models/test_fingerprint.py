"""The identity of a model: equal for equal files, different for any difference that matters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.errors import ModelFilesError
from swarm.models import fingerprint as module
from swarm.models.fingerprint import fingerprint, hash_files, write_atomically
from swarm.models.progress import ProgressReporter


def test_identity_ignores_who_wrote_the_config_but_not_what_it_says() -> None:
    """Two copies of one model must find each other; two models must never be mixed."""
    files = {"a.safetensors": "11", "b.safetensors": "22"}
    plain = fingerprint({"hidden_size": 8}, files)
    assert fingerprint({"transformers_version": "5", "hidden_size": 8, "_name_or_path": "x"}, files) == plain
    assert fingerprint({"hidden_size": 9}, files) != plain
    assert fingerprint({"hidden_size": 8}, {**files, "b.safetensors": "23"}) != plain
    assert fingerprint({"hidden_size": 8}, dict(reversed(files.items()))) == plain


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing a large model takes minutes; it must happen once, and again after any change."""
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    hashed: list[Path] = []
    hash_file = module._hash_file

    def count(path: Path, report: ProgressReporter) -> str:
        hashed.append(path)
        return hash_file(path, report)

    monkeypatch.setattr(module, "_hash_file", count)
    first = hash_files({"w": path}, tmp_path / "cache")
    assert hash_files({"w": path}, tmp_path / "cache") == first
    assert len(hashed) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert hash_files({"w": path}, tmp_path / "cache") != first
    assert len(hashed) == 2


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    """An incomplete model folder must be named, not traced back."""
    with pytest.raises(ModelFilesError, match="missing or unreadable"):
        hash_files({"w": tmp_path / "nothing"}, tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in mid-write must not leave half a file under the final name, nor litter."""
    path = tmp_path / "record"
    write_atomically(path, b"old")

    def fail(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
