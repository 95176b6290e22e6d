"""The DHT registry's own decisions, over a table in memory: keys, lives, addresses, refusals."""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Sequence
from typing import Any, Self

import pytest

from swarm.datatypes import ServerState
from swarm.discovery import dht
from swarm.discovery.dht import DhtRegistry, block_key
from swarm.discovery.dht_node import BootstrapFailedError, BootstrapFailure, DhtEntry, DhtNode
from swarm.errors import AddressInUseError, BadInputError, JoinError, MissingDependencyError, PeerLostError
from swarm.identity import Identity
from tests.server_infos import MODEL_HASH, make_server

A, B = Identity.generate(), Identity.generate()


class FakeNode(DhtNode):
    """A table of one node, with the DHT's rule that a value is replaced only by one that expires later."""

    started_with: dict[str, Any]
    failures: list[BaseException]

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], DhtEntry] = {}
        self.is_full = False
        self.is_closed = False
        self.addresses: list[str] = []

    async def store(self, entries: Sequence[DhtEntry]) -> int:
        num_stored = 0
        for entry in entries:
            known = self.entries.get((entry.key, entry.subkey))
            if not self.is_full and (known is None or known.expires_at < entry.expires_at):
                self.entries[entry.key, entry.subkey] = entry
                num_stored += 1
        return num_stored

    async def fetch(self, keys: Sequence[str]) -> list[bytes]:
        return [entry.value for (key, _), entry in self.entries.items() if key in keys]

    async def visible_addresses(self) -> list[str]:
        return self.addresses

    async def close(self) -> None:
        self.is_closed = True


def _install_fake(monkeypatch: pytest.MonkeyPatch, *failures: BaseException, addresses: Sequence[str] = ()) -> FakeNode:
    """Let DhtRegistry.start begin FakeNodes; each failure is raised by one attempt."""
    node = FakeNode()
    node.addresses = list(addresses)
    node.failures = list(failures)

    class FakeNodeClass:
        @classmethod
        async def start(cls: type[Self], identity: Identity, **arguments: Any) -> FakeNode:
            node.started_with = arguments
            if node.failures:
                raise node.failures.pop(0)
            return node

    monkeypatch.setattr(dht, "_load_node_class", lambda: FakeNodeClass)
    return node


def _address(identity: Identity, host: str = "127.0.0.1", port: int = 4001) -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{identity.peer_id}"


async def test_a_record_lies_under_the_key_of_each_of_its_blocks() -> None:
    """Who looks for a block must find all its servers, without reading those of other blocks."""
    node = FakeNode()
    registry = DhtRegistry(node, A, join_addresses=[])
    info = make_server(A.peer_id, 3, 6)
    await registry.announce(info, ttl_s=10)
    assert sorted(node.entries) == [(block_key(MODEL_HASH, block), A.peer_id) for block in (3, 4, 5)]
    assert block_key(MODEL_HASH, 3) == f"swarm/1/{MODEL_HASH}/3"
    assert len({entry.value for entry in node.entries.values()}) == 1
    assert await registry.lookup(MODEL_HASH, 12) == [info]


async def test_withdrawing_gets_past_the_longer_lived_record() -> None:
    """The DHT refuses a record that expires sooner, and a short-lived goodbye would be lost."""
    node = FakeNode()
    registry = DhtRegistry(node, A, join_addresses=[])
    info = make_server(A.peer_id, 3, 6)
    await registry.announce(info, ttl_s=600)
    await registry.withdraw(info)
    assert await registry.lookup(MODEL_HASH, 12) == [dataclasses.replace(info, state=ServerState.OFFLINE)]


async def test_an_announcement_that_nobody_took_is_an_error() -> None:
    """The server must know that it can not be found."""
    node = FakeNode()
    node.is_full = True
    with pytest.raises(PeerLostError, match="no DHT peer took the announcement"):
        await DhtRegistry(node, A, join_addresses=[]).announce(make_server(A.peer_id, 3, 6), ttl_s=10)


async def test_addresses_of_a_server_are_those_others_can_use_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one printed is the one people copy to the next machine."""
    relayed = f"{_address(B, '10.0.0.9')}/p2p-circuit/p2p/{A.peer_id}"
    node = _install_fake(
        monkeypatch, addresses=[_address(A, "127.0.0.1"), relayed, _address(A, "10.0.0.1"), _address(A, "10.0.0.2")]
    )
    monkeypatch.setattr(dht, "advertised_host", lambda host: "10.0.0.2")
    async with await DhtRegistry.start(A, host="0.0.0.0") as registry:
        assert registry.join_addresses() == [_address(A, host) for host in ("10.0.0.2", "10.0.0.1", "127.0.0.1")]
        assert node.started_with["listen_addresses"] == ["/ip4/0.0.0.0/tcp/0"]
    assert node.is_closed


async def test_a_client_listens_nowhere_and_passes_on_where_it_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can join at a client."""
    node = _install_fake(monkeypatch)
    registry = await DhtRegistry.start(A, initial_peers=[_address(B)], client_mode=True)
    assert node.started_with["listen_addresses"] == []
    assert registry.join_addresses() == [_address(B)]


async def test_names_and_ipv6_are_listened_on_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """libp2p listens on addresses only; people write localhost."""
    node = _install_fake(monkeypatch)
    await DhtRegistry.start(A, host="localhost")
    assert node.started_with["listen_addresses"][0] in ("/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0")
    with pytest.raises(BadInputError, match="is not an address or name of this machine"):
        await DhtRegistry.start(A, host="no such host")
    with pytest.raises(BadInputError, match="is not an address of this machine"):
        await DhtRegistry.start(A, host="192.0.2.7")


async def test_a_taken_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """p2pd would share the port with the other program, and half of the connections would go astray."""
    _install_fake(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUseError, match=f"port {port} on 127.0.0.1 is already taken"):
            await DhtRegistry.start(A, host="127.0.0.1", port=port)
    await DhtRegistry.start(A, host="127.0.0.1", port=port)
    with pytest.raises(BadInputError, match="is not a port"):
        await DhtRegistry.start(A, port=70000)


async def test_malformed_addresses_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo must not cost the seconds that hivemind takes to import."""
    monkeypatch.setattr(dht, "_load_node_class", lambda: pytest.fail("began to import hivemind"))
    with pytest.raises(BadInputError, match="lacks the peer id"):
        await DhtRegistry.start(A, initial_peers=["/ip4/10.0.0.1/tcp/4001"])
    with pytest.raises(BadInputError, match="no DHT address"):
        await DhtRegistry.start(A, initial_peers=["grpc://10.0.0.1:4001"])


async def test_without_hivemind_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """hivemind has wheels for one platform; everybody else joins at a gRPC address."""
    monkeypatch.delitem(sys.modules, "swarm.discovery.hivemind_node", raising=False)
    monkeypatch.setitem(sys.modules, "hivemind", None)
    monkeypatch.setitem(sys.modules, "hivemind.dht.crypto", None)
    with pytest.raises(MissingDependencyError, match="grpc://host:port") as missing:
        await DhtRegistry.start(A, initial_peers=[_address(B)], client_mode=True)
    assert "swarm-inference[dht]" in str(missing.value)


async def test_who_can_not_be_joined_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "Failed to connect to bootstrap peers" helps nobody; each address gets its own reason."""
    nobody = BootstrapFailedError(BootstrapFailure.NOBODY, "failed to connect to bootstrap peers")
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)) as gone:
        answering, refusing = listening.getsockname()[1], gone.getsockname()[1]
        gone.close()
        _install_fake(monkeypatch, nobody)
        with pytest.raises(JoinError, match="nothing listens on that port"):
            await DhtRegistry.start(A, initial_peers=[_address(B, port=refusing)], client_mode=True)
        _install_fake(monkeypatch, nobody)
        both = [_address(B, port=answering), _address(B, port=refusing)]
        with pytest.raises(JoinError, match="any of the 2 addresses") as refusal:
            await DhtRegistry.start(A, initial_peers=both, client_mode=True)
    assert all(address in str(refusal.value) for address in both)
    assert "not the peer" in str(refusal.value)


async def test_clocks_apart_are_blamed_on_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for a network fault would cost an evening."""
    _install_fake(monkeypatch, BootstrapFailedError(BootstrapFailure.CLOCK, "local time must be within 3 seconds"))
    with pytest.raises(JoinError, match="clock"):
        await DhtRegistry.start(A, initial_peers=[_address(B)], client_mode=True)


async def test_a_server_that_others_can_not_reach_joins_as_a_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a strict firewall it can still announce; it only keeps no records for others."""
    unreachable = BootstrapFailedError(BootstrapFailure.UNREACHABLE, "peer can not access this node")
    node = _install_fake(monkeypatch, unreachable)
    registry = await DhtRegistry.start(A, initial_peers=[_address(B)])
    assert node.started_with["client_mode"] is True
    assert registry.join_addresses() == [_address(B)]
    assert "can not reach this machine" in caplog.text
