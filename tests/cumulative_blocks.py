"""The smallest blocks with memory: each output is the sum of its sequence's inputs so far."""

# Letters: T tokens of one sequence, H hidden size, P positions.

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.client.blocks import BlockSession, RemoteBlocks, SequenceInput
from swarm.datatypes import Hop
from swarm.errors import LengthLimitError, SessionClosedError

__all__ = ["CumulativeBlocks", "CumulativeSession"]


class CumulativeSession(BlockSession):
    """Remembers each sequence's inputs, so a wrong rewind or fork shows in the sums."""

    def __init__(self, max_length: int, num_sequences: int) -> None:
        self._max_length = max_length
        self.inputs = [torch.zeros(0, 1) for _ in range(num_sequences)]
        """[P, H] of each sequence."""
        self.steps: list[tuple[SequenceInput, ...]] = []
        self.is_closed = False

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(rows) for rows in self.inputs)

    @property
    def route(self) -> tuple[Hop, ...]:
        return ()

    @property
    def num_failovers(self) -> int:
        return 0

    def step(self, inputs: Sequence[SequenceInput], *, last_only: bool = False) -> list[torch.Tensor]:
        if self.is_closed:
            raise SessionClosedError("the session is closed")
        for item in inputs:
            assert item.start <= len(self.inputs[item.parent]), "a step starts beyond its parent"
            if item.start + len(item.hidden) > self._max_length:
                raise LengthLimitError(f"more than the session's {self._max_length} positions")
        self.steps.append(tuple(inputs))
        grown = [torch.cat([self.inputs[item.parent][: item.start], item.hidden]) for item in inputs]
        outputs = []
        for item, rows in zip(inputs, grown, strict=True):
            self.inputs[item.sequence] = rows
            output = rows.cumsum(0)[item.start :]
            outputs.append(output[-1:] if last_only else output)
        return outputs

    def close(self) -> None:
        self.is_closed = True


class CumulativeBlocks(RemoteBlocks):
    """Opens such sessions; stateless runs are differentiable."""

    def __init__(self) -> None:
        self.sessions: list[CumulativeSession] = []

    @property
    def num_blocks(self) -> int:
        return 1

    def open_session(self, *, max_length: int, num_sequences: int = 1) -> CumulativeSession:
        session = CumulativeSession(max_length, num_sequences)
        self.sessions.append(session)
        return session

    def run_stateless(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [rows.cumsum(0) for rows in hidden]

    def close(self) -> None:
        for session in self.sessions:
            session.close()
