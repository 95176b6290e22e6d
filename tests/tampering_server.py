"""A server as a saboteur would run it: an honest one behind a door that counts, changes, drops or breaks off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio

from swarm.datatypes import PeerId, ServerInfo
from swarm.identity import Identity
from swarm.pb import session_pb2 as pb
from swarm.server.node import Node
from swarm.wire.frames import Frame, decode_frame, encode_frame
from swarm.wire.limits import channel_options
from swarm.wire.methods import SERVICE
from tests.swarm_in_process import InProcessSwarm

__all__ = ["Edit", "Passed", "TamperingServer", "edit_result", "let_one_die"]

Edit = Callable[[str, bytes], bytes | None]
"""Given a method's name and a message, what to pass on instead; None swallows it."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """One message of a stream that went through the door."""

    method: str
    """Session or Push."""
    kind: str
    """Which field of SessionRequest or SessionReply it is."""
    is_request: bool
    num_bytes: int
    num_rows: int
    """Rows of its tensor; 0 without one."""


class TamperingServer:
    """Announced in the place of `node`, which must not be announced itself.

    Without edits it behaves as the node does.
    """

    def __init__(self, swarm: InProcessSwarm, node: Node) -> None:
        self.swarm = swarm
        self._node = node
        self._identity = Identity.generate()
        self._registry = swarm.registry(self._identity)
        self._port = 0
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None
        self.is_dead = False
        """Whether it has been killed."""
        self._sessions: list[grpc.aio.ServicerContext[bytes, bytes]] = []
        self.edit_request: Edit = lambda method, body: body
        self.edit_reply: Edit = lambda method, body: body
        self.passed: list[Passed] = []
        """Every message of a session or push so far."""
        swarm.run(self._start())

    @classmethod
    def of_span(cls, swarm: InProcessSwarm, start: int, end: int, **config: Any) -> TamperingServer:
        """A new server of blocks [start, end)."""
        return cls(swarm, swarm.add_server(start, end, is_announced=False, **config))

    @property
    def peer_id(self) -> PeerId:
        return self._identity.peer_id

    @property
    def node(self) -> Node:
        """The honest server behind."""
        return self._node

    def die(self) -> None:
        """Hang up on everybody and stop answering, as a process that is killed."""
        self.swarm.run(self._stop())

    def announce_also(self, address: str) -> None:
        """Announce another address as the better one."""
        info = replace(self.info, addresses=[address, *self.info.addresses])
        self.swarm.run(self._registry.announce(info, ttl_s=600.0))

    def withdraw(self) -> None:
        """Take the announcement back, which nobody does for a process that is killed."""
        self.swarm.run(self._registry.withdraw(self.info))

    def die_soon(self) -> None:
        """The same, from within an edit."""
        self.is_dead = True
        self._later = asyncio.get_running_loop().create_task(self._stop())

    def repeat(self, body: bytes, num_times: int) -> None:
        """Say something to every open session, unasked."""

        async def say(context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError, RuntimeError):
                for _ in range(num_times):
                    await context.write(body)

        async def say_all() -> None:
            self._talks = [asyncio.create_task(say(context)) for context in self._sessions]

        self.swarm.run(say_all())

    def count(self, method: str, kind: str) -> int:
        """How many messages of a kind came through."""
        return sum(item.method == method and item.kind == kind for item in self.passed)

    async def _start(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._node.info.addresses[0], options=channel_options())
        self._server = grpc.aio.server(options=channel_options())
        handlers: dict[str, grpc.RpcMethodHandler] = {
            name: grpc.stream_stream_rpc_method_handler(self._stream(name)) for name in ("Session", "Push")
        }
        for name in ("Forward", "Backward", "Health", "Info", "Lookup"):
            handlers[name] = grpc.unary_unary_rpc_method_handler(self._unary(name))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        await self._registry.announce(self.info, ttl_s=600.0)

    @property
    def info(self) -> ServerInfo:
        """What is announced."""
        return replace(self._node.info, peer_id=self.peer_id, addresses=[f"127.0.0.1:{self._port}"])

    async def _stop(self) -> None:
        self.is_dead = True
        if self._server is not None:
            await self._server.stop(0)
        if self._channel is not None:
            await self._channel.close()

    def _unary(self, name: str) -> Callable[..., Coroutine[Any, Any, bytes]]:
        async def handle(body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            assert self._channel is not None
            edited = self.edit_request(name, body)
            if edited is not None:
                reply: bytes = await self._channel.unary_unary(f"/{SERVICE}/{name}")(edited)
                edited = self.edit_reply(name, reply)
            if edited is None:
                await asyncio.sleep(600.0)
                raise AssertionError("nobody waits for so long")
            return edited

        return handle

    def _stream(self, name: str) -> Callable[..., Coroutine[Any, Any, None]]:
        async def handle(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            assert self._channel is not None
            call = self._channel.stream_stream(f"/{SERVICE}/{name}")()
            if name == "Session":
                self._sessions.append(context)
            else:
                await call.initial_metadata()
                await context.send_initial_metadata(())

            async def pass_requests() -> None:
                async for body in requests:
                    edited = self._passing(name, body, is_request=True)
                    if edited is not None:
                        await call.write(edited)
                await call.done_writing()

            asking = asyncio.create_task(pass_requests())
            try:
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    while isinstance(body := await call.read(), bytes):
                        edited = self._passing(name, self._as_own(body), is_request=False)
                        if edited is not None:
                            await context.write(edited)
            finally:
                asking.cancel()
                call.cancel()
                await asyncio.gather(asking, return_exceptions=True)

        return handle

    def _passing(self, name: str, body: bytes, *, is_request: bool) -> bytes | None:
        header, frame = _decode(body, is_request=is_request)
        self.passed.append(
            Passed(
                method=name,
                kind=header.WhichOneof("kind") or "",
                is_request=is_request,
                num_bytes=len(body),
                num_rows=frame.tensors[0].shape[0] if frame.tensors else 0,
            )
        )
        edited = (self.edit_request if is_request else self.edit_reply)(name, body)
        return None if self.is_dead else edited

    def _as_own(self, body: bytes) -> bytes:
        """The honest server's answers in this one's name."""
        header, _ = decode_frame(body, pb.SessionReply)
        if not header.HasField("opened"):
            return body
        header.opened.peer_id = self.peer_id
        return encode_frame(header)


def _decode(body: bytes, *, is_request: bool) -> tuple[pb.SessionRequest | pb.SessionReply, Frame]:
    if is_request:
        return decode_frame(body, pb.SessionRequest)
    return decode_frame(body, pb.SessionReply)


def edit_result(change: Callable[[pb.StepResult, Frame], bytes | None]) -> Edit:
    """An edit of the results of steps, which leaves everything else alone."""

    def edit(method: str, body: bytes) -> bytes | None:
        if method != "Session":
            return body
        header, frame = decode_frame(body, pb.SessionReply)
        return change(header.result, frame) if header.HasField("result") else body

    return edit


def let_one_die(number: int, *twins: TamperingServer) -> None:
    """Whichever of the twins is used dies at its message `number` (of a session, push or run); the others live."""

    def die_at(server: TamperingServer) -> Edit:
        num_messages = 0

        def edit(method: str, body: bytes) -> bytes:
            nonlocal num_messages
            num_messages += method in ("Session", "Push", "Forward", "Backward")
            if num_messages == number and not any(twin.is_dead for twin in twins):
                server.die_soon()
            return body

        return edit

    for twin in twins:
        twin.edit_request = die_at(twin)
