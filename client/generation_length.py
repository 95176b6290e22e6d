"""How many tokens a generate call may add, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swarm.errors import LengthLimitError

__all__ = ["DEFAULT_NEW_TOKENS", "NewTokens", "check_prompt", "resolve_new_tokens"]

DEFAULT_NEW_TOKENS = 20
"""What transformers generates when nobody says how much."""


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """How many tokens may be generated."""

    count: int
    """At most this many; below 1 where the caller's own max_length leaves no room."""
    is_capped: bool
    """Whether that is less than the model's own defaults ask for, to stay within the limit."""


def check_prompt(num_tokens: int, *, limit: int | None, limit_name: str) -> None:
    """Refuse a prompt that leaves no room for a single new token.

    Args:
        num_tokens: tokens of the longest sequence, history included.
        limit: tokens it may have; None for no limit.
        limit_name: whose limit that is, for the message.

    Raises:
        LengthLimitError: it leaves none.
    """
    if limit is not None and num_tokens >= limit:
        raise LengthLimitError(
            f"the prompt has {num_tokens} tokens, and {limit_name} holds {limit} tokens in all, answer included;"
            " shorten the prompt"
        )


def resolve_new_tokens(
    given: Mapping[str, object],
    defaults: Mapping[str, object],
    *,
    num_tokens: int,
    num_columns: int,
    limit: int | None,
    limit_name: str,
) -> NewTokens:
    """What transformers' length settings come to, within `limit`.

    As in transformers, max_new_tokens wins over max_length, and what the caller gives over the model's
    defaults. What the caller asks for is done or refused; defaults give way to the limit.

    Args:
        given: the caller's settings (max_new_tokens, max_length), absent or None where not given.
        defaults: those of the model's own generation config.
        num_tokens: tokens of the longest sequence, history included.
        num_columns: the same with padding, which is what max_length counts.
        limit: tokens that a sequence may have; None for no limit.
        limit_name: whose limit that is, for the message.

    Raises:
        LengthLimitError: the prompt leaves no room, or what the caller asks for does not fit.
    """
    check_prompt(num_tokens, limit=limit, limit_name=limit_name)
    count, is_asked_for = DEFAULT_NEW_TOKENS, False
    for name, num_before in (("max_new_tokens", 0), ("max_length", num_columns)):
        asked, default = given.get(name), defaults.get(name)
        value = asked if asked is not None else default
        if isinstance(value, int):
            count, is_asked_for = value - num_before, asked is not None
            break
    if limit is None or num_tokens + count <= limit:
        return NewTokens(count=count, is_capped=False)
    if is_asked_for:
        raise LengthLimitError(
            f"a prompt of {num_tokens} tokens and {count} new ones make {num_tokens + count}, and {limit_name} holds"
            f" {limit}; ask for at most {limit - num_tokens} new tokens or shorten the prompt"
        )
    return NewTokens(count=limit - num_tokens, is_capped=True)
