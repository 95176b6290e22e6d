"""What `import swarm` promises: quick, light, and everything it lists is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import swarm

HEAVY = ("torch", "transformers", "grpc", "hivemind", "numpy", "google.protobuf")


def run_python(program: str) -> str:
    """Standard output of a program in a fresh interpreter, stripped."""
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_import_loads_no_heavy_library() -> None:
    """A script that only wants the errors, and the command line's --help, must not wait seconds for torch."""
    loaded = run_python(f"import sys, swarm; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded == "[]"


def test_import_takes_less_than_300_ms_of_cpu_time() -> None:
    """The promise in figures; CPU time, because a busy machine is not the package's fault."""
    program = "import time; start = time.process_time(); import swarm; print(time.process_time() - start)"
    assert min(float(run_python(program)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("name", swarm.__all__)
def test_every_listed_name_can_be_imported(name: str) -> None:
    """What __all__ lists is the public surface; a lazy name that leads nowhere fails only when a user needs it."""
    assert getattr(swarm, name) is not None
    assert name in dir(swarm)


def test_unknown_name_is_an_attribute_error() -> None:
    """hasattr and copy rely on AttributeError, also from a module that loads lazily."""
    assert not hasattr(swarm, "SwarmModel")


def test_every_error_of_the_tree_is_public() -> None:
    """A caller can catch only what can be imported, and __init__ must not fall behind errors.py."""
    from swarm import errors

    assert set(errors.__all__) <= set(swarm.__all__)
    assert all(getattr(swarm, name) is getattr(errors, name) for name in errors.__all__)
