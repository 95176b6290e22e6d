"""The real DHT: several nodes with their p2pd daemons on this machine's loopback, in one event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.datatypes import ServerInfo, ServerState
from swarm.discovery import open_registry
from swarm.discovery.addresses import DhtAddress, parse_join_address
from swarm.discovery.dht import DhtRegistry, block_key
from swarm.discovery.dht_node import DhtEntry
from swarm.discovery.record_checks import RejectReason
from swarm.discovery.records import seal_record
from swarm.errors import AddressInUseError, JoinError, PeerLostError
from swarm.identity import Identity
from tests.server_infos import MODEL_HASH, make_server

pytest.importorskip("hivemind", reason="hivemind has wheels for Linux on x86-64 only")

Start = Callable[..., Awaitable[DhtRegistry]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts registries and closes them after the test."""
    registries: list[DhtRegistry] = []

    async def start_one(
        identity: Identity | None = None, *, joined: DhtRegistry | None = None, **others: object
    ) -> DhtRegistry:
        registry = await DhtRegistry.start(
            identity or Identity.generate(),
            initial_peers=joined.join_addresses() if joined is not None else (),
            **others,  # type: ignore[arg-type]
        )
        registries.append(registry)
        return registry

    yield start_one
    await asyncio.gather(*(registry.close() for registry in registries))


async def _until(registry: DhtRegistry, expected: list[ServerInfo], *, timeout_s: float = 5.0) -> None:
    """Look up until the answer is `expected`, or fail with the last one."""
    deadline_s = time.monotonic() + timeout_s
    while (found := await registry.lookup(MODEL_HASH, 12)) != expected:
        assert time.monotonic() < deadline_s, f"found {found}, expected {expected}"
        await asyncio.sleep(0.05)


async def test_servers_find_each_other_and_clients_find_them(start: Start) -> None:
    """Announce on one machine, look up on another, through a third: the whole point."""
    bootstrap = await start()
    a, b = Identity.generate(), Identity.generate()
    server_a, server_b = await start(a, joined=bootstrap), await start(b, joined=bootstrap)
    info_a, info_b = make_server(a.peer_id, 0, 6), make_server(b.peer_id, 4, 12)
    await server_a.announce(info_a, ttl_s=60)
    await server_b.announce(info_b, ttl_s=60)
    client = await start(joined=bootstrap, client_mode=True)
    for registry in (bootstrap, server_a, server_b, client):
        assert await registry.lookup(MODEL_HASH, 12) == [info_a, info_b]
        assert not registry.num_rejected
    assert client.join_addresses() == bootstrap.join_addresses()
    async with await open_registry(server_b.join_addresses()) as through_server:
        assert await through_server.lookup(MODEL_HASH, 12) == [info_a, info_b]


async def test_the_address_names_the_identity_and_survives_a_restart(start: Start) -> None:
    """An address that people wrote down keeps working; p2pd must use our key for that."""
    identity = Identity.generate()
    first = await start(identity)
    [text] = first.join_addresses()
    address = parse_join_address(text)
    assert isinstance(address, DhtAddress)
    assert address.peer_id == identity.peer_id
    await first.close()
    again = await start(identity, port=address.port)
    assert again.join_addresses() == [text]


async def test_changes_are_seen_at_once_by_those_who_looked_before(start: Start) -> None:
    """hivemind likes to answer from copies; a client must see a server drain or leave, not what it was."""
    bootstrap = await start()
    identity = Identity.generate()
    server, client = await start(identity, joined=bootstrap), await start(joined=bootstrap, client_mode=True)
    info = make_server(identity.peer_id, 0, 6)
    draining = dataclasses.replace(info, state=ServerState.DRAINING)
    await server.announce(info, ttl_s=60)
    assert await client.lookup(MODEL_HASH, 12) == [info]
    await server.announce(draining, ttl_s=60)
    assert await client.lookup(MODEL_HASH, 12) == [draining]
    await server.withdraw(draining)
    assert await client.lookup(MODEL_HASH, 12) == [dataclasses.replace(info, state=ServerState.OFFLINE)]
    assert await bootstrap.lookup(MODEL_HASH, 12) == [dataclasses.replace(info, state=ServerState.OFFLINE)]


async def test_a_dead_server_is_forgotten(start: Start) -> None:
    """Its record expires although the nodes that keep it live on."""
    bootstrap = await start()
    identity = Identity.generate()
    server, client = await start(identity, joined=bootstrap), await start(joined=bootstrap, client_mode=True)
    await server.announce(make_server(identity.peer_id, 0, 6), ttl_s=1.0)
    assert len(await client.lookup(MODEL_HASH, 12)) == 1
    await server.close()
    await _until(client, [])


async def test_a_restarted_server_is_found_at_its_new_address(start: Start) -> None:
    """The old record lives longer than the new one, and the DHT would keep it."""
    bootstrap = await start()
    identity = Identity.generate()
    before = make_server(identity.peer_id, 0, 6, addresses=("127.0.0.1:4000",))
    after = dataclasses.replace(before, addresses=("127.0.0.1:5000",))
    server = await start(identity, joined=bootstrap)
    await server.announce(before, ttl_s=600)
    await server.close()
    restarted = await start(identity, joined=bootstrap)
    await restarted.announce(after, ttl_s=10)
    assert await bootstrap.lookup(MODEL_HASH, 12) == [after]


async def test_forged_records_are_not_kept_by_honest_nodes(start: Start) -> None:
    """A hostile peer stores what it likes at others: they refuse what its supposed owner did not sign."""
    bootstrap = await start()
    victim, attacker = Identity.generate(), Identity.generate()
    server, hostile = await start(victim, joined=bootstrap), await start(attacker, joined=bootstrap)
    info = make_server(victim.peer_id, 0, 2)
    await server.announce(info, ttl_s=30)
    hijacked = dataclasses.replace(info, addresses=("127.0.0.1:6666",))
    expires_at = time.time() + 60
    sealed_by_attacker = seal_record(
        dataclasses.replace(hijacked, peer_id=attacker.peer_id), attacker, expires_at=expires_at
    )
    [genuine] = await server.lookup_records(MODEL_HASH, 12)
    for value, life in [
        (sealed_by_attacker, expires_at),  # in the victim's name, signed by the attacker
        (genuine, expires_at),  # the victim's own record, its life prolonged
        (b"garbage", expires_at),
    ]:
        entries = [
            DhtEntry(key=block_key(MODEL_HASH, block), subkey=victim.peer_id, value=value, expires_at=life)
            for block in (0, 1)
        ]
        assert await hostile._node.store(entries) == 0
    for registry in (bootstrap, server, hostile):
        assert await registry.lookup(MODEL_HASH, 12) == [info]


async def test_what_a_careless_node_hands_out_is_checked_by_the_reader(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """A node may keep anything; bad entries are dropped, and the good ones beside them are still found."""
    honest, liar = Identity.generate(), Identity.generate()
    careless = await start()
    reader = await start(joined=careless, client_mode=True)
    info = make_server(honest.peer_id, 0, 2)
    expires_at = time.time() + 60
    genuine = seal_record(info, honest, expires_at=expires_at)
    impossible = seal_record(
        dataclasses.replace(info, peer_id=liar.peer_id, num_blocks=99), liar, expires_at=expires_at
    )
    for subkey, value, life in [
        (honest.peer_id, genuine, expires_at),
        (liar.peer_id, impossible, expires_at),  # fine for a node, but not for a reader
        ("nobody", b"garbage", expires_at),
        ("twin", genuine, expires_at),
        ("eternal", b"garbage", float("inf")),
    ]:
        entry = DhtEntry(key=block_key(MODEL_HASH, 0), subkey=subkey, value=value, expires_at=life)
        _store_unchecked(careless, entry)
    with caplog.at_level(logging.WARNING):
        assert await reader.lookup(MODEL_HASH, 12) == [info]
    assert reader.num_rejected == {RejectReason.IMPOSSIBLE_VALUE: 1}
    assert "impossible value" in caplog.text


async def test_an_empty_answer_said_to_live_for_ever_hides_nobody(start: Start) -> None:
    """hivemind would take it as the best possible answer and stop asking others."""
    hostile = await start()
    identity = Identity.generate()
    server = await start(identity, joined=hostile)
    info = make_server(identity.peer_id, 0, 1)
    await server.announce(info, ttl_s=60)
    entry = DhtEntry(key=block_key(MODEL_HASH, 0), subkey="x", value=b"x", expires_at=float("inf"))
    _forget_all(hostile)
    _store_unchecked(hostile, entry)
    reader = await start(joined=hostile, client_mode=True)
    for _ in range(3):
        assert await reader.lookup(MODEL_HASH, 12) == [info]


def _protocol(registry: DhtRegistry) -> Any:
    node: Any = registry._node
    return node._node.protocol


def _forget_all(registry: DhtRegistry) -> None:
    _protocol(registry).storage.clear()


def _store_unchecked(registry: DhtRegistry, entry: DhtEntry) -> None:
    """Put an entry straight into a node's own storage, past all checks."""
    from hivemind.dht.routing import DHTID
    from hivemind.utils import MSGPackSerializer

    value = MSGPackSerializer.dumps(entry.value)
    _protocol(registry).storage.store(DHTID.generate(entry.key), value, entry.expires_at, subkey=entry.subkey)


async def test_nobody_at_the_address_is_said_quickly() -> None:
    """The commonest mistake of all; waiting half a minute for it would be cruel."""
    nobody = Identity.generate().peer_id
    began_s = time.monotonic()
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{nobody}"
    with pytest.raises(JoinError, match="nothing listens on that port") as refusal:
        await DhtRegistry.start(Identity.generate(), initial_peers=[address], client_mode=True)
    assert address in str(refusal.value)
    assert time.monotonic() - began_s < 10


async def test_another_peer_at_the_address_is_told_apart(start: Start) -> None:
    """A bootstrap that lost its key file answers at the old address as somebody else."""
    bootstrap = await start()
    expected = Identity.generate().peer_id
    address = f"{bootstrap.join_addresses()[0].partition('/p2p/')[0]}/p2p/{expected}"
    with pytest.raises(JoinError, match="it is not the peer"):
        await DhtRegistry.start(Identity.generate(), initial_peers=[address], client_mode=True)


async def test_one_live_address_among_dead_ones_is_enough(start: Start) -> None:
    """People list several so that one may be down."""
    bootstrap = await start()
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    registry = await DhtRegistry.start(
        Identity.generate(), initial_peers=[dead, *bootstrap.join_addresses()], client_mode=True
    )
    await registry.close()


async def test_a_port_that_p2pd_holds_is_taken(start: Start) -> None:
    """p2pd would share its port with a second p2pd."""
    bootstrap = await start()
    address = parse_join_address(bootstrap.join_addresses()[0])
    with pytest.raises(AddressInUseError):
        await DhtRegistry.start(Identity.generate(), port=address.port)


async def test_a_bootstrap_that_restarts_is_found_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back knowing nobody; unless the servers look for it, newcomers would find an empty swarm for ever."""
    from swarm.discovery import hivemind_node

    monkeypatch.setattr(hivemind_node, "_REJOIN_PERIOD_S", 0.2)
    key, identity = Identity.generate(), Identity.generate()
    bootstrap = await start(key)
    address = parse_join_address(bootstrap.join_addresses()[0])
    server = await start(identity, joined=bootstrap)
    info = make_server(identity.peer_id, 0, 6)
    await bootstrap.close()
    await server.announce(info, ttl_s=60)
    again = await start(key, port=address.port)
    newcomer = await start(joined=again, client_mode=True)
    async with asyncio.timeout(30):  # libp2p dials an address that refused it only after some seconds
        while await newcomer.lookup(MODEL_HASH, 12) != [info]:
            await asyncio.sleep(0.3)
            await server.announce(info, ttl_s=60)


async def test_a_client_that_lost_everybody_does_not_believe_itself_announced(start: Start) -> None:
    """In client mode nobody can ask it for what it keeps, so only what others took counts."""
    bootstrap = await start()
    identity = Identity.generate()
    client = await start(identity, joined=bootstrap, client_mode=True)
    info = make_server(identity.peer_id, 0, 6)
    await client.announce(info, ttl_s=60)
    assert await bootstrap.lookup(MODEL_HASH, 12) == [info]
    await bootstrap.close()
    with pytest.raises(PeerLostError, match="no DHT peer took the announcement"):
        await client.announce(info, ttl_s=60)


async def test_hivemind_leaves_the_programs_logging_alone(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Its handler, its chatter and its renamed levels would show up in everybody's terminal and logs."""
    with caplog.at_level(logging.INFO):
        await start()
    assert {record.name for record in caplog.records if record.name != "swarm.discovery.dht"} == set()
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    assert not logging.getLogger("hivemind").propagate


async def test_a_dead_daemon_is_an_error_and_not_an_empty_swarm(start: Start) -> None:
    """ "No servers" would send people looking in the wrong place; and closing must not wait for the dead."""
    registry = await start()
    os.kill(_daemon_pid(registry), signal.SIGKILL)
    async with asyncio.timeout(10):
        while registry._node._p2p.has_daemon:  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
        with pytest.raises(PeerLostError, match="p2pd has ended"):
            await registry.lookup(MODEL_HASH, 12)
        await registry.close()


async def test_the_terminals_interrupt_does_not_reach_the_daemon(start: Start) -> None:
    """Ctrl-C goes to the whole process group; the server still needs p2pd to drain and withdraw."""
    pid = _daemon_pid(await start())
    assert os.getpgid(pid) != os.getpgid(0)


async def test_closing_and_failing_leave_no_daemon_behind(start: Start) -> None:
    """A leaked p2pd keeps the port and the identity."""
    registry = await start()
    pid = _daemon_pid(registry)
    await registry.close()
    await registry.close()
    assert not _is_running(pid)

    before = _daemons()
    starting = asyncio.create_task(DhtRegistry.start(Identity.generate()))
    await asyncio.sleep(0.05)  # while p2pd starts
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert _daemons() <= before


def test_the_daemon_ends_with_a_killed_server(tmp_path: Path) -> None:
    """kill -9 gives nobody a chance to clean up."""
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio, os, signal\n"
        "from swarm.discovery.dht import DhtRegistry\n"
        "from swarm.identity import Identity\n"
        "async def main():\n"
        "    registry = await DhtRegistry.start(Identity.generate())\n"
        "    print(registry._node._p2p._child.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert finished.stderr == "", "nothing of hivemind's reaches the terminal"
    pid = int(finished.stdout)
    deadline_s = time.monotonic() + 5
    while _is_running(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _daemon_pid(registry: DhtRegistry) -> int:
    pid: int = registry._node._p2p._child.pid  # type: ignore[attr-defined]
    return pid


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _daemons() -> set[int]:
    """Children of this process that run."""
    children: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _is_running(int(entry.name)):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except FileNotFoundError:
                continue
            if parent == os.getpid():
                children.add(int(entry.name))
    return children
