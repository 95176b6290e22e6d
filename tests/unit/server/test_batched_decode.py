"""Attention in shared padded calls gives what attention one by one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.session_memory import MemoryConfig
from tests.engine_sessions import load_tiny_span, run_mixed_sessions, step_work

KV_MEMORY_BYTES = 2**21


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "cohere2"])
def test_equals_attention_one_by_one(family: str, tmp_path: Path) -> None:
    """Plain, windowed, capped, with sinks, with values of another size: the device must not change a token."""
    model = load_tiny_span(family, tmp_path / family)
    config = MemoryConfig(page_tokens=4, prefix_memory_bytes=0)
    alone = RaggedBackend(model, memory_bytes=KV_MEMORY_BYTES, config=config)
    together = RaggedBackend(model, memory_bytes=KV_MEMORY_BYTES, config=config)
    together.attends_in_groups = True
    for expected, found in zip(run_mixed_sessions(alone, model), run_mixed_sessions(together, model), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


def test_garbage_in_foreign_memory_touches_nobody(tmp_path: Path) -> None:
    """Padding is read from somewhere: were it another's NaN, masked scores would still be NaN."""
    model = load_tiny_span("llama", tmp_path / "llama")
    backend = RaggedBackend(model, memory_bytes=KV_MEMORY_BYTES, config=MemoryConfig(page_tokens=4))
    backend.attends_in_groups = True
    backend.store._slab.fill_(float("nan"))
    for output in run_mixed_sessions(backend, model):
        assert torch.isfinite(output).all()


def test_one_session_with_bad_numbers_fails_alone(tmp_path: Path) -> None:
    """Sessions share a call, not their fate."""
    model = load_tiny_span("llama", tmp_path / "llama")
    backend = RaggedBackend(model, memory_bytes=KV_MEMORY_BYTES)
    backend.attends_in_groups = True
    prompt, token = torch.randn(6, model.hidden_size), torch.randn(1, model.hidden_size)
    bad = torch.full_like(token, float("nan"))
    backend.run_steps([step_work(name, model.span, prompt, start=0) for name in (b"a", b"b")])
    good_result, bad_result = backend.run_steps(
        [step_work(b"a", model.span, token, start=6), step_work(b"b", model.span, bad, start=6)]
    )
    assert isinstance(good_result, torch.Tensor)
    assert isinstance(bad_result, Exception)
