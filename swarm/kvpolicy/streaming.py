"""When a growing sequence is compressed: the rule every server follows, as plain functions of positions.

A sequence of n tokens is [sinks | stored | tail]: the first few and the newest positions are held in 16 bit,
everything between is stored under the policy. The border between stored and tail moves in whole blocks, and only at
*events*. There are two kinds of steps:

- A step whose tokens still fit the tail's ring is *lazy*: an event that falls due at its end is carried out when the
  next step begins. So whoever has taken a token back can still go on exactly.
- Any other step, and every part of an input that more parts follow, is *staged*: its tokens stand in ordinary pages
  until the input ends or reaches a multiple of the policy's chunk. Then the event happens at once.

Events depend on positions and on where the client's inputs begin and end, never on how layers are cut, how an input
is cut into parts or how steps are batched, so all servers of a route agree about them, and a replay that repeats the
recorded steps meets them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarm.kvpolicy.settings import KVPolicy

__all__ = [
    "CompressionEvent",
    "TailState",
    "advance",
    "can_return",
    "can_rewind",
    "cut_step",
    "event_after",
    "fits_tail",
    "is_staged",
    "new_tail",
    "next_cut",
    "settle",
    "stop_staging",
    "tail_capacity",
    "tail_start",
]


@dataclass(frozen=True, slots=True)
class CompressionEvent:
    """Tokens [first, end) leave the tail and join what is stored; then stored tokens are chosen anew."""

    first: int
    """Where the tail began."""
    end: int
    """Where it begins now; budgets are those of a context of `end - num_sinks` tokens."""
    length: int
    """Tokens of the sequence so far; `length - end` are in the tail."""


@dataclass(frozen=True, slots=True)
class TailState:
    """What a sequence's past says about its coming events; the same on every server of a route."""

    stored_end: int
    """Where the tail begins; the sinks' number until something is stored."""
    is_staging: bool = False
    """Whether the sequence stands inside an input, more of which follows."""
    compressed_at: int = 0
    """Tokens the sequence had at its last event, 0 before the first: it can go back to there exactly, not further."""


def new_tail(policy: KVPolicy) -> TailState:
    """The state of an empty sequence."""
    return TailState(policy.num_sinks)


def tail_capacity(policy: KVPolicy) -> int:
    """Slots of the tail's ring: what is left after an event and one block more."""
    return policy.tail_tokens + policy.block_tokens


def tail_start(policy: KVPolicy, length: int) -> int:
    """Where the tail of a sequence of `length` tokens begins once it has been compressed: sinks plus whole blocks."""
    if not policy.compresses:
        return policy.num_sinks
    leaving = max(0, length - policy.tail_tokens - policy.num_sinks)
    return policy.num_sinks + leaving // policy.block_tokens * policy.block_tokens


def event_after(policy: KVPolicy, stored_end: int, length: int) -> CompressionEvent | None:
    """What there is to compress in a sequence of `length` tokens.

    Args:
        stored_end: where the tail begins now; `num_sinks` for a sequence that has just begun.
    """
    end = tail_start(policy, length)
    return CompressionEvent(stored_end, end, length) if end > stored_end else None


def settle(policy: KVPolicy, tail: TailState, start: int) -> TailState:
    """The state in which a step that begins at `start` finds the sequence: what was due is done, if no input goes on.

    A step that begins at 0 begins anew.
    """
    if start == 0:
        return new_tail(policy)
    if not policy.compresses or tail.is_staging:
        return tail
    return _compress(policy, tail, start)


def fits_tail(policy: KVPolicy, tail: TailState, start: int, count: int) -> bool:
    """Whether the ring has room for `count` tokens from `start` on, once the sequence is settled there.

    An engine never cuts such a step into parts: the parts would be staged.
    """
    return start + count - settle(policy, tail, start).stored_end <= tail_capacity(policy)


def is_staged(policy: KVPolicy, tail: TailState, start: int, count: int, *, is_unfinished: bool) -> bool:
    """Whether a step's tokens stand in ordinary pages at first. Those of a step without tokens stand nowhere."""
    if not policy.compresses or count == 0:
        return False
    goes_on = tail.is_staging and start > 0
    return is_unfinished or goes_on or not fits_tail(policy, tail, start, count)


def advance(policy: KVPolicy, tail: TailState, start: int, count: int, *, is_unfinished: bool) -> TailState:
    """The state that a step of `count` tokens from `start` on leaves.

    Args:
        is_unfinished: whether more tokens of the same input follow in a later step or part.
    """
    if not policy.compresses or count == 0:
        return new_tail(policy) if start == 0 else tail
    staged = is_staged(policy, tail, start, count, is_unfinished=is_unfinished)
    tail = settle(policy, tail, start)
    if not staged:
        return tail
    end = start + count
    cut = next_cut(policy, start)
    while cut <= end:
        tail = _compress(policy, tail, cut)
        cut = next_cut(policy, cut)
    if not is_unfinished:
        tail = _compress(policy, tail, end)
    return replace(tail, is_staging=is_unfinished)


def can_rewind(policy: KVPolicy, tail: TailState, start: int) -> bool:
    """Whether a sequence can go on from an earlier position `start` exactly as if it had never been further.

    Not past its last event, and not inside an input: what is known of that input's newest tokens is not kept back.
    """
    return not policy.compresses or start == 0 or (not tail.is_staging and start >= tail.compressed_at)


def can_return(policy: KVPolicy, then: TailState, length_then: int, now: TailState) -> bool:
    """Whether a sequence, now in state `now`, can be put back to a checkpoint as exactly as if it had stayed there.

    Its content up to the checkpoint must still be its own: no step has overwritten it. Then it can, unless there was
    an event since, other than the one that was due at the checkpoint itself, or the checkpoint stands inside an
    input. The state it has then is `stop_staging(now)`.

    Args:
        then: the state at the checkpoint.
        length_then: tokens it had there.
    """
    if not policy.compresses or length_then == 0:
        return True
    if then.is_staging or now.compressed_at > length_then:
        return False
    return now.stored_end in (then.stored_end, settle(policy, then, length_then).stored_end)


def stop_staging(tail: TailState) -> TailState:
    """The state of a sequence whose begun input has been taken back."""
    return replace(tail, is_staging=False)


def next_cut(policy: KVPolicy, position: int) -> int:
    """The first position after `position` at which a staged input is compressed even if it goes on."""
    return (position // policy.chunk_tokens + 1) * policy.chunk_tokens


def cut_step(policy: KVPolicy, start: int, count: int) -> list[int]:
    """Lengths of the parts in which a step of `count` tokens from `start` on is run: no part crosses a multiple of the
    chunk, so a prompt that comes in several steps is cut alike.
    """
    if not policy.compresses:
        return [count] if count else []
    parts: list[int] = []
    position, end = start, start + count
    while position < end:
        cut = min(end, next_cut(policy, position))
        parts.append(cut - position)
        position = cut
    return parts


def _compress(policy: KVPolicy, tail: TailState, length: int) -> TailState:
    """The state after the event that is due at a length, if one is."""
    event = event_after(policy, tail.stored_end, length)
    return tail if event is None else replace(tail, stored_end=event.end, compressed_at=length)
