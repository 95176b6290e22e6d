"""Pages copied from one engine's memory to another's: the session goes on there as if it had never moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.errors import PeerBusyError, PeerFaultError, SessionStateError
from swarm.models import SpanModel
from swarm.server.engine.engine import NotNow
from swarm.server.engine.page_transfer import PageExport, PageImport, page_format
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.session_memory import MemoryConfig, SessionMemory
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep
from tests.engine_sessions import load_tiny_span, step_work

KEY = (b"a", 1)


@pytest.fixture(scope="module", params=["llama", "gemma2", "deepseek_v3"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpanModel, SpanModel]:
    """The same blocks on two servers."""
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    return load_tiny_span(request.param, folder), load_tiny_span(request.param, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    return load_tiny_span("llama", tmp_path_factory.mktemp("llama") / "model")


def rows(model: SpanModel, count: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, model.hidden_size, generator=torch.Generator().manual_seed(seed))


def run(backend: RaggedBackend, *works: StepWork) -> list[torch.Tensor]:
    results = backend.run_steps(list(works))
    backend.memory.check_integrity()
    assert all(isinstance(result, torch.Tensor) for result in results), results
    return [result for result in results if isinstance(result, torch.Tensor)]


def forks(model: SpanModel, hidden: torch.Tensor) -> StepWork:
    """Three beams, each with one token of its own, from position 40 of sequence 0."""
    items = [SequenceStep(sequence, 0, 40, 1) for sequence in range(3)]
    return StepWork(KEY, model.span, items, hidden, lambda output, error: None)


def transfer(source: SessionMemory, target: SessionMemory, model: SpanModel, positions: list[int]) -> PageImport:
    """Everything but the end of a hand-over, in slices of five pages."""
    export = PageExport(source, KEY, positions)
    sequences = export.begin()
    arriving = PageImport(target, KEY, model.span, sequences, num_pages=len(export.pages))
    arriving.begin()
    for first in range(0, len(export.pages), 5):
        arriving.load(first, export.read(first, 5))
        for memory in (source, target):
            memory.check_integrity()
    export.release()
    export.release()
    source.check_integrity()
    return arriving


def test_beams_go_on_elsewhere_with_the_same_outputs(models: tuple[SpanModel, SpanModel]) -> None:
    """Bit for bit: windows, shared pages and families that cache something else than keys and values included."""
    here, there = (RaggedBackend(model, memory_bytes=2**22) for model in models)
    model = models[0]
    run(here, step_work(b"a", model.span, rows(model, 40), start=0))
    run(here, forks(model, rows(model, 3, seed=1)))
    run(there, step_work(b"b", model.span, rows(model, 9, seed=5), start=0))  # so that page numbers differ
    transfer(here.memory, there.memory, model, [41, 41, 41]).finish()
    there.memory.check_integrity()
    page_bytes = page_format(here.store).page_bytes
    assert there.memory.usage.used_bytes - here.memory.usage.used_bytes == model.num_layers * page_bytes
    for seed in range(2, 6):
        steps = [
            step_work(b"a", model.span, rows(model, 6, seed=seed), start=41, sequence=sequence) for sequence in range(3)
        ]
        for step in steps:
            assert torch.equal(*run(here, step), *run(there, step))
    there.forget(KEY)
    there.forget((b"b", 1))
    assert there.num_tokens_free == there.num_tokens_total


def test_an_export_survives_its_session(llama: SpanModel) -> None:
    """Its client may close it, or others need its room, while the copy is under way."""
    backend = RaggedBackend(llama, memory_bytes=2**22)
    run(backend, step_work(b"a", llama.span, rows(llama, 40), start=0))
    export = PageExport(backend.memory, KEY, [40])
    export.begin()
    before = export.read(0, len(export.pages))
    assert backend.memory._spill(backend.memory._sessions[KEY])
    backend.memory.check_integrity()
    backend.forget(KEY)
    run(backend, step_work(b"c", llama.span, rows(llama, 200, seed=3), start=0))
    assert torch.equal(export.read(0, len(export.pages)), before)
    export.release()
    backend.forget((b"c", 1))
    backend.memory.check_integrity()
    assert backend.num_tokens_free == backend.num_tokens_total


def test_no_more_is_exported_than_is_held(llama: SpanModel) -> None:
    """What was closed to make room can not be handed over as if it were there."""
    backend = RaggedBackend(llama, memory_bytes=2**22)
    run(backend, step_work(b"a", llama.span, rows(llama, 40), start=0))
    for positions in ([41], [40, 1]):
        with pytest.raises(SessionStateError):
            PageExport(backend.memory, KEY, positions).begin()
    with pytest.raises(SessionStateError):
        PageExport(backend.memory, (b"nobody", 1), [1]).begin()
    assert PageExport(backend.memory, (b"nobody", 1), [0]).begin() == {}


def test_only_the_positions_asked_for_travel(llama: SpanModel) -> None:
    """The engine may hold more than the session does: steps that were undone."""
    here, there = RaggedBackend(llama, memory_bytes=2**22), RaggedBackend(llama, memory_bytes=2**22)
    run(here, step_work(b"a", llama.span, rows(llama, 40), start=0))
    transfer(here.memory, there.memory, llama, [20]).finish()
    step = step_work(b"a", llama.span, rows(llama, 5, seed=2), start=20)
    assert torch.equal(*run(there, step), *run(here, step))
    too_far = step_work(b"a", llama.span, rows(llama, 5, seed=2), start=26)
    assert isinstance(there.run_steps([too_far])[0], SessionStateError)


def test_an_import_takes_free_pages_only(llama: SpanModel) -> None:
    """Sessions inside come first, even idle ones; prefixes that nobody uses do not count."""
    here = RaggedBackend(llama, memory_bytes=2**22)
    run(here, step_work(b"a", llama.span, rows(llama, 40), start=0))
    page_bytes = here.store.page_bytes
    there = RaggedBackend(llama, memory_bytes=page_bytes * llama.num_layers * 5)
    run(there, step_work(b"b", llama.span, rows(llama, 48, seed=1), start=0))
    with pytest.raises(PeerBusyError):
        transfer(here.memory, there.memory, llama, [40])
    there.memory.check_integrity()
    there.forget((b"b", 1))
    assert there.store.pool.num_reclaimable
    arriving = transfer(here.memory, there.memory, llama, [40])
    arriving.abandon()
    arriving.abandon()
    there.memory.check_integrity()
    assert there.num_tokens_free == there.num_tokens_total


def test_a_session_is_not_imported_over_another(llama: SpanModel) -> None:
    """What is here already may be in use."""
    backend = RaggedBackend(llama, memory_bytes=2**22)
    run(backend, step_work(b"a", llama.span, rows(llama, 40), start=0))
    arriving = transfer(backend.memory, backend.memory, llama, [40])
    with pytest.raises(PeerFaultError):
        arriving.finish()
    arriving.abandon()
    backend.memory.check_integrity()
    run(backend, step_work(b"a", llama.span, rows(llama, 1), start=40))


def test_who_is_away_makes_room_before_who_is_idle(llama: SpanModel) -> None:
    """Nobody reads what a vanished client left; when host memory is full too, it is closed, and known to be lost."""
    page_bytes = RaggedBackend(llama, memory_bytes=2**22).store.page_bytes
    config = MemoryConfig(spill_memory_bytes=0, prefix_memory_bytes=0)
    backend = RaggedBackend(llama, memory_bytes=page_bytes * llama.num_layers * 6, config=config)
    for name in (b"a", b"b"):
        run(backend, step_work(name, llama.span, rows(llama, 40), start=0))
    backend.set_away((b"b", 1), True)
    assert isinstance(run(backend, step_work(b"a", llama.span, rows(llama, 40), start=40))[0], torch.Tensor)
    assert backend.has_lost((b"b", 1)) and not backend.has_lost((b"a", 1))
    (refused,) = backend.run_steps([step_work(b"b", llama.span, rows(llama, 1), start=40)])
    assert isinstance(refused, SessionStateError | NotNow)
    for name in (b"a", b"b"):
        backend.forget((name, 1))
    assert not backend.has_lost((b"b", 1))
    assert backend.num_tokens_free == backend.num_tokens_total


def test_a_dropped_step_leaves_no_fork_behind(llama: SpanModel) -> None:
    """A step that waited for room and is not wanted any more must not stand for the next one's forks."""
    page_bytes = RaggedBackend(llama, memory_bytes=2**22).store.page_bytes
    config = MemoryConfig(spill_memory_bytes=0, prefix_memory_bytes=0)
    backend = RaggedBackend(llama, memory_bytes=page_bytes * llama.num_layers * 6, config=config)
    run(backend, step_work(b"b", llama.span, rows(llama, 48), start=0))
    run(backend, step_work(b"a", llama.span, rows(llama, 20), start=0))
    fork = step_work(b"a", llama.span, rows(llama, 40, seed=1), start=20, sequence=1, parent=0)
    assert isinstance(backend.run_steps([fork])[0], NotNow)
    backend.drop_step(KEY)
    again = step_work(b"a", llama.span, rows(llama, 2, seed=2), start=10, sequence=2, parent=0)
    (output,) = run(backend, again)
    (alone,) = run(
        RaggedBackend(llama, memory_bytes=2**22),
        step_work(b"a", llama.span, torch.cat([rows(llama, 10), rows(llama, 2, seed=2)]), start=0),
    )
    assert (output - alone[10:]).abs().max() < 1e-4
