"""Pushing a session's outputs to its next hop over one stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from swarm.datatypes import PeerId
from swarm.errors import PeerLostError, SwarmError
from swarm.pb import session_pb2 as pb
from swarm.server.rpc.channels import ChannelPool
from swarm.wire.failures import error_from_failure, error_from_rpc
from swarm.wire.frames import decode_frame
from swarm.wire.methods import PUSH

__all__ = ["NextHop", "PushStream"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NextHop:
    """Where a session's outputs go."""

    peer_id: PeerId
    addresses: Sequence[str]


class PushStream:
    """One session's stream to its next hop, opened at the first write.

    Once broken it stays broken: the client relays from then on, and a new epoch brings a new stream.
    `on_problem` is called, with the sentence to show, when the next hop refuses or loses the stream.
    """

    def __init__(
        self, next_hop: NextHop, channels: ChannelPool, *, timeout_s: float, on_problem: Callable[[str], None]
    ) -> None:
        self._next_hop = next_hop
        self._channels = channels
        self._timeout_s = timeout_s
        self._on_problem = on_problem
        self._address: str | None = None
        self._call: grpc.aio.StreamStreamCall | None = None
        self._reader: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why the stream is broken; None while it works."""

    def __repr__(self) -> str:
        return f"<PushStream to {self._next_hop.peer_id} at {self._address} {self.problem or 'ok'}>"

    async def write(self, frame: bytes) -> None:
        """Send one step on. Raises PeerLostError when the next hop can not be reached in time."""
        if self.problem is not None:
            raise PeerLostError(self.problem)
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._call is None:
                    await self._connect()
                assert self._call is not None
                await self._call.write(frame)
        except TimeoutError:
            self._break(f"the next hop {self._next_hop.peer_id} took longer than {self._timeout_s:g} s")
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            reason = error_from_rpc(error, peer=self._next_hop.peer_id) if isinstance(error, grpc.RpcError) else error
            self._break(str(reason))
        except PeerLostError as error:  # no address answered
            self._break(str(error))
        if self.problem is not None:
            raise PeerLostError(self.problem)

    async def _connect(self) -> None:
        """Open the stream at the first address that answers."""
        reason = "it announced no address"
        for address in self._next_hop.addresses:
            channel = self._channels.acquire(address)
            call = channel.stream_stream(PUSH)()
            try:
                # An address that swallows everything must leave time for the next one.
                async with asyncio.timeout(self._timeout_s / len(self._next_hop.addresses)):
                    # The receiver sends its headers at once, so waiting for them tells whether it is there.
                    await call.initial_metadata()
            except TimeoutError:
                reason = f"{address} did not answer in time"
                call.cancel()
                await self._channels.release(address)
            except grpc.RpcError as error:
                reason = str(error_from_rpc(error, peer=self._next_hop.peer_id))
                await self._channels.release(address)
            except asyncio.CancelledError:
                call.cancel()
                await self._channels.release(address)
                raise
            else:
                if call.done():
                    reason = f"{address} hung up"
                    await self._channels.release(address)
                    continue
                self._address, self._call = address, call
                self._reader = asyncio.create_task(self._read(call))
                return
        raise PeerLostError(f"the next hop {self._next_hop.peer_id} can not be reached: {reason}")

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        """The next hop writes only to refuse; the end of the stream is a loss."""
        reason: SwarmError = PeerLostError(f"the next hop {self._next_hop.peer_id} hung up")
        try:
            body = await call.read()
            if isinstance(body, bytes):
                header, _ = decode_frame(body, pb.SessionReply, max_tensors=0)
                reason = error_from_failure(header.failure, peer=self._next_hop.peer_id)
        except grpc.RpcError as error:
            reason = error_from_rpc(error, peer=self._next_hop.peer_id)
        except SwarmError as error:
            reason = error
        if self.problem is None:
            self._break(str(reason))
            self._on_problem(str(reason))

    def _break(self, problem: str) -> None:
        logger.info("push to %s broke: %s", self._next_hop.peer_id, problem)
        self.problem = problem

    async def close(self) -> None:
        """End the stream and release its channel."""
        self.problem = self.problem or "the session has ended"
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._address is not None:
            address, self._address = self._address, None
            await self._channels.release(address)
