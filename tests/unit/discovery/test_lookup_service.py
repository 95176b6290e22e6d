"""Answers to look-ups: signed records as they are, bounded in size, for well-formed questions only."""

from __future__ import annotations

import pytest

from swarm.discovery import MemoryNetwork, MemoryRegistry
from swarm.discovery.lookup_service import MAX_LOOKUP_REPLY_BYTES, answer_lookup
from swarm.discovery.records import open_record
from swarm.errors import BadInputError
from swarm.identity import Identity
from swarm.pb import discovery_pb2
from tests.server_infos import MODEL_HASH, make_server

A = Identity.generate()
INFO = make_server(A.peer_id, 0, 6)
NOW = 1_800_000_000.0


class JoinedRegistry(MemoryRegistry):
    """As if it were a member of a DHT."""

    def join_addresses(self) -> list[str]:
        return [f"/ip4/10.0.0.1/tcp/4001/p2p/{A.peer_id}", "grpc://10.0.0.1:4000"]


async def _announced() -> JoinedRegistry:
    registry = JoinedRegistry(A, network=MemoryNetwork(clock=lambda: NOW))
    await registry.announce(INFO, ttl_s=10)
    return registry


async def _ask(registry: MemoryRegistry, request: discovery_pb2.LookupRequest) -> discovery_pb2.LookupReply:
    body = await answer_lookup(registry, request.SerializeToString(), clock=lambda: NOW)
    return discovery_pb2.LookupReply.FromString(body)


async def test_the_signed_records_are_passed_on_untouched() -> None:
    """The client checks the servers' own signatures, so the one in the middle can not lie about them."""
    reply = await _ask(await _announced(), discovery_pb2.LookupRequest(model_hash=MODEL_HASH, num_blocks=12))
    [signed] = reply.records
    assert open_record(signed.SerializeToString(), now=NOW, expected_model_hash=MODEL_HASH) == INFO
    assert reply.answered_at_unix_s == NOW


async def test_without_a_model_only_the_way_into_the_dht_is_told() -> None:
    """So a server can be given any other server's gRPC address and still become a full member."""
    reply = await _ask(await _announced(), discovery_pb2.LookupRequest())
    assert not reply.records
    assert list(reply.dht_addresses) == [f"/ip4/10.0.0.1/tcp/4001/p2p/{A.peer_id}"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\xff\xff garbage",
        discovery_pb2.LookupRequest(model_hash="not hex", num_blocks=12).SerializeToString(),
        discovery_pb2.LookupRequest(model_hash=MODEL_HASH).SerializeToString(),
        discovery_pb2.LookupRequest(model_hash=MODEL_HASH, num_blocks=2**32 - 1).SerializeToString(),
    ],
    ids=["garbage", "no hash", "no number of blocks", "too many blocks"],
)
async def test_other_questions_are_refused(request_bytes: bytes) -> None:
    """Each block asked for costs a DHT look-up, so the number is limited before anything is done."""
    with pytest.raises(BadInputError):
        await answer_lookup(await _announced(), request_bytes)


async def test_a_reply_fits_what_clients_accept(caplog: pytest.LogCaptureFixture) -> None:
    """A reply over gRPC's limit would fail as a whole; a part of the servers is far better than none."""

    class CrowdedRegistry(JoinedRegistry):
        async def lookup_records(self, model_hash: str, num_blocks: int) -> list[bytes]:
            return [discovery_pb2.SignedRecord(payload=bytes(4000)).SerializeToString()] * 3000

    reply = await _ask(CrowdedRegistry(), discovery_pb2.LookupRequest(model_hash=MODEL_HASH, num_blocks=12))
    assert 900 < len(reply.records) < 3000
    assert reply.ByteSize() <= MAX_LOOKUP_REPLY_BYTES
    assert "cut off" in caplog.text
