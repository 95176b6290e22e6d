"""The servers of one model as they were last looked up; one look-up serves everybody who asks meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm.client.config import ClientConfig
from swarm.client.session.policy_choice import serves_policy
from swarm.datatypes import ModelHash, ServerInfo
from swarm.weights.precision import at_least

if TYPE_CHECKING:
    from swarm.discovery.registry import Registry

__all__ = ["ServerList"]


class ServerList:
    """Lives on the event loop; close it."""

    def __init__(
        self,
        registry: Registry,
        model_hash: ModelHash,
        num_blocks: int,
        config: ClientConfig,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._model_hash = model_hash
        self._num_blocks = num_blocks
        self._config = config
        self._now_s = now_s
        self._servers: list[ServerInfo] = []
        self._looked_up_s = float("-inf")
        self._looking: asyncio.Task[None] | None = None

    @property
    def remembered(self) -> list[ServerInfo]:
        """Those that this client may use, as of the last look-up."""
        return [server for server in self._servers if self._may_use(server)]

    def _may_use(self, server: ServerInfo) -> bool:
        config = self._config
        if config.precision is not None and not at_least(server.weights, config.precision):
            return False
        if not serves_policy(server, config.kv_policy):
            return False
        is_allowed = config.allowed_peers is None or server.peer_id in config.allowed_peers
        return is_allowed and server.peer_id not in config.blocked_peers

    @property
    def is_old(self) -> bool:
        """Whether it is time for another look-up."""
        return self._now_s() - self._looked_up_s > self._config.lookup_ttl_s

    async def refresh(self, *, timeout_s: float | None = None) -> bool:
        """Look servers up; False when that takes longer than `timeout_s`: then it goes on, for those who ask next.

        Raises what the registry raises.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_up())
        looking = self._looking
        await asyncio.wait([looking], timeout=timeout_s)
        if not looking.done():
            looking.add_done_callback(_take_note_of_failure)
            return False
        looking.result()
        return True

    async def _look_up(self) -> None:
        self._servers = await self._registry.lookup(self._model_hash, self._num_blocks)
        self._looked_up_s = self._now_s()

    async def close(self) -> None:
        """End what is under way."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)


def _take_note_of_failure(looking: asyncio.Task[None]) -> None:
    """Nobody waits for this look-up any more; the next one will fail as well if something is wrong."""
    if not looking.cancelled():
        looking.exception()
