"""Finding a route: look servers up, leave out who is not wanted, plan, and wait for blocks nobody serves yet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from swarm.client.adapter_choice import AdapterChoice
from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.server_list import ServerList
from swarm.client.session.recovery import gaps_between, hops_to_keep, plan_around
from swarm.datatypes import Hop, ModelHash, PeerId, Route, ServerInfo, Span, blocks_without_server, format_blocks
from swarm.errors import NoRouteError
from swarm.kvpolicy.settings import FULL_CACHE, find_policy

if TYPE_CHECKING:
    from swarm.client.session.holdings import Holding
    from swarm.discovery.registry import Registry
    from swarm.routing import Router

__all__ = ["RouteFinder"]

logger = logging.getLogger(__name__)
_POLL_S = 1.0
_HURRY_S = 0.5
"""How long a session that lost a server waits for a look-up while it remembers others."""


class RouteFinder:
    """Routes over all blocks of one model; lives on the event loop."""

    def __init__(
        self,
        *,
        registry: Registry,
        router: Router,
        model_hash: ModelHash,
        model_name: str,
        num_blocks: int,
        health: PeerHealth,
        config: ClientConfig,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._list = ServerList(registry, model_hash, num_blocks, config, now_s=now_s)
        self._precision = config.precision
        self._policy = None if config.kv_policy is None else find_policy(config.kv_policy)
        self._adapter = AdapterChoice(config.adapter, model_name=model_name, num_blocks=num_blocks)
        self._router = router
        self._model_name = model_name
        self._num_blocks = num_blocks
        self._health = health
        self._now_s = now_s

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return self._num_blocks

    async def servers(self, *, fresh: bool = False) -> list[ServerInfo]:
        """Servers of the model that this client may use; from memory unless old or `fresh`."""
        if fresh or self._list.is_old:
            await self._list.refresh()
        return self._usable

    @property
    def _usable(self) -> list[ServerInfo]:
        """Those remembered that hold the adapter, if one was chosen."""
        return self._adapter.usable(self._list.remembered)

    async def may_compress(self) -> bool:
        """Whether a session opened now may find servers that do not keep its whole cache as it is."""
        if self._policy is not None:
            return self._policy.compresses
        return any(server.kv_policy != FULL_CACHE.preset for server in await self.servers())

    def remembered(self, peer: PeerId) -> ServerInfo | None:
        """What the last look-up said of a peer that this client may use."""
        return next((server for server in self._usable if server.peer_id == peer), None)

    async def close(self) -> None:
        """End look-ups under way."""
        await self._list.close()

    async def find(
        self, *, wait_s: float, fresh: bool = False, held: Sequence[Holding] = (), like: Sequence[Hop] = ()
    ) -> Route:
        """A route over all blocks; waits up to `wait_s` for missing servers.

        Servers that hold the session's state stay in it where they can. In the place of hops that are in `like` others
        of the same precision and KV policy are preferred, since other servers' outputs differ a little. Peers
        that failed lately are used only where nobody else serves. Raises NoRouteError naming the blocks, BadInputError
        for an adapter that nobody offers.
        """
        complete = self._route_of(held)
        if complete is not None:
            return complete
        if fresh and self._remembers_enough(held):
            fresh = not await self._list.refresh(timeout_s=_HURRY_S)
            if fresh:
                # The server that was lost may be the very one that the look-up is waiting for.
                with contextlib.suppress(NoRouteError):
                    return self._plan_without(self._health.avoided(), self._usable, held, like)
        deadline_s = self._now_s() + wait_s
        while True:
            servers = await self.servers(fresh=fresh)
            self._adapter.settle(self._list.remembered)
            try:
                return self._plan(servers, held, like)
            except NoRouteError as error:
                missing = error.missing_blocks
            if self._now_s() >= deadline_s:
                raise self._no_route(missing, f"waited {wait_s:.0f} s")
            logger.info("waiting for a server of blocks %s", format_blocks(missing))
            await asyncio.sleep(min(_POLL_S, max(deadline_s - self._now_s(), 0.05)))
            fresh = True

    def _route_of(self, held: Sequence[Holding]) -> Route | None:
        """The route of those who hold the session, when none is missing: then nobody needs to be looked up."""
        hops = hops_to_keep(held, self._usable, avoid=self._health.avoided())
        return None if not hops or gaps_between(hops, self._num_blocks) else Route(hops)

    def _remembers_enough(self, held: Sequence[Holding]) -> bool:
        """Whether what is remembered may do; a successor that nobody has looked up yet is worth waiting for."""
        remembered = {server.peer_id for server in self._usable}
        return bool(remembered) and all(item.server is not None or item.peer_id in remembered for item in held)

    def _no_route(self, missing: Sequence[int], what_was_done: str) -> NoRouteError:
        adapter = self._adapter
        option = "" if adapter.name is None else f" --adapter {adapter.name}=FOLDER"
        precisely = ""
        if self._precision is not None:
            option += f" --weights {self._precision}"
            precisely = f" in {self._precision} or more precisely"
        if self._policy is not None and self._policy.compresses:
            option += f" --kv {self._policy.preset}"
            precisely += f" under the KV policy {self._policy.preset}"
        return NoRouteError(
            f"nobody serves block{'s' if len(missing) > 1 else ''} {format_blocks(missing)} of "
            f"{self._model_name}{precisely}{adapter.describe(self._list.remembered)} ({what_was_done}); "
            f"start a server with `swarm serve {self._model_name} --join ADDRESS --blocks "
            f"{missing[0]}:{missing[-1] + 1}{option}`",
            missing_blocks=missing,
        )

    def missing_error(self, *, waited_s: float) -> NoRouteError | None:
        """The error that names the blocks which only peers serve that failed lately; None when there are none."""
        avoided = self._health.avoided()
        live = [server for server in self._usable if server.peer_id not in avoided]
        missing = blocks_without_server(live, self._num_blocks)
        return (
            self._no_route(missing, f"tried for {waited_s:g} s; those who announced them do not answer")
            if missing
            else None
        )

    async def can_avoid(self, peer: PeerId) -> bool:
        """Whether others, who have not failed lately either, serve all blocks without this peer."""
        return await self._has_route(self._health.avoided() | {peer})

    async def can_route_without(self, peers: Collection[PeerId]) -> bool:
        """Whether others serve all blocks without these peers, be they full at the moment or have they failed once."""
        return await self._has_route(self._health.given_up() | set(peers))

    async def _has_route(self, avoid: Collection[PeerId]) -> bool:
        servers = await self.servers(fresh=True)
        try:
            self._plan_span(servers, Span(start=0, end=self._num_blocks), avoid)
        except NoRouteError:
            return False
        return True

    def _plan(self, servers: Sequence[ServerInfo], held: Sequence[Holding], like: Sequence[Hop]) -> Route:
        """A route without the peers that failed lately, but for those who alone serve some block.

        They are allowed one at a time, longest recovered first: of two holders that failed, the one that fails
        again must not be tried for ever while the other one is well by now.
        """
        avoided = self._health.avoided()
        while True:
            try:
                return self._plan_without(avoided, servers, held, like)
            except NoRouteError as error:
                needed = {
                    server.peer_id
                    for server in servers
                    if server.peer_id in avoided and any(block in server.span for block in error.missing_blocks)
                }
                if not needed:
                    raise
                avoided -= {self._health.next_to_try(needed)}

    def _plan_without(
        self, avoided: Collection[PeerId], servers: Sequence[ServerInfo], held: Sequence[Holding], like: Sequence[Hop]
    ) -> Route:
        def plan_span(span: Span, avoid: Collection[PeerId]) -> Route:
            kinds = {self._kind(hop.server) for hop in like if hop.start < span.end and span.start < hop.end}
            alike = [server for server in servers if self._kind(server) in kinds]
            if alike and len(alike) < len(servers):
                with contextlib.suppress(NoRouteError):
                    return self._plan_span(alike, span, avoid)
            return self._plan_span(servers, span, avoid)

        kept = hops_to_keep(held, servers, avoid=avoided)
        return plan_around(kept, self._num_blocks, avoid=avoided, plan_span=plan_span)

    def _plan_span(self, servers: Sequence[ServerInfo], span: Span, avoid: Collection[PeerId]) -> Route:
        return self._router.plan_route(
            servers,
            self._num_blocks,
            start=span.start,
            end=span.end,
            avoid=avoid,
            reliability=self._health.reliability(),
        )

    def _kind(self, server: ServerInfo) -> tuple[str, str]:
        """What decides the numbers a server computes, beside the model; where all do the same, that does not count."""
        return server.weights, server.kv_policy if self._policy is None else self._policy.preset
