"""What every registry promises, shown on the one in memory."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from swarm.datatypes import ModelHash, ServerState, Span
from swarm.discovery import MemoryNetwork, MemoryRegistry
from swarm.discovery.record_checks import RejectReason
from swarm.discovery.records import open_record, seal_record
from swarm.errors import BadInputError
from swarm.identity import Identity
from tests.server_infos import MODEL_HASH, make_server


class Clock:
    """Unix time that moves when told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def network(clock: Clock) -> MemoryNetwork:
    return MemoryNetwork(clock=clock)


A, B = Identity.generate(), Identity.generate()


async def test_announced_servers_are_found_by_everybody(network: MemoryNetwork) -> None:
    """The point of it all."""
    reader = MemoryRegistry(network=network)
    first, second = make_server(A.peer_id, 0, 6), make_server(B.peer_id, 6, 12)
    await MemoryRegistry(B, network=network).announce(second, ttl_s=10)
    await MemoryRegistry(A, network=network).announce(first, ttl_s=10)
    assert await reader.lookup(MODEL_HASH, 12) == [first, second]
    assert await reader.lookup(ModelHash("cd" * 16), 12) == []


async def test_raw_records_can_be_checked_again(network: MemoryNetwork, clock: Clock) -> None:
    """A server answers look-ups with these; the client at the other end trusts signatures, not the server."""
    registry = MemoryRegistry(A, network=network)
    info = make_server(A.peer_id, 0, 6)
    await registry.announce(info, ttl_s=10)
    [record] = await registry.lookup_records(MODEL_HASH, 12)
    assert open_record(record, now=clock.now, expected_model_hash=MODEL_HASH) == info


async def test_a_silent_server_is_forgotten(network: MemoryNetwork, clock: Clock) -> None:
    """A crashed server says nothing; its last record must not live on."""
    registry = MemoryRegistry(A, network=network)
    await registry.announce(make_server(A.peer_id, 0, 6), ttl_s=10)
    clock.now += 9.9
    assert len(await registry.lookup(MODEL_HASH, 12)) == 1
    clock.now += 0.2
    assert await registry.lookup(MODEL_HASH, 12) == []


async def test_a_withdrawn_server_shows_as_offline_at_once(network: MemoryNetwork, clock: Clock) -> None:
    """Clients must not try a server that said goodbye, even while its last record would still be valid."""
    registry = MemoryRegistry(A, network=network)
    info = make_server(A.peer_id, 0, 6)
    await registry.announce(info, ttl_s=600)
    await registry.withdraw(info)
    assert await registry.lookup(MODEL_HASH, 12) == [dataclasses.replace(info, state=ServerState.OFFLINE)]
    clock.now += 600.1
    assert await registry.lookup(MODEL_HASH, 12) == []


async def test_a_later_announcement_replaces_an_earlier_one_that_lives_longer(network: MemoryNetwork) -> None:
    """The newest word counts, whatever lives were given; the network keeps what expires last."""
    registry = MemoryRegistry(A, network=network)
    info = make_server(A.peer_id, 0, 6)
    await registry.announce(info, ttl_s=600)
    moved = dataclasses.replace(info, span=Span(start=6, end=12))
    await registry.announce(moved, ttl_s=5)
    assert await registry.lookup(MODEL_HASH, 12) == [moved]


async def test_a_restarted_server_replaces_what_it_said_before(network: MemoryNetwork, clock: Clock) -> None:
    """The new process remembers nothing, and the old record, with an address of old, lives longer."""
    info = make_server(A.peer_id, 0, 6)
    await MemoryRegistry(A, network=network).announce(info, ttl_s=600)
    clock.now += 1
    restarted = dataclasses.replace(info, addresses=("127.0.0.1:5000",))
    await MemoryRegistry(A, network=network).announce(restarted, ttl_s=5)
    assert await MemoryRegistry(network=network).lookup(MODEL_HASH, 12) == [restarted]


async def test_forged_records_are_dropped_counted_and_told_once(
    network: MemoryNetwork, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody attacks: clients go on, operators learn of it, logs do not overflow."""
    good = make_server(A.peer_id, 0, 6)
    registry = MemoryRegistry(A, network=network)
    await registry.announce(good, ttl_s=10)
    forged = bytearray(seal_record(make_server(B.peer_id, 6, 12), B, expires_at=clock.now + 10))
    forged[-60] ^= 1
    network.put(MODEL_HASH, B.peer_id, bytes(forged), expires_at=clock.now + 10)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert await registry.lookup(MODEL_HASH, 12) == [good]
    assert registry.num_rejected == {RejectReason.SIGNATURE: 5}
    assert caplog.text.count("dropped 1 records") == 1


async def test_a_reader_without_identity_can_not_announce(network: MemoryNetwork) -> None:
    """A client must not end up as half a server."""
    with pytest.raises(BadInputError, match="DHT address"):
        await MemoryRegistry(network=network).announce(make_server(A.peer_id, 0, 6), ttl_s=10)


async def test_impossible_requests_are_refused(network: MemoryNetwork) -> None:
    """Mistakes are named where they are made, not where they show."""
    registry = MemoryRegistry(A, network=network)
    info = make_server(A.peer_id, 0, 6)
    for ttl_s in (0.0, -1.0, 4000.0, float("nan")):
        with pytest.raises(BadInputError, match="can not live for"):
            await registry.announce(info, ttl_s=ttl_s)
    with pytest.raises(BadInputError, match="announces itself"):
        await registry.announce(make_server(B.peer_id, 0, 6), ttl_s=10)
    with pytest.raises(BadInputError, match="not a model hash"):
        await registry.lookup(ModelHash("../../etc"), 12)
    for num_blocks in (0, -1, 10**9):
        with pytest.raises(BadInputError, match="can not be looked up"):
            await registry.lookup(MODEL_HASH, num_blocks)
