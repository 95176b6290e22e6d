"""How much memory there is to plan with."""

from __future__ import annotations

from pathlib import Path

from swarm.server.device_memory import _container_limit_bytes, measure_device_memory


def test_main_memory_is_measured() -> None:
    """The figure everything else is derived from."""
    memory = measure_device_memory("cpu")
    assert memory.is_host
    assert 0 < memory.usable_bytes < memory.free_bytes <= memory.total_bytes


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """In a container of 4 GiB on a machine of 64, believing in 64 means being killed."""
    (tmp_path / "memory.max").write_text("4294967296\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000000\ninactive_file 1900000000\n")
    assert _container_limit_bytes(tmp_path) == (4294967296 - 1_100_000_000, 4294967296)


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    """Most machines are no containers, or containers without limits."""
    assert _container_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    (tmp_path / "memory.stat").write_text("")
    assert _container_limit_bytes(tmp_path) is None
