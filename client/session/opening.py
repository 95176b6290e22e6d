"""Opening a session at the hops of a route."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.client.adapter_choice import adapter_hash_on
from swarm.client.session.patience import Patience
from swarm.client.session.policy_choice import PolicyChoice
from swarm.client.transport.hop_stream import HopEvent, HopStream
from swarm.datatypes import ModelHash, Route
from swarm.errors import DeadlineError, PeerFaultError, RetryElsewhereError, SwarmError
from swarm.pb import session_pb2 as pb
from swarm.wire.limits import PROTOCOL_VERSION

if TYPE_CHECKING:
    from swarm.client.config import ClientConfig
    from swarm.client.peer_health import PeerHealth
    from swarm.client.session.holdings import Holdings
    from swarm.client.session.inquiry import Inquiry
    from swarm.client.session.streams import SessionStreams
    from swarm.client.transport.channels import ServerChannels
    from swarm.datatypes import Hop
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["OpenedHop", "RouteOpener"]

logger = logging.getLogger(__name__)
_DISMISS_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class OpenedHop:
    """A hop at which the session is open."""

    stream: HopStream
    opened: pb.Opened
    has_kept: bool
    """Whether it stands where we asked it to stand."""
    policy: KVPolicy
    """Under which it keeps the session's cache."""


class RouteOpener:
    """Opens one session's routes, one after the other; lives on the event loop."""

    def __init__(
        self,
        *,
        model_hash: ModelHash,
        channels: ServerChannels,
        health: PeerHealth,
        inquiry: Inquiry,
        holdings: Holdings,
        streams: SessionStreams,
        patience: Patience,
        config: ClientConfig,
    ) -> None:
        self._model_hash = model_hash
        self._channels = channels
        self._health = health
        self._inquiry = inquiry
        self._holdings = holdings
        self._streams = streams
        self._patience = patience
        self._config = config
        self._policy_choice = PolicyChoice(config.kv_policy)
        self._session_id = os.urandom(16)
        self.queue_position: int | None = None
        """Our place in the queue of a server that is full; None when we do not wait."""

    async def open(
        self,
        route: Route,
        wanted: pb.Open,
        positions: Sequence[int],
        on_event: Callable[[HopEvent], Awaitable[None]],
        *,
        use_push: bool,
    ) -> list[OpenedHop]:
        """Open the session at every hop. Raises the refusal of the first hop that refuses.

        `wanted` says the epoch and the sizes; `positions` are those the session stands at, per sequence. All hops at
        once, unless one was full before and there is no way around it: then one after the other in block order,
        waiting in its queue. Everybody who waits holding a place does so in that order, so nobody waits for somebody
        who waits for them; therefore places further on are given up before the wait.
        """
        streams = [HopStream(hop, index, on_event) for index, hop in enumerate(route.hops)]
        busy = self._health.busy()
        full = [index for index, hop in enumerate(route.hops) if hop.peer_id in busy and self._holdings.of(hop) is None]
        if full:
            further_on = [hop.peer_id for hop in route.hops[full[0] :]]
            for peer in further_on:
                self._holdings.forget(peer)
            self._streams.leave(further_on)
        requests = [self._request(wanted, route, index, use_push=use_push) for index in range(len(streams))]
        if full:
            replies = await self._open_in_turn(route, streams, requests)
        else:
            opened = await asyncio.gather(*map(self._open_hop, streams, requests), return_exceptions=True)
            problems = [result for result in opened if isinstance(result, BaseException)]
            if problems:
                # What retrying can not mend is said first.
                raise min(problems, key=lambda problem: isinstance(problem, RetryElsewhereError))
            replies = [result for result in opened if isinstance(result, pb.Opened)]
        hops = [
            OpenedHop(
                stream=stream,
                opened=reply,
                has_kept=request.HasField("keep") and reply.kept and _same(reply.positions, positions),
                policy=self._policy_choice.check(request.kv_policy, reply.kv_policy, stream.hop.peer_id),
            )
            for stream, request, reply in zip(streams, requests, replies, strict=True)
        ]
        for item in hops:
            self._policy_choice.note(item.stream.hop.peer_id, item.stream.hop.span, item.policy)
        return hops

    def _request(self, wanted: pb.Open, route: Route, index: int, *, use_push: bool) -> pb.Open:
        hop = route.hops[index]
        holding = self._holdings.of(hop)
        request = pb.Open(
            session_id=self._session_id,
            model_hash=self._model_hash,
            start=hop.start,
            end=hop.end,
            adapter=adapter_hash_on(hop.server, self._config.adapter),
            protocol=PROTOCOL_VERSION,
            kv_policy=self._policy_choice.ask(hop.server, hop.span, keeps=holding is not None),
        )
        request.MergeFrom(wanted)
        if holding is not None:
            request.keep.epoch, request.keep.step = holding.epoch, holding.step
        if use_push and index + 1 < len(route.hops):
            next_server = route.hops[index + 1].server
            request.next.peer_id = next_server.peer_id
            request.next.addresses.extend(next_server.addresses)
        return request

    async def dismiss(self, hop: Hop, wanted: pb.Open) -> None:
        """Free a copy of the session that nobody will come for; harmless where there is none."""

        async def ignore(event: HopEvent) -> None:
            pass

        stream = HopStream(hop, 0, ignore)
        request = self._request(wanted, Route((hop,)), 0, use_push=False)
        try:
            await stream.open(self._channels.to(hop.server), request, timeout_s=_DISMISS_TIMEOUT_S)
        except SwarmError as error:  # it ends by itself, only later
            logger.debug("a copy at %s could not be dismissed: %s", hop.peer_id, error)
        finally:
            await stream.close(say_goodbye=True)

    async def _open_in_turn(
        self, route: Route, streams: Sequence[HopStream], requests: Sequence[pb.Open]
    ) -> list[pb.Opened]:
        """Open hop by hop, waiting in queues."""
        started_s = time.monotonic()
        replies: list[pb.Opened] = []
        try:
            async with asyncio.timeout(self._patience.queueing_left_s):
                for stream, request in zip(streams, requests, strict=True):
                    request.may_wait = True
                    replies.append(await self._open_hop(stream, request, on_queued=self._note_position))
        except TimeoutError:
            raise DeadlineError(
                f"the servers of {route} stayed full for {self._config.queue_timeout_s:g} s "
                f"(our place in the queue: {self.queue_position}); try again later"
            ) from None
        finally:
            self.queue_position = None
            self._patience.note_queueing(time.monotonic() - started_s)
        return replies

    def _note_position(self, position: int) -> None:
        logger.info("the server is full; our place in its queue is %d", position)
        self.queue_position = position

    async def _open_hop(
        self, stream: HopStream, request: pb.Open, on_queued: Callable[[int], None] | None = None
    ) -> pb.Opened:
        hop = stream.hop
        has_waited = False

        def note_queued(position: int) -> None:
            nonlocal has_waited
            has_waited = True
            assert on_queued is not None
            on_queued(position)

        started_s = time.monotonic()
        try:
            opened = await self._inquiry.watch_over(
                hop,
                stream.open(
                    self._channels.to(hop.server),
                    request,
                    timeout_s=min(self._config.connect_timeout_s, max(self._patience.left_s, 0.1)),
                    on_queued=note_queued if on_queued is not None else None,
                ),
            )
            if opened.peer_id != hop.peer_id:
                raise PeerFaultError(f"whoever answers at {hop.server.addresses[0]} is not {hop.peer_id}")
            self._policy_choice.check(request.kv_policy, opened.kv_policy, hop.peer_id)
        except SwarmError as error:
            found = await self._inquiry.into_refused_open(hop, error)
            if found is error:
                raise
            raise found from error
        finally:
            if stream.is_open:  # also when we were interrupted in the very moment: somebody must say goodbye
                self._streams.add(stream)
        if not has_waited:
            self._health.record_answer(hop.peer_id, time.monotonic() - started_s)
        return opened


def _same(held: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether positions per sequence are equal; a sequence left out at the end holds none."""
    width = max(len(held), len(wanted))
    return [*held, *[0] * (width - len(held))] == [*wanted, *[0] * (width - len(wanted))]
