"""When a growing sequence is compressed: the rule every server follows, as plain functions of positions.

A sequence of n tokens is [sinks | stored | tail]: the first few and the newest positions are held in 16 bit,
everything between is stored under the policy. The border between stored and tail moves in whole blocks, and only at
*events*: at the end of every step, and inside a long step at multiples of the policy's chunk. Events depend on
positions and on where the client's steps end, never on how layers are cut or steps are batched, so all servers of a
route agree about them, and a replay that repeats the recorded steps meets them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["CompressionEvent", "cut_step", "event_after", "tail_start"]


@dataclass(frozen=True, slots=True)
class CompressionEvent:
    """Tokens [first, end) leave the tail and join what is stored; then stored tokens are chosen anew."""

    first: int
    """Where the tail began."""
    end: int
    """Where it begins now; budgets are those of a context of `end - num_sinks` tokens."""
    length: int
    """Tokens of the sequence so far; `length - end` are in the tail."""


def tail_start(policy: KVPolicy, length: int) -> int:
    """Where the tail of a sequence of `length` tokens begins once it has been compressed: sinks plus whole blocks."""
    if not policy.compresses:
        return policy.num_sinks
    leaving = max(0, length - policy.tail_tokens - policy.num_sinks)
    return policy.num_sinks + leaving // policy.block_tokens * policy.block_tokens


def event_after(policy: KVPolicy, stored_end: int, length: int) -> CompressionEvent | None:
    """What to compress when a part of a step has brought a sequence to `length` tokens.

    Args:
        stored_end: where the tail begins now; `num_sinks` for a sequence that has just begun.
    """
    end = tail_start(policy, length)
    return CompressionEvent(stored_end, end, length) if end > stored_end else None


def cut_step(policy: KVPolicy, start: int, count: int) -> list[int]:
    """Lengths of the parts in which a step of `count` tokens from `start` on is run, an event after each.

    Cuts lie at absolute multiples of the chunk, so a prompt that comes in several steps is cut alike.
    """
    if not policy.compresses:
        return [count] if count else []
    parts: list[int] = []
    position, end = start, start + count
    while position < end:
        cut = min(end, (position // policy.chunk_tokens + 1) * policy.chunk_tokens)
        parts.append(cut - position)
        position = cut
    return parts
