"""Finding a route: look servers up, leave out who is not wanted, plan, and wait for blocks nobody serves yet."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.datatypes import ModelHash, PeerId, Route, ServerInfo, format_blocks
from swarm.errors import NoRouteError

if TYPE_CHECKING:
    from swarm.discovery.registry import Registry
    from swarm.routing import Router

__all__ = ["RouteFinder"]

logger = logging.getLogger(__name__)
_POLL_S = 1.0


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
        self._registry = registry
        self._router = router
        self._model_hash = model_hash
        self._model_name = model_name
        self._num_blocks = num_blocks
        self._health = health
        self._config = config
        self._now_s = now_s
        self._servers: list[ServerInfo] = []
        self._looked_up_s = float("-inf")

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return self._num_blocks

    async def servers(self, *, fresh: bool = False) -> list[ServerInfo]:
        """Servers of the model that this client may use; from memory unless old or `fresh`."""
        if fresh or self._now_s() - self._looked_up_s > self._config.lookup_ttl_s:
            self._servers = await self._registry.lookup(self._model_hash, self._num_blocks)
            self._looked_up_s = self._now_s()
        allowed, blocked = self._config.allowed_peers, self._config.blocked_peers
        return [
            server
            for server in self._servers
            if (allowed is None or server.peer_id in allowed) and server.peer_id not in blocked
        ]

    async def find(self, *, wait_s: float, fresh: bool = False) -> Route:
        """A route over all blocks; waits up to `wait_s` for missing servers.

        Peers that failed lately are used only where nobody else serves. Raises NoRouteError naming the blocks.
        """
        deadline_s = self._now_s() + wait_s
        while True:
            servers = await self.servers(fresh=fresh)
            try:
                return self._plan(servers)
            except NoRouteError as error:
                missing = error.missing_blocks
            if self._now_s() >= deadline_s:
                raise NoRouteError(
                    f"nobody serves block{'s' if len(missing) > 1 else ''} {format_blocks(missing)} of "
                    f"{self._model_name} (waited {wait_s:.0f} s); start a server with "
                    f"`swarm serve {self._model_name} --join ADDRESS --blocks {missing[0]}:{missing[-1] + 1}`",
                    missing_blocks=missing,
                )
            logger.info("waiting for a server of blocks %s", format_blocks(missing))
            await asyncio.sleep(min(_POLL_S, max(deadline_s - self._now_s(), 0.05)))
            fresh = True

    async def can_avoid(self, peer: PeerId) -> bool:
        """Whether others, who have not failed lately either, serve all blocks without this peer."""
        servers = await self.servers(fresh=True)
        try:
            self._router.plan_route(servers, self._num_blocks, avoid=self._health.avoided() | {peer})
        except NoRouteError:
            return False
        return True

    def _plan(self, servers: Sequence[ServerInfo]) -> Route:
        """A route without the peers that failed lately, but for those who alone serve some block."""
        avoided = self._health.avoided()
        while True:
            try:
                return self._router.plan_route(servers, self._num_blocks, avoid=avoided)
            except NoRouteError as error:
                needed = {
                    server.peer_id
                    for server in servers
                    if server.peer_id in avoided and any(block in server.span for block in error.missing_blocks)
                }
                if not needed:
                    raise
                avoided -= needed
