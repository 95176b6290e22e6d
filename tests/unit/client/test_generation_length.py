"""How many tokens a generate call may add."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.client.generation_length import NewTokens, resolve_new_tokens
from swarm.errors import LengthLimitError


def _resolve(given: dict[str, Any], defaults: dict[str, Any] | None = None, **sizes: Any) -> NewTokens:
    arguments = {"num_tokens": 10, "num_columns": 10, "limit": 64, "limit_name": "the context of tiny", **sizes}
    return resolve_new_tokens(given, defaults or {}, **arguments)


def test_precedence_is_that_of_transformers() -> None:
    """A different reading of the same settings would generate other numbers of tokens than a local model."""
    assert _resolve({}).count == 20
    assert _resolve({}, {"max_length": 30}).count == 20
    assert _resolve({"max_length": 15}, {"max_length": 30}).count == 5
    assert _resolve({"max_new_tokens": 3}, {"max_new_tokens": 7}).count == 3
    assert _resolve({"max_new_tokens": 3, "max_length": 50}).count == 3
    assert _resolve({"max_length": 50}, {"max_new_tokens": 7}).count == 7
    assert _resolve({"max_new_tokens": None}, {"max_new_tokens": 7}).count == 7


def test_max_length_counts_padding() -> None:
    """Transformers compares it with the width of the batch."""
    assert _resolve({"max_length": 20}, num_columns=16).count == 4


def test_exactly_the_limit_fits() -> None:
    """Off by one here would waste or overrun the last position."""
    assert _resolve({"max_new_tokens": 54}) == NewTokens(count=54, is_capped=False)
    with pytest.raises(LengthLimitError, match=r"10 tokens and 55 new ones make 65, and the context of tiny holds 64"):
        _resolve({"max_new_tokens": 55})


def test_too_long_by_default_is_shortened_not_refused() -> None:
    """Nobody asked for that length: a model's generous default must not make every call fail."""
    assert _resolve({}, num_tokens=50) == NewTokens(count=14, is_capped=True)
    assert _resolve({}, {"max_length": 4096}) == NewTokens(count=54, is_capped=True)
    assert _resolve({}, {"max_new_tokens": 4096}) == NewTokens(count=54, is_capped=True)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    """The caller learns it before anything is computed, and what to do."""
    with pytest.raises(LengthLimitError, match=r"the prompt has 64 tokens.*shorten the prompt"):
        _resolve({"max_new_tokens": 1}, num_tokens=64)
    assert _resolve({"max_new_tokens": 1}, num_tokens=63).count == 1


def test_models_without_a_limit_have_none() -> None:
    """Models with relative positions state no context length."""
    assert _resolve({"max_new_tokens": 10**6}, limit=None).count == 10**6
