"""The client's stream to one hop of a session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from swarm.client.transport.channels import lost_when_closed
from swarm.errors import BadInputError, PeerFaultError, PeerLostError, SwarmError
from swarm.pb import session_pb2 as pb
from swarm.wire.failures import error_from_failure, error_from_rpc
from swarm.wire.frames import Frame, decode_frame, encode_frame
from swarm.wire.methods import SESSION

if TYPE_CHECKING:
    import torch

    from swarm.datatypes import Hop

__all__ = ["HopEvent", "HopStream"]


@dataclass(frozen=True, slots=True)
class HopEvent:
    """Something a hop said: a result with its tensor's frame, or the error that ends the hop."""

    hop_index: int
    result: pb.StepResult | None = None
    frame: Frame | None = None
    error: SwarmError | None = None
    is_report: bool = False
    """Whether the hop itself said the error; else its stream ended with it."""


class HopStream:
    """An open session stream; what it receives goes to `on_event` in order, on the event loop."""

    def __init__(self, hop: Hop, hop_index: int, on_event: Callable[[HopEvent], Awaitable[None]]) -> None:
        self.hop = hop
        self._hop_index = hop_index
        self._on_event = on_event
        self._call: grpc.aio.StreamStreamCall | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the server has accepted the session on this stream, and we have not closed it."""
        return self._reader is not None

    async def open(
        self,
        channel: grpc.aio.Channel,
        request: pb.Open,
        *,
        timeout_s: float,
        on_queued: Callable[[int], None] | None = None,
    ) -> pb.Opened:
        """Open the session at the hop. Raises the hop's refusal, or PeerLostError.

        With `on_queued` the server may let us wait: it is called with our place, and the time until the next
        word from the server is not bounded by `timeout_s` any more (the caller has a deadline of its own).
        """
        peer = self.hop.peer_id
        with lost_when_closed(peer):
            call = self._call = channel.stream_stream(SESSION)()
        try:
            async with asyncio.timeout(timeout_s) as patience:
                with lost_when_closed(peer):
                    await call.write(encode_frame(pb.SessionRequest(open=request)))
                    while isinstance(body := await call.read(), bytes):
                        reply = self._decode_reply(body)
                        if not reply.HasField("queued") or on_queued is None:
                            break
                        on_queued(reply.queued.position)
                        patience.reschedule(None)
        except TimeoutError:
            call.cancel()
            raise PeerLostError(f"server {peer} did not open the session within {timeout_s:g} s") from None
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=peer) from error
        except asyncio.InvalidStateError as error:
            raise PeerLostError(f"server {peer} hung up") from error
        except (asyncio.CancelledError, SwarmError):
            call.cancel()
            raise
        if not isinstance(body, bytes):
            raise await self._ending(call)
        if reply.HasField("failure"):
            call.cancel()
            raise error_from_failure(reply.failure, peer=peer)
        if not reply.HasField("opened"):
            call.cancel()
            raise PeerFaultError(f"server {peer} answered an open with something else")
        self._reader = asyncio.create_task(self._read(call))
        return reply.opened

    def _decode_reply(self, body: bytes) -> pb.SessionReply:
        """Raises PeerFaultError: garbage is the fault of who sends it, not of what was asked."""
        try:
            return decode_frame(body, pb.SessionReply)[0]
        except BadInputError as error:
            raise PeerFaultError(f"server {self.hop.peer_id} sent nonsense: {error}") from error

    async def _ending(self, call: grpc.aio.StreamStreamCall) -> SwarmError:
        """Why a stream ended without a message."""
        code, details = await call.code(), await call.details()
        if code is grpc.StatusCode.OK:
            return PeerLostError(f"server {self.hop.peer_id} ended the session")
        return PeerLostError(f"server {self.hop.peer_id} hung up ({code.name}: {details})")

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        peer = self.hop.peer_id
        error: SwarmError
        try:
            with lost_when_closed(peer):
                while isinstance(body := await call.read(), bytes):
                    reply, frame = decode_frame(body, pb.SessionReply)
                    if reply.HasField("failure"):
                        await self._emit(error=error_from_failure(reply.failure, peer=peer), is_report=True)
                    elif reply.HasField("result"):
                        await self._emit(result=reply.result, frame=frame)
                error = await self._ending(call)
        except grpc.RpcError as problem:
            error = error_from_rpc(problem, peer=peer)
        except PeerLostError as problem:
            error = problem
        except SwarmError as problem:
            error = PeerFaultError(f"server {peer} sent nonsense: {problem}")
        await self._emit(error=error)

    async def _emit(
        self,
        *,
        result: pb.StepResult | None = None,
        frame: Frame | None = None,
        error: SwarmError | None = None,
        is_report: bool = False,
    ) -> None:
        await self._on_event(HopEvent(self._hop_index, result, frame, error, is_report))

    async def send_step(self, step: pb.Step, hidden: torch.Tensor) -> None:
        """Write a step with its inputs [T, H]. Raises PeerLostError."""
        assert self._call is not None
        try:
            with lost_when_closed(self.hop.peer_id):
                await self._call.write(encode_frame(pb.SessionRequest(step=step), [hidden]))
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.hop.peer_id) from error
        except asyncio.InvalidStateError as error:
            raise PeerLostError(f"server {self.hop.peer_id} hung up") from error

    async def close(self, *, say_goodbye: bool, timeout_s: float = 2.0) -> None:
        """End the stream; with `say_goodbye` the server frees the session at once."""
        call, self._call = self._call, None
        reader, self._reader = self._reader, None
        if call is None:
            return
        if say_goodbye and reader is not None and not call.done():
            # Before the reader is cancelled: that would cancel the call, and the goodbye with it.
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await call.write(encode_frame(pb.SessionRequest(close=pb.Close())))
                    await asyncio.wait([reader])  # the server ends the stream once the session is freed
        call.cancel()
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
