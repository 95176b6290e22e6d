"""A server's devices, from what its operator says to blocks that run."""

from __future__ import annotations

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import BadInputError
from swarm.models import load_span
from swarm.server.engine.chained import ChainedBackend
from swarm.server.engine.tensor_parallel import TensorParallelBackend
from swarm.server.engine.work import ForwardWork
from swarm.server.hosting import measure_tokens_per_s
from swarm.server.node_config import NodeConfig
from swarm.server.preparing import Workplace, find_workplace
from swarm.server.span_loading import load_backend
from swarm.weights import Precision
from tests.integration.conftest import TinyLlama

SPAN = Span(start=1, end=6)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [(Precision.FP32, TensorParallelBackend), (Precision.NF4, ChainedBackend)],
    ids=["slices of floats", "layers in few bits"],
)
def test_two_devices_answer_like_one(llama: TinyLlama, precision: Precision, kind: type) -> None:
    """What several devices share is the same blocks; processors stand in for GPUs."""
    config = NodeConfig(kv_memory_bytes=2**21, num_threads=1)
    workplace = Workplace(devices=("cpu", "cpu"), precision=precision, reason="")
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    work = ForwardWork(span=SPAN, counts=[9], hidden=hidden, on_done=lambda output, error: None)
    one = load_span(llama.source, SPAN, weights=precision)
    expected = one(hidden.unsqueeze(0), torch.arange(9).unsqueeze(0)).squeeze(0)
    loaded = load_backend(llama.source, SPAN, config, workplace, [], None)
    try:
        assert isinstance(loaded.backend, kind)
        assert measure_tokens_per_s(loaded) > 0
        torch.testing.assert_close(loaded.backend.run_stateless(work), expected, rtol=1e-4, atol=1e-4)
        assert not loaded.is_broken()
    finally:
        loaded.close()


def test_memory_of_all_devices_counts(llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A span that no device could hold alone is what several are for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_260_000, 80 * 2**30))
    config = NodeConfig(device="cuda:0,cuda:1", weights="fp32", kv_memory_bytes=100_000)
    workplace = find_workplace(llama.source, config)
    assert workplace.devices == ("cuda:0", "cuda:1")
    with pytest.raises(BadInputError, match="cuda:0"):
        workplace.plan(llama.source, Span(start=0, end=6), config)
    plan = workplace.spread(llama.source, Span(start=0, end=6), config)
    assert [share.device for share in plan.shares] == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("device", "offload", "sentence"),
    [
        ("cuda:0,cuda:0", False, "twice"),
        ("cuda:0,cpu", False, "mixes"),
        ("cuda:2", False, "there are 2"),
        ("tpu", False, "unknown"),
        ("cuda:0,cuda:1", True, "--offload is not offered over several"),
    ],
)
def test_devices_that_can_not_be_used_are_named(
    llama: TinyLlama, monkeypatch: pytest.MonkeyPatch, device: str, offload: bool, sentence: str
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInputError, match=sentence):
        find_workplace(llama.source, NodeConfig(device=device, offload=offload))
