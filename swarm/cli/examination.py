"""What `swarm doctor` finds out about this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Final, Literal

from swarm.cli.machine import DISTRIBUTION, describe_cpu, find_version, free_disk_bytes, read_memory

__all__ = ["Finding", "Verdict", "examine_machine", "judge_packages"]

Verdict = Literal["ok", "warn", "problem"]
_GIB: Final = 2**30
_MIN_MEMORY_BYTES: Final = 4 * _GIB
_MIN_DISK_BYTES: Final = 5 * _GIB
_MIN_PYTHON: Final = (3, 11)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    verdict: Verdict
    seen: str
    """What was found."""
    advice: str = ""
    """What to do about it; empty when nothing."""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine_machine() -> list[Finding]:
    """Everything that can be found out without a network."""
    examinations: tuple[Callable[[], Finding], ...] = (
        _examine_python,
        _examine_packages,
        _examine_torch,
        _examine_cpu,
        _examine_gpus,
        _examine_memory,
        _examine_disk,
        _examine_dht,
        _examine_ports,
    )
    return [examine() for examine in examinations]


def judge_packages(
    required: list[str], version_of: Callable[[str], str | None], *, extra: str = ""
) -> tuple[list[str], list[str]]:
    """Which requirements are missing, and which are there in a version that does not fit.

    Args:
        required: as in a package's metadata (`torch==2.13.*`, markers included).
        version_of: the installed version of a package, None when it is not installed.
        extra: the extra whose requirements count too.
    """
    from packaging.requirements import Requirement

    missing: list[str] = []
    misfits: list[str] = []
    for text in required:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == DISTRIBUTION:  # an extra that includes another
            continue
        version = version_of(requirement.name)
        if version is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(version, prereleases=True):
            misfits.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    return missing, misfits


def _examine_python() -> Finding:
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _MIN_PYTHON:
        return Finding(subject="Python", verdict="problem", seen=seen, advice="install Python 3.11 or newer")
    return Finding(subject="Python", verdict="ok", seen=seen)


def _examine_packages() -> Finding:
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Finding(
            subject="packages",
            verdict="warn",
            seen=f"{DISTRIBUTION} is not installed, it runs from a folder",
            advice="pip install -e '.[server]' in that folder installs what it needs",
        )
    missing, misfits = judge_packages(required, find_version)
    if missing or misfits:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"not fitting: {', '.join(misfits)}"] if misfits else []
        return Finding(
            subject="packages",
            verdict="problem",
            seen="; ".join(parts),
            advice=f"pip install --upgrade '{DISTRIBUTION}[server]'",
        )
    shown = ", ".join(f"{name} {find_version(name)}" for name in ("transformers", "grpcio", "safetensors"))
    version = find_version(DISTRIBUTION)
    return Finding(subject="packages", verdict="ok", seen=f"{DISTRIBUTION} {version} with {shown}, all as required")


def _examine_torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding(
            subject="torch", verdict="problem", seen=f"can not be imported ({error})", advice="pip install torch"
        )
    return Finding(
        subject="torch",
        verdict="ok",
        seen=f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    )


def _examine_cpu() -> Finding:
    return Finding(subject="processor", verdict="ok", seen=f"{describe_cpu()}, {os.cpu_count()} cores")


def _examine_gpus() -> Finding:
    import torch

    names = []
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"cuda:{index} {name}, {free_bytes / _GIB:.1f} of {total_bytes / _GIB:.1f} GiB free")
    if names:
        return Finding(subject="GPUs", verdict="ok", seen="; ".join(names))
    if torch.version.cuda is not None:
        return Finding(
            subject="GPUs",
            verdict="warn",
            seen=f"torch is built for CUDA {torch.version.cuda}, but sees no device",
            advice="check `nvidia-smi`; without a device the CPU computes",
        )
    return Finding(
        subject="GPUs",
        verdict="ok",
        seen="none that torch can use (a CPU build); the CPU computes",
        advice="if this machine has an NVIDIA GPU, install a CUDA build of torch",
    )


def _examine_memory() -> Finding:
    memory = read_memory()
    if memory is None:
        return Finding(subject="memory", verdict="warn", seen="could not be found out", advice="pip install psutil")
    seen = f"{memory.available_bytes / _GIB:.1f} of {memory.total_bytes / _GIB:.1f} GiB free"
    if memory.available_bytes < _MIN_MEMORY_BYTES:
        return Finding(
            subject="memory",
            verdict="warn",
            seen=seen,
            advice="close other programs, or serve few blocks (--num-blocks)",
        )
    return Finding(subject="memory", verdict="ok", seen=seen)


def _examine_disk() -> Finding:
    from swarm.models.source import default_cache_dir

    folder = default_cache_dir()
    try:
        free_bytes = free_disk_bytes(folder)
    except OSError as error:
        return Finding(
            subject="disk",
            verdict="problem",
            seen=f"{folder} can not be used ({error.strerror})",
            advice="set SWARM_CACHE to a folder that you may write to",
        )
    seen = f"{free_bytes / _GIB:.1f} GiB free for models at {folder}"
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        return Finding(
            subject="disk",
            verdict="problem",
            seen=f"{existing} is not writable",
            advice="set SWARM_CACHE to a folder that you may write to",
        )
    if free_bytes < _MIN_DISK_BYTES:
        return Finding(
            subject="disk", verdict="warn", seen=seen, advice="make room, or set SWARM_CACHE to a larger disk"
        )
    return Finding(subject="disk", verdict="ok", seen=seen)


def _examine_dht() -> Finding:
    version = find_version("hivemind")
    if version is not None:
        return Finding(
            subject="DHT", verdict="ok", seen=f"hivemind {version}: this machine can serve and join anywhere"
        )
    return Finding(
        subject="DHT",
        verdict="warn",
        seen="hivemind is not installed: this machine can ask (--join grpc://HOST:PORT), but not serve",
        advice=f"pip install '{DISTRIBUTION}[server]' (hivemind has wheels for Linux on x86-64 only)",
    )


def _examine_ports() -> Finding:
    from swarm.discovery.addresses import advertised_host

    host = advertised_host("0.0.0.0")
    try:
        with socket.create_server(("", 0)) as listener:
            listener.settimeout(2.0)
            port = listener.getsockname()[1]
            with socket.create_connection((host, port), timeout=2.0), contextlib.closing(listener.accept()[0]):
                pass
    except OSError as error:
        return Finding(
            subject="ports",
            verdict="problem",
            seen=f"a port opened here is not reached at {host} ({error.strerror or error})",
            advice="allow incoming connections in this machine's firewall, or pass --announce-host",
        )
    if host.startswith("127.") or host == "::1":
        return Finding(
            subject="ports",
            verdict="warn",
            seen="ports can be opened, but this machine has no network address",
            advice="connect it to a network, or use it alone",
        )
    return Finding(
        subject="ports",
        verdict="ok",
        seen=f"ports can be opened; others in this network reach this machine at {host}",
    )
