"""What is planned before loading is what is there after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.kvpolicy.settings import find_policy
from swarm.models import load_span, resolve_model
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.planning import plan_server
from swarm.weights import Precision
from tests.tiny_models import NUM_BLOCKS, save_tiny_model


@pytest.mark.parametrize("precision", list(Precision))
def test_a_plan_comes_true(precision: Precision, tmp_path: Path) -> None:
    """Others choose servers by announced tokens, and operators machines by planned blocks."""
    save_tiny_model("llama", tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    plan = plan_server(source, precision, "cpu", kv_bytes=2**20)
    assert (plan.num_blocks, plan.num_streamed, plan.kv_bytes) == (NUM_BLOCKS, 0, 2**20)
    model = load_span(source, Span(start=0, end=plan.num_blocks), weights=precision)
    assert model.count_weights().size_bytes == plan.weight_bytes
    backend = RaggedBackend(model, memory_bytes=plan.kv_bytes)
    assert plan.kv_tokens - backend.store.page_tokens < backend.num_tokens_total <= plan.kv_tokens


def test_a_plan_follows_the_kv_policy(tmp_path: Path) -> None:
    """Compressed pages hold more tokens in the same memory."""
    save_tiny_model("llama", tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
    plain = plan_server(source, Precision.FP32, "cpu", kv_bytes=2**20)
    least_bytes = 64 * (2**20 // plain.kv_tokens)
    compressed = plan_server(source, Precision.FP32, "cpu", kv_bytes=2**20, policy=find_policy("pyramid+gear"))
    assert compressed.kv_tokens > 4 * plain.kv_tokens
    with pytest.raises(BadInputError, match=r"hold 63 uncompressed tokens, .* give .* or more --kv-memory"):
        plan_server(source, Precision.FP32, "cpu", kv_bytes=least_bytes - 1, policy=find_policy("pyramid+gear"))
    with pytest.raises(BadInputError, match=r"of KV alone do not fit .* give less --kv-memory"):
        plan_server(source, Precision.FP32, "cpu", kv_bytes=2**50, num_blocks=2)
