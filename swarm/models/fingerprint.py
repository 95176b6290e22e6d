"""Identifies a model by what is in its files, so that peers never mix different weights."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm.datatypes import ModelHash
from swarm.errors import ModelFilesError
from swarm.models.progress import ProgressReporter, SilentProgress

__all__ = ["fingerprint", "hash_files", "write_atomically"]

_CHUNK_BYTES = 4 << 20
# Differ between copies of one and the same model: who wrote the config, from where, when.
_VOLATILE_CONFIG_KEYS = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})


def fingerprint(config: Mapping[str, Any], file_hashes: Mapping[str, str]) -> ModelHash:
    """SHA-256 over the parsed config.json and over the names and SHA-256 of all weight files."""
    meaning = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(file_hashes):
        digest.update(f"\n{name} {file_hashes[name]}".encode())
    return ModelHash(digest.hexdigest())


def hash_files(paths: Mapping[str, Path], cache_dir: Path, *, report: ProgressReporter | None = None) -> dict[str, str]:
    """SHA-256 of each file, remembered in `cache_dir` until its size or modification time changes.

    Raises:
        ModelFilesError: a file can not be read.
    """
    report = report or SilentProgress()
    hashes: dict[str, str] = {}
    unknown: dict[str, tuple[Path, os.stat_result]] = {}
    for name, path in paths.items():
        try:
            stat = path.stat()
        except OSError as error:
            raise ModelFilesError(f"{path} is missing or unreadable; fetch the model again") from error
        known = _recall(_memory_of(path, cache_dir), path, stat)
        if known is None:
            unknown[name] = (path, stat)
        else:
            hashes[name] = known
    if unknown:
        report.start("identifying the weights", sum(stat.st_size for _, stat in unknown.values()), "bytes")
        for name, (path, stat) in unknown.items():
            hashes[name] = _hash_file(path, report)
            record = {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            write_atomically(_memory_of(path, cache_dir), json.dumps({**record, "sha256": hashes[name]}).encode())
        report.finish()
    return hashes


def _hash_file(path: Path, report: ProgressReporter) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                report.advance(len(chunk))
    except OSError as error:
        raise ModelFilesError(f"{path} can not be read ({error.strerror}); fetch the model again") from error
    return digest.hexdigest()


def _memory_of(path: Path, cache_dir: Path) -> Path:
    return cache_dir / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def _recall(memory: Path, path: Path, stat: os.stat_result) -> str | None:
    try:
        record = json.loads(memory.read_bytes())
        unchanged = (record["path"], record["size"], record["mtime_ns"]) == (
            str(path.resolve()),
            stat.st_size,
            stat.st_mtime_ns,
        )
        return str(record["sha256"]) if unchanged else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers, and a crash, see either the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
