"""KV memory is planned before loading as it is taken after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.models.block_sizes import measure_model_shape
from swarm.server.engine.ragged import RaggedBackend
from swarm.weights import Precision
from tests.engine_sessions import load_tiny_span
from tests.tiny_models import build_tiny_config


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "deepseek_v3", "qwen3_moe"])
def test_planned_kv_bytes_are_what_pages_take(family: str, tmp_path: Path) -> None:
    """KV tokens are announced capacity: shared heads and latent attention count as what is really kept."""
    sizes = measure_model_shape(build_tiny_config(family)).sizes(Precision.FP32, "cpu")
    store = RaggedBackend(load_tiny_span(family, tmp_path / family), memory_bytes=2**20).store
    assert sizes.kv_bytes_per_token * store.page_tokens == store.page_bytes
