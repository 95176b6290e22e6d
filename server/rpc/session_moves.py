"""Sessions that move between servers: held back while they are copied, handed off, expected, taken over."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from swarm.datatypes import PeerId
from swarm.errors import BadInputError, PeerBusyError, PeerLeavingError, SessionStateError
from swarm.server.rpc.server_session import ServerSession

if TYPE_CHECKING:
    from swarm.server.engine.engine import Engine
    from swarm.server.rpc.handover_offers import OfferedSession
    from swarm.server.rpc.session_limits import SessionLimits
    from swarm.server.rpc.sessions import SessionTable

__all__ = ["SessionMoves", "has_moved"]

_MAX_MOVED: Final = 1024
"""Sessions handed over that are remembered."""


class SessionMoves:
    """The part of a table that hand-overs need; lives on the event loop."""

    def __init__(self, table: SessionTable, engine: Engine, limits: SessionLimits) -> None:
        self._table = table
        self._engine = engine
        self._limits = limits
        self._moved: OrderedDict[bytes, ServerSession] = OrderedDict()
        """Sessions that were handed over, while steps or openings of them may still come."""
        self.num_taken_over = 0
        """Sessions that other servers handed over."""
        self.num_handed_over = 0

    @property
    def num_farewells(self) -> int:
        """Clients of sessions that were handed over which have not hung up yet."""
        return sum(session.send is not None for session in self._moved.values())

    def find(self, session_id: bytes) -> ServerSession | None:
        """A session that was handed over."""
        return self._moved.get(session_id)

    def forget(self) -> None:
        """What was handed over may come again."""
        self._moved.clear()

    # -- to another server ---------------------------------------------------------------------

    async def hold_back(self, session: ServerSession) -> None:
        """Let what is under way of a session finish; its later steps wait for `let_go` or `hand_off`."""
        session.let_go.clear()
        await self._table.steps.hold_back(session)

    async def let_go(self, session: ServerSession) -> None:
        """The session stays: run what was held back. That happens even if the wait for it is cancelled."""

        async def go_on() -> None:
            await self._table.steps.go_on(session)
            session.let_go.set()

        self._table.steps.spawn(go_on())
        with contextlib.suppress(TimeoutError):  # a client that reads nothing holds up itself alone
            async with asyncio.timeout(self._limits.handover_message_timeout_s):
                await session.let_go.wait()

    def hand_off(self, session: ServerSession, successor: PeerId) -> None:
        """Another server holds the session now: tell the client, free what is here, answer later steps likewise."""
        held_back, session.held_back = session.held_back, None
        session.successor = successor
        self.num_handed_over += 1
        self._moved[session.session_id] = session
        while len(self._moved) > _MAX_MOVED:
            self._moved.popitem(last=False)
        self._table.free(session)
        step = held_back[0][0].step if held_back else 0
        self._table.steps.spawn(self._table.steps.send_failure(session, has_moved(session), step=step))
        self._table.steps.spawn(self._table.close(session))
        session.let_go.set()

    # -- from another server -------------------------------------------------------------------

    async def expect(self, offered: OfferedSession) -> None:
        """Let in a session that is being handed over; `take_over` or `expect_no_more` is to follow.

        Raises PeerBusyError, PeerLeavingError, SessionStateError (it is here, at this epoch or a later one).
        """
        self._table.check_not_draining()
        while (held := self._table.held(offered.session_id)) is not None:
            self._check_older(held, offered)
            await self._table.close(held)
        self._table.check_not_draining()
        try:
            claim = self._table.sizes.claim(
                max(offered.expected_tokens, offered.num_tokens),
                max_sequences=offered.mirror.max_sequences,
                span=offered.span,
                compresses=offered.mirror.policy.compresses,
            )
            decision = self._table.admission.enter_now(offered.key, claim)
        except ValueError as error:
            raise BadInputError("this session is being handed over or opened already, at the same epoch") from error
        if not decision:
            raise PeerBusyError("this server is full")

    def expect_no_more(self, offered: OfferedSession) -> None:
        """The hand-over has failed; nothing of it stays."""
        self._engine.forget(offered.key)
        self._table.admission.leave(offered.key)

    def take_over(self, offered: OfferedSession) -> ServerSession:
        """Hold a session whose pages have come, until its client opens it.

        Raises SessionStateError when it was opened here meanwhile, PeerLeavingError.
        """
        self._table.check_not_draining()
        if (held := self._table.held(offered.session_id)) is not None:
            raise SessionStateError("the session was opened here meanwhile", epoch=held.mirror.epoch)
        session = ServerSession(
            session_id=offered.session_id,
            span=offered.span,
            key=offered.key,
            mirror=offered.mirror,
            adapter=offered.adapter,
            push=None,
            expected_tokens=offered.expected_tokens,
            grace_s=self._limits.detach_grace_s if offered.is_client_away else self._limits.takeover_grace_s,
            is_unclaimed=True,
        )
        self._table.add(session)
        self._engine.set_away(session.key, True)
        self.num_taken_over += 1
        return session

    @staticmethod
    def _check_older(held: ServerSession, offered: OfferedSession) -> None:
        """What another server handed over before, and nobody came for, may be an attempt that it gave up."""
        if held.mirror.epoch >= offered.mirror.epoch and not held.is_unclaimed:
            raise SessionStateError(
                f"the session is here already, at epoch {held.mirror.epoch}", epoch=held.mirror.epoch
            )


def has_moved(session: ServerSession) -> PeerLeavingError:
    """What whoever asks for a session that was handed over is told."""
    return PeerLeavingError("this server is leaving; it has handed the session over", successor=session.successor)
