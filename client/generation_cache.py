"""What transformers calls the KV cache: only the bookkeeping, since keys and values live on the servers."""

# Letters: B rows of a batch, T columns of a batch.

from __future__ import annotations

from typing import NoReturn

import torch
from transformers import Cache

from swarm.client.blocks import BlockSession, RemoteBlocks
from swarm.client.cache_plan import CachePlan, Row, plan_pass
from swarm.errors import BadInputError, SessionClosedError

__all__ = ["GenerationCache"]


class GenerationCache(Cache):
    """Maps transformers' padded columns to each sequence's own positions.

    Rewinds (`crop`) and forks (`reorder_cache`) are noted here and travel with the next step. Rows that
    have finished while others go on are no longer sent; their columns hold padding.
    """

    def __init__(
        self,
        blocks: RemoteBlocks,
        *,
        max_length: int,
        num_new_tokens: int = 0,
        limit: int | None = None,
        session: BlockSession | None = None,
        num_rows: int = 0,
    ) -> None:
        """Without `session` one is opened when the first step tells how many rows there are.

        Args:
            blocks: where to open it.
            max_length: positions that each sequence may hold.
            num_new_tokens: room kept beyond the first step, if that turns out longer than expected.
            limit: positions that the model can hold at most; None when it sets no limit.
            session: an open session to continue, which is then not closed with the cache; its token ids are kept.
            num_rows: sequences of `session`.
        """
        super().__init__(layers=[])
        self._blocks = blocks
        self._max_length = max_length
        self._num_new_tokens = num_new_tokens
        self._limit = limit
        self._session = session
        self._owns_session = session is None
        self._is_closed = False
        self._rows = [Row(source=row, token_ids=[]) for row in range(num_rows)]
        # Columns shown so far in this generate call, in runs of equal realness: (columns, mask or None).
        self._runs: list[tuple[int, torch.Tensor | None]] = []
        self._num_columns = 0
        self._is_replay = session is None

    # What transformers asks.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns shown so far, padding included, as transformers counts."""
        return self._num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._num_columns + query_length, 0

    def __len__(self) -> int:
        return 1  # transformers takes an empty cache for none

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"lengths={self.lengths}"
        return f"{type(self).__name__}({state})"

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return len(self._rows) or -1

    @property
    def is_sliding(self) -> list[bool]:
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        return [False]

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        raise BadInputError("a swarm's cache takes no keys or values; they live on the servers")

    def activate_past_recording(self) -> None:
        """Nothing to do: any position can be returned to."""

    def reset(self) -> None:
        """Forget all positions."""
        self.rewind(0)
        self._runs.clear()
        self._num_columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` columns.

        Raises:
            BadInputError: the argument is positive, or more columns than there are.
        """
        left = -tokens_to_remove
        if left < 0 or left > self._num_columns:
            raise BadInputError(
                f"crop({tokens_to_remove}) on a cache of {self._num_columns} columns; give minus the number to drop"
            )
        self._num_columns -= left
        while left:
            num_columns, mask = self._runs.pop()
            num_kept = max(num_columns - left, 0)
            for index, row in enumerate(self._rows):
                num_dropped = num_columns - num_kept if mask is None else int(mask[index, num_kept:].sum())
                row.truncate(row.length - num_dropped)
            if num_kept:
                self._runs.append((num_kept, None if mask is None else mask[:, :num_kept]))
            left -= num_columns - num_kept

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i continues what row `beam_idx[i]` holds now."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (int64, or bool per row), in that order."""
        order: list[int] = indices.nonzero().flatten().tolist() if indices.dtype == torch.bool else indices.tolist()
        self._rows = [self._rows[row].copy() for row in order]
        self._runs = [(num_columns, None if mask is None else mask[order]) for num_columns, mask in self._runs]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self._rows)).repeat_interleave(repeats))

    # What our sessions and passes ask.

    @property
    def num_rows(self) -> int:
        """Rows of the batch; 0 before the first step."""
        return len(self._rows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions that each row holds."""
        return tuple(row.length for row in self._rows)

    @property
    def sources(self) -> list[int]:
        """Which sequence of the session each row continues."""
        return [row.source for row in self._rows]

    @property
    def keeps_token_ids(self) -> bool:
        """Whether it belongs to a session of several calls."""
        return not self._owns_session

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids at the positions held, per row; only for sessions."""
        return [row.token_ids or [] for row in self._rows]

    @property
    def pending(self) -> list[int | None]:
        """Each row's last sampled token, not yet sent; only for sessions."""
        return [row.pending for row in self._rows]

    def begin_call(self) -> None:
        """Let the next pass show each row from its first token on; what has been sent before stays unsent."""
        self._runs.clear()
        self._num_columns = 0
        self._is_replay = True
        for row in self._rows:
            row.is_finished = False

    def end_call(self) -> None:
        """Let the next pass append to every row."""
        self._is_replay = False
        for row in self._rows:
            row.is_finished = False

    def rewind(self, length: int) -> None:
        """Forget every row's positions from `length` on, the pending token included."""
        for row in self._rows:
            row.rewind(length)

    def close(self) -> None:
        """Free the servers' memory if this cache opened the session; harmless when repeated."""
        self._is_closed = True
        if self._session is not None and self._owns_session:
            self._session.close()

    def note_sampled(self, token_ids: torch.Tensor, is_done: torch.Tensor) -> None:
        """Remember sampled tokens, and which rows have now finished.

        Args:
            token_ids: [B, columns so far + 1] int64.
            is_done: [B] bool, rows for which a stop criterion holds.
        """
        if is_done.shape[0] != len(self._rows):
            return  # beam search judges more candidates than it has rows
        if self.keeps_token_ids:
            for row, token_id in zip(self._rows, token_ids[:, -1].tolist(), strict=True):
                if not row.is_finished:
                    row.pending = token_id
        if len(self._rows) > 1:
            for row, is_now_done in zip(self._rows, is_done.tolist(), strict=True):
                row.is_finished = row.is_finished or is_now_done

    def num_candidates(self, num_columns: int) -> int | None:
        """How many tokens beyond `num_columns` the next pass may try out; None: any number.

        Wrong guesses are taken back, which servers that compress can do within limits.
        """
        row = self._rows[0] if self._rows else Row(source=0)
        if self._session is None:
            room = 0 if self._blocks.may_compress else None
        else:
            room = self._session.room_to_take_back(row.source, row.length)
        if room is None:
            return None
        num_unsent = num_columns - (row.length if self._is_replay else self._num_columns)
        return max(room - max(num_unsent, 0), 0)

    def plan(self, *, num_rows: int, num_columns: int, mask: torch.Tensor | None, num_outputs: int) -> CachePlan:
        """Decide what a forward pass has to send; see `plan_pass`.

        Raises:
            BadInputError: another number of rows than before.
            SessionClosedError: the cache has been closed.
        """
        if self._is_closed:
            raise SessionClosedError(
                "this cache ended with its generate call; use `with model.session() as session:` and pass session="
                " to continue over several calls"
            )
        if not self._rows:
            self._rows = [Row(source=row) for row in range(num_rows)]
        if num_rows != len(self._rows):
            raise BadInputError(
                f"the batch has {num_rows} rows, the session {len(self._rows)} sequences; open it with"
                f" model.session(batch_size={num_rows})"
            )
        return plan_pass(
            self._rows, num_columns=num_columns, mask=mask, num_outputs=num_outputs, is_replay=self._is_replay
        )

    def session_for(self, plan: CachePlan) -> BlockSession:
        """The session that carries the plan's steps, opened now if need be."""
        if self._session is None:
            longest = max((step.end for step in plan.steps), default=0)
            max_length = max(self._max_length, longest + self._num_new_tokens)
            if self._limit is not None:
                max_length = min(max_length, self._limit)
            self._session = self._blocks.open_session(max_length=max_length, num_sequences=plan.num_rows)
        return self._session

    def commit(self, plan: CachePlan, token_ids: torch.Tensor | None) -> None:
        """Note that the servers have taken the plan's steps, and all forks with them.

        Args:
            plan: what was sent.
            token_ids: [B, T] int64 that the plan's columns point into; None when embeddings were given.
        """
        given = token_ids.tolist() if token_ids is not None and self.keeps_token_ids else None
        for step in plan.steps:
            row = self._rows[step.row]
            if given is not None and row.token_ids is not None:
                row.truncate(step.start)
                columns, ids = step.columns, given[step.row]
                row.token_ids += ids[columns] if isinstance(columns, slice) else [ids[at] for at in columns.tolist()]
                row.pending = None
            row.length = step.end
        for index, row in enumerate(self._rows):
            row.source = index
        self._num_columns += plan.num_columns
        self._is_replay = False
        if plan.mask is None and self._runs and self._runs[-1][1] is None:
            self._runs[-1] = (self._runs[-1][0] + plan.num_columns, None)
        else:
            self._runs.append((plan.num_columns, plan.mask))

    def copy_row(self, source: int, row: int) -> None:
        """Let a row continue what another row holds, without sending it again."""
        self._rows[row].source = self._rows[source].source
        self._rows[row].length = self._rows[source].length
