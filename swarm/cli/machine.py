"""What this machine is: processor, memory, GPUs, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

__all__ = [
    "DISTRIBUTION",
    "MACHINE_PACKAGES",
    "MemoryAmount",
    "describe_cpu",
    "find_version",
    "free_disk_bytes",
    "hardware_to_json",
    "read_memory",
    "versions_to_json",
]

DISTRIBUTION: Final = "swarm-inference"
MACHINE_PACKAGES: Final = ("torch", "transformers", "grpcio", "hivemind", "uvloop", "safetensors", "bitsandbytes")
"""Packages whose versions matter when figures are compared."""


@dataclass(frozen=True, kw_only=True)
class MemoryAmount:
    """Main memory."""

    total_bytes: int
    available_bytes: int
    """What programs could take now without pushing others out."""


def read_memory() -> MemoryAmount | None:
    """This machine's main memory; None where it can not be found out."""
    try:
        import psutil
    except ImportError:  # it comes with the extra `server`; the system's own answer is coarser
        try:
            page_bytes = os.sysconf("SC_PAGE_SIZE")
            total, free = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
        return MemoryAmount(total_bytes=total * page_bytes, available_bytes=free * page_bytes)
    memory = psutil.virtual_memory()
    return MemoryAmount(total_bytes=memory.total, available_bytes=memory.available)


def free_disk_bytes(folder: Path) -> int:
    """Room on the disk that holds `folder`, or will. Raises OSError."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def describe_cpu() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def find_version(package: str) -> str | None:
    """The installed version of a distribution; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware_to_json() -> dict[str, Any]:
    """What a benchmark ran on."""
    import torch

    memory = read_memory()
    return {
        "cpu": describe_cpu(),
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": memory.total_bytes if memory else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def versions_to_json() -> dict[str, str]:
    """What a benchmark ran with."""
    from swarm.version import __version__

    found = {package: find_version(package) for package in MACHINE_PACKAGES}
    versions = {"swarm": __version__, "python": platform.python_version(), "system": platform.platform()}
    return versions | {package: version for package, version in found.items() if version is not None}
