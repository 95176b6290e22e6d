"""Lets sessions in: those who must wait are told their place until it is their turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from swarm.errors import PeerBusyError, PeerLeavingError
from swarm.kvcache.admission import AdmissionConfig, AdmissionQueue, Claim
from swarm.server.engine.work import SessionKey

__all__ = ["AdmissionDesk"]

_RETRY_AFTER_S = 2.0


class AdmissionDesk:
    """The admission queue with its waiting; lives on the event loop."""

    def __init__(self, *, total_bytes: int, config: AdmissionConfig) -> None:
        self._queue: AdmissionQueue[SessionKey] = AdmissionQueue(total_bytes=total_bytes, config=config)
        self._changed: dict[SessionKey, asyncio.Event] = {}
        self._admitted: set[SessionKey] = set()
        self._has_closed = False

    @property
    def num_waiting(self) -> int:
        return self._queue.num_waiting

    def has_place(self, claim: Claim) -> bool:
        """Whether a session that expects to use so much would be let in now."""
        return self._queue.has_place(claim)

    def enter_now(self, key: SessionKey, claim: Claim) -> bool:
        """Let a session in if there is a place at once. Raises ValueError when it is inside or waits already."""
        return self._queue.request(key, claim, may_wait=False).is_admitted

    async def enter(
        self,
        key: SessionKey,
        claim: Claim,
        *,
        may_wait: bool,
        tell_position: Callable[[int], Awaitable[None]],
    ) -> None:
        """Return once the session may start; the caller must `leave` it when it has ended.

        Raises PeerBusyError when it may not wait, or the queue is full, PeerLeavingError after `turn_away`. A
        cancelled wait leaves nothing behind.
        """
        decision = self._queue.request(key, claim, may_wait=may_wait)
        if decision.is_admitted:
            return
        if decision.position is None:
            reason = "its queue is full" if may_wait else f"{self._queue.num_waiting} sessions wait already"
            raise PeerBusyError(
                f"the server is full and {reason}; try again in {_RETRY_AFTER_S:g} s",
                retry_after_s=_RETRY_AFTER_S,
                queue_position=self._queue.num_waiting + 1,
            )
        changed = self._changed[key] = asyncio.Event()
        told: int | None = None
        try:
            while key not in self._admitted:
                position = self._queue.positions()[key]
                if position != told:
                    told = position
                    await tell_position(position)
                    continue  # the turn may have come meanwhile
                changed.clear()
                await changed.wait()
                if self._has_closed:
                    raise PeerLeavingError("this server is leaving and takes no new sessions")
        except BaseException:
            self.leave(key)
            raise
        finally:
            self._changed.pop(key, None)
            self._admitted.discard(key)

    def turn_away(self) -> None:
        """The server is leaving: everybody who waits hears so, and nobody is to ask until `let_in`."""
        self._has_closed = True
        for changed in self._changed.values():
            changed.set()

    def let_in(self) -> None:
        """The server stays after all."""
        self._has_closed = False

    def leave(self, key: SessionKey) -> None:
        """A session has ended; whoever fits now is let in. Harmless when repeated."""
        self._admitted.update(self._queue.leave(key))
        for changed in self._changed.values():
            changed.set()
