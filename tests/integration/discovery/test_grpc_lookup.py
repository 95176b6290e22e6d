"""Look-ups over gRPC against small real servers on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio
import pytest

from swarm.discovery import MemoryNetwork, MemoryRegistry, open_registry
from swarm.discovery.lookup_client import GrpcRegistry, find_dht_addresses
from swarm.discovery.lookup_service import answer_lookup
from swarm.discovery.record_checks import RejectReason
from swarm.discovery.records import seal_record
from swarm.errors import BadInputError, JoinError, PeerLostError
from swarm.identity import Identity
from swarm.pb import discovery_pb2
from tests.server_infos import MODEL_HASH, make_server

Answer = Callable[[bytes], Awaitable[bytes]]
Serve = Callable[[Answer], Awaitable[tuple[grpc.aio.Server, str]]]

A, B = Identity.generate(), Identity.generate()
DHT_ADDRESS = f"/ip4/10.0.0.1/tcp/4001/p2p/{A.peer_id}"


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers that answer look-ups with a function of bytes; gives (server, grpc://host:port)."""
    servers: list[grpc.aio.Server] = []

    async def serve_one(answer: Answer) -> tuple[grpc.aio.Server, str]:
        async def lookup(request: bytes, context: object) -> bytes:
            return await answer(request)

        server = grpc.aio.server()
        handlers = {"Lookup": grpc.unary_unary_rpc_method_handler(lookup)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("swarm.Node", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return server, f"grpc://127.0.0.1:{port}"

    yield serve_one
    await asyncio.gather(*(server.stop(None) for server in servers))


class JoinedRegistry(MemoryRegistry):
    """As if it were a member of a DHT."""

    def join_addresses(self) -> list[str]:
        return [DHT_ADDRESS]


def _answer_from(registry: MemoryRegistry) -> Answer:
    async def answer(request: bytes) -> bytes:
        return await answer_lookup(registry, request)

    return answer


def _unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return f"grpc://127.0.0.1:{unused.getsockname()[1]}"


async def test_a_client_finds_servers_through_any_one_of_them(serve: Serve) -> None:
    """This is how clients work on machines without hivemind."""
    network = MemoryNetwork()
    server_a, server_b = JoinedRegistry(A, network=network), JoinedRegistry(B, network=network)
    info_a, info_b = make_server(A.peer_id, 0, 6), make_server(B.peer_id, 6, 12)
    await server_a.announce(info_a, ttl_s=60)
    await server_b.announce(info_b, ttl_s=60)
    _, address = await serve(_answer_from(server_a))
    async with await open_registry([address]) as registry:
        assert await registry.lookup(MODEL_HASH, 12) == [info_a, info_b]
        assert registry.join_addresses() == [address]
        with pytest.raises(BadInputError, match="DHT address"):
            await registry.announce(info_a, ttl_s=10)


async def test_the_one_who_answers_need_not_be_trusted(serve: Serve) -> None:
    """It may leave servers out, but it can not invent or change one."""
    genuine = seal_record(make_server(A.peer_id, 0, 6), A, expires_at=time.time() + 60)
    forged = discovery_pb2.SignedRecord.FromString(genuine)
    forged.payload = forged.payload.replace(b"127.0.0.1:4000", b"127.6.6.6:4000")

    async def lie(request: bytes) -> bytes:
        records = [discovery_pb2.SignedRecord.FromString(genuine), forged]
        return discovery_pb2.LookupReply(records=records).SerializeToString()

    _, address = await serve(lie)
    registry = GrpcRegistry([address])
    assert await registry.lookup(MODEL_HASH, 12) == [make_server(A.peer_id, 0, 6)]
    assert registry.num_rejected == {RejectReason.SIGNATURE: 1}


async def test_a_client_with_a_wrong_clock_still_finds_servers(serve: Serve) -> None:
    """Laptops wake up minutes off; records live for seconds."""
    server = JoinedRegistry(A)
    info = make_server(A.peer_id, 0, 6)
    await server.announce(info, ttl_s=10)
    _, address = await serve(_answer_from(server))
    for hours in (-3, 3):
        registry = GrpcRegistry([address], clock=lambda hours=hours: time.time() + hours * 3600)  # type: ignore[misc]
        assert await registry.lookup(MODEL_HASH, 12) == [info]


async def test_addresses_are_tried_in_turn_and_the_good_one_first_next_time(serve: Serve) -> None:
    """One address of several being down must cost a moment, once."""
    num_asked = 0

    async def answer(request: bytes) -> bytes:
        nonlocal num_asked
        num_asked += 1
        return discovery_pb2.LookupReply().SerializeToString()

    _, good = await serve(answer)
    registry = await GrpcRegistry.connect([_unused_address(), good])
    began_s = time.monotonic()
    assert await registry.lookup(MODEL_HASH, 12) == []
    assert time.monotonic() - began_s < 1.0
    assert num_asked == 2


async def test_servers_found_earlier_are_asked_when_the_given_one_dies(serve: Serve) -> None:
    """The server a client joined at is as mortal as any other; the swarm is still there without it."""
    network = MemoryNetwork()
    first, second = JoinedRegistry(A, network=network), JoinedRegistry(B, network=network)
    server_a, address_a = await serve(_answer_from(first))
    server_b, address_b = await serve(_answer_from(second))
    info_a = make_server(A.peer_id, 0, 6, addresses=[address_a.removeprefix("grpc://")])
    info_b = make_server(B.peer_id, 6, 12, addresses=[address_b.removeprefix("grpc://")])
    await first.announce(info_a, ttl_s=60)
    await second.announce(info_b, ttl_s=60)
    registry = await GrpcRegistry.connect([address_a])
    assert await registry.lookup(MODEL_HASH, 12) == [info_a, info_b]
    await server_a.stop(None)
    assert await registry.lookup(MODEL_HASH, 12) == [info_a, info_b]
    await server_b.stop(None)
    with pytest.raises(PeerLostError, match="no server answers look-ups any more"):
        await registry.lookup(MODEL_HASH, 12)


async def test_who_does_not_answer_is_named_with_the_reason(serve: Serve) -> None:
    """Each of these is a different mistake with a different cure."""

    async def mute(request: bytes) -> bytes:
        await asyncio.sleep(30)
        return b""

    async def babble(request: bytes) -> bytes:
        return b"\xff\xff\xff"

    _, muted = await serve(mute)
    _, babbling = await serve(babble)
    stranger = grpc.aio.server()
    stranger_port = stranger.add_insecure_port("127.0.0.1:0")
    await stranger.start()
    try:
        for address, reason in [
            (_unused_address(), "no connection"),
            (muted, "no reply within 1 s"),
            (babbling, "no look-up reply"),
            (f"grpc://127.0.0.1:{stranger_port}", "no swarm server"),
            ("grpc://no-such-host.invalid:4000", "no connection"),
        ]:
            began_s = time.monotonic()
            with pytest.raises(JoinError, match=f"nobody answers at {address}.*{reason}"):
                await open_registry([address], timeout_s=1.0)
            assert time.monotonic() - began_s < 4
    finally:
        await stranger.stop(None)


async def test_a_reply_larger_than_agreed_is_not_read(serve: Serve) -> None:
    """A hostile server must not fill a client's memory."""

    async def flood(request: bytes) -> bytes:
        return bytes(8 * 1024 * 1024)

    _, address = await serve(flood)
    with pytest.raises(JoinError):
        await GrpcRegistry.connect([address])


async def test_a_server_finds_its_way_into_the_dht_through_grpc(serve: Serve) -> None:
    """--join means the same for servers: the address of anybody who is in."""
    _, address = await serve(_answer_from(JoinedRegistry(A)))
    assert await find_dht_addresses([address]) == [DHT_ADDRESS]
    assert await find_dht_addresses([]) == []
    # A DHT address that is there needs nobody to be asked.
    assert await find_dht_addresses([_unused_address(), DHT_ADDRESS]) == [DHT_ADDRESS]
    with pytest.raises(JoinError, match="nobody answers"):
        await find_dht_addresses([_unused_address()])
    _, outside = await serve(_answer_from(MemoryRegistry(A)))
    with pytest.raises(JoinError, match="in no DHT"):
        await find_dht_addresses([outside])


async def test_impossible_dht_addresses_are_skipped(serve: Serve) -> None:
    """They are passed to p2pd, so only well-formed ones may come through."""

    async def answer(request: bytes) -> bytes:
        addresses = ["--help", "/unix/tmp/x", "grpc://10.0.0.1:1", DHT_ADDRESS]
        return discovery_pb2.LookupReply(dht_addresses=addresses).SerializeToString()

    _, address = await serve(answer)
    assert await find_dht_addresses([address]) == [DHT_ADDRESS]


async def test_offline_servers_are_reported_as_such(serve: Serve) -> None:
    """`status` shows who left; the router does not use them."""
    server = JoinedRegistry(A)
    info = make_server(A.peer_id, 0, 6)
    await server.announce(info, ttl_s=60)
    await server.withdraw(info)
    _, address = await serve(_answer_from(server))
    [found] = await GrpcRegistry([address]).lookup(MODEL_HASH, 12)
    assert dataclasses.replace(found, state=info.state) == info
    assert found.state.value == "offline"


def test_a_client_never_loads_hivemind() -> None:
    """Most clients do not have it, and its import takes seconds."""
    script = (
        "import asyncio, sys\n"
        "from swarm.discovery import open_registry\n"
        "from swarm.errors import JoinError\n"
        "try:\n"
        f"    asyncio.run(open_registry([{_unused_address()!r}], timeout_s=2))\n"
        "except JoinError as error:\n"
        "    print(error)\n"
        "assert not {'hivemind', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "nobody answers" in finished.stdout
    assert finished.stderr == ""
