"""Choosing a backend for a loaded span: the batching one where it proves right, else the one that always is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from swarm.errors import BadInputError, SwarmError, UnsupportedModelError
from swarm.server.engine.engine import NotNow, SpanBackend
from swarm.server.engine.ragged import RaggedBackend, probe_layers
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    from swarm.models import SpanModel
    from swarm.server.policy_layers import PolicyWish

__all__ = ["ChosenBackend", "choose_backend"]

logger = logging.getLogger(__name__)
_SESSIONS = ((b"a", 11), (b"b", 7))
_NUM_DECODE_STEPS = 3
_LONG_SESSION = b"c"
_LONG_PARTS = (25, 20, 6, 1, 1, 1)
"""Two of one input, whose end is the first event; the last token but one begins with the next. All policies of ours
still keep all tokens then."""
_NUM_LONG_INPUT_PARTS = 2
_LONG_TOLERANCE = 0.05
"""Relative, root mean square; rounding may also have a token of many ask another expert."""
_FINE_BITS = 8
_FINE_TOLERANCE = 0.25
"""Likewise, where tokens are stored in that many bits: blocks of the demo model, asked about noise, differ by up to
0.08, by 0.6 or more where heads are mixed up."""
_CODED_TOLERANCE = 1.1
"""Likewise, in the policy's own bits: by up to 0.55 with 4 bits, 0.97 with 2, so this finds nonsense only."""
_RAW_TOLERANCE = 0.02
"""Relative, root mean square; what rounding keys and values to 16 bit may change."""


class ChosenBackend(NamedTuple):
    backend: SpanBackend
    is_batching: bool
    reason: str
    """Why not batching, in one sentence; empty when it is."""
    kv_problem: str = ""
    """Why sessions can not be compressed as wished, in half a sentence; empty when they can, or nobody wished it."""


def choose_backend(model: SpanModel, *, memory_bytes: int, wish: PolicyWish | None = None) -> ChosenBackend:
    """A backend for a span whose own self-test passed.

    Runs two sessions packed into one batch and one at a time; only equal results let the batching backend
    serve, and only nearly equal ones let it compress sessions as `wish` says: so few tokens are all kept, in 16 bit.
    Then a longer session reads an input in parts and has two events, after which no token has been dropped either.
    Raises BadInputError when the memory is too small for any.
    """
    sequential = SequentialBackend(model, memory_bytes=memory_bytes)
    attention = model.attention
    expected: list[torch.Tensor] = []
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
        if wish is None or not wish.policy.compresses:
            return ChosenBackend(backend, True, "")
        page_tokens = backend.store.page_tokens
        del backend  # its memory is wanted now
        return _choose_compressing(model, expected, memory_bytes=memory_bytes, page_tokens=page_tokens, wish=wish)
    if model.attention != attention:
        model.set_attention(attention)
    logger.info("sessions of %s run one at a time: %s", model.architecture, problem)
    wished = wish is not None and wish.policy.compresses
    return ChosenBackend(
        sequential, False, problem, "only sessions that run in batches can be compressed" if wished else ""
    )


def _choose_compressing(
    model: SpanModel, expected: list[torch.Tensor], *, memory_bytes: int, page_tokens: int, wish: PolicyWish
) -> ChosenBackend:
    """A backend that compresses sessions, or an exact one and why not."""
    backend: RaggedBackend | None = None
    try:
        problem = _test_fine_codes(model, wish, memory_bytes, page_tokens)
        backend = _build_compressing(model, wish, memory_bytes, page_tokens)
        found = _run_sessions(model, backend, compresses=True)
        tolerance = max(_two_ways(model), _RAW_TOLERANCE)
        errors = (_distance([left], [right]) for left, right in zip(expected, found, strict=True))
        too_much = next((error for error in errors if not error <= tolerance), None)
        if too_much is not None:
            problem = problem or f"compressed sessions differ by {too_much:.1e} from sessions run alone"
        # Both kinds of session must be right beside each other's memory.
        problem = problem or _compare(expected, _run_sessions(model, backend), model.tolerance)
        tolerance = max(_two_ways(model), _LONG_TOLERANCE) if wish.policy.quantisation is None else _CODED_TOLERANCE
        problem = problem or _test_events(model, backend, tolerance=tolerance)
    except Exception as error:  # whatever a foreign family does, it can still be served exactly
        if not isinstance(error, SwarmError):
            logger.debug("the compressing backend failed its self-test", exc_info=True)
        problem = str(error) if isinstance(error, SwarmError) else f"{type(error).__name__}: {error}"
    if backend is None or problem:
        logger.info("sessions of %s are not compressed: %s", model.architecture, problem)
        backend = None  # the memory is wanted again
        return ChosenBackend(RaggedBackend(model, memory_bytes=memory_bytes), True, "", problem)
    return ChosenBackend(backend, True, "")


def _test_fine_codes(model: SpanModel, wish: PolicyWish, memory_bytes: int, page_tokens: int) -> str:
    """What is wrong at events, or nothing: in coarse codes a fault looks like what rounding does.

    The backend is gone, and its memory free, when this returns or raises.
    """
    if wish.policy.quantisation is None:
        return ""
    backend = _build_compressing(model, wish.in_bits(_FINE_BITS), memory_bytes, page_tokens)
    return _test_events(model, backend, tolerance=_FINE_TOLERANCE)


def _build_compressing(model: SpanModel, wish: PolicyWish, memory_bytes: int, page_tokens: int) -> RaggedBackend:
    layers = probe_layers(model)
    policy_layers = wish.build(
        [layer.shape for layer in layers],
        [layer.window for layer in layers],
        page_tokens=page_tokens,
        itemsize=model.dtype.itemsize,
    )
    return RaggedBackend(model, memory_bytes=memory_bytes, policy_layers=policy_layers)


def _run_sessions(model: SpanModel, backend: SpanBackend, *, compresses: bool = False) -> list[torch.Tensor]:
    """Prompts and a few decode steps of two sessions, the backend's own way; nothing is left behind."""
    generator = torch.Generator().manual_seed(0)
    outputs: list[torch.Tensor] = []
    for step in range(_NUM_DECODE_STEPS + 1):
        works = []
        for name, num_prompt_tokens in _SESSIONS:
            start, count = (0, num_prompt_tokens) if step == 0 else (num_prompt_tokens + step - 1, 1)
            hidden = torch.randn(count, model.hidden_size, generator=generator)
            works.append(_make_work(model, name, SequenceStep(0, 0, start, count), hidden, compresses=compresses))
        outputs += _run_works(backend, works)
    for name, _ in _SESSIONS:
        backend.forget((name, 1))
    return outputs


def _test_events(model: SpanModel, backend: SpanBackend, *, tolerance: float) -> str:
    """What is wrong with a compressed session that reads an input in parts and goes on over two events, or nothing.

    Args:
        tolerance: how far steps may differ that attend to stored tokens.
    """
    hidden = torch.randn(sum(_LONG_PARTS), model.hidden_size, generator=torch.Generator().manual_seed(1))
    works = [_make_work(model, _LONG_SESSION, SequenceStep(0, 0, 0, len(hidden)), hidden, compresses=False)]
    expected = _run_works(backend, works)[0].split(_LONG_PARTS)
    backend.forget((_LONG_SESSION, 1))
    found: list[torch.Tensor] = []
    start = 0
    for index, rows in enumerate(hidden.split(_LONG_PARTS)):
        is_unfinished = index + 1 < _NUM_LONG_INPUT_PARTS
        item = SequenceStep(0, 0, start, len(rows), is_unfinished=is_unfinished)
        found += _run_works(backend, [_make_work(model, _LONG_SESSION, item, rows, compresses=True)])
        start += len(rows)
    backend.forget((_LONG_SESSION, 1))
    exact, stored = slice(_NUM_LONG_INPUT_PARTS), slice(_NUM_LONG_INPUT_PARTS, None)
    for steps, allowed in ((exact, max(_two_ways(model), _LONG_TOLERANCE)), (stored, tolerance)):
        error = _distance(expected[steps], found[steps])
        if not error <= allowed:
            return f"compressed sessions with events differ by {error:.1e} from exact ones"
    return ""


def _two_ways(model: SpanModel) -> float:
    """How far two ways of attending may differ that round in different places; exact and compressed pages are such."""
    return 2 * model.tolerance


def _distance(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Relative, root mean square; NaN where there is any."""
    left, right = torch.cat(list(expected)).float(), torch.cat(list(found)).float()
    return float((left - right).norm() / left.norm().clamp(min=1e-6))


def _make_work(
    model: SpanModel, name: bytes, item: SequenceStep, hidden: torch.Tensor, *, compresses: bool
) -> StepWork:
    return StepWork((name, 1), model.span, [item], hidden, lambda output, error: None, compresses=compresses)


def _run_works(backend: SpanBackend, works: list[StepWork]) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for result in backend.run_steps(works):
        if isinstance(result, BaseException):
            raise result
        if isinstance(result, NotNow):
            raise BadInputError(f"the KV memory is too small for a few tokens ({result.reason}); give more")
        results.append(result)
    return results


def _compare(
    expected: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
    tolerance: float,
) -> str:
    """What is wrong with `found`, or nothing."""
    for left, right in zip(expected, found, strict=True):
        scale = max(float(left.abs().max()), 1e-6)
        error = float((left - right).abs().max()) / scale
        if not error <= tolerance:
            return f"sessions packed into one batch differ by {error:.1e} from sessions run alone"
    return ""
