"""What sessions hold in KV memory: brought to each step's start, given pages, shared, copied and given back."""

# Letters: T tokens of a step, H hidden size.

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swarm.datatypes import Span
from swarm.errors import BadInputError, LengthLimitError, SessionStateError
from swarm.kvcache.compressed_checks import drop_idle_pages
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.page_table import PageTable
from swarm.kvpolicy.streaming import settle
from swarm.server.engine.compressed_sequence import CompressedSequence, Compression
from swarm.server.engine.engine import NotNow
from swarm.server.engine.held_session import HeldSession, PlainSequence
from swarm.server.engine.kv_usage import KVUsage, measure_usage
from swarm.server.engine.memory_bounds import longest_input, pages_for_input, refuse_input, refuse_session
from swarm.server.engine.memory_room import MemoryConfig, MemoryRoom
from swarm.server.engine.page_store import PageStore
from swarm.server.engine.spilling import count_pages
from swarm.server.engine.step_cuts import Stretch, find_stretches
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    from swarm.datatypes import AdapterHash
    from swarm.kvcache.compressed_table import PartPlan
    from swarm.server.engine.compressed_store import CompressedStore
    from swarm.server.engine.sequence_pages import HeldPages

__all__ = ["MemoryConfig", "PreparedItem", "SessionMemory"]


@dataclass(frozen=True, slots=True)
class PreparedItem:
    """One sequence's part of a step, with pages for all of its tokens."""

    item: SequenceStep
    table: PageTable
    """Of an exact sequence; of a compressed one, what is staged: position 0 is the first staged token."""
    known_outputs: Sequence[torch.Tensor] = ()
    """Outputs [page_tokens, H] of leading pages that were found in the index and need not run."""
    num_known: int = 0
    compressed: CompressedSequence | None = None
    plan: PartPlan | None = None
    """What the part means for a compressed sequence."""


class SessionMemory(MemoryRoom):
    """Owns the pages of a store; lives on the engine thread."""

    def __init__(
        self,
        store: PageStore,
        config: MemoryConfig,
        *,
        compression: Compression | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `compression` all sessions are exact."""
        super().__init__(store, config, now_s=now_s)
        self._compression = compression
        self._num_created = 0
        self.num_tokens_shared = 0
        """Tokens that were found in the index instead of being run."""
        self.usage = KVUsage(total_bytes=store.pool.num_pages * store.page_bytes)
        """After the last engine step; other threads may read it."""
        self.num_tokens_total = self._tokens_in(store.pool.num_pages)
        """Positions that fit when nothing is held: of compressed sequences of usual length where the server has a
        policy, else exact ones."""
        self.num_tokens_free = self.num_tokens_total
        """Positions that still fit, counting pages that only the index holds; other threads may read it."""

    @property
    def compressed(self) -> CompressedStore | None:
        """What compressed sequences are read and written by; None when all sessions are exact."""
        return self._compression.store if self._compression is not None else None

    def _tokens_in(self, num_pages: int) -> int:
        if self._compression is not None:
            return num_pages * self.store.page_bytes // self._compression.bytes_per_token
        return num_pages // self.store.num_layers * self._config.page_tokens

    def longest_input(self, max_tokens: int) -> tuple[int, int] | None:
        """What limits the inputs of compressed sessions in all blocks; None when they may have `max_tokens`.

        Tokens that a new session's input may have, and bytes of memory that would take `max_tokens`, or as many as are
        read before they are compressed. Without compression there is no such limit.
        """
        compression = self._compression
        if compression is None:
            return None
        span = Span(start=compression.first_block, end=compression.first_block + self.store.num_layers)
        wanted = min(max_tokens, compression.store.policy.chunk_tokens)
        longest = longest_input(compression, span, num_pages=self.store.pool.num_pages)
        if longest >= wanted:
            return None
        return longest, pages_for_input(compression, span, wanted) * self.store.page_bytes

    # -- transfers -----------------------------------------------------------------------------

    def held_pages(self, key: SessionKey, positions: Sequence[int]) -> tuple[dict[int, HeldPages], torch.Tensor | None]:
        """Where the first `positions` of each sequence are, by sequence: pages of the pool, or rows of the tensor.

        The tensor is [pages, values of a page] in host memory, None while the session is not there. Sequences that
        are to hold nothing are left out. Raises SessionStateError when less is held, or when a compressed sequence
        can not go back to there; inside an input it can not be taken elsewhere at all.
        """
        session = self._sessions.get(key)
        spilled = session.spilled if session is not None else None
        found: dict[int, HeldPages] = {}
        for sequence, length in enumerate(positions):
            if not length:
                continue
            if session is None or sequence not in session.sequences:
                raise SessionStateError(f"sequence {sequence} of the session is not held any more")
            held = session.sequences[sequence]
            layout = spilled.layouts[sequence] if spilled is not None else None
            num_held = held.length if layout is None else layout.length
            if num_held < length:
                raise SessionStateError(f"sequence {sequence} of the session holds {num_held} positions, not {length}")
            if isinstance(held, PlainSequence):
                found[sequence] = held.pages_up_to(length, layout)
            else:
                state = layout if isinstance(layout, CompressedState) else held.table.state()
                found[sequence] = _state_at(state, length, held, sequence)
        return found, spilled.contents if spilled is not None else None

    def add_session(
        self,
        key: SessionKey,
        span: Span,
        sequences: Mapping[int, HeldPages],
        *,
        adapter: AdapterHash,
        compresses: bool = False,
    ) -> bool:
        """A session that holds these pages of the pool, too; False, and nothing is done, when there is one.

        Its pages stay out of the index until a sequence begins anew: a page's name there is a hash over everything
        its sequence received, and that went to another server.
        """
        if key in self._sessions:
            return False
        session = self._new_session(key, span, adapter, compresses=compresses)
        for sequence, part in sequences.items():
            held = session.sequences[sequence] = self._new_sequence(session)
            held.put_back(part)
            if isinstance(held, PlainSequence):
                held.trail.give_up()
        return True

    def drop_step(self, key: SessionKey) -> None:
        """A step that `prepare` was asked for will not be asked for again."""
        session = self._sessions.get(key)
        if session is not None:
            session.has_forked = False

    def find_stretches(self, work: StepWork) -> list[Stretch] | None:
        """Where a step that has not begun may be cut into parts; None for anywhere."""
        compressed, session = self.compressed, self._sessions.get(work.session)
        if compressed is None or not work.compresses:
            return None

        def goes_on(sequence: int, start: int) -> bool:
            held = session.sequences.get(sequence) if session is not None else None
            if session is None or not isinstance(held, CompressedSequence):
                return False
            layout = session.spilled.layouts[sequence] if session.spilled is not None else None
            state = layout if isinstance(layout, CompressedState) else held.table
            return state.tail.is_staging and state.length == start

        return find_stretches(compressed.policy, work.sequences, goes_on)

    # -- before a step -------------------------------------------------------------------------

    def prepare(self, work: StepWork, *, protected: Collection[SessionKey]) -> list[PreparedItem] | NotNow:
        """Bring every named sequence to its start, find what is known of the new tokens, take pages for the rest.

        Compressed sequences also do the event that was due at their start, and take pages in reserve for the one at
        the part's end.

        `work.hidden` is on the host, in the model's dtype. `protected` are sessions of the same batch, which make
        no room. Raises LengthLimitError when its session would not fit if it were alone, SessionStateError when it
        continues what is not held; the session should be forgotten then.
        """
        session = self._sessions.get(work.session)
        if session is None:
            session = self._new_session(work.session, work.span, work.adapter, compresses=work.compresses)
        session.last_used_s = self._now_s()
        if session.spilled is not None and not self._restore(session, session.spilled, protected):
            return NotNow("the session's pages are in host memory and there is no room for them yet")
        if not session.has_forked:
            if not self._fork(session, work.sequences, protected):
                return NotNow("the KV memory is full")
            session.has_forked = True
        for item in work.sequences:
            session.sequences[item.sequence].drop_reserve()
            self._rewind(session, item)
        if session.compresses:
            prepared = self._prepare_compressed(session, work.sequences, protected)
        else:
            prepared = self._prepare_plain(session, work, protected)
        if not isinstance(prepared, NotNow):
            session.has_forked = False
        return prepared

    def _new_session(self, key: SessionKey, span: Span, adapter: AdapterHash, *, compresses: bool) -> HeldSession:
        if compresses and self._compression is None:
            raise BadInputError("this server keeps every token exactly; open the session without a KV policy")
        self._num_created += 1
        session = self._sessions[key] = HeldSession(key, span, self._num_created, adapter, compresses)
        session.last_used_s = self._now_s()
        return session

    def _new_sequence(self, session: HeldSession) -> PlainSequence | CompressedSequence:
        if session.compresses:
            assert self._compression is not None
            return self._compression.new_sequence(session.span)
        trail = self._prefixes.new_trail(session.span, session.adapter)
        table = self.store.new_table(len(session.span))
        return PlainSequence(table, trail, page_tokens=self.store.page_tokens)

    def _fork(self, session: HeldSession, items: Sequence[SequenceStep], protected: Collection[SessionKey]) -> bool:
        """Make all forks of a step, reading every parent before any sequence changes; False when there is no room."""
        num_wanted = 0
        for item in items:
            parent = session.sequences.get(item.parent)
            held = parent.length if parent is not None else 0
            if item.start > held:
                raise SessionStateError(
                    f"sequence {item.parent} holds {held} positions here, not {item.start}; send the session again"
                )
            if parent is not None:
                _check_rewind(parent, item.parent, item.start)
                num_wanted += parent.fork_pages_wanted(item.start) if item.parent != item.sequence else 0
        if num_wanted and not self._have_room(num_wanted, session, protected):
            return False
        forks: dict[int, PlainSequence | CompressedSequence] = {}
        for item in items:
            parent = session.sequences.get(item.parent)
            if parent is not None and item.parent != item.sequence:
                forks[item.sequence] = parent.fork(item.start)
        for item in items:
            replaced = session.sequences.get(item.sequence)
            if item.sequence in forks:
                session.sequences[item.sequence] = forks[item.sequence]
                if replaced is not None:
                    replaced.free()
            elif replaced is None:
                session.sequences[item.sequence] = self._new_sequence(session)
        return True

    def _rewind(self, session: HeldSession, item: SequenceStep) -> None:
        held = session.sequences[item.sequence]
        _check_rewind(held, item.sequence, item.start)
        held.rewind(item.start)

    # -- exact sequences -----------------------------------------------------------------------

    def _prepare_plain(
        self, session: HeldSession, work: StepWork, protected: Collection[SessionKey]
    ) -> list[PreparedItem] | NotNow:
        """Pages for sequences that stand at their starts; those of known leading tokens are adopted."""
        parts: list[tuple[SequenceStep, PageTable, list[torch.Tensor]]] = []
        row = 0
        for item in work.sequences:
            held = session.sequences[item.sequence]
            assert isinstance(held, PlainSequence)
            known = self._prefixes.match(held.table, held.trail, work.hidden[row : row + item.count])
            parts.append((item, held.table, known))
            row += item.count
        wanted = sum(table.pages_wanted(item.start + item.count) for item, table, _ in parts)
        if not self._have_room(wanted, session, protected):
            return NotNow("the KV memory is full")
        prepared: list[PreparedItem] = []
        for item, table, known in parts:
            self.store.copy_pages(table.grow(item.start + item.count))
            prepared.append(PreparedItem(item, table, known, len(known) * self._config.page_tokens))
        return prepared

    def _have_room(
        self, num_pages: int, session: HeldSession, protected: Collection[SessionKey], num_staged: int = 0
    ) -> bool:
        """Have `num_pages` free, for an input of which `num_staged` tokens stand uncompressed.

        Raises LengthLimitError, before anybody makes room, when the session would not fit if it were alone.
        """
        pool = self.store.pool
        if num_pages <= pool.num_free:
            return True
        if count_pages(session.sequences) + num_pages > pool.num_pages:
            raise self._refusal(session, num_staged)
        if self._make_room(num_pages, session, protected):
            return True
        self._check_others(session, num_pages)
        return False

    def _refusal(self, session: HeldSession, num_staged: int) -> LengthLimitError:
        """What to say to a session that is too long for all of the memory."""
        store, num_pages = self.store, self.store.pool.num_pages
        if not session.compresses or self._compression is None:
            return refuse_session(num_pages // len(session.span) * self._config.page_tokens)
        longest = longest_input(self._compression, session.span, num_pages=num_pages)
        if num_staged > longest:
            return refuse_input(longest)
        num_tokens = self.num_tokens_total * store.num_layers // len(session.span)
        return refuse_session(num_tokens, is_exact=False)

    # -- compressed sequences ------------------------------------------------------------------

    def _prepare_compressed(
        self, session: HeldSession, items: Sequence[SequenceStep], protected: Collection[SessionKey]
    ) -> list[PreparedItem] | NotNow:
        """The same under the server's policy."""
        assert self._compression is not None
        store, events = self.store, self._compression.events
        parts: list[tuple[SequenceStep, CompressedSequence]] = []
        for item in items:
            held = session.sequences[item.sequence]
            assert isinstance(held, CompressedSequence)
            parts.append((item, held))
            if item.count and not self._settle(session, held, item.start, protected):
                return NotNow("the KV memory is full")
        plans = [held.table.plan(item.start, item.count, is_unfinished=item.is_unfinished) for item, held in parts]
        wanted = []
        for (_, held), plan in zip(parts, plans, strict=True):
            num_new_tiles = events.max_new_tiles(held, plan.end) if plan.ends_staging else 0
            wanted.append(held.table.pages_wanted(plan, num_new_tiles))
        # What was staged of one input may have been compressed every `chunk_tokens`.
        staged = [
            plan.end - (held.table.staged_start if held.table.tail.is_staging else plan.start)
            for (_, held), plan in zip(parts, plans, strict=True)
            if plan.is_staged
        ]
        if not self._have_room(sum(wanted), session, protected, num_staged=max(staged, default=0)):
            return NotNow("the KV memory is full")
        prepared: list[PreparedItem] = []
        for (item, held), plan, num_pages in zip(parts, plans, wanted, strict=True):
            held.table.reserve(num_pages)
            store.copy_pages(held.table.grow(plan))
            if not plan.ends_staging:
                held.drop_reserve()
            prepared.append(PreparedItem(item, held.table.staged, compressed=held, plan=plan))
        return prepared

    def _settle(
        self, session: HeldSession, held: CompressedSequence, start: int, protected: Collection[SessionKey]
    ) -> bool:
        """Do the event that is due before a step from `start` on; False when there is no room for it."""
        assert self._compression is not None
        table, events = held.table, self._compression.events
        if settle(table.policy, table.tail, start) == table.tail:
            return True
        wanted = table.event_pages_wanted(events.max_new_tiles(held, start))
        if not self._have_room(wanted, session, protected):
            return False
        table.reserve(wanted)
        events.settle(held, start)
        held.drop_reserve()
        return True

    # -- after a step --------------------------------------------------------------------------

    def record(self, work: StepWork, prepared: Sequence[PreparedItem], outputs: torch.Tensor) -> None:
        """Remember what a step's tokens were and gave, page by page; `outputs` [T, H] on the host."""
        session = self._sessions[work.session]
        row = 0
        for part in prepared:
            self.num_tokens_shared += part.num_known
            held = session.sequences[part.item.sequence]
            new = slice(row + part.num_known, row + part.item.count)
            start = part.item.start + part.num_known
            if isinstance(held, PlainSequence):
                self._prefixes.record(held.table, held.trail, start, work.hidden[new], outputs[new])
            row += part.item.count

    def update_free(self) -> None:
        """Recount what is free and used; called after each engine step."""
        pool = self.store.pool
        num_free = pool.num_free + pool.num_reclaimable
        self.num_tokens_free = self._tokens_in(num_free)
        sequences = [held for session in self._sessions.values() for held in session.sequences.values()]
        self.usage = measure_usage(
            [held.table for held in sequences if isinstance(held, PlainSequence)],
            [held.table for held in sequences if isinstance(held, CompressedSequence)],
            num_pages_total=pool.num_pages,
            num_pages_used=pool.num_pages - num_free,
            page_tokens=self._config.page_tokens,
            page_bytes=self.store.page_bytes,
            num_tokens_shared=self.num_tokens_shared,
            num_spills=self.num_spills,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page has exactly the owners it should have."""
        sessions = self._sessions.values()
        sequences = [held for session in sessions for held in session.sequences.values()]
        owners = [held.owned_pages() for held in sequences]
        owners += [transfer.pages for transfer in self.transfers]
        self.store.pool.check_integrity(owners, self._prefixes.kept_pages())
        for held in sequences:
            if isinstance(held, CompressedSequence):
                held.table.check_integrity()
        spilled = [session.spilled for session in sessions if session.spilled is not None]
        assert self.spilled_bytes == sum(pages.size_bytes for pages in spilled)
        assert not any(session.spilled is not None and session.holds_pages for session in sessions)


def _check_rewind(held: PlainSequence | CompressedSequence, sequence: int, start: int) -> None:
    if not held.can_rewind(start):
        raise SessionStateError(
            f"sequence {sequence} holds {held.length} positions in compressed form and can not go back to {start}; "
            "send the session again"
        )


def _state_at(state: CompressedState, length: int, held: CompressedSequence, sequence: int) -> CompressedState:
    """What is to travel of a compressed sequence, in as few pages as possible."""
    try:
        state = state.rewind(length)
    except ValueError as error:
        raise SessionStateError(f"sequence {sequence} of the session was compressed since: {error}") from error
    if state.tail.is_staging:
        raise SessionStateError(f"sequence {sequence} of the session stands inside an input, before it is compressed")
    return drop_idle_pages(state, held.table.layout)
