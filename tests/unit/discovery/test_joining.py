"""Which kind of registry an address leads to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from swarm.discovery import MemoryRegistry, open_registry
from swarm.discovery.dht import DhtRegistry
from swarm.discovery.lookup_client import GrpcRegistry
from swarm.discovery.registry import Registry
from swarm.errors import BadInputError, JoinError, MissingDependencyError, SwarmError
from swarm.identity import Identity

DHT_ADDRESS = f"/ip4/10.0.0.1/tcp/4001/p2p/{Identity.generate().peer_id}"


class Attempts:
    """Stands in for both kinds; remembers what was tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[tuple[str, list[str]]] = []
        self.failing: dict[str, SwarmError] = {}
        monkeypatch.setattr(GrpcRegistry, "connect", self._connect)
        monkeypatch.setattr(DhtRegistry, "start", self._start)

    async def _connect(self, addresses: Sequence[str], *, timeout_s: float) -> Registry:
        return self._try("grpc", addresses)

    async def _start(self, identity: Identity, *, initial_peers: Sequence[str], **arguments: Any) -> Registry:
        assert arguments["client_mode"] is True
        return self._try("dht", initial_peers)

    def _try(self, kind: str, addresses: Sequence[str]) -> Registry:
        self.tried.append((kind, list(addresses)))
        if kind in self.failing:
            raise self.failing[kind]
        return MemoryRegistry()


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(monkeypatch)


async def test_each_kind_of_address_leads_to_its_registry(attempts: Attempts) -> None:
    """One option takes both, so that nobody has to know the difference."""
    await open_registry([DHT_ADDRESS])
    await open_registry(["grpc://10.0.0.1:4000"])
    assert attempts.tried == [("dht", [DHT_ADDRESS]), ("grpc", ["grpc://10.0.0.1:4000"])]


async def test_grpc_is_tried_first_and_the_dht_is_the_way_out(attempts: Attempts) -> None:
    """The look-up without a daemon is quicker, but one dead server must not keep a client out."""
    await open_registry([DHT_ADDRESS, "grpc://10.0.0.1:4000"])
    assert [kind for kind, _ in attempts.tried] == ["grpc"]
    attempts.failing["grpc"] = JoinError("nobody answers at grpc://10.0.0.1:4000")
    await open_registry([DHT_ADDRESS, "grpc://10.0.0.1:4000"])
    assert [kind for kind, _ in attempts.tried[1:]] == ["grpc", "dht"]


async def test_when_all_fails_every_reason_is_given(attempts: Attempts) -> None:
    """The one that matters may be any of them."""
    attempts.failing["grpc"] = JoinError("nobody answers at grpc://10.0.0.1:4000")
    with pytest.raises(JoinError, match=r"^nobody answers at grpc://10.0.0.1:4000$"):
        await open_registry(["grpc://10.0.0.1:4000"])
    attempts.failing["dht"] = MissingDependencyError("DHT addresses need hivemind")
    with pytest.raises(JoinError, match=r"nobody answers.*DHT addresses need hivemind"):
        await open_registry([DHT_ADDRESS, "grpc://10.0.0.1:4000"])
    with pytest.raises(MissingDependencyError):
        await open_registry([DHT_ADDRESS])


async def test_nonsense_is_refused_before_anything_is_tried(attempts: Attempts) -> None:
    """One typo among several addresses is still a typo."""
    with pytest.raises(BadInputError, match="no address to join at"):
        await open_registry([])
    with pytest.raises(BadInputError, match="did you mean grpc://"):
        await open_registry(["grpc://10.0.0.1:4000", "10.0.0.1:4000"])
    assert attempts.tried == []
