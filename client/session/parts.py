"""What goes into one step on the wire: long inputs are cut, and what goes back can go first. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, Protocol, Self, TypeVar

from swarm.kvpolicy.settings import PRESETS
from swarm.kvpolicy.streaming import tail_capacity

__all__ = ["SHORT_INPUT_TOKENS", "Rows", "SequenceRequest", "StepPart", "moves_first", "plan_parts"]


class Rows(Protocol):
    """Consecutive tokens' inputs; a tensor [T, H] in real use, anything sliceable in tests."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Self: ...


R = TypeVar("R", bound=Rows)

SHORT_INPUT_TOKENS: Final = max(policy.num_sinks + tail_capacity(policy) for policy in PRESETS.values())
"""Inputs of more tokens never fit the uncompressed tail of a compressed cache."""


@dataclass(frozen=True)
class SequenceRequest(Generic[R]):
    """New tokens for one sequence: continue `parent`'s first `start` positions by `rows`."""

    sequence: int
    parent: int
    start: int
    rows: R
    is_unfinished: bool = False
    """Whether more tokens of the same input follow in the next step of this sequence."""


@dataclass(frozen=True)
class StepPart(Generic[R]):
    """What goes into one step on the wire."""

    sequences: tuple[SequenceRequest[R], ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(item.rows) for item in self.sequences)


def plan_parts(requests: Sequence[SequenceRequest[R]], *, max_tokens: int) -> list[StepPart[R]]:
    """Cut a step into parts of at most `max_tokens` tokens that are sent one after the other.

    When more than one part is needed, forks go first, all together and without tokens, because each of
    them means the state before the step. All but the last part of an input say that it goes on. Inputs that are
    short enough for a compressed cache's tail are not cut, so that they are kept there, whatever stands beside them.
    """
    if sum(len(item.rows) for item in requests) <= max_tokens:
        return [StepPart(tuple(requests))]
    parts: list[StepPart[R]] = []
    moves = tuple(_without_rows(item) for item in requests if item.parent != item.sequence)
    if moves:
        parts.append(StepPart(moves))
    current: list[SequenceRequest[R]] = []
    room = max_tokens
    for item in requests:
        if not len(item.rows) and item.parent == item.sequence:
            current.append(item)
        if room < len(item.rows) <= min(SHORT_INPUT_TOKENS, max_tokens):
            parts.append(StepPart(tuple(current)))
            current, room = [], max_tokens
        done = 0
        while done < len(item.rows):
            rows = item.rows[done : done + room]
            is_unfinished = item.is_unfinished or done + len(rows) < len(item.rows)
            current.append(SequenceRequest(item.sequence, item.sequence, item.start + done, rows, is_unfinished))
            done += len(rows)
            room -= len(rows)
            if room == 0:
                parts.append(StepPart(tuple(current)))
                current, room = [], max_tokens
    if current:
        parts.append(StepPart(tuple(current)))
    return parts


def moves_first(
    parts: Sequence[StepPart[R]], length_of: Callable[[int], int]
) -> tuple[StepPart[R], list[StepPart[R]]] | None:
    """Planned parts as one that only goes back and forks, and others that only append; None when nothing goes back.

    Args:
        length_of: positions that a sequence holds before the parts.
    """
    moves: list[SequenceRequest[R]] = []
    appending: list[StepPart[R]] = []
    seen: set[int] = set()
    for part in parts:
        for item in part.sequences:
            if item.sequence not in seen and (item.parent != item.sequence or item.start != length_of(item.sequence)):
                moves.append(_without_rows(item))
            seen.add(item.sequence)
        appending.append(StepPart(tuple(replace(item, parent=item.sequence) for item in part.sequences)))
    if not moves:
        return None
    # What has no tokens is done by the moves; but a step needs a part, also one that sends nothing.
    with_tokens = [part for part in appending if part.num_tokens]
    return StepPart(tuple(moves)), with_tokens or appending[-1:]


def _without_rows(item: SequenceRequest[R]) -> SequenceRequest[R]:
    return SequenceRequest(item.sequence, item.parent, item.start, item.rows[:0])
