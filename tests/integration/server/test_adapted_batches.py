"""Sessions with different adapters in one engine: batches, pages, and what a server refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarm.datatypes import AdapterHash, Span
from swarm.models import SpanModel, load_span, resolve_model
from swarm.models.adapters.bank import AdapterBank
from swarm.models.adapters.rows import NO_ADAPTER, AdapterPlan, current_adapter_plan
from swarm.models.adapters.source import open_adapter
from swarm.pb import session_pb2 as pb
from swarm.server.engine.engine import SpanBackend
from swarm.server.engine.job import StepJob
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.work import StepWork
from tests.engine_sessions import step_work
from tests.raw_client import RawClient, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tiny_adapters import LINEARS, save_tiny_adapter
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(start=1, end=5)
FAMILIES = ["llama", "gemma2", "deepseek_v3", "qwen3_moe"]


class Adapted:
    """A family's blocks with two adapters."""

    def __init__(self, family: str, folder: Path) -> None:
        model = save_tiny_model(family, folder / "model")
        self.span: SpanModel = load_span(resolve_model(str(folder / "model")), SPAN)
        bank = AdapterBank(self.span, num_blocks=NUM_BLOCKS)
        self.folders: dict[str, Path] = {}
        hashes: list[AdapterHash] = []
        for seed, name in enumerate(("red", "blue")):
            self.folders[name] = folder / name
            save_tiny_adapter(model, folder / name, seed=seed, target_modules=list(LINEARS[family]))
            hashes.append(bank.add(open_adapter(name, folder / name, cache_dir=folder / "cache")).adapter_hash)
        self.red, self.blue = hashes


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    torch.set_num_threads(1)
    return Adapted("llama", tmp_path_factory.mktemp("llama"))


def work(session: int, hidden: torch.Tensor, start: int, adapter: AdapterHash, *, span: Span = SPAN) -> StepWork:
    return dataclasses.replace(step_work(bytes([session]), span, hidden, start=start), adapter=adapter)


def run(backend: SpanBackend, works: list[StepWork]) -> list[torch.Tensor]:
    outputs = backend.run_steps(works)
    assert all(isinstance(output, torch.Tensor) for output in outputs), outputs
    return [output for output in outputs if isinstance(output, torch.Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_sessions_run_alone(family: str, tmp_path: Path) -> None:
    """Prompts and decoding steps of every choice stand side by side; each gets what it would get alone."""
    torch.set_num_threads(1)
    adapted = Adapted(family, tmp_path)
    chosen = [adapted.red, NO_ADAPTER, adapted.blue, adapted.red, NO_ADAPTER, adapted.blue]
    generator = torch.Generator().manual_seed(5)
    steps = [
        [torch.randn(count, adapted.span.hidden_size, generator=generator) for count in counts]
        for counts in ((20, 17, 3, 33, 1, 16), (1,) * 6, (1, 5, 1, 1, 2, 1))
    ]
    starts = [0] * len(chosen)
    alone, together = SequentialBackend(adapted.span, memory_bytes=2**22), []
    expected = []
    rounds: list[list[StepWork]] = []
    for hidden in steps:
        rounds.append([work(index, hidden[index], starts[index], adapter) for index, adapter in enumerate(chosen)])
        starts = [start + len(rows) for start, rows in zip(starts, hidden, strict=True)]
    for works in rounds:
        expected += [run(alone, [single])[0] for single in works]
    backend = RaggedBackend(adapted.span, memory_bytes=2**22)
    for works in rounds:
        together += run(backend, works)
    for left, right in zip(expected, together, strict=True):
        assert (left - right).abs().max() <= 1e-4 * left.abs().max()


def test_a_part_of_the_span(llama: Adapted) -> None:
    """Routes join at any block: what is skipped is skipped with its adapter."""
    inner = Span(start=2, end=4)
    hidden = torch.randn(9, llama.span.hidden_size, generator=torch.Generator().manual_seed(5))
    found = run(RaggedBackend(llama.span, memory_bytes=2**22), [work(0, hidden, 0, llama.red, span=inner)])[0]
    whole = load_span(resolve_model(str(llama.folders["red"].parent / "model")), inner)
    bank = AdapterBank(whole, num_blocks=NUM_BLOCKS)
    bank.add(open_adapter("red", llama.folders["red"], cache_dir=llama.folders["red"].parent / "cache"))
    expected = run(SequentialBackend(whole, memory_bytes=2**22), [work(0, hidden, 0, llama.red, span=inner)])[0]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_product_for_each_adapter_in_a_batch(llama: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sessions with few adapters must not cost a product each: their rows are brought side by side."""
    plans: list[AdapterPlan | None] = []
    handle = llama.span.blocks[0].register_forward_pre_hook(lambda *_: plans.append(current_adapter_plan.get()))
    chosen = [llama.red, NO_ADAPTER, llama.blue, llama.red, llama.blue, NO_ADAPTER, llama.red]
    try:
        backend = RaggedBackend(llama.span, memory_bytes=2**22)
        plans.clear()
        hidden = torch.randn(len(chosen), 1, llama.span.hidden_size, generator=torch.Generator().manual_seed(5))
        run(backend, [work(index, hidden[index], 0, adapter) for index, adapter in enumerate(chosen)])
    finally:
        handle.remove()
    assert len(plans) == 1
    assert plans[0] is not None
    assert sorted((part.adapter, part.end_row - part.first_row) for part in plans[0].parts) == sorted(
        [(llama.red, 3), (llama.blue, 2)]
    )


def test_pages_of_one_adapter_are_not_another_ones(llama: Adapted) -> None:
    """The same prompt gives other keys and values with another adapter; with the same one it is not run twice."""
    backend = RaggedBackend(llama.span, memory_bytes=2**22)
    hidden = torch.randn(64, llama.span.hidden_size, generator=torch.Generator().manual_seed(5))
    num_run = []
    for session, adapter in enumerate([NO_ADAPTER, llama.red, llama.blue, llama.red, NO_ADAPTER]):
        before = backend.num_tokens_run
        run(backend, [work(session, hidden, 0, adapter)])
        backend.memory.check_integrity()
        num_run.append(backend.num_tokens_run - before)
    assert num_run == [64, 64, 64, 0, 0]


def test_parts_of_a_long_step_keep_the_adapter(llama: Adapted) -> None:
    """The engine cuts prompts into chunks, each of them a work of its own."""
    hidden = torch.zeros(10, llama.span.hidden_size)
    job = StepJob(work(0, hidden, 0, llama.red), is_decode=False, arrived_s=0.0)
    part = job.part(4)
    assert (part.adapter, len(part.hidden)) == (llama.red, 4)


@pytest.fixture(scope="module")
def swarm(llama: Adapted) -> Iterator[InProcessSwarm]:
    folder = llama.folders["red"].parent / "model"
    with InProcessSwarm(folder, [(0, 6)], adapters={"red": llama.folders["red"]}) as swarm:
        yield swarm


@pytest.mark.parametrize("adapter", ["0" * 32, "red", "x" * 5000, "\x00"])
def test_adapters_that_are_not_here(adapter: str, swarm: InProcessSwarm) -> None:
    """A hop that quietly went on without the adapter would spoil the whole answer; the refusal names what there is."""
    with RawClient(swarm.nodes[0].info) as raw:
        failure = raw.refused_open(adapter=adapter)
        assert failure.code == pb.FAILURE_NOT_SERVED
        assert "offered: red" in failure.message
        reply, _ = raw.forward([torch.zeros(3, 32)], adapter=adapter)
        assert reply.failure.code == pb.FAILURE_NOT_SERVED
    wait_until(lambda: is_idle(swarm.nodes[0]))


def test_a_kept_session_keeps_its_adapter(swarm: InProcessSwarm) -> None:
    """A later epoch that asks for another adapter can not go on with what the earlier one holds."""
    info = swarm.nodes[0].info
    own = info.adapters[0].adapter_hash
    with RawClient(info) as raw:
        for adapter, is_kept in ((own, True), ("", False)):
            stream, message = raw.open(adapter=own)
            stream.send(step_frame(step_message(1, count=3), torch.zeros(3, 32)))
            assert stream.receive() is not None
            message.adapter = adapter
            assert raw.reopen(message, epoch=2, keep=(1, 1))[1].kept == is_kept
