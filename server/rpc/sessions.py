"""Sessions on a server: judge a step, run it on the engine, send its output on, remember it for a retry."""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swarm.datatypes import PeerId, Span
from swarm.errors import (
    BadInputError,
    LengthLimitError,
    NoRouteError,
    PeerBusyError,
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
from swarm.server.rpc.push import NextHop, PushStream
from swarm.server.session_mirror import MirrorState, SequenceStep, SessionMirror, Verdict
from swarm.wire.failures import failure_from_error
from swarm.wire.frames import Frame, encode_frame
from swarm.wire.limits import MAX_SEQUENCES, PROTOCOL_VERSION

if TYPE_CHECKING:
    import torch

__all__ = ["HostedModel", "ServerSession", "SessionLimits", "SessionTable"]

logger = logging.getLogger(__name__)

SendToClient = Callable[[bytes], Awaitable[None]]
SESSION_ID_BYTES: Final = 16


@dataclass(frozen=True, kw_only=True)
class HostedModel:
    """What this server serves."""

    model_hash: str
    span: Span
    hidden_size: int
    max_positions: int
    """Context length of the model."""
    kv_policy: str
    peer_id: PeerId


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

    def __post_init__(self) -> None:
        for name in ("default_expected_tokens", "detach_grace_s", "push_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"SessionLimits.{name} must be above 0")


@dataclass
class _LastStep:
    """The step accepted last, kept to answer a retry from memory."""

    header: pb.Step
    output: torch.Tensor | None = None
    """[T, H]; None while the engine works on it."""
    relay: bool = False
    compute_s: float = 0.0


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
    delivery: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Outputs leave in the order of their steps."""

    @property
    def key(self) -> SessionKey:
        return (self.session_id, self.mirror.epoch)

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
        self._limits = limits
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
        self._check_open(request)
        held = self._sessions.get(request.session_id)
        opened = pb.Opened(protocol=PROTOCOL_VERSION, peer_id=self._model.peer_id, kv_policy=self._model.kv_policy)
        if held is not None and held.mirror.epoch > request.epoch:
            raise SessionStateError(
                f"epoch {request.epoch} has passed, the session is at {held.mirror.epoch}", epoch=held.mirror.epoch
            )
        if held is not None and held.mirror.epoch == request.epoch and held.mirror.state is MirrorState.OPEN:
            held.send = send
            opened.resumed = True
            opened.positions.extend(held.mirror.positions)
            opened.last_step = held.mirror.last_step
            opened.kv_tokens_free = self._engine.num_tokens_free
            return held, opened
        if held is not None:
            await self.close(held)
        if self.is_draining:
            raise PeerBusyError("this server is leaving and takes no new sessions", retry_after_s=30.0)
        mirror = SessionMirror(
            epoch=request.epoch, max_length=request.max_length, max_sequences=request.max_sequences or 1
        )

        async def tell_position(position: int) -> None:
            await send(encode_frame(pb.SessionReply(queued=pb.Queued(position=position))))

        await self._admission.enter(
            (request.session_id, request.epoch),
            request.expected_tokens or self._limits.default_expected_tokens,
            may_wait=request.may_wait,
            tell_position=tell_position,
        )
        session = ServerSession(
            session_id=request.session_id,
            span=Span(start=request.start, end=request.end),
            mirror=mirror,
            push=self._new_push(request),
            send=send,
        )
        self._sessions[session.session_id] = session
        opened.kv_tokens_free = self._engine.num_tokens_free
        return session, opened

    def _check_open(self, request: pb.Open) -> None:
        model = self._model
        if request.protocol != PROTOCOL_VERSION:
            raise BadInputError(f"protocol {request.protocol} is not spoken here, only {PROTOCOL_VERSION}; upgrade")
        if len(request.session_id) != SESSION_ID_BYTES:
            raise BadInputError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(request.session_id)}")
        if request.model_hash != model.model_hash:
            raise NoRouteError(f"model {request.model_hash[:12]} is not served here, only {model.model_hash[:12]}")
        if not (model.span.start <= request.start < request.end <= model.span.end):
            raise NoRouteError(f"blocks {request.start}:{request.end} are not served here, only {model.span}")
        if not 1 <= request.max_length <= model.max_positions:
            raise LengthLimitError(
                f"max_length {request.max_length} is outside 1..{model.max_positions}, the model's context"
            )
        if request.max_sequences > MAX_SEQUENCES:
            raise LengthLimitError(f"{request.max_sequences} sequences were asked for, {MAX_SEQUENCES} are allowed")
        if request.kv_policy not in ("", model.kv_policy):
            raise NoRouteError(f"KV policy {request.kv_policy!r} is not offered here, only {model.kv_policy!r}")

    def _new_push(self, request: pb.Open) -> PushStream | None:
        if not request.HasField("next"):
            return None
        next_hop = NextHop(PeerId(request.next.peer_id), tuple(request.next.addresses)[:8])

        def tell_client(problem: str) -> None:
            session = self._sessions.get(request.session_id)
            if session is not None and session.mirror.epoch == request.epoch:
                self._spawn(self._send_failure(session, PeerLostError(problem), step=session.mirror.last_step))

        return PushStream(next_hop, self._channels, timeout_s=self._limits.push_timeout_s, on_problem=tell_client)

    def detach(self, session: ServerSession, send: SendToClient) -> None:
        """The client's connection is gone; keep the session for a while in case it comes back."""
        if session.send is send:
            session.send = None
            session.detached_at_s = time.monotonic()

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
            if session.send is None and now_s - session.detached_at_s > self._limits.detach_grace_s
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

    def find(self, session_id: bytes) -> ServerSession:
        """The session a pushed step belongs to. Raises SessionStateError when it is not held."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SessionStateError("no such session is open here")
        return session

    async def take_step(self, session: ServerSession, step: pb.Step, frame: Frame) -> None:
        """Judge a step and hand it to the engine; its output is delivered when it is done.

        A refusal is sent to the client; nothing is raised for it.
        """
        try:
            hidden_shape = self._check_tensor(frame)
            sequences = [SequenceStep(item.sequence, item.parent, item.start, item.count) for item in step.sequences]
            verdict = session.mirror.judge(
                epoch=step.epoch, step=step.step, sequences=sequences, num_rows=hidden_shape[0]
            )
        except SwarmError as error:
            if isinstance(error, BadInputError) and not isinstance(error, LengthLimitError):
                session.mirror.fail() if session.mirror.state is MirrorState.OPEN else None
            await self._send_failure(session, error, step=step.step)
            return
        if verdict is Verdict.REPEAT:
            await self._repeat(session, step)
            return
        last = _LastStep(header=step, relay=step.relay)
        session.last = last
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

    def _check_tensor(self, frame: Frame) -> tuple[int, int]:
        if len(frame.tensors) != 1:
            raise BadInputError(f"a step carries one tensor, not {len(frame.tensors)}")
        header = frame.tensors[0]
        if header.dtype not in ("float32", "bfloat16", "float16"):
            raise BadInputError(f"hidden states are float32, bfloat16 or float16, not {header.dtype}")
        if len(header.shape) != 2 or header.shape[1] != self._model.hidden_size:
            raise BadInputError(f"hidden states have shape [tokens, {self._model.hidden_size}], not {header.shape}")
        return header.shape[0], header.shape[1]

    def _step_done(
        self, session: ServerSession, last: _LastStep, output: torch.Tensor | None, error: BaseException | None
    ) -> None:
        if session.mirror.state is MirrorState.CLOSED:
            return
        if error is not None:
            if session.mirror.state is MirrorState.OPEN:
                session.mirror.fail()
            self._spawn(self._send_failure(session, error, step=last.header.step))
            return
        last.output = output
        self._spawn(self._deliver(session, last))

    async def _repeat(self, session: ServerSession, step: pb.Step) -> None:
        """Answer from memory; a step still under way is answered when it is done, as now asked."""
        last = session.last
        if last is None or last.header.step != step.step:
            await self._send_failure(
                session, SessionStateError("the step's output is no longer remembered"), step=step.step
            )
            return
        last.relay = last.relay or step.relay
        if last.output is not None:
            await self._deliver(session, last)

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
