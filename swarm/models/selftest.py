"""Tries a loaded span before it serves: the same tokens at once, in chunks, one by one, and again.

There is no list of good architectures; a span that gives one answer whichever way it is asked, and
whose blocks need nothing but hidden states and positions, is good.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from swarm.models.anatomy import poisoned
from swarm.models.span import SpanModel
from swarm.models.span_cache import SpanCache

__all__ = ["SelfTestReport", "check_span"]

logger = logging.getLogger(__name__)

_NUM_TOKENS = 24
_CHUNKS = (12, 1, 1, 5, 1, 1, 2, 1)
_REWIND_TO = 15


@dataclass(frozen=True, kw_only=True)
class SelfTestReport:
    """Outcome of `check_span`."""

    reason: str | None
    """Why the span must not serve, in one sentence; None if it may."""
    max_relative_error: float
    """Largest difference met, relative to the size of the hidden states; infinite if there was no result."""

    @property
    def ok(self) -> bool:
        return self.reason is None


def check_span(span_model: SpanModel, *, seed: int = 0) -> SelfTestReport:
    """Run a span on random hidden states in several ways and compare. Takes about 40 short calls.

    Needs an attention function that works without the engine ("sdpa", "eager"). Never raises for a
    span that fails, whatever the way it fails.
    """
    name = f"{span_model.architecture} (blocks {span_model.span})"
    try:
        with torch.inference_mode():
            return _compare(span_model, name, seed)
    except Exception as error:  # any failure of foreign model code means: do not serve
        logger.debug("self-test of %s failed", name, exc_info=True)
        reason = str(error).strip().partition("\n")[0]
        return SelfTestReport(
            reason=f"{name} does not run as a span: {type(error).__name__}: {reason}", max_relative_error=math.inf
        )


def _compare(span_model: SpanModel, name: str, seed: int) -> SelfTestReport:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, _NUM_TOKENS, span_model.hidden_size, generator=generator)
    hidden = hidden.to(device=span_model.device, dtype=span_model.dtype)
    positions = torch.arange(_NUM_TOKENS, device=span_model.device)[None]

    leak = _side_input(span_model, hidden, positions)
    if leak is not None:
        return SelfTestReport(
            reason=f"{name} can not be served: its blocks are also given {leak}, "
            "made from token embeddings or weights that servers do not have",
            max_relative_error=math.inf,
        )
    whole = span_model(hidden, positions)
    if whole.shape != hidden.shape:
        shape = tuple(whole.shape)
        return SelfTestReport(reason=f"{name} answers hidden states of shape {shape}", max_relative_error=math.inf)
    if not torch.isfinite(whole).all():
        return SelfTestReport(
            reason=f"{name} answers values that are not finite in {span_model.dtype}; load it in another precision",
            max_relative_error=math.inf,
        )
    cache = span_model.new_cache()
    stepwise = _run_in_chunks(span_model, hidden, positions, cache, _CHUNKS)
    cache.crop(_REWIND_TO)
    twin = cache.clone()
    rest = _NUM_TOKENS - _REWIND_TO
    again = _run_in_chunks(span_model, hidden, positions, cache, (rest - 1, 1))
    twins = _run_in_chunks(span_model, hidden, positions, twin, (1,) * rest)

    tolerance = span_model.tolerance
    worst = 0.0
    for what, result, expected in (
        ("cached steps", stepwise, whole),
        ("a rewound cache", again, whole[:, _REWIND_TO:]),
        ("a copied cache", twins, whole[:, _REWIND_TO:]),
    ):
        error = _relative_error(result, expected)
        worst = max(worst, error)
        if not error <= tolerance:
            return SelfTestReport(
                reason=f"{name} can not be served: {what} differ by {error:.1e} (relative) from running "
                f"all tokens at once, and {tolerance:.0e} is allowed",
                max_relative_error=error,
            )
    return SelfTestReport(reason=None, max_relative_error=worst)


def _run_in_chunks(
    span_model: SpanModel,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    cache: SpanCache,
    chunk_lengths: tuple[int, ...],
) -> torch.Tensor:
    outputs = []
    for length in chunk_lengths:
        start = cache.length
        chunk = slice(start, start + length)
        outputs.append(span_model(hidden[:, chunk], positions[:, chunk], cache=cache))
    return torch.cat(outputs, dim=1)


def _relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def _side_input(span_model: SpanModel, hidden: torch.Tensor, positions: torch.Tensor) -> str | None:
    """Name of an argument of the blocks that depends on what servers do not have; None if there is none.

    Everything outside the blocks is made to answer NaN: whatever NaN a block is given, apart from
    the hidden states, is such a dependence.
    """
    leaks: list[str] = []

    def look(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {f"its argument {index}": value for index, value in enumerate(args) if index > 0}
        named |= {key: value for key, value in kwargs.items() if key != "hidden_states"}
        for key, value in named.items():
            if any(torch.isnan(tensor).any() for tensor in _tensors_in(value) if tensor.is_floating_point()):
                leaks.append(key)

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in span_model.blocks]
    try:
        with poisoned(span_model):
            span_model(hidden, positions)
    finally:
        for handle in handles:
            handle.remove()
    return leaks[0] if leaks else None


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
