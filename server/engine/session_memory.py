"""Who holds which pages: sessions' sequences, shared prefixes, and what was moved out to make room."""

# Letters: T tokens of a step, H hidden size.

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from swarm.errors import PeerBusyError, SessionStateError
from swarm.kvcache.page_table import PageTable, pages_for
from swarm.kvcache.prefix_index import PrefixEntry, PrefixIndex, PrefixTrail
from swarm.server.engine.engine import NotNow
from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.page_store import PageStore
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep

if TYPE_CHECKING:
    from swarm.datatypes import Span

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

    def __post_init__(self) -> None:
        if self.page_tokens < 1:
            raise ValueError(f"MemoryConfig.page_tokens is {self.page_tokens}; give 1 or more")
        for name in ("prefix_memory_bytes", "spill_memory_bytes", "idle_after_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"MemoryConfig.{name} must not be negative")


@dataclass
class _Sequence:
    table: PageTable
    trail: PrefixTrail[torch.Tensor]


@dataclass
class _Session:
    span: Span
    number: int
    """Rises with every session: who came first makes room last."""
    sequences: dict[int, _Sequence] = field(default_factory=dict)
    last_used_s: float = 0.0
    has_forked: bool = False
    """The forks of the step at hand are made; it waits for room."""
    spilled: dict[int, tuple[int, torch.Tensor]] | None = None
    """Length and pages of each sequence while the session is in host memory."""

    def num_pages(self) -> int:
        return sum(held.table.num_pages * held.table.num_layers for held in self.sequences.values())


@dataclass(frozen=True)
class PreparedItem:
    """One sequence's part of a step, with pages for all of its tokens."""

    item: SequenceStep
    table: PageTable
    known_outputs: Sequence[torch.Tensor]
    """Outputs [page_tokens, H] of leading pages that were found in the index and need not run."""
    num_known: int


class SessionMemory:
    """Owns the pages of a store; lives on the engine thread."""

    def __init__(
        self, store: PageStore, config: MemoryConfig, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._config = config
        self._now_s = now_s
        self._sessions: dict[SessionKey, _Session] = {}
        self._num_created = 0
        self._index: PrefixIndex[torch.Tensor] = PrefixIndex(max_bytes=config.prefix_memory_bytes)
        self.spilled_bytes = 0
        self.num_spills = 0
        self.num_tokens_shared = 0
        """Tokens that were found in the index instead of being run."""
        self.usage = KVUsage(total_bytes=store.pool.num_pages * store.page_bytes)
        """After the last engine step; other threads may read it."""
        self.num_tokens_free = store.num_tokens_free
        """Positions that fit, counting pages that only the index holds; other threads may read it."""

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    # -- before a step -------------------------------------------------------------------------

    def prepare(self, work: StepWork, *, protected: Collection[SessionKey]) -> list[PreparedItem] | NotNow:
        """Bring every named sequence to its start, find what is known of the new tokens, take pages for the rest.

        `protected` are sessions of the same batch, which make no room. Raises PeerBusyError when the step
        could never fit, SessionStateError when it continues what is not held.
        """
        session = self._sessions.get(work.session)
        if session is None:
            self._num_created += 1
            session = self._sessions[work.session] = _Session(work.span, self._num_created)
        session.last_used_s = self._now_s()
        if session.spilled is not None and not self._restore(work.session, session, protected):
            return NotNow("the session's pages are in host memory and there is no room for them yet")
        if not session.has_forked:
            self._fork(session, work.sequences)
            session.has_forked = True
        known = self._rewind_and_match(session, work)
        wanted = sum(
            session.sequences[item.sequence].table.pages_wanted(item.start + item.count) for item in work.sequences
        )
        if wanted > self._store.pool.num_pages:
            raise PeerBusyError(
                f"the step needs {wanted} pages of KV memory, all of this server is {self._store.pool.num_pages}"
            )
        if not self._make_room(wanted, work.session, session, protected):
            return NotNow("the KV memory is full")
        prepared: list[PreparedItem] = []
        for item in work.sequences:
            table = session.sequences[item.sequence].table
            self._store.copy_pages(table.grow(item.start + item.count))
            outputs = known[item.sequence]
            prepared.append(PreparedItem(item, table, outputs, len(outputs) * self._config.page_tokens))
        session.has_forked = False
        return prepared

    def _new_sequence(self, span: Span) -> _Sequence:
        root = self._index.root(str(span))
        return _Sequence(
            self._store.new_table(len(span)), PrefixTrail(root, page_tokens=self._config.page_tokens)
        )

    def _fork(self, session: _Session, items: Sequence[SequenceStep]) -> None:
        """Make all forks of a step, reading every parent before any sequence changes."""
        forks: dict[int, _Sequence] = {}
        for item in items:
            parent = session.sequences.get(item.parent)
            held = parent.table.length if parent is not None else 0
            if item.start > held:
                raise SessionStateError(f"sequence {item.parent} holds {held} positions, not {item.start}")
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
                session.sequences[item.sequence] = self._new_sequence(session.span)

    def _rewind_and_match(self, session: _Session, work: StepWork) -> dict[int, list[torch.Tensor]]:
        """Outputs of leading pages that are in the index, per sequence; those pages are adopted."""
        known: dict[int, list[torch.Tensor]] = {}
        row = 0
        for item in work.sequences:
            held = session.sequences[item.sequence]
            held.table.rewind(item.start)
            held.trail.rewind(item.start)
            known[item.sequence] = self._match(held, work.hidden[row : row + item.count])
            row += item.count
        return known

    def _match(self, held: _Sequence, hidden: torch.Tensor) -> list[torch.Tensor]:
        page_tokens = self._config.page_tokens
        outputs: list[torch.Tensor] = []
        if not len(self._index) or held.trail.is_broken or held.trail.length % page_tokens:
            return outputs
        for first in range(0, hidden.shape[0] - page_tokens + 1, page_tokens):
            digest = self._index.extend(held.trail.last, _content(hidden[first : first + page_tokens]))
            entry = self._index.find(digest)
            if entry is None:
                break
            held.table.adopt_page(entry.pages)
            held.trail.skip_page(digest)
            outputs.append(entry.outputs)
        if outputs:
            self._index.touch(held.trail.digests)
        return outputs

    # -- after a step --------------------------------------------------------------------------

    def record(self, work: StepWork, prepared: Sequence[PreparedItem], outputs: torch.Tensor) -> None:
        """Remember what a step's tokens were and gave, page by page; `outputs` [T, H] on the host."""
        self.num_tokens_shared += sum(part.num_known for part in prepared)
        if not self._config.prefix_memory_bytes:
            return
        session = self._sessions[work.session]
        row = 0
        for part in prepared:
            held = session.sequences[part.item.sequence]
            if not held.trail.is_broken:
                for token in range(row + part.num_known, row + part.item.count):
                    content = _content(work.hidden[token : token + 1])
                    page = held.trail.append(content, outputs[token].clone())
                    if page is not None:
                        self._index_page(held, *page)
            row += part.item.count

    def _index_page(self, held: _Sequence, content: bytes, outputs: list[torch.Tensor]) -> None:
        digest = self._index.extend(held.trail.last, content)
        held.trail.close_page(digest)
        if self._index.find(digest) is not None:
            return
        number = len(held.trail.digests) - 1
        pages = [int(page) for page in held.table.pages[:, number]]
        stacked = torch.stack(outputs)
        self._store.pool.share(pages)
        size_bytes = stacked.numel() * stacked.element_size()
        for entry in self._index.insert(digest, PrefixEntry(pages, stacked, size_bytes)):
            self._store.pool.release(entry.pages)

    def forget(self, key: SessionKey) -> None:
        """Give a session's pages back; harmless when there are none."""
        session = self._sessions.pop(key, None)
        if session is None:
            return
        for held in session.sequences.values():
            held.table.free()
        self._drop_spilled(session)

    def update_free(self) -> None:
        """Recount what is free and used; called after each engine step."""
        num_layers = self._store.num_layers
        num_pages = self._store.pool.num_free + sum(len(entry.pages) for entry in self._index if self._is_unused(entry))
        self.num_tokens_free = num_pages // num_layers * self._config.page_tokens
        self.usage = self._measure_usage(self._store.pool.num_pages - num_pages)

    def _measure_usage(self, num_used: int) -> KVUsage:
        """`num_used`: pages that sessions hold."""
        page_bytes, page_tokens = self._store.page_bytes, self._config.page_tokens
        tables = [held.table for session in self._sessions.values() for held in session.sequences.values()]
        num_owned = sum(table.num_pages * table.num_layers for table in tables)
        # Of a last page that several hold, only what none of them fills is wasted.
        filled: dict[int, tuple[int, int]] = {}
        for table in tables:
            if table.num_pages:
                page = int(table.pages[0, -1])
                num_filled = table.length - (table.num_pages - 1) * page_tokens
                filled[page] = (max(num_filled, filled.get(page, (0, 0))[0]), table.num_layers)
        num_empty = sum((page_tokens - num_filled) * num_layers for num_filled, num_layers in filled.values())
        return KVUsage(
            total_bytes=self._store.pool.num_pages * page_bytes,
            used_bytes=num_used * page_bytes,
            wasted_bytes=num_empty * page_bytes // page_tokens,
            shared_bytes=max(num_owned - num_used, 0) * page_bytes,
            num_tokens_shared=self.num_tokens_shared,
            num_spills=self.num_spills,
        )

    # -- room ----------------------------------------------------------------------------------

    def _is_unused(self, entry: PrefixEntry[torch.Tensor]) -> bool:
        """Whether only the index holds an entry's pages."""
        return self._store.pool.num_owners(entry.pages[0]) == 1

    def _make_room(
        self, num_pages: int, key: SessionKey, session: _Session, protected: Collection[SessionKey]
    ) -> bool:
        """Have `num_pages` free: first prefixes nobody uses go, then idle sessions, then younger ones."""
        pool = self._store.pool
        if pool.num_free < num_pages and len(self._index):
            for entry in self._index.evict(self._is_unused, len(self._index)):
                pool.release(entry.pages)
        if pool.num_free >= num_pages:
            return True
        for victim_key, victim in self._victims(key, session, protected):
            self._spill(victim_key, victim)
            for entry in self._index.evict(self._is_unused, len(self._index)):
                pool.release(entry.pages)
            if pool.num_free >= num_pages:
                return True
        return False

    def _victims(
        self, key: SessionKey, session: _Session, protected: Collection[SessionKey]
    ) -> list[tuple[SessionKey, _Session]]:
        """Sessions that may make room: idle ones, longest idle first, then those younger than `session`."""
        now_s = self._now_s()
        others = [
            (other_key, other)
            for other_key, other in self._sessions.items()
            if other_key != key and other_key not in protected and other.spilled is None and other.sequences
        ]
        idle = [entry for entry in others if now_s - entry[1].last_used_s > self._config.idle_after_s]
        idle.sort(key=lambda entry: entry[1].last_used_s)
        busy = [entry for entry in others if entry not in idle and entry[1].number > session.number]
        busy.sort(key=lambda entry: -entry[1].number)
        return idle + busy

    def _spill(self, key: SessionKey, session: _Session) -> None:
        """Move a session's pages to host memory, if there is any left for it."""
        size_bytes = session.num_pages() * self._store.page_bytes
        if self.spilled_bytes + size_bytes > self._config.spill_memory_bytes:
            return
        session.spilled = {}
        for number, held in session.sequences.items():
            length = held.table.length
            session.spilled[number] = (length, self._store.save_pages(held.table.owned_pages()))
            held.table.free()
        self.spilled_bytes += size_bytes
        self.num_spills += 1
        logger.info("session %s moved to host memory, %d bytes", key[0].hex()[:8], size_bytes)

    def _restore(self, key: SessionKey, session: _Session, protected: Collection[SessionKey]) -> bool:
        """Move a session's pages back; False when there is no room."""
        assert session.spilled is not None
        num_pages = sum(
            pages_for(length, self._config.page_tokens) * session.sequences[number].table.num_layers
            for number, (length, _) in session.spilled.items()
        )
        if not self._make_room(num_pages, key, session, protected):
            return False
        for number, (length, saved) in session.spilled.items():
            table = session.sequences[number].table
            table.grow(length)
            self._store.load_pages(table.owned_pages(), saved)
        self._drop_spilled(session)
        return True

    def _drop_spilled(self, session: _Session) -> None:
        if session.spilled is not None:
            self.spilled_bytes -= sum(
                saved.shape[0] * self._store.page_bytes for _, saved in session.spilled.values()
            )
            session.spilled = None

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page has exactly the owners it should have."""
        owners = [held.table.owned_pages() for session in self._sessions.values() for held in session.sequences.values()]
        self._store.pool.check_integrity([*owners, *(entry.pages for entry in self._index)])
        spilled = [saved for session in self._sessions.values() for _, saved in (session.spilled or {}).values()]
        assert self.spilled_bytes == sum(saved.shape[0] for saved in spilled) * self._store.page_bytes
        assert self._index.size_bytes == sum(entry.size_bytes for entry in self._index)


def _content(hidden: torch.Tensor) -> bytes:
    """What the server received, [T, H] on the host, as bytes."""
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()
