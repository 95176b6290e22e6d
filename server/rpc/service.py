"""The gRPC service of a server: turns calls into sessions, engine work and answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from swarm.datatypes import AdapterHash, ServerInfo, Span
from swarm.errors import AddressInUseError, BadInputError, PeerBusyError, PeerLeavingError, SwarmError
from swarm.pb import node_pb2, session_pb2
from swarm.server.engine.work import BackwardWork, ForwardWork, WorkDone
from swarm.server.hosting import Hosting
from swarm.server.rpc.request_checks import check_adapter, check_run
from swarm.server.rpc.sessions import ServerSession, SessionTable
from swarm.wire.failures import failure_from_error
from swarm.wire.frames import Frame, decode_frame, encode_frame
from swarm.wire.limits import channel_options
from swarm.wire.methods import SERVICE

if TYPE_CHECKING:
    import torch

__all__ = ["NodeService"]

logger = logging.getLogger(__name__)

Bytes = bytes
LookupAnswer = Callable[[bytes], Awaitable[bytes]]


class NodeService:
    """Answers one server's calls; lives on the event loop, and outlives what is hosted.

    Before `host` and after `unhost` it answers questions and look-ups only.

    `describe` gives the server's current account of itself; `answer_lookup` serves look-ups for clients
    without a DHT; `join_addresses` are what others may pass to --join.
    """

    def __init__(
        self,
        *,
        describe: Callable[[], ServerInfo],
        answer_lookup: LookupAnswer,
        join_addresses: Callable[[], list[str]],
    ) -> None:
        self._hosting: Hosting | None = None
        self._streams: set[asyncio.Task[object]] = set()
        """Handlers of sessions and pushes; they belong to what is hosted now."""
        self._describe = describe
        self._answer_lookup = answer_lookup
        self._join_addresses = join_addresses
        self._started_s = time.monotonic()
        self._server: grpc.aio.Server | None = None
        self._num_runs = 0
        """Stateless runs the engine has not finished, whether or not their callers still wait."""

    async def start(self, host: str, port: int) -> int:
        """Listen on host:port (0 picks a port); returns the port. Raises AddressInUseError."""
        server = grpc.aio.server(options=channel_options(), maximum_concurrent_rpcs=4096)
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {
                        "Session": stream(self._session),
                        "Push": stream(self._push),
                        "Handover": stream(self._handover),
                        "Forward": unary(self._forward),
                        "Backward": unary(self._backward),
                        "Health": unary(self._health),
                        "Info": unary(self._info),
                        "Lookup": unary(self._lookup),
                    },
                ),
            )
        )
        netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound_port: int = server.add_insecure_port(netloc)
        except RuntimeError as error:
            raise AddressInUseError(
                f"can not listen on {netloc}: the port is taken or not yours; try --port 0"
            ) from error
        if bound_port == 0:
            raise AddressInUseError(f"can not listen on {netloc}: the port is taken or not yours; try --port 0")
        await server.start()
        self._server = server
        return bound_port

    async def stop(self, grace_s: float = 1.0) -> None:
        """Stop listening; calls under way get `grace_s` to end."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    def host(self, hosting: Hosting) -> None:
        """Serve these blocks from now on. Whatever was served before must be unhosted first."""
        assert self._hosting is None
        self._hosting = hosting

    async def unhost(self) -> None:
        """Serve no blocks any more; streams that are open end."""
        self._hosting = None
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    def _hosted(self) -> Hosting:
        if self._hosting is None:
            raise PeerLeavingError("this server is loading other blocks")
        return self._hosting

    # -- sessions ------------------------------------------------------------------------------

    async def _session(self, requests: AsyncIterator[Bytes], context: grpc.aio.ServicerContext[Bytes, Bytes]) -> None:
        writing = asyncio.Lock()

        async def send(body: bytes) -> None:
            async with writing:
                try:
                    await context.write(body)
                except (grpc.RpcError, asyncio.InvalidStateError, RuntimeError) as error:
                    logger.debug("a client went away while it was answered: %s", error)

        try:
            hosting = self._hosted()
        except PeerLeavingError as error:
            await send(encode_frame(session_pb2.SessionReply(failure=failure_from_error(error))))
            return
        with self._stream_of(hosting):
            await self._serve_session(hosting.sessions, requests, send)

    async def _serve_session(
        self, sessions: SessionTable, requests: AsyncIterator[Bytes], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        session: ServerSession | None = None
        try:
            async for body in _messages(requests, first_timeout_s=sessions.limits.first_message_timeout_s):
                try:
                    header, frame = decode_frame(body, session_pb2.SessionRequest)
                    kind = header.WhichOneof("kind")
                    if kind == "open":
                        if session is not None:
                            raise BadInputError("a stream holds one session, and this one has it already")
                        session, opened = await sessions.open(header.open, send)
                        await send(encode_frame(session_pb2.SessionReply(opened=opened)))
                    elif session is None:
                        raise BadInputError("the first message of a session stream must be `open`")
                    elif kind == "step":
                        await sessions.take_step(session, header.step, frame)
                    elif kind == "close":
                        await sessions.close(session)
                        return
                    else:
                        raise BadInputError("a session message of no known kind was sent")
                except SwarmError as error:
                    await send(encode_frame(session_pb2.SessionReply(failure=failure_from_error(error))))
                    if session is not None and isinstance(error, BadInputError):
                        await sessions.close(session)
                    if session is None or isinstance(error, BadInputError):
                        return
        finally:
            if session is not None:
                sessions.detach(session, send)

    async def _push(self, requests: AsyncIterator[Bytes], context: grpc.aio.ServicerContext[Bytes, Bytes]) -> None:
        # Headers tell the sender at once that somebody is here.
        await context.send_initial_metadata(())
        try:
            hosting = self._hosted()
            with self._stream_of(hosting):
                await self._take_pushed(hosting.sessions, requests)
        except SwarmError as error:
            await context.write(encode_frame(session_pb2.SessionReply(failure=failure_from_error(error))))

    async def _take_pushed(self, sessions: SessionTable, requests: AsyncIterator[Bytes]) -> None:
        async for body in _messages(requests, first_timeout_s=sessions.limits.first_message_timeout_s):
            header, frame = decode_frame(body, session_pb2.SessionRequest)
            if header.WhichOneof("kind") != "step":
                raise BadInputError("only steps can be pushed")
            session = sessions.find(header.step.session_id, epoch=header.step.epoch)
            await sessions.take_step(session, header.step, frame)

    async def _handover(self, requests: AsyncIterator[Bytes], context: grpc.aio.ServicerContext[Bytes, Bytes]) -> None:
        await context.send_initial_metadata(())
        try:
            hosting = self._hosted()
        except PeerLeavingError as error:
            await context.write(encode_frame(node_pb2.HandoverReply(failure=failure_from_error(error))))
            return
        with self._stream_of(hosting):
            await hosting.handovers.receive(requests, context.write)

    @contextlib.contextmanager
    def _stream_of(self, hosting: Hosting) -> Iterator[None]:
        """Makes the running handler end, as if by itself, when what it serves is unhosted."""
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self._hosting is hosting:
                raise
        finally:
            self._streams.discard(task)

    # -- stateless runs ------------------------------------------------------------------------

    async def _forward(self, body: Bytes, context: grpc.aio.ServicerContext[Bytes, Bytes]) -> Bytes:
        return await self._run_stateless(body, num_tensors=1)

    async def _backward(self, body: Bytes, context: grpc.aio.ServicerContext[Bytes, Bytes]) -> Bytes:
        return await self._run_stateless(body, num_tensors=2)

    async def _run_stateless(self, body: bytes, *, num_tensors: int) -> bytes:
        started_s = time.perf_counter()
        try:
            hosting = self._hosted()
            request, frame = decode_frame(body, node_pb2.RunRequest, max_tensors=num_tensors)
            span, counts = check_run(request, frame, hosting.model, num_tensors=num_tensors)
            adapter = check_adapter(request.adapter, hosting.model)
            if self._num_runs >= hosting.sessions.limits.max_runs_under_way:
                raise PeerBusyError(f"{self._num_runs} stateless runs are under way, the most this server takes")
            loop = asyncio.get_running_loop()
            result: asyncio.Future[torch.Tensor] = loop.create_future()

            def finish(output: torch.Tensor | None, error: BaseException | None) -> None:
                self._num_runs -= 1
                if result.done():  # the caller gave up
                    return
                if error is not None:
                    result.set_exception(error)
                elif output is not None:
                    result.set_result(output)

            def on_done(output: torch.Tensor | None, error: BaseException | None) -> None:
                loop.call_soon_threadsafe(finish, output, error)

            self._num_runs += 1
            hosting.engine.submit(_stateless_work(frame, span, counts, adapter, on_done))
            output = await result
        except SwarmError as error:
            return encode_frame(node_pb2.RunReply(failure=failure_from_error(error)))
        compute_us = int((time.perf_counter() - started_s) * 1e6)
        return encode_frame(node_pb2.RunReply(compute_us=compute_us), [output])

    # -- questions -----------------------------------------------------------------------------

    async def _health(self, body: Bytes, context: grpc.aio.ServicerContext[Bytes, Bytes]) -> Bytes:
        info = self._describe()
        silent_s = self._hosting.engine.silent_s if self._hosting is not None else 0.0
        return node_pb2.HealthReply(
            state=info.state.value, peer_id=info.peer_id, engine_silent_ms=int(silent_s * 1000)
        ).SerializeToString()

    async def _info(self, body: Bytes, context: grpc.aio.ServicerContext[Bytes, Bytes]) -> Bytes:
        from swarm.discovery.records import to_record

        reply = node_pb2.InfoReply(
            server=to_record(self._describe(), expires_at=time.time() + 60.0),
            uptime_s=int(time.monotonic() - self._started_s),
            join_addresses=self._join_addresses(),
        )
        if self._hosting is not None:
            engine = self._hosting.engine
            reply.num_steps = engine.counters.num_steps
            reply.num_tokens = engine.counters.num_tokens
            reply.num_failed_steps = engine.counters.num_failed_steps
            reply.num_batches = engine.counters.num_batches
            reply.num_tokens_run = engine.num_tokens_run
            reply.num_sessions_taken_over = self._hosting.sessions.moves.num_taken_over
            reply.num_sessions_handed_over = self._hosting.sessions.moves.num_handed_over
            reply.kv.CopyFrom(node_pb2.KVUsage(**dataclasses.asdict(engine.kv_usage)))
        return reply.SerializeToString()

    async def _lookup(self, body: Bytes, context: grpc.aio.ServicerContext[Bytes, Bytes]) -> Bytes:
        try:
            return await self._answer_lookup(body)
        except SwarmError as error:
            is_theirs = isinstance(error, BadInputError)
            code = grpc.StatusCode.INVALID_ARGUMENT if is_theirs else grpc.StatusCode.UNAVAILABLE
            await context.abort(code, str(error))
            raise


async def _messages(requests: AsyncIterator[Bytes], *, first_timeout_s: float) -> AsyncIterator[Bytes]:
    """A stream's messages; none when the first is late, so that silent streams do not use up the server's calls."""
    iterator = aiter(requests)
    first = asyncio.ensure_future(anext(iterator, None))
    try:
        await asyncio.wait({first}, timeout=first_timeout_s)
    finally:
        if not first.done():
            first.cancel()
    if first.cancelled() or not first.done() or (body := first.result()) is None:
        return
    yield body
    async for body in iterator:
        yield body


def _stateless_work(
    frame: Frame, span: Span, counts: Sequence[int], adapter: AdapterHash, on_done: WorkDone
) -> ForwardWork | BackwardWork:
    hidden = frame.tensor(0)
    if len(frame.tensors) == 1:
        return ForwardWork(span=span, counts=counts, hidden=hidden, on_done=on_done, adapter=adapter)
    return BackwardWork(
        span=span, counts=counts, hidden=hidden, gradient=frame.tensor(1), on_done=on_done, adapter=adapter
    )
