"""What every test stands on: one thread per process, and tiers told apart by folder."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Set before anything imports torch, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Time limits per example fail by chance on a busy machine; pytest-timeout guards against real hangs.
hypothesis.settings.register_profile("swarm", deadline=None)
hypothesis.settings.load_profile("swarm")

_TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(_TESTS).parts[0]
        if tier in ("e2e", "gpu"):
            item.add_marker(tier)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none on this machine")
