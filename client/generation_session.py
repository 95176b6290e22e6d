"""A conversation over several generate calls, of which only new tokens travel."""

from __future__ import annotations

import operator
from types import TracebackType
from typing import Self

import torch

from swarm.client.blocks import BlockSession, RemoteBlocks
from swarm.client.generation_cache import GenerationCache
from swarm.datatypes import Hop
from swarm.errors import BadInputError, LengthLimitError, SessionClosedError

__all__ = ["GenerationSession"]


class GenerationSession:
    """One or more sequences that several `model.generate(..., session=session)` calls continue.

    The history of a sequence is every token given or generated so far. The last generated token has
    not been sent yet, since nothing was computed from it; it travels with the next call.

    One thread at a time. Leaving the `with` block frees the servers' memory.
    """

    def __init__(self, blocks: RemoteBlocks, *, max_length: int, batch_size: int = 1) -> None:
        """Not for callers; use `model.session()`.

        Args:
            blocks: where the sequences live.
            max_length: tokens that each sequence may have.
            batch_size: number of sequences.
        """
        self._max_length = max_length
        self._session: BlockSession = blocks.open_session(max_length=max_length, num_sequences=batch_size)
        self._cache = GenerationCache(blocks, max_length=max_length, session=self._session, num_rows=batch_size)
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"position {self.position} of {self._max_length}"
        return f"<GenerationSession {state}, {self.batch_size} sequences>"

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._cache.num_rows

    @property
    def max_length(self) -> int:
        """Tokens that each sequence may have."""
        return self._max_length

    @property
    def token_ids(self) -> list[list[int]]:
        """The history of each sequence, without padding."""
        return [
            list(ids) if last is None else [*ids, last]
            for ids, last in zip(self._cache.token_ids, self._cache.pending, strict=True)
        ]

    @property
    def position(self) -> int:
        """Tokens in the history; of the longest sequence, where there are several.

        Set it to a smaller number to forget what came after: the next call continues from there.
        With several sequences each keeps at most that many tokens.
        """
        return max(len(ids) for ids in self.token_ids)

    @position.setter
    def position(self, position: int) -> None:
        self.check_open()
        try:
            position = operator.index(position)
        except TypeError:
            raise BadInputError(f"a position is a whole number of tokens, not {position!r}") from None
        if not 0 <= position <= self.position:
            raise BadInputError(
                f"the session is at position {self.position} and can only be set back, not to {position}"
            )
        self._cache.rewind(position)

    @property
    def route(self) -> tuple[Hop, ...]:
        """Hops in use (peer_id, start, end), in block order; empty before the first step."""
        return self._session.route

    @property
    def num_failovers(self) -> int:
        """How often a server was replaced."""
        return self._session.num_failovers

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def cache(self) -> GenerationCache:
        """For single steps: `model(new_ids, past_key_values=session.cache)` appends tokens and returns their logits."""
        return self._cache

    def close(self) -> None:
        """Free the servers' memory; harmless when repeated."""
        self._is_closed = True
        self._cache.close()
        self._session.close()

    def check_open(self) -> None:
        """Raises SessionClosedError when the session has been closed."""
        if self._is_closed:
            raise SessionClosedError("this session has been closed; open another with model.session()")

    def extend_history(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
        """The whole history of each sequence, `input_ids` included.

        Where every row of `input_ids` begins with exactly the tokens that its sequence has sent, the rows
        are whole histories; otherwise they continue them.

        Args:
            input_ids: [batch_size, T] int64.
            attention_mask: [batch_size, T], nonzero for tokens; None when all are tokens.

        Raises:
            BadInputError: another number of rows, or a sequence without a single token.
            LengthLimitError: more tokens than the session may hold.
        """
        if input_ids.shape[0] != self.batch_size:
            raise BadInputError(
                f"the batch has {input_ids.shape[0]} rows, the session {self.batch_size} sequences; open it with"
                f" model.session(batch_size={input_ids.shape[0]})"
            )
        rows: list[list[int]] = input_ids.tolist()
        if attention_mask is not None:
            rows = [
                [token_id for token_id, is_real in zip(row, real, strict=True) if is_real]
                for row, real in zip(rows, attention_mask.tolist(), strict=True)
            ]
        sent = self._cache.token_ids
        if not all(row[: len(ids)] == ids and len(row) >= len(ids) for row, ids in zip(rows, sent, strict=True)):
            rows = [history + row for history, row in zip(self.token_ids, rows, strict=True)]
        for index, row in enumerate(rows):
            if not row:
                raise BadInputError(f"sequence {index} of the session has no tokens yet; give at least one")
            if len(row) > self._max_length:
                raise LengthLimitError(
                    f"sequence {index} would have {len(row)} tokens, and the session holds {self._max_length}; open it"
                    " with a larger max_length"
                )
        return rows
