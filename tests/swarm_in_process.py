"""A swarm in the test's own process: real servers and clients over real gRPC, discovery in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from swarm.client.config import ClientConfig
from swarm.client.connection import SwarmBlocks, connect
from swarm.client.transport.background import BackgroundLoop
from swarm.datatypes import ServerInfo, Span
from swarm.discovery import MemoryNetwork, MemoryRegistry
from swarm.identity import Identity
from swarm.models import ModelSource, resolve_model
from swarm.server.node import Node, NodeConfig

__all__ = ["InProcessSwarm", "is_idle", "wait_until"]

_Result = TypeVar("_Result")


class InProcessSwarm:
    """Servers of one model on one event loop in a thread. Use it in a `with` block."""

    def __init__(self, model_folder: Path | str, spans: Sequence[tuple[int, int]], **config: Any) -> None:
        self.source: ModelSource = resolve_model(str(model_folder))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._network = MemoryNetwork()
        self._config = config
        self._clients: list[SwarmBlocks] = []
        self.nodes: list[Node] = []
        self._spans = list(spans)

    def __enter__(self) -> InProcessSwarm:
        self._thread.start()
        try:
            for start, end in self._spans:
                self.add_server(start, end)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.close()
        for node in list(self.nodes):
            self.run(node.leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine on the servers' loop."""
        return self.begin(work).result(120)

    def begin(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """Start a coroutine on the servers' loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def add_server(self, start: int, end: int, *, is_announced: bool = True, **config: Any) -> Node:
        """Start one more server of blocks [start, end); one that is not announced can stand behind another."""
        identity = Identity.generate()
        settings: dict[str, Any] = {
            "span": Span(start=start, end=end),
            "host": "127.0.0.1",
            "device": "cpu",
            "kv_memory_bytes": 2**24,
            "announce_period_s": 0.5,
        }
        node_config = NodeConfig(**(settings | self._config | config))
        registry = self.registry(identity) if is_announced else _SilentRegistry(identity, network=self._network)
        node = Node(self.source, identity, node_config, registry=registry)
        self.run(node.start())
        self.nodes.append(node)
        return node

    def registry(self, identity: Identity | None = None) -> MemoryRegistry:
        """Another peer's view of the swarm's discovery."""
        return MemoryRegistry(identity, network=self._network)

    @property
    def address(self) -> str:
        """What a client passes to --join: the first server still there."""
        return f"grpc://{self.nodes[0].info.addresses[0]}"

    def connect(self, *, asks_servers: bool = False, **options: Any) -> SwarmBlocks:
        """A client; closed with the swarm.

        With `asks_servers` it looks others up through a server, as real clients do, whose answer may be two
        seconds old; else it reads the announcements themselves.
        """
        config = ClientConfig(**({"no_route_wait_s": 2.0, "request_timeout_s": 20.0} | options))
        model: dict[str, Any] = {
            "model_hash": self.source.model_hash,
            "model_name": self.source.name,
            "num_blocks": self.source.num_blocks,
            "config": config,
        }
        if asks_servers:
            client = connect(initial_peers=[self.address], **model)
        else:
            client = SwarmBlocks(loop=BackgroundLoop(), registry=self.registry(), **model)
        self._clients.append(client)
        return client


class _SilentRegistry(MemoryRegistry):
    """Looks up, and announces nothing."""

    async def _publish(self, info: ServerInfo, data: bytes, *, expires_at: float) -> None:
        pass


def is_idle(node: Node) -> bool:
    """Whether a server holds no session and all its KV memory is free."""
    return node.info.num_sessions == 0 and node.info.kv_tokens_free == node.info.kv_tokens_total


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Return once `condition` holds; AssertionError when it does not within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {condition}"
        time.sleep(0.01)
