"""Who holds which pages: sessions' sequences, shared prefixes, and what was moved out to make room."""

# Letters: T tokens of a step, H hidden size.

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from swarm.errors import PeerBusyError, SessionStateError
from swarm.kvcache.page_table import PageTable, pages_for
from swarm.server.engine.engine import NotNow
from swarm.server.engine.kv_usage import KVUsage, measure_usage
from swarm.server.engine.page_store import PageStore
from swarm.server.engine.page_transfer import PageExport, PageImport, SequencePages
from swarm.server.engine.prefix_sharing import PrefixSharing, Trail
from swarm.server.engine.spilling import SpilledPages, count_pages, restore_pages, spill_pages
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    from swarm.datatypes import AdapterHash, Span

__all__ = ["MemoryConfig", "PreparedItem", "SessionMemory"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """How a page store is shared out."""

    page_tokens: int = 16
    """Tokens of a page; half of one per sequence and layer is wasted on average."""
    prefix_memory_bytes: int = 128 * 2**20
    """Host memory for outputs of shared prefixes; 0 shares nothing."""
    spill_memory_bytes: int = 2**30
    """Host memory for sessions that make room for others."""
    idle_after_s: float = 3.0
    """A session without work for this long makes room before those that are busy."""
    close_after_s: float = 600.0
    """A session without work for this long is closed when host memory is full too; its client replays it."""

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"MemoryConfig.page_tokens is {self.page_tokens}; give 1 or more")
        for name in ("prefix_memory_bytes", "spill_memory_bytes", "idle_after_s", "close_after_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"MemoryConfig.{name} must not be negative")


@dataclass
class _Sequence:
    table: PageTable
    trail: Trail


@dataclass
class _Session:
    key: SessionKey
    span: Span
    number: int
    """Rises with every session: who came first makes room last."""
    adapter: AdapterHash
    """What it computes with besides the blocks: its pages are of no use to sessions with another one."""
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    last_used_s: float = 0.0
    has_forked: bool = False
    """The forks of the step at hand are made; it waits for room."""
    spilled: SpilledPages | None = None
    """What the sequences hold while the session is in host memory; their tables are empty then."""

    @property
    def tables(self) -> dict[int, PageTable]:
        return {number: held.table for number, held in self.sequences.items()}

    @property
    def holds_pages(self) -> bool:
        return any(held.table.num_pages for held in self.sequences.values())


@dataclass(frozen=True, slots=True)
class PreparedItem:
    """One sequence's part of a step, with pages for all of its tokens."""

    item: SequenceStep
    table: PageTable
    known_outputs: Sequence[torch.Tensor]
    """Outputs [page_tokens, H] of leading pages that were found in the index and need not run."""
    num_known: int


class SessionMemory:
    """Owns the pages of a store; lives on the engine thread."""

    def __init__(self, store: PageStore, config: MemoryConfig, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._config = config
        self._now_s = now_s
        self._sessions: dict[SessionKey, _Session] = {}
        self._num_created = 0
        self.transfers: list[PageExport | PageImport] = []
        """Transfers that hold pages of their own."""
        self._prefixes = PrefixSharing(store, max_bytes=config.prefix_memory_bytes)
        self.spilled_bytes = 0
        self.num_spills = 0
        self.num_closed = 0
        """Sessions that were closed to make room."""
        self._away: set[SessionKey] = set()
        """Sessions whose clients are: they may never come back, so these make room first."""
        self._lost: set[SessionKey] = set()
        """Sessions closed to make room that nobody has asked to forget; other threads may look into it."""
        self.num_tokens_shared = 0
        """Tokens that were found in the index instead of being run."""
        self.usage = KVUsage(total_bytes=store.pool.num_pages * store.page_bytes)
        """After the last engine step; other threads may read it."""
        self.num_tokens_free = store.num_tokens_free
        """Positions that fit, counting pages that only the index holds; other threads may read it."""

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    # -- transfers -----------------------------------------------------------------------------

    def held_pages(
        self, key: SessionKey, positions: Sequence[int]
    ) -> tuple[dict[int, SequencePages], torch.Tensor | None]:
        """Where the first `positions` of each sequence are, by sequence: pages of the pool, or rows of the tensor.

        The tensor is [pages, values of a page] in host memory, None while the session is not there. Sequences that
        are to hold nothing are left out. Raises SessionStateError when less is held.
        """
        session = self._sessions.get(key)
        spilled = session.spilled if session is not None else None
        held: dict[int, SequencePages] = {}
        for sequence, length in enumerate(positions):
            if not length:
                continue
            if session is None or sequence not in session.sequences:
                raise SessionStateError(f"sequence {sequence} of the session is not held any more")
            table = session.sequences[sequence].table
            num_held = table.length if spilled is None else spilled.lengths[sequence]
            if num_held < length:
                raise SessionStateError(f"sequence {sequence} of the session holds {num_held} positions, not {length}")
            pages = table.pages if spilled is None else spilled.layouts[sequence]
            held[sequence] = SequencePages(length, pages[:, : pages_for(length, self._config.page_tokens)].copy())
        return held, spilled.contents if spilled is not None else None

    def add_session(
        self, key: SessionKey, span: Span, sequences: Mapping[int, SequencePages], *, adapter: AdapterHash
    ) -> bool:
        """A session that holds these pages of the pool, too; False, and nothing is done, when there is one.

        Its pages stay out of the index until a sequence begins anew: a page's name there is a hash over everything
        its sequence received, and that went to another server.
        """
        if key in self._sessions:
            return False
        self._num_created += 1
        session = self._sessions[key] = _Session(key, span, self._num_created, adapter)
        session.last_used_s = self._now_s()
        for sequence, part in sequences.items():
            held = session.sequences[sequence] = self._new_sequence(session)
            held.table.adopt(part.pages, part.length)
            held.trail.give_up()
        return True

    def drop_unused_prefixes(self, num_pages: int) -> None:
        """Have `num_pages` free, as far as giving up prefixes that no session uses can bring that about."""
        self._prefixes.reclaim(num_pages - self.store.pool.num_free)

    def has_lost(self, key: SessionKey) -> bool:
        """Whether a session was closed to make room; other threads may ask."""
        return key in self._lost

    def set_away(self, key: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away: it then makes room before all others."""
        if is_away:
            self._away.add(key)
        else:
            self._away.discard(key)

    def drop_step(self, key: SessionKey) -> None:
        """A step that `prepare` was asked for will not be asked for again."""
        session = self._sessions.get(key)
        if session is not None:
            session.has_forked = False

    # -- before a step -------------------------------------------------------------------------

    def prepare(self, work: StepWork, *, protected: Collection[SessionKey]) -> list[PreparedItem] | NotNow:
        """Bring every named sequence to its start, find what is known of the new tokens, take pages for the rest.

        `work.hidden` is on the host, in the model's dtype. `protected` are sessions of the same batch, which make
        no room. Raises PeerBusyError when the step could never fit, SessionStateError when it continues what is
        not held; the session should be forgotten then.
        """
        session = self._sessions.get(work.session)
        if session is None:
            self._num_created += 1
            session = _Session(work.session, work.span, self._num_created, work.adapter)
            self._sessions[work.session] = session
        session.last_used_s = self._now_s()
        if session.spilled is not None and not self._restore(session, session.spilled, protected):
            return NotNow("the session's pages are in host memory and there is no room for them yet")
        if not session.has_forked:
            self._fork(session, work.sequences)
            session.has_forked = True
        known = self._rewind_and_match(session, work)
        wanted = sum(
            session.sequences[item.sequence].table.pages_wanted(item.start + item.count) for item in work.sequences
        )
        if wanted > self.store.pool.num_free and not self._make_room(wanted, session, protected):
            self._check_others(session, wanted)
            return NotNow("the KV memory is full")
        prepared: list[PreparedItem] = []
        for item, outputs in zip(work.sequences, known, strict=True):
            table = session.sequences[item.sequence].table
            self.store.copy_pages(table.grow(item.start + item.count))
            prepared.append(PreparedItem(item, table, outputs, len(outputs) * self._config.page_tokens))
        session.has_forked = False
        return prepared

    def _new_sequence(self, session: _Session) -> _Sequence:
        trail = self._prefixes.new_trail(session.span, session.adapter)
        return _Sequence(self.store.new_table(len(session.span)), trail)

    def _fork(self, session: _Session, items: Sequence[SequenceStep]) -> None:
        """Make all forks of a step, reading every parent before any sequence changes."""
        for item in items:
            parent = session.sequences.get(item.parent)
            held = parent.table.length if parent is not None else 0
            if item.start > held:
                raise SessionStateError(
                    f"sequence {item.parent} holds {held} positions here, not {item.start}; send the session again"
                )
        forks: dict[int, _Sequence] = {}
        for item in items:
            parent = session.sequences.get(item.parent)
            if parent is not None and item.parent != item.sequence:
                trail = parent.trail.copy()
                trail.rewind(item.start)
                forks[item.sequence] = _Sequence(parent.table.fork(item.start), trail)
        for item in items:
            replaced = session.sequences.get(item.sequence)
            if item.sequence in forks:
                session.sequences[item.sequence] = forks[item.sequence]
                if replaced is not None:
                    replaced.table.free()
            elif replaced is None:
                session.sequences[item.sequence] = self._new_sequence(session)

    def _rewind_and_match(self, session: _Session, work: StepWork) -> list[list[torch.Tensor]]:
        """Outputs of leading pages that are in the index, per named sequence; those pages are adopted."""
        known: list[list[torch.Tensor]] = []
        row = 0
        for item in work.sequences:
            held = session.sequences[item.sequence]
            held.table.rewind(item.start)
            held.trail.rewind(item.start)
            known.append(self._prefixes.match(held.table, held.trail, work.hidden[row : row + item.count]))
            row += item.count
        return known

    def _check_others(self, session: _Session, num_pages: int) -> None:
        """Waiting helps only while somebody else holds pages."""
        if not self.transfers and not any(
            other.holds_pages for other in self._sessions.values() if other is not session
        ):
            pool = self.store.pool
            raise PeerBusyError(
                f"the step needs {num_pages} more pages of KV memory, and its own session holds all but "
                f"{pool.num_free} of the {pool.num_pages} here; use a shorter context or a server with more KV memory"
            )

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
            self._prefixes.record(held.table, held.trail, start, work.hidden[new], outputs[new])
            row += part.item.count

    def forget(self, key: SessionKey) -> None:
        """Give a session's pages back; harmless when there are none."""
        self._lost.discard(key)
        self._away.discard(key)
        session = self._sessions.pop(key, None)
        if session is None:
            return
        for held in session.sequences.values():
            held.table.free()
        self._drop_spilled(session)

    def update_free(self) -> None:
        """Recount what is free and used; called after each engine step."""
        pool = self.store.pool
        num_free = pool.num_free + pool.num_reclaimable
        self.num_tokens_free = num_free // self.store.num_layers * self._config.page_tokens
        self.usage = measure_usage(
            [held.table for session in self._sessions.values() for held in session.sequences.values()],
            num_pages_total=pool.num_pages,
            num_pages_used=pool.num_pages - num_free,
            page_tokens=self._config.page_tokens,
            page_bytes=self.store.page_bytes,
            num_tokens_shared=self.num_tokens_shared,
            num_spills=self.num_spills,
        )

    # -- room ----------------------------------------------------------------------------------

    def _idle_s(self, session: _Session) -> float:
        return self._now_s() - session.last_used_s

    def _make_room(self, num_pages: int, session: _Session, protected: Collection[SessionKey]) -> bool:
        """Have `num_pages` free: first prefixes nobody uses go, then idle sessions, then younger ones.

        They go to host memory. When that is full, sessions idle for long are closed; and so that not everybody
        waits for everybody, the longest-standing busy session may close what else is in its way.
        """
        pool = self.store.pool
        self._prefixes.reclaim(num_pages - pool.num_free)
        victims = self._victims(session, protected) if pool.num_free < num_pages else []
        unmoved: list[_Session] = []
        for victim in victims:
            if self._spill(victim):
                self._prefixes.reclaim(num_pages - pool.num_free)
            else:
                unmoved.append(victim)
            if pool.num_free >= num_pages:
                break
        for victim in unmoved:
            if pool.num_free >= num_pages:
                break
            if self._may_close(victim) or self._is_first(session):
                self._close(victim)
                self._prefixes.reclaim(num_pages - pool.num_free)
        return pool.num_free >= num_pages

    def _may_close(self, session: _Session) -> bool:
        """Whether a session may be closed so that somebody else has room: nobody waits for the dead."""
        return session.key in self._away or self._idle_s(session) > self._config.close_after_s

    def _victims(self, session: _Session, protected: Collection[SessionKey]) -> list[_Session]:
        """Sessions that may make room: those of absent clients, idle ones, then those younger than `session`.

        Of the first two, longest idle first.
        """
        idle: list[_Session] = []
        busy: list[_Session] = []
        for other in self._sessions.values():
            if other is session or other.key in protected or not other.holds_pages:
                continue
            if other.key in self._away or self._idle_s(other) > self._config.idle_after_s:
                idle.append(other)
            elif other.number > session.number:
                busy.append(other)
        idle.sort(key=lambda other: (other.key not in self._away, other.last_used_s))
        busy.sort(key=lambda other: -other.number)
        return idle + busy

    def _is_first(self, session: _Session) -> bool:
        """Whether no busy session came before this one."""
        return not any(
            other.number < session.number
            and other.key not in self._away
            and self._idle_s(other) <= self._config.idle_after_s
            for other in self._sessions.values()
        )

    def _spill(self, session: _Session) -> bool:
        """Move a session's pages to host memory; False when that is full."""
        size_bytes = count_pages(session.tables) * self.store.page_bytes
        if size_bytes > self._config.spill_memory_bytes:
            return False
        if self.spilled_bytes + size_bytes > self._config.spill_memory_bytes:
            self._close_spilled(self.spilled_bytes + size_bytes - self._config.spill_memory_bytes)
            if self.spilled_bytes + size_bytes > self._config.spill_memory_bytes:
                return False
        session.spilled = spill_pages(self.store, session.tables)
        self.spilled_bytes += session.spilled.size_bytes
        self.num_spills += 1
        logger.info("session %s moved to host memory, %d bytes", session.key[0].hex()[:8], size_bytes)
        return True

    def _close_spilled(self, num_bytes: int) -> None:
        """Free `num_bytes` of host memory, or as much as there is, by closing sessions idle for long or away."""
        old = [
            session for session in self._sessions.values() if session.spilled is not None and self._may_close(session)
        ]
        goal_bytes = self.spilled_bytes - num_bytes
        for session in sorted(old, key=lambda session: (session.key not in self._away, session.last_used_s)):
            if self.spilled_bytes <= goal_bytes:
                break
            self._close(session)

    def _close(self, session: _Session) -> None:
        """Drop a session: its next step is answered with SessionStateError, and the client replays."""
        logger.warning("session %s closed to make room", session.key[0].hex()[:8])
        self.num_closed += 1
        self.forget(session.key)
        self._lost.add(session.key)

    def _restore(self, session: _Session, spilled: SpilledPages, protected: Collection[SessionKey]) -> bool:
        """Move a session's pages back; False when there is no room."""
        if not self._make_room(spilled.num_pages, session, protected):
            self._check_others(session, spilled.num_pages)
            return False
        restore_pages(self.store, spilled, session.tables)
        self._drop_spilled(session)
        return True

    def _drop_spilled(self, session: _Session) -> None:
        if session.spilled is not None:
            self.spilled_bytes -= session.spilled.size_bytes
            session.spilled = None

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page has exactly the owners it should have."""
        sessions = self._sessions.values()
        owners = [held.table.owned_pages() for session in sessions for held in session.sequences.values()]
        owners += [transfer.pages for transfer in self.transfers]
        self.store.pool.check_integrity(owners, self._prefixes.kept_pages())
        spilled = [session.spilled for session in sessions if session.spilled is not None]
        assert self.spilled_bytes == sum(pages.size_bytes for pages in spilled)
        assert not any(session.spilled is not None and session.holds_pages for session in sessions)
