"""Parts of a span on several devices serve as one, whichever of them runs out of room."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.models import load_span, resolve_model
from swarm.server.engine.chained import ChainedBackend, Stage
from swarm.server.engine.engine import NotNow
from swarm.server.engine.job import StepJob
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.session_memory import MemoryConfig
from swarm.server.engine.work import BackwardWork, ForwardWork, StepWork
from swarm.server.session_mirror import SequenceStep
from tests.engine_sessions import load_tiny_span, run_mixed_sessions, step_work
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

SPAN = Span(start=0, end=NUM_BLOCKS)
CUTS = (Span(start=0, end=1), Span(start=1, end=4), Span(start=4, end=6))
TOLERANCE = 1e-5
MEMORY_BYTES = 2**21
HIDDEN_SIZE = 32


class ReluctantBackend(RaggedBackend):
    """Has no room for some steps, as if others held all pages, and finds it out after the forks, as always."""

    random = random.Random(0)
    share = 0.0
    num_refusals = 0

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | NotNow | BaseException]:
        results: list[torch.Tensor | NotNow | BaseException] = []
        for work in works:
            if self.random.random() >= self.share:
                results += super().run_steps([work])
                continue
            pool, make_room = self.store.pool, self.memory._make_room
            taken = pool.allocate(pool.num_free)
            self.memory._make_room = lambda *args: False  # type: ignore[method-assign]
            self.memory._check_others = lambda *args: None  # type: ignore[method-assign]
            results += super().run_steps([work])
            self.memory._make_room = make_room  # type: ignore[method-assign]
            pool.release(taken)
            self.num_refusals += isinstance(results[-1], NotNow)
        return results


def chain(folder: Path, *, share: float = 0.0) -> tuple[ChainedBackend, list[ReluctantBackend]]:
    """Three stages of a tiny llama, which refuse this share of steps."""
    if not folder.exists():
        save_tiny_model("llama", folder)
    source = resolve_model(str(folder))
    config = MemoryConfig(page_tokens=4)
    backends = [ReluctantBackend(load_span(source, span), memory_bytes=MEMORY_BYTES, config=config) for span in CUTS]
    for backend in backends:
        backend.share = share
    return ChainedBackend([Stage(span, backend) for span, backend in zip(CUTS, backends, strict=True)]), backends


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def test_stages_serve_as_one(tmp_path: Path) -> None:
    """Batches of sessions and gradients are those of one device."""
    backend, _ = chain(tmp_path / "m")
    whole = load_tiny_span("llama", tmp_path / "m")
    reference = RaggedBackend(whole, memory_bytes=MEMORY_BYTES)
    assert backend.span == SPAN
    for left, right in zip(run_mixed_sessions(backend, whole), run_mixed_sessions(reference, whole), strict=True):
        assert_close(left, right)
    assert backend.num_tokens_free == backend.num_tokens_total
    hidden, gradient = torch.randn(2, 9, HIDDEN_SIZE).unbind()
    for part in (SPAN, Span(start=1, end=5), Span(start=2, end=3), Span(start=4, end=6)):
        works = (
            ForwardWork(part, [4, 5], hidden, lambda output, error: None),
            BackwardWork(part, [4, 5], hidden, gradient, lambda output, error: None),
        )
        for work in works:
            assert_close(backend.run_stateless(work), reference.run_stateless(work))


@pytest.mark.parametrize("seed", range(3))
def test_steps_wait_between_stages_without_harm(seed: int, tmp_path: Path) -> None:
    """A stage without room stops a step half-way; forks that stages before it have made must not be made again.

    Beams exchange their histories at every step, so a fork made twice would show at once.
    """
    backend, stages = chain(tmp_path / "m", share=0.3)
    reference = SequentialBackend(load_tiny_span("llama", tmp_path / "m"), memory_bytes=2**24)
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths: dict[bytes, dict[int, int]] = {b"a": {}, b"b": {}, b"c": {}}
    for _ in range(25):
        for name, held in lengths.items():
            span = Span(start=1, end=5) if name == b"c" else SPAN
            work = make_step(name, span, held, chance, generator)
            (wanted,) = reference.run_steps([work])
            assert isinstance(wanted, torch.Tensor), wanted
            assert_close(run_in_parts(backend, work, chance), wanted)
    assert sum(stage.num_refusals for stage in stages) > 20
    for stage in stages:
        stage.memory.check_integrity()
    for name in lengths:
        backend.forget((name, 1))
    assert backend.num_tokens_free == backend.num_tokens_total


def make_step(
    name: bytes, span: Span, held: dict[int, int], chance: random.Random, generator: torch.Generator
) -> StepWork:
    """Some sequences continue parents of any name from any position; `held` is brought up to date."""
    items: list[SequenceStep] = []
    before = dict(held)
    for sequence in chance.sample(range(3), chance.choice([1, 2, 3])):
        parent = chance.choice([sequence, (sequence + 1) % 3])
        start = chance.randint(max(before.get(parent, 0) - 2, 0), before.get(parent, 0))
        items.append(SequenceStep(sequence, parent, start, chance.choice([0, 1, 2, 5])))
        held[sequence] = items[-1].start + items[-1].count
    hidden = torch.randn(sum(item.count for item in items), HIDDEN_SIZE, generator=generator)
    return StepWork((name, 1), span, items, hidden, lambda output, error: None)


def run_in_parts(backend: ChainedBackend, work: StepWork, chance: random.Random) -> torch.Tensor:
    """As the engine does it: parts of any size, tried again in other sizes until there is room."""
    job = StepJob(work, True, 0.0)
    while True:
        part = job.part(chance.randint(1, job.num_left) if job.num_left else 0)
        (result,) = backend.run_steps([part])
        if isinstance(result, NotNow):
            continue
        assert isinstance(result, torch.Tensor), result
        job.has_begun = True
        job.num_done += len(part.hidden)
        job.outputs.append(result)
        if not job.num_left:
            return torch.cat(job.outputs)


def test_an_unwanted_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """A client that gives up a waiting step and asks for something else must not get the old step's outputs."""
    backend, stages = chain(tmp_path / "m")
    reference = RaggedBackend(load_tiny_span("llama", tmp_path / "m"), memory_bytes=MEMORY_BYTES)
    first, unwanted, wanted = torch.randn(3, 6, HIDDEN_SIZE).unbind()
    backend.run_steps([step_work(b"a", SPAN, first, start=0)])
    stages[2].share = 1.0
    (result,) = backend.run_steps([step_work(b"a", SPAN, unwanted, start=6)])
    assert isinstance(result, NotNow)
    stages[2].share = 0.0
    backend.drop_step((b"a", 1))
    (found,) = backend.run_steps([step_work(b"a", SPAN, wanted, start=6)])
    reference.run_steps([step_work(b"a", SPAN, first, start=0)])
    (expected,) = reference.run_steps([step_work(b"a", SPAN, wanted, start=6)])
    assert isinstance(found, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert_close(found, expected)


def test_stages_must_join(tmp_path: Path) -> None:
    """A gap would give wrong numbers without any error."""
    _, stages = chain(tmp_path / "m")
    with pytest.raises(ValueError, match="stages 0:1 and 4:6 do not join"):
        ChainedBackend([Stage(CUTS[0], stages[0]), Stage(CUTS[2], stages[2])])
