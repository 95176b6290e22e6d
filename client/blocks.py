"""What the remote model needs of the swarm: sessions over all blocks, and stateless differentiable runs."""

# Letters: T tokens of one sequence, H hidden size.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from swarm.datatypes import Hop

__all__ = ["BlockSession", "RemoteBlocks", "SequenceInput"]


@dataclass(frozen=True, kw_only=True)
class SequenceInput:
    """New tokens for one sequence of a session, in one step.

    The sequence continues from the first `start` positions that `parent` held before the step, so one
    form covers appending (parent is the sequence itself, start its length), rewinding (start below its
    length) and forking for beams (another parent). All parents are read before any sequence changes.
    """

    sequence: int
    """Which sequence of the session, from 0."""
    parent: int
    """Sequence whose positions are continued; usually the sequence itself."""
    start: int
    """Position of the first new token: the number of positions kept from the parent."""
    hidden: torch.Tensor
    """[T, H] inputs of the first block; T may be 0 (a pure rewind or fork)."""


class BlockSession(ABC):
    """One stream of steps through all blocks, holding the state of one or more sequences.

    Blocking; used by one thread at a time.
    """

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Positions each sequence may hold."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Positions held now, per sequence."""

    @property
    @abstractmethod
    def route(self) -> tuple[Hop, ...]:
        """Hops in use, in block order; empty before the first step."""

    @property
    @abstractmethod
    def num_failovers(self) -> int:
        """How often a hop was replaced."""

    def room_to_take_back(self, sequence: int, start: int) -> int | None:
        """How many tokens one step can append to a sequence at `start` so that taking back all but the first is cheap.

        None: any number. Servers that compress can not undo what they have compressed, so the rest would have to be
        sent again; 0 where that is so from the first token on.
        """
        return None

    @abstractmethod
    def step(self, inputs: Sequence[SequenceInput], *, last_only: bool = False) -> list[torch.Tensor]:
        """Run new tokens through all blocks.

        Returns, in the order of `inputs`, the last block's outputs [T, H] of each; with `last_only` only
        the last row [min(T, 1), H]. Raises LengthLimitError (before anything is sent, or when no server has memory
        for so long a session), SessionClosedError, NoRouteError or DeadlineError.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the servers' memory; harmless when repeated."""


class RemoteBlocks(ABC):
    """All blocks of one model, served by a swarm."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks of the whole model."""

    @property
    def may_compress(self) -> bool:
        """Whether a session opened now may be at servers that do not keep its whole cache as it is."""
        return False

    @abstractmethod
    def open_session(self, *, max_length: int, num_sequences: int = 1) -> BlockSession:
        """A new session; servers are contacted at its first step."""

    @abstractmethod
    def run_stateless(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run whole sequences, each [T, H] from position 0, through all blocks without keeping any state.

        Differentiable with respect to `hidden`: the backward pass is a second, retryable request that
        recomputes on the servers.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all sessions and connections."""
