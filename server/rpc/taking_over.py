"""Takes over sessions that servers which leave hand over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from swarm.errors import BadInputError, NoRouteError, PeerBusyError, PeerLostError, SwarmError
from swarm.pb import node_pb2 as pb
from swarm.server.engine.page_transfer import PageImport, page_format
from swarm.server.rpc.compressed_offers import compression_terms
from swarm.server.rpc.engine_calls import ask_engine, tell_engine
from swarm.server.rpc.handover_offers import OfferedSession, check_offer, pages_in_a_message
from swarm.wire.failures import failure_from_error
from swarm.wire.frames import Frame, decode_frame, encode_frame
from swarm.wire.limits import MAX_HANDOVER_HEADER_BYTES, MAX_HANDOVER_PAGES_BYTES

if TYPE_CHECKING:
    from swarm.server.engine.engine import Engine
    from swarm.server.engine.page_transfer import PageFormat
    from swarm.server.rpc.request_checks import HostedModel
    from swarm.server.rpc.sessions import SessionTable

__all__ = ["HandoverReceiver"]

logger = logging.getLogger(__name__)

Bytes = bytes
_Kind = TypeVar("_Kind", pb.HandoverOffer, pb.HandoverPages, pb.HandoverEnd)


class HandoverReceiver:
    """Answers hand-overs to one server; lives on the event loop."""

    def __init__(self, model: HostedModel, engine: Engine, sessions: SessionTable) -> None:
        self._model = model
        self._engine = engine
        self._sessions = sessions
        self._num_under_way = 0

    async def receive(self, messages: AsyncIterator[Bytes], send: Callable[[Bytes], Awaitable[None]]) -> None:
        """Take over the session that `messages` hand over, or say why not; half of one leaves nothing behind."""
        limits = self._sessions.limits
        self._num_under_way += 1
        try:
            if self._num_under_way > limits.max_takeovers:
                raise PeerBusyError(f"{limits.max_takeovers} sessions are being handed over here, the most at one time")
            async with asyncio.timeout(limits.handover_timeout_s):
                await self._receive(_Messages(messages, timeout_s=limits.handover_message_timeout_s), send)
        except SwarmError as error:
            logger.info("a session is not taken over: %s", error)
            await send(encode_frame(pb.HandoverReply(failure=failure_from_error(error))))
        except TimeoutError:
            late = PeerLostError(f"the hand-over took longer than {limits.handover_timeout_s:g} s")
            await send(encode_frame(pb.HandoverReply(failure=failure_from_error(late))))
        finally:
            self._num_under_way -= 1

    async def _receive(self, messages: _Messages, send: Callable[[Bytes], Awaitable[None]]) -> None:
        started_s = time.monotonic()
        memory = self._engine.memory
        if memory is None:
            raise NoRouteError("sessions run one at a time here and can not be moved")
        wanted = page_format(memory.store)
        offer, frame = await messages.next(pb.HandoverOffer)
        # In a thread: the tables of many long sequences take a while, and other sessions go on meanwhile.
        offered = await asyncio.to_thread(
            check_offer,
            offer,
            self._model,
            wanted,
            terms=compression_terms(memory, self._sessions.sizes, self._model),
            tables=_read_tables(frame),
        )
        await self._sessions.moves.expect(offered)
        transfer = PageImport(
            memory,
            offered.key,
            offered.span,
            offered.sequences,
            num_pages=offered.num_pages,
            adapter=offered.adapter,
        )
        try:
            await ask_engine(self._engine, transfer.begin)
            await send(encode_frame(pb.HandoverReply(accepted=True)))
            await self._load_pages(messages, transfer, offered, wanted)
            await messages.next(pb.HandoverEnd)
            await ask_engine(self._engine, transfer.finish)
            self._sessions.moves.take_over(offered)
        except BaseException:
            tell_engine(self._engine, transfer.abandon)
            self._sessions.moves.expect_no_more(offered)
            raise
        logger.info(
            "session %s taken over: %d tokens, %d bytes, %d ms",
            offered.session_id.hex()[:8],
            offered.num_tokens,
            offered.num_pages * wanted.page_bytes,
            (time.monotonic() - started_s) * 1000,
        )
        await send(encode_frame(pb.HandoverReply(accepted=True)))

    async def _load_pages(
        self, messages: _Messages, transfer: PageImport, offered: OfferedSession, wanted: PageFormat
    ) -> None:
        first = 0
        while first < offered.num_pages:
            header, frame = await messages.next(pb.HandoverPages)
            if len(frame.tensors) != 1 or header.first != first:
                raise BadInputError(f"pages from {first} on should have come, in one tensor, not from {header.first}")
            tensor = frame.tensors[0]
            if len(tensor.shape) != 2 or tensor.shape[1] != wanted.page_values or tensor.dtype != wanted.dtype:
                raise BadInputError(
                    f"pages are {wanted.dtype} [pages, {wanted.page_values}], not {tensor.dtype} {tensor.shape}"
                )
            count = tensor.shape[0]
            if not 1 <= count <= min(offered.num_pages - first, pages_in_a_message(wanted)):
                raise BadInputError(f"{count} pages came in one message, with {offered.num_pages - first} to come")
            await ask_engine(self._engine, partial(transfer.load, first, frame.tensor(0)))
            first += count


def _read_tables(frame: Frame) -> npt.NDArray[np.int32] | None:
    """What came with an offer; None when nothing did. Raises BadInputError."""
    if not frame.tensors:
        return None
    tensor = frame.tensors[0]
    size_bytes = tensor.payload_end - tensor.payload_start
    if tensor.dtype != "int32" or len(tensor.shape) != 1 or size_bytes > MAX_HANDOVER_PAGES_BYTES:
        raise BadInputError(
            f"tables are int32 [numbers] of at most {MAX_HANDOVER_PAGES_BYTES} bytes, not {tensor.dtype} {tensor.shape}"
        )
    tables: npt.NDArray[np.int32] = frame.tensor(0).numpy()
    return tables


class _Messages:
    """What the other server says, each message within its time."""

    def __init__(self, messages: AsyncIterator[Bytes], *, timeout_s: float) -> None:
        self._messages = aiter(messages)
        self._timeout_s = timeout_s

    async def next(self, kind: type[_Kind]) -> tuple[_Kind, Frame]:
        """The next message, which must be of this kind. Raises PeerLostError, BadInputError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                body: Bytes | None = await anext(self._messages, None)
        except TimeoutError:
            raise PeerLostError(f"nothing more came for {self._timeout_s:g} s") from None
        if body is None:
            raise PeerLostError("the other server hung up")
        header, frame = decode_frame(body, pb.HandoverRequest, max_header_bytes=MAX_HANDOVER_HEADER_BYTES)
        name = header.WhichOneof("kind")
        message = getattr(header, name) if name is not None else None
        if not isinstance(message, kind):
            raise BadInputError(f"{kind.DESCRIPTOR.name} should have come, not {name}")
        return message, frame
