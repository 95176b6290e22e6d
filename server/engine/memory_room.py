"""Who makes room when KV memory is short: unused prefixes first, then sessions, which are moved out or closed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import PeerBusyError
from swarm.server.engine.held_session import HeldSession
from swarm.server.engine.page_store import PageStore
from swarm.server.engine.prefix_sharing import PrefixSharing
from swarm.server.engine.spilling import SpilledPages, count_pages, restore_pages, spill_pages
from swarm.server.engine.work import SessionKey

if TYPE_CHECKING:
    from swarm.server.engine.page_transfer import PageExport, PageImport

__all__ = ["MemoryConfig", "MemoryRoom"]

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


class MemoryRoom:
    """The sessions of a store and the room they take; on the engine thread only, but for what says otherwise."""

    def __init__(self, store: PageStore, config: MemoryConfig, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._config = config
        self._now_s = now_s
        self._sessions: dict[SessionKey, HeldSession] = {}
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

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def has_lost(self, key: SessionKey) -> bool:
        """Whether a session was closed to make room; other threads may ask."""
        return key in self._lost

    def set_away(self, key: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away: it then makes room before all others."""
        if is_away:
            self._away.add(key)
        else:
            self._away.discard(key)

    def drop_unused_prefixes(self, num_pages: int) -> None:
        """Have `num_pages` free, as far as giving up prefixes that no session uses can bring that about."""
        self._prefixes.reclaim(num_pages - self.store.pool.num_free)

    def forget(self, key: SessionKey) -> None:
        """Give a session's pages back; harmless when there are none."""
        self._lost.discard(key)
        self._away.discard(key)
        session = self._sessions.pop(key, None)
        if session is None:
            return
        for held in session.sequences.values():
            held.free()
        self._drop_spilled(session)

    def _idle_s(self, session: HeldSession) -> float:
        return self._now_s() - session.last_used_s

    def _make_room(self, num_pages: int, session: HeldSession, protected: Collection[SessionKey]) -> bool:
        """Have `num_pages` free: first prefixes nobody uses go, then idle sessions, then younger ones.

        They go to host memory. When that is full, sessions idle for long are closed; and so that not everybody
        waits for everybody, the longest-standing busy session may close what else is in its way.
        """
        pool = self.store.pool
        self._prefixes.reclaim(num_pages - pool.num_free)
        victims = self._victims(session, protected) if pool.num_free < num_pages else []
        unmoved: list[HeldSession] = []
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

    def _may_close(self, session: HeldSession) -> bool:
        """Whether a session may be closed so that somebody else has room: nobody waits for the dead."""
        return session.key in self._away or self._idle_s(session) > self._config.close_after_s

    def _victims(self, session: HeldSession, protected: Collection[SessionKey]) -> list[HeldSession]:
        """Sessions that may make room: those of absent clients, idle ones, then those younger than `session`.

        Of the first two, longest idle first.
        """
        idle: list[HeldSession] = []
        busy: list[HeldSession] = []
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

    def _is_first(self, session: HeldSession) -> bool:
        """Whether no busy session came before this one."""
        return not any(
            other.number < session.number
            and other.key not in self._away
            and self._idle_s(other) <= self._config.idle_after_s
            for other in self._sessions.values()
        )

    def _spill(self, session: HeldSession) -> bool:
        """Move a session's pages to host memory; False when that is full."""
        size_bytes = count_pages(session.sequences) * self.store.page_bytes
        if size_bytes > self._config.spill_memory_bytes:
            return False
        if self.spilled_bytes + size_bytes > self._config.spill_memory_bytes:
            self._close_spilled(self.spilled_bytes + size_bytes - self._config.spill_memory_bytes)
            if self.spilled_bytes + size_bytes > self._config.spill_memory_bytes:
                return False
        session.spilled = spill_pages(self.store, session.sequences)
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

    def _close(self, session: HeldSession) -> None:
        """Drop a session: its next step is answered with SessionStateError, and the client replays."""
        logger.warning("session %s closed to make room", session.key[0].hex()[:8])
        self.num_closed += 1
        self.forget(session.key)
        self._lost.add(session.key)

    def _restore(self, session: HeldSession, spilled: SpilledPages, protected: Collection[SessionKey]) -> bool:
        """Move a session's pages back; False when there is no room."""
        if not self._make_room(spilled.num_pages, session, protected):
            self._check_others(session, spilled.num_pages)
            return False
        restore_pages(self.store, spilled, session.sequences)
        self._drop_spilled(session)
        return True

    def _drop_spilled(self, session: HeldSession) -> None:
        if session.spilled is not None:
            self.spilled_bytes -= session.spilled.size_bytes
            session.spilled = None

    def _check_others(self, session: HeldSession, num_pages: int) -> None:
        """Waiting helps only while somebody else holds pages; else raise PeerBusyError."""
        if self.transfers or any(other.holds_pages for other in self._sessions.values() if other is not session):
            return
        raise PeerBusyError(
            f"the step needs {num_pages} more pages of KV memory than its session has, {self.store.pool.num_free} are "
            "free here, and nobody holds others"
        )
