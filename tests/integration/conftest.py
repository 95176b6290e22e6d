"""A tiny model on disk and in memory, for swarms that serve it and for judging what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.models import ModelSource
from tests.local_blocks import LocalBlocks, local_blocks
from tests.tiny_models import save_tiny_model


@dataclass(frozen=True, kw_only=True)
class TinyLlama:
    """Six blocks of hidden size 32."""

    folder: Path
    local: Any
    """Transformers' own model, whole."""
    source: ModelSource
    blocks: LocalBlocks
    """All blocks as one span in this process, the yardstick for hidden states."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("llama") / "model"
    local = save_tiny_model("llama", folder)
    source, blocks = local_blocks(folder)
    return TinyLlama(folder=folder, local=local, source=source, blocks=blocks)
