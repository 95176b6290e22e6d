"""Pairs of the same tiny model: plain transformers, and a remote model over blocks in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.client.remote_model import SwarmModelForCausalLM
from tests.local_blocks import local_blocks
from tests.model_pair import Pair
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and local model of a family, written once."""
    saved: dict[str, tuple[Path, Any]] = {}

    def save(family: str) -> tuple[Path, Any]:
        if family not in saved:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp(family) / "model"
            saved[family] = folder, save_tiny_model(family, folder)
        return saved[family]

    return save


@pytest.fixture
def make_pair(saved_model: Callable[[str], tuple[Path, Any]]) -> Callable[..., Pair]:
    """A family over spans that begin before the blocks in `cuts`."""

    def make(family: str = "llama", *, cuts: tuple[int, ...] = (1, 4)) -> Pair:
        folder, local = saved_model(family)
        source, blocks = local_blocks(folder, *cuts)
        remote = SwarmModelForCausalLM.from_blocks(source, blocks)
        return Pair(folder=folder, source=source, local=local, remote=remote, blocks=blocks)

    return make


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """A llama over three uneven spans."""
    return make_pair()
