"""Weights that stream to a GPU, and blocks that several GPUs share, give what one GPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from swarm.datatypes import Span
from swarm.models import load_span, resolve_model
from swarm.models.offload import offload_layers
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.tensor_parallel import SliceConfig, start_tensor_parallel
from swarm.server.engine.work import BackwardWork
from swarm.weights import Precision
from tests.engine_sessions import load_tiny_span, run_mixed_sessions
from tests.tiny_models import NUM_BLOCKS

KV_MEMORY_BYTES = 2**22
SPAN = Span(start=0, end=NUM_BLOCKS)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("which", [(1, 4), (0, 2, 4), tuple(range(NUM_BLOCKS))], ids=str)
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.NF4], ids=str)
def test_streamed_blocks_give_the_same_bits(
    precision: Precision, which: tuple[int, ...], where: Literal["host", "disk"], tmp_path: Path
) -> None:
    """A copy that is still under way, or overwrites weights still in use, shows as other bits."""
    load_tiny_span("llama", tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"))
    whole, model = (load_span(source, SPAN, weights=precision, device="cuda") for _ in range(2))
    streamer = offload_layers(model, which, where=where, folder=tmp_path)
    assert streamer is not None
    backends = [RaggedBackend(loaded, memory_bytes=KV_MEMORY_BYTES) for loaded in (whole, model)]
    for left, right in zip(run_mixed_sessions(backends[0], whole), run_mixed_sessions(backends[1], model), strict=True):
        assert torch.equal(left, right)
    hidden, gradient = torch.randn(2, 12, whole.hidden_size).unbind()
    work = BackwardWork(SPAN, [5, 7], hidden, gradient, lambda output, error: None)
    wanted, found = (
        SequentialBackend(loaded, memory_bytes=KV_MEMORY_BYTES).run_stateless(work) for loaded in (whole, model)
    )
    assert torch.equal(wanted, found)
    streamer.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_span(tmp_path: Path) -> None:
    """The sums go through NCCL here, which the tests on CPUs never meet."""
    whole = load_tiny_span("llama", tmp_path / "m", device="cuda")
    source = resolve_model(str(tmp_path / "m"))
    config = SliceConfig(devices=("cuda:0", "cuda:1"), memory_bytes=2 * KV_MEMORY_BYTES)
    backend = start_tensor_parallel(source, SPAN, config)
    try:
        reference = RaggedBackend(whole, memory_bytes=KV_MEMORY_BYTES)
        found = run_mixed_sessions(backend, backend.model)
        for left, right in zip(run_mixed_sessions(reference, whole), found, strict=True):
            assert float((left - right).abs().max()) <= 1e-3 * float(left.abs().max())
    finally:
        backend.close()
