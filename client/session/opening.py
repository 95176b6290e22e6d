"""Opening a session at the hops of a route, and leaving them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from swarm.client.session.patience import Patience
from swarm.client.transport.hop_stream import HopEvent, HopStream
from swarm.datatypes import ModelHash, Route
from swarm.errors import DeadlineError, FinalError, PeerFaultError, RetryElsewhereError
from swarm.pb import session_pb2 as pb
from swarm.wire.limits import PROTOCOL_VERSION

if TYPE_CHECKING:
    from swarm.client.config import ClientConfig
    from swarm.client.peer_health import PeerHealth
    from swarm.client.session.blame import Blame
    from swarm.client.transport.channels import ServerChannels

__all__ = ["RouteOpener"]

logger = logging.getLogger(__name__)


class RouteOpener:
    """Opens one session's routes, one after the other; lives on the event loop."""

    def __init__(
        self,
        *,
        model_hash: ModelHash,
        channels: ServerChannels,
        health: PeerHealth,
        blame: Blame,
        patience: Patience,
        config: ClientConfig,
    ) -> None:
        self._model_hash = model_hash
        self._channels = channels
        self._health = health
        self._blame = blame
        self._patience = patience
        self._config = config
        self._session_id = os.urandom(16)
        self._farewells: set[asyncio.Task[None]] = set()
        self.queue_position: int | None = None
        """Our place in the queue of a server that is full; None when we do not wait."""

    async def open(
        self, route: Route, wanted: pb.Open, on_event: Callable[[HopEvent], Awaitable[None]], *, use_push: bool
    ) -> list[HopStream]:
        """Open the session at every hop. Raises the refusal of the first hop that refuses.

        `wanted` says the epoch and the sizes. All hops at once, unless one was full before and there is no way
        around it: then one after the other in block order, waiting in its queue. Everybody who waits holding a
        place does so in that order, so nobody waits for somebody who waits for them.
        """
        streams = [HopStream(hop, index, on_event) for index, hop in enumerate(route.hops)]
        requests = [self._request(wanted, route, index, use_push=use_push) for index in range(len(streams))]
        try:
            if self._health.busy().intersection(hop.peer_id for hop in route.hops):
                await self._open_in_turn(route, streams, requests)
            else:
                opened = await asyncio.gather(*map(self._open_hop, streams, requests), return_exceptions=True)
                problems = [result for result in opened if isinstance(result, BaseException)]
                if problems:
                    # What retrying can not mend is said first.
                    raise min(problems, key=lambda problem: isinstance(problem, RetryElsewhereError))
        except BaseException:
            self.leave(streams)
            raise
        return streams

    def _request(self, wanted: pb.Open, route: Route, index: int, *, use_push: bool) -> pb.Open:
        hop = route.hops[index]
        request = pb.Open(
            session_id=self._session_id,
            model_hash=self._model_hash,
            start=hop.start,
            end=hop.end,
            protocol=PROTOCOL_VERSION,
        )
        request.MergeFrom(wanted)
        if use_push and index + 1 < len(route.hops):
            next_server = route.hops[index + 1].server
            request.next.peer_id = next_server.peer_id
            request.next.addresses.extend(next_server.addresses)
        return request

    async def _open_in_turn(self, route: Route, streams: Sequence[HopStream], requests: Sequence[pb.Open]) -> None:
        """Open hop by hop, waiting in queues."""
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._patience.queueing_left_s):
                for stream, request in zip(streams, requests, strict=True):
                    request.may_wait = True
                    await self._open_hop(stream, request, on_queued=self._note_position)
        except TimeoutError:
            raise DeadlineError(
                f"the servers of {route} stayed full for {self._config.queue_timeout_s:g} s "
                f"(our place in the queue: {self.queue_position}); try again later"
            ) from None
        finally:
            self.queue_position = None
            self._patience.note_queueing(time.monotonic() - started_s)

    def _note_position(self, position: int) -> None:
        logger.info("the server is full; our place in its queue is %d", position)
        self.queue_position = position

    async def _open_hop(
        self, stream: HopStream, request: pb.Open, on_queued: Callable[[int], None] | None = None
    ) -> None:
        hop = stream.hop
        try:
            channel = self._channels.to(hop.server)
            opened = await stream.open(channel, request, timeout_s=self._config.connect_timeout_s, on_queued=on_queued)
            if opened.peer_id != hop.peer_id:
                raise PeerFaultError(f"whoever answers at {hop.server.addresses[0]} is not {hop.peer_id}")
        except RetryElsewhereError as error:
            await self._blame.record(hop, error)
            raise
        except FinalError as refusal:
            raise self._blame.weigh(hop, refusal) from refusal

    def leave(self, streams: Sequence[HopStream]) -> None:
        """Close streams in the background: the session need not wait for servers it leaves."""
        for stream in streams:
            task = asyncio.get_running_loop().create_task(stream.close(say_goodbye=True))
            self._farewells.add(task)
            task.add_done_callback(self._farewells.discard)

    async def wait_until_left(self, *, timeout_s: float) -> None:
        """Wait until the goodbyes are said, or the time is over."""
        if self._farewells:
            await asyncio.wait(self._farewells, timeout=timeout_s)
