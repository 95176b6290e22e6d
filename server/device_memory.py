"""How much memory a device has free: a GPU's own, or this machine's main memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from swarm.server.capacity_plan import DeviceMemory

__all__ = ["find_default_device", "measure_device_memory"]

_CGROUP: Final = Path("/sys/fs/cgroup")


def find_default_device() -> str:
    """What `--device auto` means here: the first GPU, else the processor."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def measure_device_memory(device: str) -> DeviceMemory:
    """Memory of `device` ("cpu", "cuda:1") at this moment; all zero where it can not be found out."""
    if device.startswith("cuda"):
        import torch

        free_bytes, total_bytes = torch.cuda.mem_get_info(torch.device(device))
        return DeviceMemory(name=device, free_bytes=free_bytes, total_bytes=total_bytes, is_host=False)
    free_bytes, total_bytes = _main_memory_bytes()
    limits = _container_limit_bytes(_CGROUP)
    if limits is not None:
        free_bytes, total_bytes = min(free_bytes, limits[0]), min(total_bytes, limits[1])
    return DeviceMemory(name="main memory", free_bytes=free_bytes, total_bytes=total_bytes, is_host=True)


def _main_memory_bytes() -> tuple[int, int]:
    """Free and all, as the system sees it."""
    try:
        import psutil
    except ImportError:  # it comes with the extra `server`; the system's own answer is coarser
        try:
            page_bytes = os.sysconf("SC_PAGE_SIZE")
            return os.sysconf("SC_AVPHYS_PAGES") * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes
        except (AttributeError, OSError, ValueError):
            return 0, 0
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _container_limit_bytes(folder: Path) -> tuple[int, int] | None:
    """Free and all, as a container's limit (cgroup v2) has it; None without one.

    The system's own figures are those of the whole machine: whoever believes them in a container is killed.
    """
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        caches = {
            line.split()[0]: int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines() if line
        }
    except (OSError, ValueError, IndexError):
        return None
    if not limit.isdigit():  # "max"
        return None
    # Cached files are dropped when memory is wanted.
    used -= caches.get("inactive_file", 0)
    return max(int(limit) - used, 0), int(limit)
