"""What a server tells of its KV memory adds up."""

from __future__ import annotations

from pathlib import Path

import torch

from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.session_memory import MemoryConfig
from tests.engine_sessions import load_tiny_span, step_work

KV_MEMORY_BYTES = 2**20


def test_used_wasted_and_shared_bytes(tmp_path: Path) -> None:
    """Operators size their memory by these figures, and the waste is a promise."""
    model = load_tiny_span("llama", tmp_path / "llama")
    backend = RaggedBackend(model, memory_bytes=KV_MEMORY_BYTES, config=MemoryConfig(page_tokens=4))
    layer_pages = backend.store.page_bytes * model.num_layers
    prompt = torch.randn(10, model.hidden_size)
    backend.run_steps([step_work(b"a", model.span, prompt, start=0)])
    usage = backend.kv_usage
    assert usage.used_bytes == 3 * layer_pages
    assert usage.wasted_bytes == layer_pages // 2  # two of the last page's four tokens
    assert usage.shared_bytes == 0
    backend.run_steps([step_work(b"b", model.span, prompt, start=0)])
    usage = backend.kv_usage
    assert usage.num_tokens_shared == 8
    assert usage.shared_bytes == 2 * layer_pages
    assert usage.used_bytes == 4 * layer_pages
    assert usage.wasted_bytes == layer_pages
    for name in (b"a", b"b"):
        backend.forget((name, 1))
    usage = backend.kv_usage
    assert (usage.used_bytes, usage.wasted_bytes, usage.shared_bytes) == (0, 0, 0)
    assert usage.total_bytes > 0


def test_the_other_backend_tells_what_it_holds(tmp_path: Path) -> None:
    """Caches without pages waste and share nothing."""
    model = load_tiny_span("llama", tmp_path / "llama")
    backend = SequentialBackend(model, memory_bytes=KV_MEMORY_BYTES)
    backend.run_steps([step_work(b"a", model.span, torch.randn(10, model.hidden_size), start=0)])
    assert 0 < backend.kv_usage.used_bytes < backend.kv_usage.total_bytes
    assert backend.kv_usage.wasted_bytes == 0
