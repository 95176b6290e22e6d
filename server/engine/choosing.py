"""Choosing a backend for a loaded span: the batching one where it proves right, else the one that always is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch

from swarm.errors import BadInputError, UnsupportedModelError
from swarm.server.engine.engine import NotNow, SpanBackend
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    from swarm.models import SpanModel

__all__ = ["ChosenBackend", "choose_backend"]

logger = logging.getLogger(__name__)
_SESSIONS = ((b"a", 11), (b"b", 7))
_NUM_DECODE_STEPS = 3


class ChosenBackend(NamedTuple):
    backend: SpanBackend
    is_batching: bool
    reason: str
    """Why not batching, in one sentence; empty when it is."""


def choose_backend(model: SpanModel, *, memory_bytes: int) -> ChosenBackend:
    """A backend for a span whose own self-test passed.

    Runs two sessions packed into one batch and one at a time; only equal results let the batching backend
    serve. Raises BadInputError when the memory is too small for any.
    """
    sequential = SequentialBackend(model, memory_bytes=memory_bytes)
    attention = model.attention
    try:
        expected = _run_sessions(model, sequential)
        backend = RaggedBackend(model, memory_bytes=memory_bytes)
        problem = _compare(expected, _run_sessions(model, backend), model.tolerance)
    except BadInputError as error:
        if not isinstance(error, UnsupportedModelError):
            raise
        problem = str(error)
    except Exception as error:  # whatever a foreign family does, the other backend can serve it
        logger.debug("the batching backend failed its self-test", exc_info=True)
        problem = f"{type(error).__name__}: {error}"
    if not problem:
        return ChosenBackend(backend, True, "")
    if model.attention != attention:
        model.set_attention(attention)
    logger.info("sessions of %s run one at a time: %s", model.architecture, problem)
    return ChosenBackend(sequential, False, problem)


def _run_sessions(model: SpanModel, backend: SpanBackend) -> list[torch.Tensor]:
    """Prompts and a few decode steps of two sessions, the backend's own way; nothing is left behind."""
    generator = torch.Generator().manual_seed(0)
    outputs: list[torch.Tensor] = []
    for step in range(_NUM_DECODE_STEPS + 1):
        works = []
        for name, num_prompt_tokens in _SESSIONS:
            start, count = (0, num_prompt_tokens) if step == 0 else (num_prompt_tokens + step - 1, 1)
            hidden = torch.randn(count, model.hidden_size, generator=generator)
            item = SequenceStep(0, 0, start, count)
            works.append(StepWork((name, 1), model.span, [item], hidden, lambda output, error: None))
        for result in backend.run_steps(works):
            if isinstance(result, BaseException):
                raise result
            if isinstance(result, NotNow):
                raise BadInputError(f"the KV memory is too small for a few tokens ({result.reason}); give more")
            outputs.append(result)
    for name, _ in _SESSIONS:
        backend.forget((name, 1))
    return outputs


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor], tolerance: float) -> str:
    """What is wrong with `found`, or nothing."""
    for left, right in zip(expected, found, strict=True):
        scale = max(float(left.abs().max()), 1e-6)
        error = float((left - right).abs().max()) / scale
        if not error <= tolerance:
            return f"sessions packed into one batch differ by {error:.1e} from sessions run alone"
    return ""
