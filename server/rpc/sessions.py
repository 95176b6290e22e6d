"""Sessions on a server: judge a step, run it on the engine, send its output on, remember it for a retry."""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swarm.datatypes import Span
from swarm.errors import (
    BadInputError,
    LengthLimitError,
    PeerLeavingError,
    PeerLostError,
    SessionStateError,
    SwarmError,
)
from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import session_pb2 as pb
from swarm.server.engine.engine import Engine
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.rpc.admission_desk import AdmissionDesk
from swarm.server.rpc.channels import ChannelPool
from swarm.server.rpc.push import PushStream
from swarm.server.rpc.request_checks import HostedModel, check_open, check_step_tensor, read_next_hop
from swarm.server.session_mirror import MirrorState, SequenceStep, SessionMirror, Verdict
from swarm.wire.failures import failure_from_error
from swarm.wire.frames import Frame, encode_frame
from swarm.wire.limits import PROTOCOL_VERSION

if TYPE_CHECKING:
    import torch

__all__ = ["HostedModel", "ServerSession", "SessionLimits", "SessionTable"]

logger = logging.getLogger(__name__)

SendToClient = Callable[[bytes], Awaitable[None]]
_MAX_REPEATS: Final = 8
"""Answers from memory to one step: enough for any retry, and an end to routes that bite their own tail."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """Bounds that keep one client from harming others."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    """Who may start a session, and who waits."""
    default_expected_tokens: int = 256
    """What a session is expected to use when it does not say."""
    detach_grace_s: float = 15.0
    """How long a session outlives a lost connection to its client."""
    push_timeout_s: float = 5.0
    """After this long without progress a push has failed and the client relays."""
    max_steps_under_way: int = 64
    """Steps of one session that are neither refused nor delivered; a client sends a few at a time."""
    first_message_timeout_s: float = 10.0
    """How long a stream may stay silent before it says what it is for."""
    max_runs_under_way: int = 64
    """Stateless runs of all clients together; one more is answered with BUSY."""

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"SessionLimits.{limit.name} is {value}; it must be above 0")


@dataclass
class _LastStep:
    """The step accepted last, kept to answer a retry from memory."""

    header: pb.Step
    output: torch.Tensor | None = None
    """[T, H]; None while the engine works on it."""
    relay: bool = False
    compute_s: float = 0.0
    num_repeats: int = 0


@dataclass(eq=False)
class ServerSession:
    """One session at one epoch."""

    session_id: bytes
    span: Span
    mirror: SessionMirror
    push: PushStream | None
    send: SendToClient | None = None
    """The client's stream; None while the client is away."""
    detached_at_s: float = 0.0
    last: _LastStep | None = None
    num_under_way: int = 0
    """Steps accepted and not yet delivered; each holds tensors."""
    delivery: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Outputs leave in the order of their steps."""

    @property
    def key(self) -> SessionKey:
        return (self.session_id, self.mirror.epoch)

    def is_like(self, other: ServerSession) -> bool:
        """Whether both run the same blocks with the same bounds."""
        return (self.span, self.mirror.max_length, self.mirror.max_sequences) == (
            other.span,
            other.mirror.max_length,
            other.mirror.max_sequences,
        )

    def __repr__(self) -> str:
        return (
            f"<ServerSession {self.session_id.hex()[:8]} blocks {self.span} epoch {self.mirror.epoch} "
            f"step {self.mirror.last_step} positions {self.mirror.positions} {self.mirror.state.value}>"
        )


class SessionTable:
    """All sessions of a server; lives on the event loop."""

    def __init__(self, model: HostedModel, engine: Engine, limits: SessionLimits) -> None:
        self._model = model
        self._engine = engine
        self.limits = limits
        self._sessions: dict[bytes, ServerSession] = {}
        self._channels = ChannelPool()
        self._tasks: set[asyncio.Task[None]] = set()
        self._admission = AdmissionDesk(num_tokens_total=engine.num_tokens_total, config=limits.admission)
        self.is_draining = False

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Sessions in the queue."""
        return self._admission.num_waiting

    # -- open and close ------------------------------------------------------------------------

    async def open(self, request: pb.Open, send: SendToClient) -> tuple[ServerSession, pb.Opened]:
        """Start a session, or resume one that is still held at the same epoch.

        Raises NoRouteError (not served here), BadInputError, LengthLimitError, PeerBusyError, SessionStateError.
        """
        check_open(request, self._model)
        session = ServerSession(
            session_id=request.session_id,
            span=Span(start=request.start, end=request.end),
            mirror=SessionMirror(
                epoch=request.epoch, max_length=request.max_length, max_sequences=request.max_sequences or 1
            ),
            push=self._new_push(request),
            send=send,
        )
        held = await self._make_way(session)
        if held is not None:
            held.send = send
            return held, self._opened(held, kept=True)

        async def tell_position(position: int) -> None:
            await send(encode_frame(pb.SessionReply(queued=pb.Queued(position=position))))

        self._check_not_draining()
        try:
            await self._admission.enter(
                session.key,
                self._expected_tokens(request),
                may_wait=request.may_wait,
                tell_position=tell_position,
            )
        except ValueError as error:
            raise BadInputError("this session is being opened already, at the same epoch") from error
        try:
            # While this one waited, its client may have opened it again, and the server may have begun to leave.
            self._check_not_draining()
            await self._make_way(session)
        except BaseException:
            self._admission.leave(session.key)
            raise
        self._sessions[session.session_id] = session
        return session, self._opened(session, kept=False)

    async def _make_way(self, session: ServerSession) -> ServerSession | None:
        """Close what older epochs of a session left here. Returns the session if it is held at this very epoch.

        Raises SessionStateError when its epoch has passed or it has failed, BadInputError when it was another.
        """
        epoch = session.mirror.epoch
        while (held := self._sessions.get(session.session_id)) is not None:
            if held.mirror.epoch < epoch:
                await self.close(held)  # and look again: others may come in meanwhile
                continue
            if held.mirror.epoch > epoch:
                raise SessionStateError(
                    f"epoch {epoch} has passed, the session is at {held.mirror.epoch}", epoch=held.mirror.epoch
                )
            if held.mirror.state is not MirrorState.OPEN:
                raise SessionStateError("the session failed here; open it at a higher epoch", epoch=epoch)
            if not session.is_like(held):
                raise BadInputError(f"the session was opened for blocks {held.span} and other sizes; raise its epoch")
            return held
        return None

    def _expected_tokens(self, request: pb.Open) -> int:
        """What a session claims to need: no more than it may ever use, or one claim could keep everybody out."""
        claimed = request.expected_tokens or self.limits.default_expected_tokens
        return min(claimed, request.max_length * (request.max_sequences or 1))

    def _check_not_draining(self) -> None:
        if self.is_draining:
            raise PeerLeavingError("this server is leaving and takes no new sessions")

    def _opened(self, session: ServerSession, *, kept: bool) -> pb.Opened:
        return pb.Opened(
            protocol=PROTOCOL_VERSION,
            peer_id=self._model.peer_id,
            kv_policy=self._model.kv_policy,
            kv_tokens_free=self._engine.num_tokens_free,
            kept=kept,
            positions=session.mirror.positions,
        )

    def _new_push(self, request: pb.Open) -> PushStream | None:
        next_hop = read_next_hop(request)
        if next_hop is None:
            return None

        def tell_client(problem: str) -> None:
            session = self._sessions.get(request.session_id)
            if session is not None and session.mirror.epoch == request.epoch:
                self._spawn(self._send_failure(session, PeerLostError(problem), step=session.mirror.last_step))

        return PushStream(next_hop, self._channels, timeout_s=self.limits.push_timeout_s, on_problem=tell_client)

    def detach(self, session: ServerSession, send: SendToClient) -> None:
        """The client's connection is gone; keep the session for a while in case it comes back."""
        if session.send is not send:  # it has come back already
            return
        session.send = None
        session.detached_at_s = time.monotonic()
        if session.mirror.state is MirrorState.DEAD:
            self._spawn(self.close(session))  # there is nothing to come back to

    async def close(self, session: ServerSession) -> None:
        """Free everything of a session; harmless when repeated."""
        session.mirror.close()
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
        self._engine.forget(session.key)
        self._admission.leave(session.key)
        session.last = None
        if session.push is not None:
            await session.push.close()

    async def close_abandoned(self) -> int:
        """Close sessions whose client has been away for longer than the grace; says how many."""
        now_s = time.monotonic()
        abandoned = [
            session
            for session in self._sessions.values()
            if session.send is None and now_s - session.detached_at_s > self.limits.detach_grace_s
        ]
        for session in abandoned:
            logger.info("closing %r: its client did not come back", session)
            await self.close(session)
        return len(abandoned)

    async def shutdown(self) -> None:
        """Close all sessions and connections."""
        for session in list(self._sessions.values()):
            await self.close(session)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channels.close()

    # -- steps ---------------------------------------------------------------------------------

    def find(self, session_id: bytes, *, epoch: int) -> ServerSession:
        """The session a pushed step belongs to. Raises SessionStateError when it is not held at this epoch.

        The pusher alone hears of that: outputs of a route that the client has left are nobody's fault.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionStateError("no such session is open here")
        if session.mirror.epoch != epoch:
            raise SessionStateError(
                f"the session is at epoch {session.mirror.epoch} here, not at {epoch}", epoch=session.mirror.epoch
            )
        return session

    async def take_step(self, session: ServerSession, step: pb.Step, frame: Frame) -> None:
        """Judge a step and hand it to the engine; its output is delivered when it is done.

        A refusal is sent to the client; nothing is raised for it.
        """
        try:
            num_rows = check_step_tensor(frame, self._model)
            if session.num_under_way >= self.limits.max_steps_under_way:
                raise BadInputError(f"{session.num_under_way} steps are under way, the most a session may have")
            sequences = [SequenceStep(item.sequence, item.parent, item.start, item.count) for item in step.sequences]
            verdict = session.mirror.judge(epoch=step.epoch, step=step.step, sequences=sequences, num_rows=num_rows)
        except SwarmError as error:
            if isinstance(error, BadInputError) and not isinstance(error, LengthLimitError):
                self._fail(session)
            await self._send_failure(session, error, step=step.step)
            return
        if verdict is Verdict.REPEAT:
            await self._repeat(session, step)
            return
        last = _LastStep(header=step, relay=step.relay)
        session.last = last
        session.num_under_way += 1
        loop = asyncio.get_running_loop()
        started_s = time.perf_counter()

        def on_done(output: torch.Tensor | None, error: BaseException | None) -> None:
            last.compute_s = time.perf_counter() - started_s
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(self._step_done, session, last, output, error)

        self._engine.submit(
            StepWork(
                session=session.key,
                span=session.span,
                sequences=sequences,
                hidden=frame.tensor(0),
                on_done=on_done,
            )
        )

    def _fail(self, session: ServerSession) -> None:
        """A failed session can not go on, so what it holds is of no use to anybody."""
        if session.mirror.state is MirrorState.OPEN:
            session.mirror.fail()
            self._engine.forget(session.key)

    def _step_done(
        self, session: ServerSession, last: _LastStep, output: torch.Tensor | None, error: BaseException | None
    ) -> None:
        if session.mirror.state is MirrorState.CLOSED:
            return
        if error is not None:
            session.num_under_way -= 1
            self._fail(session)
            self._spawn(self._send_failure(session, error, step=last.header.step))
            return
        last.output = output
        self._spawn(self._deliver_first(session, last))

    async def _repeat(self, session: ServerSession, step: pb.Step) -> None:
        """Answer from memory; a step still under way is answered when it is done, as now asked."""
        last = session.last
        if last is None or last.header.step != step.step:
            await self._send_failure(
                session, SessionStateError("the step's output is no longer remembered"), step=step.step
            )
            return
        last.num_repeats += 1
        if last.num_repeats > _MAX_REPEATS:
            self._fail(session)
            error = BadInputError(f"step {step.step} was repeated more than {_MAX_REPEATS} times")
            await self._send_failure(session, error, step=step.step)
            return
        last.relay = last.relay or step.relay
        if last.output is not None:
            await self._deliver(session, last)

    async def _deliver_first(self, session: ServerSession, last: _LastStep) -> None:
        try:
            await self._deliver(session, last)
        finally:
            session.num_under_way -= 1

    async def _deliver(self, session: ServerSession, last: _LastStep) -> None:
        """Send an output to the next hop, or to the client when this is the last one or the push fails."""
        assert last.output is not None
        async with session.delivery:
            problem = ""
            if session.push is not None and not last.relay:
                try:
                    header = pb.SessionRequest(step=last.header)
                    header.step.session_id = session.session_id
                    await session.push.write(encode_frame(header, [last.output]))
                except PeerLostError as error:
                    problem = str(error)
                else:
                    return
            is_intermediate = session.push is not None
            output = last.output
            if last.header.last_only and not is_intermediate:
                output = _last_rows(output, [item.count for item in last.header.sequences])
            result = pb.StepResult(
                epoch=session.mirror.epoch,
                step=last.header.step,
                relay=is_intermediate,
                push_problem=problem,
                compute_us=int(last.compute_s * 1e6),
            )
            await self._send(session, encode_frame(pb.SessionReply(result=result), [output]))

    async def _send_failure(self, session: ServerSession, error: BaseException, *, step: int) -> None:
        failure = failure_from_error(error, epoch=session.mirror.epoch, step=step)
        await self._send(session, encode_frame(pb.SessionReply(failure=failure)))

    async def _send(self, session: ServerSession, body: bytes) -> None:
        if session.send is not None:  # an absent client asks again when it comes back
            await session.send(body)

    def _spawn(self, work: Awaitable[None]) -> None:
        """Run a delivery as an owned task whose failure is logged."""

        async def run() -> None:
            try:
                await work
            except Exception:
                logger.exception("a delivery failed")

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _last_rows(output: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The last row of each sequence that has any: [number of such sequences, H]."""
    ends: list[int] = []
    end = 0
    for count in counts:
        end += count
        if count:
            ends.append(end - 1)
    return output if len(ends) == output.shape[0] else output[ends]
