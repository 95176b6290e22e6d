"""Hands one session over to another server: its pages, and what it takes to judge its next step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from swarm.datatypes import ServerInfo
from swarm.errors import NoRouteError, PeerFaultError, PeerLostError, SessionClosedError
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvpolicy.streaming import settle
from swarm.pb import node_pb2 as pb
from swarm.server.engine.page_transfer import PageExport, page_format
from swarm.server.rpc.channels import ChannelPool
from swarm.server.rpc.compressed_offers import compression_terms
from swarm.server.rpc.engine_calls import ask_engine, tell_engine
from swarm.server.rpc.handover_offers import OfferedSession, pages_in_a_message, write_offer
from swarm.wire.failures import error_from_failure, error_from_rpc
from swarm.wire.frames import decode_frame, encode_frame
from swarm.wire.limits import MAX_HANDOVER_HEADER_BYTES, MAX_HANDOVER_PAGES_BYTES
from swarm.wire.methods import HANDOVER

if TYPE_CHECKING:
    from swarm.server.engine.engine import Engine
    from swarm.server.engine.sequence_pages import HeldPages
    from swarm.server.engine.session_memory import SessionMemory
    from swarm.server.rpc.request_checks import HostedModel
    from swarm.server.rpc.server_session import ServerSession
    from swarm.server.rpc.sessions import SessionTable

__all__ = ["HandoverSender"]

logger = logging.getLogger(__name__)

_MAX_COPYING: Final = 4
"""Sessions being copied at one time: more would only share the same uplink."""
_MAX_IN_LINE: Final = 12
"""Sessions that take no new steps for it: those being copied, and some whose last step may take its time."""


class HandoverSender:
    """Hands sessions of one server over; lives on the event loop. `close` it when done."""

    def __init__(self, model: HostedModel, engine: Engine, sessions: SessionTable) -> None:
        self._model = model
        self._engine = engine
        self._sessions = sessions
        self._channels = ChannelPool()
        self._in_line = asyncio.Semaphore(_MAX_IN_LINE)
        self._copying = asyncio.Semaphore(_MAX_COPYING)

    async def hand_over(self, session: ServerSession, successor: ServerInfo) -> None:
        """Move a session between two of its steps; its client is told. Until then, and on failure, it stays here.

        Raises RetryElsewhereError and others of our errors when the successor does not take it, and
        SessionClosedError when it has ended or gone on to another epoch.
        """
        memory = self._engine.memory
        if memory is None:
            raise NoRouteError("sessions run one at a time here and can not be moved")
        async with self._in_line:
            if session.held_back is not None or session.is_over:
                raise SessionClosedError("the session has ended, or is being handed over already")
            await self._hand_over(session, successor, memory)

    async def _hand_over(self, session: ServerSession, successor: ServerInfo, memory: SessionMemory) -> None:
        timeout_s = self._sessions.limits.handover_timeout_s
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._sessions.moves.hold_back(session)
                async with self._copying:
                    _check_open(session)
                    _check_between_inputs(session)
                    num_bytes = await self._copy(session, successor, memory)
            _check_open(session)
        except TimeoutError as error:
            await self._sessions.moves.let_go(session)
            raise PeerLostError(f"the hand-over took longer than {timeout_s:g} s") from error
        except BaseException:
            await self._sessions.moves.let_go(session)
            raise
        num_tokens = session.mirror.num_positions
        self._sessions.moves.hand_off(session, successor.peer_id)
        logger.info(
            "session %s handed over to %s: %d tokens, %d bytes, %d ms",
            session.name,
            successor.peer_id[-8:],
            num_tokens,
            num_bytes,
            (time.monotonic() - started_s) * 1000,
        )

    async def _copy(self, session: ServerSession, successor: ServerInfo, memory: SessionMemory) -> int:
        """Copy a session that no step changes; returns the bytes of its pages."""
        export = PageExport(memory, session.key, session.mirror.positions)
        try:
            sequences = await ask_engine(self._engine, export.begin)
            _check_tails(session, sequences)
            offered = OfferedSession(
                session_id=session.session_id,
                span=session.span,
                mirror=session.mirror,
                sequences=sequences,
                num_pages=len(export.pages),
                expected_tokens=session.expected_tokens,
                adapter=session.adapter,
                is_client_away=session.send is None,
            )
            return await self._send(session, offered, export, successor, memory)
        finally:
            tell_engine(self._engine, export.release)

    async def _send(
        self,
        session: ServerSession,
        offered: OfferedSession,
        export: PageExport,
        successor: ServerInfo,
        memory: SessionMemory,
    ) -> int:
        pages = page_format(memory.store)
        terms = compression_terms(memory, self._sessions.sizes, self._model)
        offer, tables = write_offer(offered, self._model, pages, terms)
        tables_bytes = tables.nbytes if tables is not None else 0
        if offer.ByteSize() + 16 > MAX_HANDOVER_HEADER_BYTES or tables_bytes > MAX_HANDOVER_PAGES_BYTES:
            raise NoRouteError(f"the session is too large to be offered: it holds {offered.num_pages} pages")
        conversation = _Conversation(
            successor, self._channels, timeout_s=self._sessions.limits.handover_message_timeout_s
        )
        try:
            await conversation.open()
            await conversation.write(_encode_offer(offer, tables))
            await conversation.read_acceptance()
            step = pages_in_a_message(pages)
            for first in range(0, offered.num_pages, step):
                contents = await ask_engine(self._engine, partial(export.read, first, step))
                header = pb.HandoverRequest(pages=pb.HandoverPages(first=first))
                await conversation.write(encode_frame(header, [contents]))
                _check_open(session)
            await conversation.write(encode_frame(pb.HandoverRequest(end=pb.HandoverEnd())))
            await conversation.read_acceptance()
        finally:
            await conversation.close()
        return offered.num_pages * pages.page_bytes

    async def close(self) -> None:
        """Close all connections."""
        await self._channels.close()


class _Conversation:
    """A hand-over's stream to a successor; every wait in it has its limit."""

    def __init__(self, successor: ServerInfo, channels: ChannelPool, *, timeout_s: float) -> None:
        self._successor = successor
        self._channels = channels
        self._timeout_s = timeout_s
        self._address: str | None = None
        self._call: grpc.aio.StreamStreamCall | None = None

    async def open(self) -> None:
        """Connect to the first address that answers. Raises PeerLostError."""
        peer, addresses = self._successor.peer_id, self._successor.addresses
        reason = "it announced no address"
        for address in addresses:
            self._address = address
            self._call = self._channels.acquire(address).stream_stream(HANDOVER)()
            try:
                async with asyncio.timeout(self._timeout_s / len(addresses)):
                    await self._call.initial_metadata()
                if not self._call.done():
                    return
                reason = f"{address} hung up"
            except TimeoutError:
                reason = f"{address} did not answer in time"
            except grpc.RpcError as error:
                reason = str(error_from_rpc(error, peer=peer))
            await self.close()
        raise PeerLostError(f"the successor {peer} can not be reached: {reason}")

    async def write(self, body: bytes) -> None:
        """Raises PeerLostError, or what the successor answered instead of listening."""
        assert self._call is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._call.write(body)
        except TimeoutError:
            raise PeerLostError(f"the successor took nothing for {self._timeout_s:g} s") from None
        except (grpc.RpcError, asyncio.InvalidStateError):
            await self.read_acceptance()  # it says why
            raise PeerFaultError("the successor hung up") from None

    async def read_acceptance(self) -> None:
        """Wait for the successor's consent. Raises its refusal, or PeerLostError."""
        assert self._call is not None
        peer = self._successor.peer_id
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._call.read()
        except TimeoutError:
            raise PeerLostError(f"the successor said nothing for {self._timeout_s:g} s") from None
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=peer) from error
        if not isinstance(body, bytes):
            raise PeerLostError(f"the successor {peer} hung up")
        reply, _ = decode_frame(body, pb.HandoverReply, max_tensors=0)
        if not reply.accepted:
            raise error_from_failure(reply.failure, peer=peer)

    async def close(self) -> None:
        """End the stream; the successor drops what is not complete."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._address is not None:
            address, self._address = self._address, None
            await self._channels.release(address)


def _encode_offer(offer: pb.HandoverOffer, tables: npt.NDArray[np.int32] | None) -> bytes:
    import torch

    return encode_frame(pb.HandoverRequest(offer=offer), [torch.from_numpy(tables)] if tables is not None else [])


def _check_open(session: ServerSession) -> None:
    if session.is_over:
        raise SessionClosedError("the session has ended, or gone on to another epoch")


def _check_between_inputs(session: ServerSession) -> None:
    """What a compressed sequence is judged by at its input's end is not handed over; it may have ended next time."""
    if any(tail.is_staging for tail in session.mirror.tails):
        raise NoRouteError("the session is in the middle of an input; it can be handed over when that has ended")


def _check_tails(session: ServerSession, sequences: Mapping[int, HeldPages]) -> None:
    """The successor's mirror will stand where the pages do, so that must be where this one stands."""
    policy = session.mirror.policy
    for number, part in sequences.items():
        if isinstance(part, CompressedState) != policy.compresses:
            raise NoRouteError("the session is kept otherwise than it was opened")
        if isinstance(part, CompressedState):
            # An event that is due may have happened on one side only: the step that it was due for was given up.
            held, expected = (settle(policy, tail, part.length) for tail in (part.tail, session.mirror.tail(number)))
            if held != expected:
                raise NoRouteError(f"sequence {number} is compressed up to {part.tail}, not {expected}")
