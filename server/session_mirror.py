"""The server's half of a session: which steps fit, which are repeats, which are refused. Pure, no I/O.

The client is the owner of a session's history; a server mirrors only what it needs to judge the next
step: the epoch, the last step accepted, and how many positions each sequence holds.

    OPEN ──fail──▶ DEAD        a step failed half-way: positions can not be trusted any more
     └────close──▶ CLOSED

A new epoch is a new mirror. There is no way back from DEAD or CLOSED.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.errors import BadInputError, LengthLimitError, SessionClosedError, SessionStateError

__all__ = ["MirrorState", "SequenceStep", "SessionMirror", "Verdict"]


class MirrorState(enum.Enum):
    OPEN = "open"
    DEAD = "dead"
    CLOSED = "closed"


_MOVES = {
    MirrorState.OPEN: {MirrorState.DEAD, MirrorState.CLOSED},
    MirrorState.DEAD: {MirrorState.CLOSED},
    MirrorState.CLOSED: set[MirrorState](),
}


class Verdict(enum.Enum):
    """What to do with a step."""

    RUN = "run"
    """It is the next one, and fits."""
    REPEAT = "repeat"
    """It was accepted before: answer from memory (or wait for the run that is under way)."""


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """New tokens of one sequence: continue the first `start` positions of `parent` by `count` tokens."""

    sequence: int
    parent: int
    start: int
    count: int


@dataclass(kw_only=True)
class SessionMirror:
    """Epoch, last step and lengths of one session."""

    epoch: int
    max_length: int
    max_sequences: int
    last_step: int = 0
    state: MirrorState = MirrorState.OPEN
    _lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise BadInputError(f"epoch {self.epoch} is not valid; epochs start at 1")
        if self.max_length < 1 or self.max_sequences < 1:
            raise BadInputError("a session needs max_length >= 1 and max_sequences >= 1")

    def length(self, sequence: int) -> int:
        """Positions held by a sequence; 0 for one never named."""
        return self._lengths.get(sequence, 0)

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions per sequence, from sequence 0 to the highest ever named."""
        return tuple(self.length(sequence) for sequence in range(max(self._lengths, default=-1) + 1))

    @property
    def num_positions(self) -> int:
        """Positions held by all sequences together."""
        return sum(self._lengths.values())

    def judge(self, *, epoch: int, step: int, sequences: Sequence[SequenceStep], num_rows: int) -> Verdict:
        """Decide about a step, and account for it when it is to run.

        Raises SessionClosedError, SessionStateError (other epoch, step out of order, start beyond what is
        held), LengthLimitError (beyond max_length or max_sequences) or BadInputError (malformed). A refused
        step changes nothing.
        """
        if self.state is not MirrorState.OPEN:
            raise SessionClosedError(f"the session is {self.state.value} on this server")
        if epoch != self.epoch:
            raise self._state_error(f"step {step} is of epoch {epoch}, this server is at epoch {self.epoch}")
        if step == self.last_step and step > 0:
            return Verdict.REPEAT
        if step != self.last_step + 1:
            raise self._state_error(f"step {step} does not follow step {self.last_step}")
        self._lengths.update(self._lengths_after(sequences, num_rows))
        self.last_step = step
        return Verdict.RUN

    def _lengths_after(self, sequences: Sequence[SequenceStep], num_rows: int) -> dict[int, int]:
        after: dict[int, int] = {}
        total_rows = 0
        for item in sequences:
            if max(item.sequence, item.parent) >= self.max_sequences or min(item.sequence, item.parent) < 0:
                raise LengthLimitError(
                    f"sequence {max(item.sequence, item.parent)} was named, the session has {self.max_sequences}"
                )
            if item.sequence in after:
                raise BadInputError(f"sequence {item.sequence} appears twice in one step")
            if item.start > self.length(item.parent):
                raise self._state_error(
                    f"sequence {item.sequence} should continue at position {item.start}, but {item.parent} holds "
                    f"{self.length(item.parent)}"
                )
            end = item.start + item.count
            if end > self.max_length:
                raise LengthLimitError(
                    f"position {end} is beyond the session's max_length {self.max_length}; open a longer session"
                )
            after[item.sequence] = end
            total_rows += item.count
        if total_rows != num_rows:
            raise BadInputError(f"the step names {total_rows} tokens but carries {num_rows} rows")
        return after

    def fail(self) -> None:
        """A step failed half-way; what is held can not be trusted, so the session is dead here."""
        self._move(MirrorState.DEAD)

    def close(self) -> None:
        """The session has ended; harmless when repeated."""
        if self.state is not MirrorState.CLOSED:
            self._move(MirrorState.CLOSED)

    def _move(self, state: MirrorState) -> None:
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"a session can not go from {self.state.value} to {state.value}")
        self.state = state

    def _state_error(self, message: str) -> SessionStateError:
        return SessionStateError(message, epoch=self.epoch, positions=self.positions)
