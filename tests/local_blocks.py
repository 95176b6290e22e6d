"""All blocks of a model in this process: what a swarm does, without servers or a network."""

# Letters: T tokens of one sequence, H hidden size, P positions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from swarm.client.blocks import BlockSession, RemoteBlocks, SequenceInput
from swarm.datatypes import Hop, ModelHash, PeerId, ServerInfo, ServerState, Span
from swarm.errors import LengthLimitError, SessionClosedError
from swarm.models import ModelSource, SpanModel, load_span, resolve_model
from swarm.models.span_cache import SpanCache

__all__ = ["LocalBlocks", "LocalSession", "StepRecord", "local_blocks"]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step carried."""

    inputs: tuple[SequenceInput, ...]
    last_only: bool

    @property
    def num_tokens(self) -> int:
        """Hidden states sent."""
        return sum(len(item.hidden) for item in self.inputs)


@dataclass
class _Sequence:
    """One sequence's caches, one per span."""

    caches: list[SpanCache] = field(default_factory=list)
    length: int = 0


class LocalSession(BlockSession):
    """Keeps every sequence's caches, checks what a server would check, and records every step."""

    def __init__(self, blocks: LocalBlocks, max_length: int, num_sequences: int) -> None:
        self._blocks = blocks
        self._max_length = max_length
        self._sequences = [blocks.empty_sequence() for _ in range(num_sequences)]
        self.steps: list[StepRecord] = []
        self.is_closed = False

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sequence.length for sequence in self._sequences)

    @property
    def route(self) -> tuple[Hop, ...]:
        return self._blocks.hops if self.steps else ()

    @property
    def num_failovers(self) -> int:
        return 0

    @property
    def num_tokens_sent(self) -> int:
        """Hidden states sent in all steps together."""
        return sum(step.num_tokens for step in self.steps)

    def step(self, inputs: Sequence[SequenceInput], *, last_only: bool = False) -> list[torch.Tensor]:
        if self.is_closed:
            raise SessionClosedError("the session is closed")
        assert len({item.sequence for item in inputs}) == len(inputs), "a sequence appears twice in a step"
        for item in inputs:
            assert 0 <= item.start <= self._sequences[item.parent].length, "a step starts beyond its parent"
            if item.start + len(item.hidden) > self._max_length:
                raise LengthLimitError(f"more than the session's {self._max_length} positions")
        if self._blocks.fail_at_step == len(self.steps):
            raise KeyboardInterrupt
        self.steps.append(StepRecord(inputs=tuple(inputs), last_only=last_only))
        forks = [self._blocks.fork(self._sequences[item.parent], item.start) for item in inputs]
        outputs = []
        for item, fork in zip(inputs, forks, strict=True):
            self._sequences[item.sequence] = fork
            output = self._blocks.extend(fork, item.hidden)
            outputs.append(output[-1:] if last_only else output)
        return outputs

    def close(self) -> None:
        self.is_closed = True


class LocalBlocks(RemoteBlocks):
    """Spans of one model, run one after the other in this process."""

    def __init__(self, spans: Sequence[SpanModel]) -> None:
        self._spans = spans
        self.sessions: list[LocalSession] = []
        """Every session ever opened, in order."""
        self.stateless_runs: list[tuple[int, ...]] = []
        """Lengths of the sequences of every stateless run, in order."""
        self.fail_at_step: int | None = None
        """Raise KeyboardInterrupt in a session's step of this index."""
        self.is_closed = False

    @property
    def num_blocks(self) -> int:
        return self._spans[-1].span.end

    @property
    def hops(self) -> tuple[Hop, ...]:
        """A made-up server for each span."""
        return tuple(
            Hop(
                server=ServerInfo(
                    peer_id=PeerId(f"local-{model.span}"),
                    model_hash=ModelHash(""),
                    model_name="local",
                    num_blocks=self.num_blocks,
                    span=model.span,
                    state=ServerState.ONLINE,
                    weights="fp32",
                    kv_policy="none",
                ),
                span=model.span,
            )
            for model in self._spans
        )

    def open_session(self, *, max_length: int, num_sequences: int = 1) -> LocalSession:
        session = LocalSession(self, max_length, num_sequences)
        self.sessions.append(session)
        return session

    def run_stateless(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.stateless_runs.append(tuple(len(rows) for rows in hidden))
        outputs = []
        for rows in hidden:
            batch, positions = rows.unsqueeze(0), torch.arange(len(rows)).unsqueeze(0)
            for model in self._spans:
                batch = model(batch, positions)
            outputs.append(batch.squeeze(0))
        return outputs

    def close(self) -> None:
        self.is_closed = True
        for session in self.sessions:
            session.close()

    def empty_sequence(self) -> _Sequence:
        return _Sequence(caches=[model.new_cache() for model in self._spans])

    def fork(self, parent: _Sequence, start: int) -> _Sequence:
        """A copy of the first `start` positions of `parent`."""
        caches = []
        for cache in parent.caches:
            twin = cache.clone()
            if start < parent.length:
                twin.crop(start)
            caches.append(twin)
        return _Sequence(caches=caches, length=start)

    def extend(self, sequence: _Sequence, hidden: torch.Tensor) -> torch.Tensor:
        """Append [T, H] and return the last block's [T, H]."""
        if not len(hidden):
            return hidden
        batch = hidden.unsqueeze(0)
        positions = torch.arange(sequence.length, sequence.length + len(hidden)).unsqueeze(0)
        with torch.inference_mode():
            for model, cache in zip(self._spans, sequence.caches, strict=True):
                batch = model(batch, positions, cache=cache)
        sequence.length += len(hidden)
        # Not an inference tensor: what arrives over a network is none either.
        return batch.squeeze(0).clone()


def local_blocks(folder: Path, *cuts: int) -> tuple[ModelSource, LocalBlocks]:
    """The model in a folder, cut into spans before each block in `cuts`."""
    source = resolve_model(str(folder), cache_dir=folder.parent / "cache")
    bounds = [0, *cuts, source.num_blocks]
    spans = [load_span(source, Span(start=start, end=end)) for start, end in pairwise(bounds)]
    return source, LocalBlocks(spans)
