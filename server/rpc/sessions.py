"""All sessions of a server: who may open one, what is kept of earlier epochs, when one ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from swarm.datatypes import AdapterHash, Span
from swarm.errors import BadInputError, PeerBusyError, PeerLeavingError, PeerLostError, SessionStateError
from swarm.pb import session_pb2 as pb
from swarm.server.rpc.admission_desk import AdmissionDesk
from swarm.server.rpc.channels import ChannelPool
from swarm.server.rpc.push import NextHop, PushStream
from swarm.server.rpc.request_checks import HostedModel, check_open, choose_policy, read_next_hop
from swarm.server.rpc.server_session import SendToClient, ServerSession
from swarm.server.rpc.session_claims import KVSizes
from swarm.server.rpc.session_limits import SessionLimits
from swarm.server.rpc.session_moves import SessionMoves, has_moved
from swarm.server.rpc.stepping import StepRunner
from swarm.server.session_mirror import MirrorState, SessionMirror
from swarm.wire.frames import Frame, encode_frame
from swarm.wire.limits import PROTOCOL_VERSION

if TYPE_CHECKING:
    from swarm.server.engine.engine import Engine

__all__ = ["HostedModel", "ServerSession", "SessionLimits", "SessionTable"]

logger = logging.getLogger(__name__)


class SessionTable:
    """All sessions of a server; lives on the event loop."""

    def __init__(
        self, model: HostedModel, engine: Engine, limits: SessionLimits, *, sizes: KVSizes | None = None
    ) -> None:
        """`sizes` says what sessions take; without them every token takes the same share of the memory."""
        self._model = model
        self._engine = engine
        self.limits = limits
        self._sessions: dict[bytes, ServerSession] = {}
        self._channels = ChannelPool()
        self.steps = StepRunner(model, engine, max_steps_under_way=limits.max_steps_under_way)
        self.sizes = sizes or KVSizes.of_tokens(engine.num_tokens_total)
        """What sessions are expected to take of the KV memory."""
        self.admission = AdmissionDesk(total_bytes=self.sizes.total_bytes, config=limits.admission)
        self.moves = SessionMoves(self, engine, limits)
        """Sessions that come from other servers, and go to them."""
        self.is_draining = False

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Sessions in the queue."""
        return self.admission.num_waiting

    # -- open ----------------------------------------------------------------------------------

    async def open(self, request: pb.Open, send: SendToClient) -> tuple[ServerSession, pb.Opened]:
        """Start a session, or go on with what an earlier epoch of it holds here, if that is asked for and there.

        Raises NoRouteError (not served here), BadInputError, LengthLimitError, PeerBusyError, PeerLeavingError,
        SessionStateError (its epoch has passed).
        """
        check_open(request, self._model)
        next_hop = read_next_hop(request)
        mirror = SessionMirror(
            epoch=request.epoch,
            max_length=request.max_length,
            max_sequences=request.max_sequences or 1,
            policy=choose_policy(request, self._model),
        )
        kept = await self._make_way(request)
        if kept is not None:
            return self._go_on(*kept, request, self._new_push(request.session_id, request.epoch, next_hop), send)
        key = (request.session_id, request.epoch)
        await self._enter(request, send)
        try:
            # While this one waited, its client may have opened it again, and the server may have begun to leave.
            self.check_not_draining()
            await self._make_way(request, may_keep=False)
        except BaseException:
            self.admission.leave(key)
            raise
        session = ServerSession(
            session_id=request.session_id,
            span=Span(start=request.start, end=request.end),
            key=key,
            mirror=mirror,
            adapter=AdapterHash(request.adapter),
            push=self._new_push(request.session_id, request.epoch, next_hop),
            send=send,
            expected_tokens=self._expected_tokens(request),
            grace_s=self.limits.detach_grace_s,
        )
        self._sessions[session.session_id] = session
        return session, self._opened(session, is_kept=False)

    async def _make_way(self, request: pb.Open, *, may_keep: bool = True) -> tuple[ServerSession, SessionMirror] | None:
        """Close what older epochs of a session left here, unless it is to be kept: that is returned.

        Raises SessionStateError when the epoch asked for has passed.
        """
        while (held := self._sessions.get(request.session_id)) is not None:
            if held.held_back is not None and request.HasField("keep"):
                await self._wait_until_let_go(held)
                continue
            if held.mirror.epoch >= request.epoch:
                raise SessionStateError(
                    f"epoch {request.epoch} has passed, the session is at {held.mirror.epoch}; open it at a higher one",
                    epoch=held.mirror.epoch,
                )
            mirror = self._kept(held, request) if may_keep and request.HasField("keep") else None
            if mirror is not None:
                return held, mirror
            await self.close(held)  # and look again: others may come in meanwhile
        self._check_not_moved(request.session_id)
        return None

    async def _wait_until_let_go(self, session: ServerSession) -> None:
        try:
            async with asyncio.timeout(self.limits.handover_timeout_s):
                await session.let_go.wait()
        except TimeoutError:
            raise PeerBusyError("the session is being handed over to another server") from None

    def _kept(self, held: ServerSession, request: pb.Open) -> SessionMirror | None:
        """A mirror at the new epoch that stands where the request wants it; None when that can not be had."""
        bounds = (Span(start=request.start, end=request.end), request.max_length, request.max_sequences or 1)
        if bounds != (held.span, held.mirror.max_length, held.mirror.max_sequences):
            return None
        if request.adapter != held.adapter:
            return None
        if request.kv_policy and choose_policy(request, self._model) != held.mirror.policy:
            return None
        if self._engine.has_lost(held.key):
            return None
        return held.mirror.kept(epoch=request.epoch, kept_epoch=request.keep.epoch, kept_step=request.keep.step)

    def _go_on(
        self,
        held: ServerSession,
        mirror: SessionMirror,
        request: pb.Open,
        push: PushStream | None,
        send: SendToClient,
    ) -> tuple[ServerSession, pb.Opened]:
        """Replace an older epoch by a new one that has its memory and its place."""
        session = ServerSession(
            session_id=held.session_id,
            span=held.span,
            key=held.key,
            mirror=mirror,
            adapter=held.adapter,
            push=push,
            send=send,
            expected_tokens=held.expected_tokens,
            grace_s=self.limits.detach_grace_s,
        )
        self.steps.cancel_after(held, request.keep.step if request.keep.epoch == held.mirror.epoch else 0)
        held.is_replaced = True
        held.mirror.close()
        self._sessions[session.session_id] = session
        self.steps.spawn(self.close(held))
        self._engine.set_away(session.key, False)
        return session, self._opened(session, is_kept=True)

    async def _enter(self, request: pb.Open, send: SendToClient) -> None:
        """Pass admission; sessions whose clients are away give way. Raises PeerBusyError, PeerLeavingError."""

        async def tell_position(position: int) -> None:
            await send(encode_frame(pb.SessionReply(queued=pb.Queued(position=position))))

        self.check_not_draining()
        claim = self.sizes.claim(
            self._expected_tokens(request),
            max_sequences=request.max_sequences or 1,
            span=Span(start=request.start, end=request.end),
            compresses=choose_policy(request, self._model).compresses,
        )
        while not self.admission.has_place(claim) and (absent := self._first_to_yield()) is not None:
            await self._close_absent(absent)
        try:
            await self.admission.enter(
                (request.session_id, request.epoch),
                claim,
                may_wait=request.may_wait,
                tell_position=tell_position,
            )
        except ValueError as error:
            raise BadInputError("this session is being opened already, at the same epoch") from error

    def _expected_tokens(self, request: pb.Open) -> int:
        """What a session claims to need: no more than it may ever use, or one claim could keep everybody out."""
        claimed = request.expected_tokens or self.limits.default_expected_tokens
        return min(claimed, request.max_length * (request.max_sequences or 1))

    def check_not_draining(self) -> None:
        """Raises PeerLeavingError once the server lets nobody in any more."""
        if self.is_draining:
            raise PeerLeavingError("this server is leaving and takes no new sessions")

    def _check_not_moved(self, session_id: bytes) -> None:
        moved = self.moves.find(session_id)
        if moved is not None and self.is_draining:
            raise has_moved(moved)

    def _opened(self, session: ServerSession, *, is_kept: bool) -> pb.Opened:
        estimate = self._engine.estimate
        return pb.Opened(
            protocol=PROTOCOL_VERSION,
            peer_id=self._model.peer_id,
            kv_policy=session.mirror.policy.preset,
            kv_tokens_free=self.sizes.convert_tokens(self._engine.num_tokens_free, compresses=session.compresses),
            kept=is_kept,
            positions=session.mirror.positions if is_kept else (),
            step_us=_microseconds(estimate.step_s),
            token_us=_microseconds(estimate.token_s),
        )

    def _new_push(self, session_id: bytes, epoch: int, next_hop: NextHop | None) -> PushStream | None:
        if next_hop is None:
            return None

        def tell_client(problem: str) -> None:
            session = self._sessions.get(session_id)
            if session is not None and session.mirror.epoch == epoch:
                self.steps.spawn(
                    self.steps.send_failure(session, PeerLostError(problem), step=session.mirror.last_step)
                )

        return PushStream(next_hop, self._channels, timeout_s=self.limits.push_timeout_s, on_problem=tell_client)

    # -- close ---------------------------------------------------------------------------------

    def detach(self, session: ServerSession, send: SendToClient) -> None:
        """The client's connection is gone; keep the session for a while in case it comes back."""
        if session.send is not send:
            return
        session.send = None
        session.away_since_s = time.monotonic()
        if session.mirror.state is MirrorState.CLOSED:
            return
        if session.mirror.state is MirrorState.DEAD:
            self.steps.spawn(self.close(session))  # there is nothing to come back to
        else:
            self._engine.set_away(session.key, True)

    async def close(self, session: ServerSession) -> None:
        """Free everything of a session; harmless when repeated."""
        self.free(session)
        if session.push is not None:
            await session.push.close()

    def free(self, session: ServerSession) -> None:
        """Free everything but the connection to the next hop; harmless when repeated."""
        session.mirror.close()
        session.last = None
        if not session.is_replaced:
            if self._sessions.get(session.session_id) is session:
                del self._sessions[session.session_id]
            self._engine.forget(session.key)
            self.admission.leave(session.key)

    async def close_abandoned(self) -> int:
        """Close sessions whose clients have been away for too long; says how many. To be called every second.

        Too long is their grace, or a moment while somebody waits for a place.
        """
        abandoned = [
            session
            for session in self._sessions.values()
            if (away_s := session.away_s()) is not None and away_s > session.grace_s
        ]
        for session in abandoned:
            await self._close_absent(session)
        num_closed = len(abandoned)
        while self.admission.num_waiting and (absent := self._first_to_yield()) is not None:
            await self._close_absent(absent)
            num_closed += 1
        return num_closed

    def _first_to_yield(self) -> ServerSession | None:
        """The session whose client has been away for longest, if that is long enough to give way."""
        absent = [
            (away_s, session.session_id, session)
            for session in self._sessions.values()
            if (away_s := session.away_s()) is not None
            and away_s > self.limits.yield_after_s
            and session.held_back is None
        ]
        return max(absent)[2] if absent else None

    async def _close_absent(self, session: ServerSession) -> None:
        logger.info("closing %r: its client did not come back", session)
        await self.close(session)

    async def shutdown(self) -> None:
        """Close all sessions and connections."""
        for session in list(self._sessions.values()):
            await self.close(session)
        self.moves.forget()
        await self.steps.shutdown()
        await self._channels.close()

    # -- steps ---------------------------------------------------------------------------------

    def find(self, session_id: bytes, *, epoch: int) -> ServerSession:
        """The session a pushed step belongs to. Raises SessionStateError when it is not held at this epoch.

        The pusher alone hears of that: outputs of a route that the client has left are nobody's fault.
        """
        session = self._sessions.get(session_id) or self.moves.find(session_id)
        if session is None:
            raise SessionStateError("no such session is open here")
        if session.mirror.epoch != epoch:
            raise SessionStateError(
                f"the session is at epoch {session.mirror.epoch} here, not at {epoch}", epoch=session.mirror.epoch
            )
        return session

    async def take_step(self, session: ServerSession, step: pb.Step, frame: Frame) -> None:
        """Run a step, and deliver its output when it is done; what is wrong with it is told the client."""
        if session.successor is not None:
            await self.steps.send_failure(session, has_moved(session), step=step.step)
        else:
            await self.steps.take_step(session, step, frame)

    def held(self, session_id: bytes) -> ServerSession | None:
        """The session of this id, if there is one."""
        return self._sessions.get(session_id)

    def add(self, session: ServerSession) -> None:
        """Hold a session that has a place already."""
        assert session.session_id not in self._sessions
        self._sessions[session.session_id] = session

    # -- leaving -------------------------------------------------------------------------------

    def start_draining(self) -> None:
        """Let nobody in any more; who waits is told so."""
        self.is_draining = True
        self.admission.turn_away()

    def stop_draining(self) -> None:
        """The server stays after all: let sessions in again, also those that were handed over."""
        self.is_draining = False
        self.admission.let_in()
        self.moves.forget()

    def open_sessions(self) -> list[ServerSession]:
        """Sessions that can go on."""
        return [session for session in self._sessions.values() if session.mirror.state is MirrorState.OPEN]

    async def close_absent(self, sessions: Iterable[ServerSession]) -> None:
        """Close those of `sessions` whose clients have been away for more than a moment."""
        for session in sessions:
            away_s = session.away_s()
            if away_s is not None and away_s > self.limits.yield_after_s and not session.is_over:
                await self._close_absent(session)

    async def close_dead(self) -> None:
        """Close sessions that failed: there is nothing to hand over or to finish."""
        for session in list(self._sessions.values()):
            if session.mirror.state is MirrorState.DEAD:
                await self.close(session)


def _microseconds(seconds: float) -> int:
    return min(int(seconds * 1e6), 2**32 - 1)
