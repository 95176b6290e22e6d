"""How others see a server: it announces itself now and then, and withdraws when it goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from swarm.datatypes import PeerId, ServerInfo, ServerState, Span
from swarm.errors import PeerLostError

if TYPE_CHECKING:
    from swarm.discovery.registry import Registry
    from swarm.identity import Identity
    from swarm.models import ModelSource
    from swarm.server.node_config import NodeConfig

__all__ = ["Presence", "announced_address", "describe_joining", "join_dht"]

logger = logging.getLogger(__name__)
_JOIN_TIMEOUT_S: Final = 10.0
_WITHDRAW_TIMEOUT_S: Final = 3.0
_PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0)
"""Between tries to announce."""


class Presence:
    """Announces what `describe` returns; a record lives for two periods."""

    def __init__(self, registry: Registry, describe: Callable[[], ServerInfo], *, period_s: float) -> None:
        self._registry = registry
        self._describe = describe
        self._period_s = period_s
        self._now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def announce(self) -> None:
        """Now. Raises PeerLostError when nobody could be told after a few tries: a busy machine may miss one."""
        for pause_s in _PAUSES_S:
            try:
                await self._registry.announce(self._describe(), ttl_s=2 * self._period_s)
                return
            except PeerLostError as error:
                logger.info("could not announce, trying again in %g s: %s", pause_s, error)
            await asyncio.sleep(pause_s)
        await self._registry.announce(self._describe(), ttl_s=2 * self._period_s)

    def announce_soon(self) -> None:
        """Without waiting for it."""
        self._now.set()

    def keep_announcing(self) -> None:
        """From now on, every period; harmless when repeated."""
        if self._task is None:
            self._task = asyncio.create_task(self._announce_forever(), name="announce")

    async def end(self) -> None:
        """Stop announcing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def withdraw(self) -> None:
        """Tell others that the server has left; not being able to does not matter, as the record expires."""
        try:
            async with asyncio.timeout(_WITHDRAW_TIMEOUT_S):
                await self._registry.withdraw(self._describe())
        except Exception as error:
            logger.info("could not withdraw: %s", error)

    async def _announce_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._period_s):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()
            try:
                await self.announce()
            except Exception as error:  # the next period tries again; sessions do not depend on it
                logger.warning("could not announce: %s", error)


async def join_dht(identity: Identity, config: NodeConfig) -> Registry:
    """Join the swarm that the config names, or begin a new one. Raises JoinError, AddressInUseError."""
    from swarm.discovery.dht import DhtRegistry
    from swarm.discovery.lookup_client import find_dht_addresses

    initial_peers = await find_dht_addresses(config.join, timeout_s=_JOIN_TIMEOUT_S)
    return await DhtRegistry.start(identity, host=config.host, port=config.dht_port, initial_peers=initial_peers)


def describe_joining(source: ModelSource, config: NodeConfig, *, peer_id: PeerId) -> ServerInfo:
    """What a server says before it has loaded anything."""
    return ServerInfo(
        peer_id=peer_id,
        model_hash=source.model_hash,
        model_name=source.name,
        num_blocks=source.num_blocks,
        span=config.span or Span(start=0, end=1),  # not announced until it has chosen
        state=ServerState.JOINING,
        weights=config.weights,
        kv_policy=config.policy.preset,
        version=_version(),
    )


def announced_address(config: NodeConfig, *, port: int) -> str:
    """Where others reach a server that listens on `port`."""
    from swarm.discovery.addresses import advertised_host

    host = config.announce_host or advertised_host(config.host)
    port = config.announce_port or port
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("swarm-inference")
    except PackageNotFoundError:
        return "0"
