"""Two processes with half of the heads each serve as one process with all of them does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import ModelFilesError, PeerFaultError, SessionStateError, UnsupportedModelError
from swarm.models import resolve_model
from swarm.server.engine.engine import SpanBackend
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.session_memory import MemoryConfig
from swarm.server.engine.tensor_parallel import SliceConfig, TensorParallelBackend, start_tensor_parallel
from swarm.server.engine.work import BackwardWork, ForwardWork
from tests.engine_sessions import load_tiny_span, run_mixed_sessions, step_work
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(start=0, end=NUM_BLOCKS)
TOLERANCE = 1e-5
DEVICES = ("cpu", "cpu")
TIMEOUT_S = 60.0
Start = Callable[..., TensorParallelBackend]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts two processes for a tiny model of a family; they end with the test."""
    started: list[TensorParallelBackend] = []

    def start_family(
        family: str, *, memory_bytes: int = 2**21, timeout_s: float = TIMEOUT_S, idle_after_s: float = 3.0
    ) -> TensorParallelBackend:
        save_tiny_model(family, tmp_path / "m")
        config = SliceConfig(
            devices=DEVICES,
            memory_bytes=memory_bytes,
            cache_dir=tmp_path / "cache",
            timeout_s=timeout_s,
            start_timeout_s=TIMEOUT_S,
            num_threads=1,
        )
        memory = MemoryConfig(page_tokens=4, idle_after_s=idle_after_s)
        source = resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache")
        started.append(start_tensor_parallel(source, SPAN, config, memory=memory))
        return started[-1]

    yield start_family
    for backend in started:
        backend.close()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def decode_greedily(backend: SpanBackend, family: str, folder: Path) -> list[int]:
    """Token ids of a short prompt's continuation, with the embeddings and head of the whole model."""
    model: Any = save_tiny_model(family, folder)
    tokens = [1, 17, 99, 42]
    start = 0
    for _ in range(24):
        with torch.inference_mode():
            hidden = model.get_input_embeddings()(torch.tensor(tokens[start:]))
            (output,) = backend.run_steps([step_work(b"greedy", SPAN, hidden, start=start)])
            assert isinstance(output, torch.Tensor), output
            start = len(tokens)
            logits = model.get_output_embeddings()(model.base_model.norm(output[-1]))
        tokens.append(int(logits.argmax()))
    backend.forget((b"greedy", 1))
    return tokens


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_two_processes_serve_as_one(family: str, tmp_path: Path, start: Start) -> None:
    """Batches of sessions, gradients and whole answers: nobody may notice how many devices a server has."""
    backend = start(family)
    whole = load_tiny_span(family, tmp_path / "m")
    reference = RaggedBackend(whole, memory_bytes=2**21, config=MemoryConfig(page_tokens=4))
    assert backend.num_tokens_total == reference.num_tokens_total  # half of the heads in half of the memory, twice

    found, wanted = run_mixed_sessions(backend, backend.model), run_mixed_sessions(reference, whole)
    for left, right in zip(found, wanted, strict=True):
        assert_close(left, right)

    hidden, gradient = torch.randn(2, 9, whole.hidden_size).unbind()
    part = Span(start=1, end=4)
    for work in (
        ForwardWork(part, [4, 5], hidden, lambda output, error: None),
        BackwardWork(part, [4, 5], hidden, gradient, lambda output, error: None),
    ):
        assert_close(backend.run_stateless(work), reference.run_stateless(work))

    assert decode_greedily(backend, family, tmp_path / "m") == decode_greedily(reference, family, tmp_path / "m")
    assert backend.num_tokens_free == reference.num_tokens_free


def test_all_processes_take_the_same_decisions_when_memory_is_short(tmp_path: Path, start: Start) -> None:
    """Who makes room for whom depends on time and order; a process that decides otherwise would mix sessions up."""
    memory_bytes = 6 * 32 * 4 * 4 * 32  # six layers of 32 pages of 4 tokens
    backend = start("llama", memory_bytes=memory_bytes, idle_after_s=0.0)
    whole = load_tiny_span("llama", tmp_path / "m")
    reference = RaggedBackend(whole, memory_bytes=2**22)
    sessions = [bytes([number]) for number in range(6)]
    lengths = dict.fromkeys(sessions, 0)
    torch.manual_seed(0)
    common = torch.randn(12, whole.hidden_size)  # a shared prefix
    for _ in range(6):
        for name in sessions:
            count = 12 if not lengths[name] else 7
            hidden = common if not lengths[name] else torch.randn(count, whole.hidden_size)
            work = step_work(name, SPAN, hidden, start=lengths[name])
            (found,), (wanted,) = backend.run_steps([work]), reference.run_steps([work])
            assert isinstance(found, torch.Tensor), found
            assert isinstance(wanted, torch.Tensor)
            assert_close(found, wanted)
            lengths[name] += count
    assert backend.kv_usage.num_spills > 0
    backend.set_away((sessions[0], 1), True)
    backend.drop_step((sessions[1], 1))
    for name in sessions:
        backend.forget((name, 1))
    # What is wrong with one session is that session's own, and no reason for the processes to part.
    (refused,) = backend.run_steps([step_work(b"new", SPAN, common, start=5)])
    assert isinstance(refused, SessionStateError)
    (served,) = backend.run_steps([step_work(b"new", SPAN, common, start=0)])
    assert isinstance(served, torch.Tensor)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_is_an_error_within_the_deadline(how: str, start: Start) -> None:
    """A GPU that falls off its bus must not leave clients waiting: they go to another server."""
    backend = start("llama", timeout_s=4.0)
    hidden = torch.randn(5, backend.model.hidden_size)
    (output,) = backend.run_steps([step_work(b"a", SPAN, hidden, start=0)])
    assert isinstance(output, torch.Tensor)
    process_id = backend._workers._processes[0].pid
    assert process_id is not None
    os.kill(process_id, getattr(signal, how))
    started_s = time.monotonic()
    with pytest.raises(PeerFaultError, match=r"gone|failed"):
        backend.run_steps([step_work(b"a", SPAN, hidden, start=5)])
    assert time.monotonic() - started_s < 40.0
    assert backend.is_broken
    started_s = time.monotonic()
    with pytest.raises(PeerFaultError, match="restart the server"):
        backend.run_steps([step_work(b"a", SPAN, hidden, start=5)])
    backend.forget((b"a", 1))
    backend.close()
    assert time.monotonic() - started_s < 30.0
    assert backend._workers._processes == []


def test_refusals_come_before_anything_is_started(tmp_path: Path, start: Start) -> None:
    """A family without a plan has another way to use several devices."""
    with pytest.raises(UnsupportedModelError, match="no tensor-parallel plan for falcon"):
        start("falcon")


def test_a_worker_that_can_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    """Its own process' output is seen by nobody."""
    from swarm.server.engine import tensor_parallel

    order = tensor_parallel._order

    def break_files(*args: object) -> object:
        made = order(*args)  # type: ignore[arg-type]
        for path in (tmp_path / "m").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:100])
        return made

    monkeypatch.setattr(tensor_parallel, "_order", break_files)
    with pytest.raises((PeerFaultError, ModelFilesError), match="damaged or incomplete"):
        start("llama")
