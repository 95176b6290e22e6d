"""Sessions under a policy on a server that is short of memory answer as on one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swarm.kvpolicy.settings import find_policy
from swarm.models import SpanModel
from swarm.server.engine.engine import NotNow
from swarm.server.engine.page_transfer import PageExport, PageImport
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.session_memory import MemoryConfig
from swarm.server.engine.work import StepWork
from swarm.server.policy_layers import PolicyWish
from swarm.server.session_mirror import SequenceStep
from tests.engine_sessions import load_tiny_span


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    folder: Path = tmp_path_factory.mktemp("llama") / "model"
    return load_tiny_span("llama", folder)


def make_backend(model: SpanModel, *, num_pages: int, preset: str, spill_bytes: int = 2**24) -> RaggedBackend:
    """A backend whose memory is `num_pages` pages."""
    shapes = RaggedBackend(model, memory_bytes=2**20).store.shapes
    wish = PolicyWish(policy=find_policy(preset), num_layers=model.num_layers, first_layer=0, max_positions=2048)
    layers = wish.build(shapes, [0] * len(shapes), page_tokens=16, itemsize=model.dtype.itemsize)
    config = MemoryConfig(prefix_memory_bytes=0, spill_memory_bytes=spill_bytes, idle_after_s=0.0)
    return RaggedBackend(
        model, memory_bytes=num_pages * layers.page_bytes, config=config, policy_layers=layers, allows_kernel=False
    )


def run_patiently(backend: RaggedBackend, work: StepWork) -> torch.Tensor:
    """The step's outputs; it waits at most a few times."""
    for _ in range(3):
        (result,) = backend.run_steps([work])
        backend.memory.check_integrity()
        if isinstance(result, torch.Tensor):
            return result
        assert isinstance(result, NotNow), result
    raise AssertionError("the step never ran")


def script(model: SpanModel) -> list[StepWork]:
    """Prompts and tokens of four sessions, one of them exact, one with two beams."""
    generator = torch.Generator().manual_seed(5)
    steps: list[StepWork] = []

    def add(name: bytes, items: list[SequenceStep]) -> None:
        hidden = torch.randn(sum(item.count for item in items), model.hidden_size, generator=generator)
        steps.append(
            StepWork((name, 1), model.span, items, hidden, lambda output, error: None, compresses=name != b"exact")
        )

    lengths = {b"a": 90, b"b": 130, b"exact": 70}
    for name, length in lengths.items():
        add(name, [SequenceStep(0, 0, 0, length // 2, is_unfinished=name != b"exact")])
        add(name, [SequenceStep(0, 0, length // 2, length - length // 2)])
    for step in range(24):
        for name in lengths:
            add(name, [SequenceStep(0, 0, lengths[name] + step, 1)])
        beams = [SequenceStep(beam, 0 if step == 0 else 1 - beam, 130 + step, 1) for beam in range(2)]
        if step == 23:
            beams = [SequenceStep(beam, 0, 154, 1) for beam in range(2)]
            add(b"b", beams)
    return steps


@pytest.mark.parametrize("preset", ["pyramid", "gear", "pyramid+gear"])
def test_making_room_changes_no_answer(model: SpanModel, preset: str) -> None:
    """What went to host memory and back must be the same bits in other pages."""
    roomy = make_backend(model, num_pages=2000, preset=preset)
    tight = make_backend(model, num_pages=100, preset=preset)
    for count, work in enumerate(script(model)):
        if count % 5 == 4:  # as if somebody else had wanted all of the memory
            for session in tight.memory._sessions.values():
                assert session.spilled is not None or tight.memory._spill(session)
        assert torch.equal(run_patiently(roomy, work), run_patiently(tight, work))
    assert tight.memory.num_spills > 10 and roomy.memory.num_spills == 0
    for name in (b"a", b"b", b"exact"):
        tight.forget((name, 1))
    assert tight.num_tokens_free == tight.num_tokens_total and tight.memory.spilled_bytes == 0


@pytest.mark.parametrize("preset", ["pyramid", "gear", "pyramid+gear"])
def test_a_compressed_session_goes_on_elsewhere_with_the_same_outputs(model: SpanModel, preset: str) -> None:
    """Bit for bit, as for exact ones."""
    here, there = (make_backend(model, num_pages=2000, preset=preset) for _ in range(2))
    works = [work for work in script(model) if work.session == (b"a", 1)]
    for work in works[:10]:
        run_patiently(here, work)
    export = PageExport(here.memory, (b"a", 1), [98])
    arriving = PageImport(there.memory, (b"a", 1), model.span, export.begin(), num_pages=len(export.pages))
    arriving.begin()
    arriving.load(0, export.read(0, len(export.pages)))
    export.release()
    arriving.finish()
    there.memory.check_integrity()
    for work in works[10:]:
        assert torch.equal(run_patiently(here, work), run_patiently(there, work))
