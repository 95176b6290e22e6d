"""The server's half of a session: which steps fit, which are repeats, which are refused. Pure, no I/O.

The client is the owner of a session's history; a server mirrors only what it needs to judge the next
step: the epoch, the last step accepted, how many positions each sequence holds, and in a session that is compressed,
how far each has been (swarm.kvpolicy.streaming).

    OPEN ──fail──▶ DEAD        a step failed half-way: positions can not be trusted any more
     └────close──▶ CLOSED

A new epoch is a new mirror: an empty one, or one that stands at a checkpoint of the old one. After every step a
mirror notes a checkpoint, and drops those whose content the step has overwritten or compressed; so a checkpoint that
is left holds no more positions of any sequence than later ones and the present do, and going back to it is nothing
but forgetting positions. There is no way back from DEAD or CLOSED.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from swarm.errors import BadInputError, LengthLimitError, SessionClosedError, SessionStateError
from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy
from swarm.kvpolicy.streaming import TailState, advance, can_return, can_rewind, new_tail, stop_staging

__all__ = ["MAX_CHECKPOINTS", "Checkpoint", "MirrorState", "SequenceStep", "SessionMirror", "Verdict"]

MAX_CHECKPOINTS: Final = 128
"""States a session can be kept at: more steps than a client ever has under way."""
_MAX_CHECKPOINT_POSITIONS: Final = 4096
"""Numbers in all checkpoints together (but for the newest), so that sessions of many sequences stay small."""


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
    is_unfinished: bool = False
    """Whether more tokens of the same input follow in a later step; nothing is compressed before the last."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that a session can be kept at: the one after a step."""

    epoch: int
    step: int
    positions: tuple[int, ...]
    """Per sequence, from sequence 0; those beyond hold nothing."""
    tails: tuple[TailState, ...] = ()
    """Per sequence likewise, in a session that is compressed; empty in others."""

    def length(self, sequence: int) -> int:
        return self.positions[sequence] if sequence < len(self.positions) else 0


@dataclass(kw_only=True)
class SessionMirror:
    """Epoch, last step, lengths and checkpoints of one session."""

    epoch: int
    max_length: int
    max_sequences: int
    policy: KVPolicy = FULL_CACHE
    """What the session's cache is kept by."""
    last_step: int = 0
    """The step accepted last; 0 before the first of this epoch."""
    state: MirrorState = MirrorState.OPEN
    _lengths: dict[int, int] = field(default_factory=dict)
    _tails: dict[int, TailState] = field(default_factory=dict)
    """Of the sequences in `_lengths`, where the policy compresses."""
    _checkpoints: deque[Checkpoint] = field(default_factory=deque)
    """Oldest first; each holds no more of any sequence than the next one, and the last no more than `_lengths`."""

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

    def tail(self, sequence: int) -> TailState:
        """How far a sequence's compression has come; only of use where the policy compresses."""
        return self._tails.get(sequence, new_tail(self.policy))

    @property
    def tails(self) -> tuple[TailState, ...]:
        """Per sequence like `positions`; empty in a session that is not compressed."""
        if not self.policy.compresses:
            return ()
        return tuple(self.tail(sequence) for sequence in range(max(self._lengths, default=-1) + 1))

    @property
    def num_positions(self) -> int:
        """Positions held by all sequences together."""
        return sum(self._lengths.values())

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """States the session can be kept at, oldest first."""
        return tuple(self._checkpoints)

    @classmethod
    def restored(
        cls,
        *,
        epoch: int,
        max_length: int,
        max_sequences: int,
        positions: Sequence[int],
        checkpoints: Iterable[Checkpoint],
        policy: KVPolicy = FULL_CACHE,
        tails: Sequence[TailState] = (),
    ) -> SessionMirror:
        """The mirror of a session that another server handed over: `positions` are held per sequence.

        With a policy that compresses, `tails` and those of the checkpoints are as long as the positions. Raises
        BadInputError, LengthLimitError when this can not be what a mirror of ours held.
        """
        mirror = cls(epoch=epoch, max_length=max_length, max_sequences=max_sequences, policy=policy)
        if len(positions) > max_sequences or max(positions, default=0) > max_length:
            raise LengthLimitError(
                f"{len(positions)} sequences of up to {max(positions, default=0)} positions were handed over in a "
                f"session of {max_sequences} and {max_length}"
            )
        _check_tails(policy, positions, tails)
        mirror._lengths = dict(enumerate(positions))
        mirror._tails = dict(enumerate(tails))
        earlier = Checkpoint(0, 0, ())
        for checkpoint in checkpoints:
            if (checkpoint.epoch, checkpoint.step) <= (earlier.epoch, earlier.step) or checkpoint.epoch > epoch:
                raise BadInputError("the checkpoints handed over are not in order")
            if not _holds_no_more(earlier.positions, checkpoint.positions):
                raise BadInputError("a checkpoint handed over holds less than the one before it")
            _check_tails(policy, checkpoint.positions, checkpoint.tails)
            mirror._append(checkpoint)
            earlier = checkpoint
        if not _holds_no_more(earlier.positions, mirror.positions):
            raise BadInputError("a checkpoint handed over holds more than the session does")
        mirror._drop_compressed()
        return mirror

    def kept(self, *, epoch: int, kept_epoch: int, kept_step: int) -> SessionMirror | None:
        """A mirror at a higher epoch that stands where this one stood after a step; None when that is lost.

        This one is to be closed then. Asking again for the same state, at a yet higher epoch, gives it again.
        """
        if self.state is not MirrorState.OPEN or epoch <= self.epoch:
            return None
        for index, checkpoint in enumerate(self._checkpoints):
            if (checkpoint.epoch, checkpoint.step) == (kept_epoch, kept_step):
                return SessionMirror(
                    epoch=epoch,
                    max_length=self.max_length,
                    max_sequences=self.max_sequences,
                    policy=self.policy,
                    _lengths=dict(enumerate(checkpoint.positions)),
                    _tails=self._tails_at(checkpoint),
                    _checkpoints=deque(list(self._checkpoints)[: index + 1]),
                )
        return None

    def _tails_at(self, checkpoint: Checkpoint) -> dict[int, TailState]:
        """The states of sequences that go back to a checkpoint."""
        if checkpoint.positions == self.positions and checkpoint.tails == self.tails:
            return dict(self._tails)  # they stay where they are, which may be inside an input
        # What was compressed at the checkpoint itself, by a step after it, stays compressed.
        return {
            sequence: stop_staging(self.tail(sequence)) if checkpoint.length(sequence) else new_tail(self.policy)
            for sequence in range(len(checkpoint.tails))
        }

    def judge(self, *, epoch: int, step: int, sequences: Sequence[SequenceStep], num_rows: int) -> Verdict:
        """Decide about a step, and account for it when it is to run.

        The first step of an epoch may have any number from 1, since a server that kept its state takes no part
        in the replay to others. Raises SessionClosedError, SessionStateError (other epoch, step out of order, start
        beyond what is held or before what has been compressed), LengthLimitError (beyond max_length or max_sequences)
        or BadInputError (malformed). A refused step changes nothing.
        """
        if self.state is not MirrorState.OPEN:
            raise SessionClosedError(f"the session is {self.state.value} on this server")
        if epoch != self.epoch:
            raise self._state_error(f"step {step} is of epoch {epoch}, this server is at epoch {self.epoch}")
        if step == self.last_step and step > 0:
            return Verdict.REPEAT
        if step != self.last_step + 1 if self.last_step else step < 1:
            raise self._state_error(f"step {step} does not follow step {self.last_step}")
        lengths = self._lengths_after(sequences, num_rows)
        tails = self._tails_after(sequences)
        self._drop_lost(sequences)
        self._lengths.update(lengths)
        self._tails.update(tails)
        self._drop_compressed()
        self.last_step = step
        self._append(Checkpoint(epoch, step, self.positions, self.tails))
        return Verdict.RUN

    def _drop_lost(self, sequences: Sequence[SequenceStep]) -> None:
        """Drop checkpoints that hold positions which a step of these parts overwrites or frees."""
        limits = {item.sequence: item.start if item.parent == item.sequence else 0 for item in sequences}
        # Later checkpoints hold no less, so what is lost is at the end.
        while self._checkpoints and any(self._checkpoints[-1].length(each) > limit for each, limit in limits.items()):
            self._checkpoints.pop()

    def _drop_compressed(self) -> None:
        """Drop checkpoints inside an input, and those after which something was compressed that they hold as it was."""
        if self.policy.compresses:
            self._checkpoints = deque(each for each in self._checkpoints if self._can_return(each))

    def _can_return(self, checkpoint: Checkpoint) -> bool:
        return all(
            can_return(self.policy, then, length, self.tail(sequence))
            for sequence, (length, then) in enumerate(zip(checkpoint.positions, checkpoint.tails, strict=True))
        )

    def _tails_after(self, sequences: Sequence[SequenceStep]) -> Mapping[int, TailState]:
        """The states that a step whose lengths are right leaves; empty in a session that is not compressed."""
        if not self.policy.compresses:
            return {}
        after: dict[int, TailState] = {}
        for item in sequences:
            tail = self.tail(item.parent)
            if item.start < self.length(item.parent) and not can_rewind(self.policy, tail, item.start):
                raise self._state_error(
                    f"sequence {item.parent} can not go back from position {self.length(item.parent)} to {item.start}: "
                    "it has been compressed since"
                )
            after[item.sequence] = advance(self.policy, tail, item.start, item.count, is_unfinished=item.is_unfinished)
        return after

    def _append(self, checkpoint: Checkpoint) -> None:
        self._checkpoints.append(checkpoint)
        most = max(1, min(MAX_CHECKPOINTS, _MAX_CHECKPOINT_POSITIONS // max(len(checkpoint.positions), 1)))
        while len(self._checkpoints) > most:
            self._checkpoints.popleft()

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


def _holds_no_more(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether `left` holds at most the positions that `right` holds, of every sequence."""
    return all(length <= (right[index] if index < len(right) else 0) for index, length in enumerate(left))


def _check_tails(policy: KVPolicy, positions: Sequence[int], tails: Sequence[TailState]) -> None:
    """Raises BadInputError unless these can be the states of sequences that hold so many positions."""
    if len(tails) != (len(positions) if policy.compresses else 0):
        raise BadInputError(f"{len(tails)} states were handed over for {len(positions)} sequences")
    for length, tail in zip(positions, tails, strict=False):
        is_new = tail.stored_end == policy.num_sinks and not tail.compressed_at
        if not is_new and not policy.num_sinks < tail.stored_end <= tail.compressed_at <= length:
            raise BadInputError(
                f"a sequence of {length} positions can not be compressed up to {tail.stored_end} since "
                f"{tail.compressed_at}"
            )
