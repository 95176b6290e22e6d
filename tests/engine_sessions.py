"""Random sessions run through a backend, for comparing backends and devices."""

from __future__ import annotations

from pathlib import Path

import torch

from swarm.datatypes import Span
from swarm.models import SpanModel, load_span, resolve_model
from swarm.server.engine.engine import SpanBackend
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep
from tests.tiny_models import NUM_BLOCKS, save_tiny_model

__all__ = ["load_tiny_span", "run_mixed_sessions", "step_work"]

PROMPT_LENGTHS = (5, 16, 17, 40, 3, 33)


def load_tiny_span(family: str, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SpanModel:
    """All blocks of a tiny model, saved in `folder` at the first call."""
    if not folder.exists():
        save_tiny_model(family, folder)
    return load_span(resolve_model(str(folder)), Span(start=0, end=NUM_BLOCKS), device=device, dtype=dtype)


def step_work(
    name: bytes, span: Span, hidden: torch.Tensor, *, start: int, sequence: int = 0, parent: int | None = None
) -> StepWork:
    """A step of one sequence; `hidden` [T, H]."""
    item = SequenceStep(sequence, sequence if parent is None else parent, start, len(hidden))
    return StepWork((name, 1), span, [item], hidden, lambda output, error: None)


def run_mixed_sessions(backend: SpanBackend, model: SpanModel, *, num_steps: int = 4) -> list[torch.Tensor]:
    """Outputs [T, H] of sessions of different lengths that decode together, prompts joining on the way."""
    generator = torch.Generator().manual_seed(7)
    outputs: list[torch.Tensor] = []
    lengths: dict[bytes, int] = {}
    waiting = [(bytes([index]), length) for index, length in enumerate(PROMPT_LENGTHS)]
    for step in range(len(waiting) + num_steps):
        works: list[StepWork] = []
        for name, length in lengths.items():
            hidden = torch.randn(1, model.hidden_size, generator=generator)
            works.append(step_work(name, model.span, hidden, start=length))
        for name in lengths:
            lengths[name] += 1
        if step % 2 == 0 and waiting:
            for name, length in waiting[:2]:
                hidden = torch.randn(length, model.hidden_size, generator=generator)
                works.append(step_work(name, model.span, hidden, start=0))
                lengths[name] = length
            del waiting[:2]
        for result in backend.run_steps(works):
            assert isinstance(result, torch.Tensor), result
            outputs.append(result.float().cpu())
    for name in lengths:
        backend.forget((name, 1))
    return outputs
