"""A client's connection to the swarm: one loop, one registry, and the sessions and runs that use them."""

# Letters: T tokens of one sequence, H hidden size.

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from swarm.client.blocks import BlockSession, RemoteBlocks, SequenceInput
from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerExperience, PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.client.session.driver import SessionDriver
from swarm.client.session.parts import SequenceRequest
from swarm.client.stateless import RunAllBlocks, StatelessRunner
from swarm.client.transport.background import BackgroundLoop
from swarm.client.transport.channels import ServerChannels
from swarm.datatypes import Hop, ModelHash, ServerInfo
from swarm.errors import BadInputError, SessionClosedError
from swarm.routing import FewestHopsRouter

if TYPE_CHECKING:
    from swarm.discovery.registry import Registry

__all__ = ["SwarmBlocks", "SwarmSession", "connect"]

logger = logging.getLogger(__name__)


class SwarmBlocks(RemoteBlocks):
    """All blocks of one model over the network. Close it, or use it as a context manager."""

    def __init__(
        self,
        *,
        loop: BackgroundLoop,
        registry: Registry,
        model_hash: ModelHash,
        model_name: str,
        num_blocks: int,
        config: ClientConfig,
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._model_hash = model_hash
        self._config = config
        self._num_blocks = num_blocks
        self._channels = ServerChannels()
        self._health = PeerHealth(ban_s=config.ban_s, now_s=time.monotonic)
        self._finder = RouteFinder(
            registry=registry,
            router=FewestHopsRouter(),
            model_hash=model_hash,
            model_name=model_name,
            num_blocks=num_blocks,
            health=self._health,
            config=config,
        )
        self._runner = StatelessRunner(
            model_hash=model_hash,
            finder=self._finder,
            channels=self._channels,
            health=self._health,
            config=config,
        )
        self._sessions: weakref.WeakSet[SwarmSession] = weakref.WeakSet()
        self._is_closed = False

    def __enter__(self) -> SwarmBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def may_compress(self) -> bool:
        return self._loop.run(self._finder.may_compress())

    def servers(self) -> list[ServerInfo]:
        """Servers of this model that are known now."""
        return self._loop.run(self._finder.servers(fresh=True))

    def peer_health(self) -> list[PeerExperience]:
        """This client's own experience with each peer, over all sessions and runs of this connection."""

        async def read() -> list[PeerExperience]:
            return self._health.experience()

        return self._loop.run(read())

    def open_session(self, *, max_length: int, num_sequences: int = 1) -> SwarmSession:
        """A new session; servers are contacted at its first step. Raises SessionClosedError after close()."""
        if self._is_closed:
            raise SessionClosedError("this connection to the swarm is closed; connect anew")
        driver = SessionDriver(
            model_hash=self._model_hash,
            finder=self._finder,
            channels=self._channels,
            health=self._health,
            config=self._config,
            max_length=max_length,
            num_sequences=num_sequences,
        )
        session = SwarmSession(driver, self._loop)
        self._sessions.add(session)
        return session

    def run_stateless(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See RemoteBlocks; sequences [T, H] travel together."""
        if self._is_closed:
            raise SessionClosedError("this connection to the swarm is closed; connect anew")
        check_finite(hidden)
        counts = [rows.shape[0] for rows in hidden]
        outputs: torch.Tensor = RunAllBlocks.apply(  # type: ignore[no-untyped-call]
            torch.cat(list(hidden)), counts, self._runner, self._loop.run
        )
        return list(outputs.split(counts))

    def close(self) -> None:
        """Close all sessions and connections; harmless when repeated."""
        if self._is_closed:
            return
        self._is_closed = True
        sessions = list(self._sessions)

        async def close_sessions() -> None:
            await asyncio.gather(*(session.close_on_loop() for session in sessions))

        self._loop.run(close_sessions())
        self._loop.run(self._finder.close())
        self._loop.run(self._channels.close())
        self._loop.run(self._registry.close())
        self._loop.stop()


class SwarmSession(BlockSession):
    """A session over the network."""

    def __init__(self, driver: SessionDriver, loop: BackgroundLoop) -> None:
        self._driver = driver
        self._loop = loop
        self._is_closed = False
        # Who forgets to close a session must not hold servers' memory until their own process ends.
        weakref.finalize(self, loop.spawn, driver.close).atexit = False

    def __repr__(self) -> str:
        return f"<SwarmSession {self._driver.machine!r} route {self._driver.route}>"

    @property
    def max_length(self) -> int:
        return self._driver.machine.max_length

    @property
    def lengths(self) -> tuple[int, ...]:
        return self._driver.machine.lengths

    @property
    def route(self) -> tuple[Hop, ...]:
        return self._driver.route.hops if self._driver.route is not None else ()

    @property
    def num_failovers(self) -> int:
        return self._driver.num_failovers

    def room_to_take_back(self, sequence: int, start: int) -> int | None:
        """See BlockSession."""
        return self._loop.run(self._driver.room_to_take_back(sequence, start))

    def step(self, inputs: Sequence[SequenceInput], *, last_only: bool = False) -> list[torch.Tensor]:
        """See BlockSession."""
        if self._is_closed:
            raise SessionClosedError("the session is closed; open a new one with model.session()")
        if not inputs:
            return []
        check_finite([item.hidden for item in inputs])
        requests = [SequenceRequest(item.sequence, item.parent, item.start, item.hidden.detach()) for item in inputs]
        return self._loop.run(self._driver.step(requests, last_only=last_only))

    def close(self) -> None:
        """See BlockSession."""
        if not self._is_closed:
            self._loop.run(self.close_on_loop())

    async def close_on_loop(self) -> None:
        """The same, from the connection's own loop."""
        self._is_closed = True
        await self._driver.close()


def check_finite(hidden: Sequence[torch.Tensor]) -> None:
    """Refuse what every server would refuse, so that what a server refuses speaks against the server.

    Raises BadInputError for values that are infinite or no numbers.
    """
    for index, rows in enumerate(hidden):
        if not rows.isfinite().all():
            raise BadInputError(f"the inputs of sequence {index} hold values that are infinite or no numbers")


def connect(
    *,
    model_hash: ModelHash,
    model_name: str,
    num_blocks: int,
    initial_peers: Sequence[str],
    config: ClientConfig | None = None,
) -> SwarmBlocks:
    """Join through any of `initial_peers` (DHT or grpc:// addresses) and give access to a model's blocks.

    Raises JoinError when nobody answers, BadInputError for an address that is none, MissingDependencyError
    when a DHT address is given without hivemind.
    """
    from swarm.discovery import open_registry

    config = config or ClientConfig()
    loop = BackgroundLoop()
    try:
        registry = loop.run(open_registry(initial_peers, timeout_s=config.connect_timeout_s))
    except BaseException:
        loop.stop()
        raise
    return SwarmBlocks(
        loop=loop,
        registry=registry,
        model_hash=model_hash,
        model_name=model_name,
        num_blocks=num_blocks,
        config=config,
    )
