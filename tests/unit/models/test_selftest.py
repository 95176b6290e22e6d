"""The self-test lets good spans serve and names what is wrong with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.datatypes import Span
from swarm.models.selftest import check_span
from swarm.models.source import resolve_model
from swarm.models.span import SpanModel, load_span
from tests.tiny_models import FAMILIES, save_tiny_model


def build(family: str, tmp_path: Path, **settings: Any) -> SpanModel:
    save_tiny_model(family, tmp_path / "m")
    return load_span(resolve_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache"), Span(start=1, end=4), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_good_spans_pass(family: str, tmp_path: Path) -> None:
    """Every family that must work is let through."""
    report = check_span(build(family, tmp_path))
    assert report.ok, report.reason
    assert report.reason is None
    assert report.max_relative_error < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_half_precision_passes_within_its_rounding(family: str, tmp_path: Path) -> None:
    """Rounding of bf16 is no reason to refuse."""
    report = check_span(build(family, tmp_path, dtype=torch.bfloat16))
    assert report.ok, report.reason


def test_blocks_whose_cached_steps_differ_are_refused(tmp_path: Path) -> None:
    """A family that counts positions from the start of a chunk would give every user wrong tokens, silently."""
    span = build("llama", tmp_path)
    rotary: Any = span.model.get_decoder().rotary_emb

    def misplace(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0]
        from_zero = rotary(hidden, torch.arange(hidden.shape[1])[None])
        return args, {**kwargs, "position_embeddings": from_zero}

    span.blocks[1].register_forward_pre_hook(misplace, with_kwargs=True)
    report = check_span(span)
    assert not report.ok
    assert report.reason is not None
    assert "llama (blocks 1:4) can not be served: cached steps differ by" in report.reason
    assert report.max_relative_error > 1e-4


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Broken weights, or a precision too small, must be found before the first user does."""
    span = build("llama", tmp_path)
    next(span.parameters()).data.fill_(float("nan"))
    report = check_span(span)
    assert report.reason is not None
    assert "not finite" in report.reason


def test_blocks_that_are_fed_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    """Side inputs made from token embeddings are zeros on a server: wrong numbers that agree with themselves."""
    span = build("llama", tmp_path)
    decoder: Any = span.model.get_decoder()
    run = decoder.forward

    def forward_with_side_input(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        return run(*args, inputs_embeds=inputs_embeds, per_layer_input=inputs_embeds * 2, **kwargs)

    decoder.forward = forward_with_side_input
    report = check_span(span)
    assert report.reason is not None
    assert "per_layer_input" in report.reason


def test_model_code_that_fails_is_a_reason_not_a_traceback(tmp_path: Path) -> None:
    """Foreign code may raise anything; the operator gets a sentence."""
    span = build("llama", tmp_path)

    def fail(block: Any, args: Any) -> None:
        raise KeyError("no such mask")

    span.blocks[0].register_forward_pre_hook(fail)
    report = check_span(span)
    assert report.reason is not None
    assert "does not run as a span: KeyError" in report.reason
