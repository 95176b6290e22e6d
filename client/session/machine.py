"""The client's half of a session as a state machine over plain values. Pure, no I/O.

    NEW ──▶ OPEN ⇄ STEPPING        STEPPING ──▶ RECOVERING ──▶ STEPPING
    any but CLOSED ──▶ CLOSED      STEPPING, RECOVERING ──▶ NEW   (the step was given up; nothing is lost)

A session is a log: the inputs of every position of every sequence, and in which steps they came. Servers only cache
what follows from it, so a lost server is a matter of sending part of the log again at a higher epoch. This module is
the one place that knows epoch, lengths and history; the driver asks it what to send. A long step becomes history
part by part, so that a loss near its end costs no more than what was lost.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from swarm.client.session.parts import Rows, SequenceRequest, StepPart, plan_parts
from swarm.client.session.step_record import StepRecord
from swarm.errors import BadInputError, LengthLimitError, SessionClosedError
from swarm.kvpolicy.settings import KVPolicy

__all__ = ["SessionMachine", "SessionState"]


R = TypeVar("R", bound=Rows)


class SessionState(enum.Enum):
    NEW = "new"
    OPEN = "open"
    STEPPING = "stepping"
    RECOVERING = "recovering"
    CLOSED = "closed"


_MOVES: dict[SessionState, frozenset[SessionState]] = {
    SessionState.NEW: frozenset({SessionState.OPEN, SessionState.STEPPING, SessionState.CLOSED}),
    SessionState.OPEN: frozenset({SessionState.STEPPING, SessionState.NEW, SessionState.CLOSED}),
    SessionState.STEPPING: frozenset(
        {SessionState.OPEN, SessionState.RECOVERING, SessionState.NEW, SessionState.CLOSED}
    ),
    SessionState.RECOVERING: frozenset({SessionState.STEPPING, SessionState.NEW, SessionState.CLOSED}),
    SessionState.CLOSED: frozenset(),
}


class _History(Generic[R]):
    """Inputs of one sequence from position 0, as shared chunks: a fork copies references, never rows."""

    __slots__ = ("_chunks", "record")

    def __init__(self, chunks: Sequence[R] = (), record: StepRecord | None = None) -> None:
        self._chunks = list(chunks)
        self.record = record or StepRecord()

    @property
    def length(self) -> int:
        return self.record.length

    @property
    def chunks(self) -> Sequence[R]:
        """All inputs."""
        return self._chunks

    def first(self, length: int) -> _History[R]:
        """The history of the first `length` positions."""
        taken: list[R] = []
        missing = length
        for chunk in self._chunks:
            if missing <= 0:
                break
            taken.append(chunk if len(chunk) <= missing else chunk[:missing])
            missing -= len(chunk)
        return _History(taken, self.record.first(length))

    def copy(self) -> _History[R]:
        return self.first(self.length)

    def append(self, rows: R, *, is_unfinished: bool) -> None:
        if len(rows):
            self._chunks.append(rows)
            self.record.note(len(rows), is_unfinished=is_unfinished)


class SessionMachine(Generic[R]):
    """Epoch, lengths and history of one session."""

    def __init__(self, *, max_length: int, max_sequences: int) -> None:
        if max_length < 1 or max_sequences < 1:
            raise BadInputError("a session needs max_length >= 1 and at least one sequence")
        self.max_length = max_length
        self.max_sequences = max_sequences
        self.state = SessionState.NEW
        self.epoch = 0
        self._histories: dict[int, _History[R]] = {}
        self._pending: tuple[SequenceRequest[R], ...] = ()
        self._before: dict[int, _History[R]] | None = None
        """History before the step under way, once a part of the step has become history."""

    def __repr__(self) -> str:
        return f"<SessionMachine {self.state.value} epoch {self.epoch} lengths {self.lengths}>"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions held per sequence; of the step under way only the parts that are done count."""
        return tuple(self.length(sequence) for sequence in range(max(self._histories, default=-1) + 1))

    def length(self, sequence: int) -> int:
        """Positions held by one sequence."""
        history = self._histories.get(sequence)
        return 0 if history is None else history.length

    def begin_step(self, requests: Sequence[SequenceRequest[R]]) -> None:
        """Accept new tokens, before anything is sent.

        Raises SessionClosedError, LengthLimitError or BadInputError; a refused step changes nothing.
        """
        if self.state is SessionState.CLOSED:
            raise SessionClosedError("the session is closed; open a new one with model.session()")
        if self.state in (SessionState.STEPPING, SessionState.RECOVERING):
            raise BadInputError("a step of this session is still under way; use one session per thread")
        seen: set[int] = set()
        for item in requests:
            if item.sequence in seen:
                raise BadInputError(f"sequence {item.sequence} appears twice in one step")
            seen.add(item.sequence)
            if not (0 <= item.sequence < self.max_sequences and 0 <= item.parent < self.max_sequences):
                raise BadInputError(
                    f"sequence {max(item.sequence, item.parent)} is outside the session's {self.max_sequences}"
                )
            if not 0 <= item.start <= self.length(item.parent):
                raise BadInputError(
                    f"position {item.start} is outside 0..{self.length(item.parent)} held by sequence {item.parent}"
                )
            end = item.start + len(item.rows)
            if end > self.max_length:
                raise LengthLimitError(
                    f"the session would hold {end} positions, its max_length is {self.max_length}; "
                    "open one with a larger max_length or send less"
                )
        self._pending = tuple(requests)
        self._move(SessionState.STEPPING)

    @property
    def pending(self) -> tuple[SequenceRequest[R], ...]:
        """The step under way."""
        return self._pending

    def finish_part(self, part: StepPart[R]) -> None:
        """A part of the step under way, not its last, is done: it is in the log from now on."""
        if self._before is None:
            self._before = {sequence: history.copy() for sequence, history in self._histories.items()}
        self._apply(part.sequences)

    def finish_step(self, last: StepPart[R] | None = None) -> None:
        """The step under way is done: it, or the last of its parts, becomes history."""
        self._apply(self._pending if last is None else last.sequences)
        self._before = None
        self._pending = ()
        self._move(SessionState.OPEN)

    def _apply(self, requests: Sequence[SequenceRequest[R]]) -> None:
        parents = {item.parent: self._histories.get(item.parent, _History[R]()) for item in requests}
        num_readers = Counter(item.parent for item in requests)
        updated: dict[int, _History[R]] = {}
        for item in requests:
            parent = parents[item.parent]
            if item.parent == item.sequence and item.start == parent.length and num_readers[item.parent] == 1:
                # The common case of appending; a parent that others read too must stay as it was for them.
                parent.append(item.rows, is_unfinished=item.is_unfinished)
                updated[item.sequence] = parent
                continue
            history = parent.first(item.start)
            history.append(item.rows, is_unfinished=item.is_unfinished)
            updated[item.sequence] = history
        self._histories.update(updated)

    def abandon_step(self) -> bool:
        """The step under way was given up; servers may be anywhere in it. Says whether parts of it are taken back."""
        has_parts = self._before is not None
        if self._before is not None:
            self._histories, self._before = self._before, None
        self._pending = ()
        self._move(SessionState.NEW)
        return has_parts

    def start_epoch(self) -> int:
        """A new route, whose steps count from 1 again. Returns the epoch to open hops with."""
        self.epoch += 1
        return self.epoch

    def lose_route(self) -> None:
        """A server was lost during a step."""
        self._move(SessionState.RECOVERING)

    def recover_route(self) -> None:
        """All servers stand where the log ends; the step under way can go on."""
        self._move(SessionState.STEPPING)

    def can_go_back(self, policies: Sequence[KVPolicy]) -> bool:
        """Whether servers of these policies can do exactly what the step under way forgets or forks."""
        return all(
            item.start >= history.length or history.record.can_rewind(policies, item.start)
            for item in self._pending
            if (history := self._histories.get(item.parent)) is not None
        )

    def room_to_take_back(self, policies: Sequence[KVPolicy], sequence: int, start: int) -> int | None:
        """How many tokens servers of these policies can append at `start`, and forget again but for the first.

        None: any number.
        """
        history = self._histories.get(sequence)
        return (StepRecord() if history is None else history.record).room(policies, start)

    def log(self, concatenate: Callable[[Sequence[R]], R]) -> tuple[SequenceRequest[R], ...]:
        """All of history, one request per sequence: what fresh servers must see to stand where we are."""
        return tuple(
            SequenceRequest(sequence, sequence, 0, concatenate(history.chunks))
            for sequence, history in sorted(self._histories.items())
            if history.length
        )

    def replay(
        self, concatenate: Callable[[Sequence[R]], R], *, policies: Sequence[KVPolicy], max_tokens: int
    ) -> list[StepPart[R]]:
        """The log as the steps to send to fresh servers.

        Servers that compress must see inputs begin and end where they did, or they would keep other tokens.

        Args:
            policies: those under which any of the servers compress; without any only the size of a step matters.
            max_tokens: of one step.
        """
        log = self.log(concatenate)
        if not policies:
            return plan_parts(log, max_tokens=max_tokens)
        parts: list[StepPart[R]] = []
        for item in log:
            for step in self._histories[item.sequence].record.segments(policies, max_tokens=max_tokens):
                piece = SequenceRequest(
                    item.sequence, item.sequence, step.start, item.rows[step.start : step.end], step.is_unfinished
                )
                parts.extend(plan_parts([piece], max_tokens=max_tokens))
        return parts

    def close(self) -> None:
        """End; harmless when repeated."""
        if self.state is not SessionState.CLOSED:
            self._move(SessionState.CLOSED)
            self._histories.clear()
            self._pending = ()

    def _move(self, state: SessionState) -> None:
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"a session can not go from {self.state.value} to {state.value}")
        self.state = state
