"""Discovery over a distributed hash table: one signed record under the key of every block a server holds."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from swarm.datatypes import ModelHash, ServerInfo
from swarm.discovery.addresses import DhtAddress, advertised_host, is_wildcard_host, parse_join_address, sort_by_reach
from swarm.discovery.dht_node import BootstrapFailedError, BootstrapFailure, DhtEntry, DhtNode
from swarm.discovery.join_diagnosis import explain_failed_join
from swarm.discovery.records import RECORD_VERSION, has_valid_envelope
from swarm.discovery.registry import FetchedRecords, RecordRegistry
from swarm.errors import AddressInUseError, BadInputError, JoinError, MissingDependencyError, PeerLostError
from swarm.identity import Identity

if TYPE_CHECKING:
    from swarm.discovery.hivemind_node import HivemindNode

__all__ = ["DhtRegistry", "block_key"]

logger = logging.getLogger(__name__)


def block_key(model_hash: ModelHash, block: int) -> str:
    """The DHT key under which the servers of one block are found."""
    return f"swarm/{RECORD_VERSION}/{model_hash}/{block}"


class DhtRegistry(RecordRegistry):
    """A member of the DHT; made by `start`."""

    def __init__(
        self,
        node: DhtNode,
        identity: Identity,
        *,
        join_addresses: Sequence[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Over a node that runs already; `clock` gives unix seconds."""
        super().__init__(identity, clock=clock)
        self._node = node
        self._join_addresses = list(join_addresses)

    @classmethod
    async def start(
        cls,
        identity: Identity,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        initial_peers: Sequence[str] = (),
        client_mode: bool = False,
        startup_timeout_s: float = 15.0,
        clock: Callable[[], float] = time.time,
    ) -> DhtRegistry:
        """Join the DHT of `initial_peers`, or begin a new one when there are none.

        Listens on `host`:`port` (TCP; port 0 takes a free one, host 0.0.0.0 or :: all addresses). In client
        mode it listens nowhere and stores nothing for others. The first call in a process imports hivemind and
        torch, which keeps the event loop busy for seconds.

        Raises BadInputError for an address or host that is none, AddressInUseError when the port is taken,
        JoinError when nobody answers, MissingDependencyError without hivemind.
        """
        peers = [_parse_dht_address(text) for text in initial_peers]
        listen_addresses: list[str] = []
        if not client_mode:
            listen_host = _resolve_listen_host(host)
            _check_port_is_free(listen_host, port)
            listen_addresses = [f"/{'ip6' if ':' in listen_host else 'ip4'}/{listen_host}/tcp/{port}"]
        node_class = _load_node_class()

        def accept(subkey: object, value: bytes, expires_at: float) -> bool:
            return has_valid_envelope(value, peer_id=subkey, expires_at=expires_at, now=clock())

        async def start_node(*, client_mode: bool) -> DhtNode:
            return await node_class.start(
                identity,
                listen_addresses=listen_addresses,
                initial_peers=peers,
                accept=accept,
                client_mode=client_mode,
                startup_timeout_s=startup_timeout_s,
            )

        try:
            try:
                node = await start_node(client_mode=client_mode)
            except BootstrapFailedError as error:
                if error.failure is not BootstrapFailure.UNREACHABLE or client_mode:
                    raise
                logger.warning("other peers can not reach this machine, so it keeps no part of the DHT: %s", error)
                client_mode = True
                node = await start_node(client_mode=True)
        except BootstrapFailedError as error:
            logger.debug("joining failed: %s", error)
            raise await _explain(error, peers) from error
        except OSError as error:
            raise BadInputError(f"the DHT could not be started on {host} port {port}: {error}") from error
        try:
            visible = await node.visible_addresses()
        except BaseException:
            await node.close()
            raise
        join_addresses = _order_by_reach(visible, host) if not client_mode else [str(peer) for peer in peers]
        logger.info("joined the DHT as %s, reachable at %s", identity.peer_id, join_addresses)
        return cls(node, identity, join_addresses=join_addresses, clock=clock)

    def join_addresses(self) -> list[str]:
        """DHT addresses for --join, best first: this node's own, or in client mode those it joined at."""
        return list(self._join_addresses)

    async def close(self) -> None:
        """See Registry."""
        await self._node.close()

    async def _publish(self, info: ServerInfo, data: bytes, *, expires_at: float) -> None:
        entries = [
            DhtEntry(key=block_key(info.model_hash, block), subkey=info.peer_id, value=data, expires_at=expires_at)
            for block in range(info.span.start, info.span.end)
        ]
        num_stored = await self._node.store(entries)
        if num_stored == 0:
            raise PeerLostError("no DHT peer took the announcement; is this machine still connected?")
        if num_stored < len(entries):
            logger.warning("announced only %d of the blocks %s", num_stored, info.span)

    async def _fetch(self, model_hash: ModelHash, num_blocks: int) -> FetchedRecords:
        keys = [block_key(model_hash, block) for block in range(num_blocks)]
        return FetchedRecords(records=await self._node.fetch(keys), now=self._clock())

    def __repr__(self) -> str:
        return f"DhtRegistry({', '.join(self._join_addresses) or 'joined nobody'})"


def _parse_dht_address(text: str) -> DhtAddress:
    address = parse_join_address(text)
    if not isinstance(address, DhtAddress):
        raise BadInputError(f"{text} is no DHT address; give one of the form /ip4/HOST/tcp/PORT/p2p/PEER_ID")
    return address


def _load_node_class() -> type[HivemindNode]:
    try:
        with warnings.catch_warnings():
            # torch and hivemind warn about their own use of each other's deprecated parts.
            warnings.simplefilter("ignore")
            module = importlib.import_module("swarm.discovery.hivemind_node")
    except ImportError as error:
        raise MissingDependencyError(
            "DHT addresses need hivemind, which can not be imported here: install it with "
            "`pip install 'swarm-inference[dht]'` (Linux on x86-64), or join at a server's gRPC address, "
            "grpc://host:port"
        ) from error
    node_class: type[HivemindNode] = module.HivemindNode
    return node_class


async def _explain(error: BootstrapFailedError, peers: Sequence[DhtAddress]) -> JoinError:
    if error.failure is BootstrapFailure.CLOCK:
        return JoinError(
            f"the clock of this machine and that of {', '.join(map(str, peers))} differ by more than 3 seconds; "
            f"set both by network time"
        )
    return await explain_failed_join(peers)


def _resolve_listen_host(host: str) -> str:
    """`host` as an IP address of this machine."""
    if is_wildcard_host(host):
        return "::" if ":" in host else "0.0.0.0"
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise BadInputError(f"--host {host} is not an address or name of this machine") from error


def _check_port_is_free(host: str, port: int) -> None:
    """p2pd shares a taken port instead of failing, and connections would go to either program at random."""
    if not 0 <= port <= 65535:
        raise BadInputError(f"--port {port} is not a port; choose 1 to 65535, or 0 for any free one")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier run may linger
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"port {port} on {host} is already taken by another program; choose another with --port, "
                    f"or --port 0 for any free one"
                ) from error
            if error.errno == errno.EACCES:
                raise BadInputError(f"port {port} is reserved by the system; choose one above 1023") from error
            raise BadInputError(
                f"--host {host} is not an address of this machine; use 0.0.0.0 to listen on all of them"
            ) from error


def _order_by_reach(addresses: Sequence[str], listen_host: str) -> list[str]:
    """Own addresses, those first that most machines can use; forms that nobody could pass to --join are left out."""
    parsed: list[DhtAddress] = []
    for text in addresses:
        with contextlib.suppress(BadInputError):
            parsed.append(_parse_dht_address(text))
    preferred = advertised_host(listen_host)
    hosts = sort_by_reach(sorted((address.host for address in parsed), key=lambda host: host != preferred))
    return [str(address) for address in sorted(parsed, key=lambda address: hosts.index(address.host))]
