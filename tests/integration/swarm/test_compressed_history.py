"""Sessions of compressing servers as the protocol sees them: what can not be undone is sent again, and nothing else.

The servers here judge steps as servers that compress do, but keep caches exactly: so every answer has a yardstick.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from swarm.client.blocks import SequenceInput
from swarm.errors import DeadlineError
from swarm.pb import session_pb2 as pb
from swarm.server import hosting
from swarm.server.rpc.request_checks import HostedModel
from swarm.server.rpc.server_session import ServerSession
from swarm.wire.frames import decode_frame, encode_frame
from tests.integration.conftest import TinyLlama
from tests.integration.swarm.test_failover import Doors, avoided, rows, servers_of
from tests.swarm_in_process import InProcessSwarm
from tests.tampering_server import TamperingServer

POLICY = "smallest"
THIRDS = ((0, 2), (2, 4), (4, 6))
LENGTH = 400


@pytest.fixture(autouse=True)
def judging_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of the policy in every respect but their engines'."""
    monkeypatch.setattr(hosting, "HostedModel", lambda **fields: HostedModel(**(fields | {"kv_policy": POLICY})))
    monkeypatch.setattr(ServerSession, "compresses", False)


@pytest.fixture
def doors(llama: TinyLlama) -> Iterator[Doors]:
    with servers_of(llama, *THIRDS, *THIRDS) as found:
        yield found


def random_inputs(rng: random.Random, lengths: Sequence[int], num_sequences: int) -> list[SequenceInput]:
    """Answers token by token, prompts, rewinds near and far, forks."""
    inputs = []
    for sequence in rng.sample(range(num_sequences), rng.choice([1, 1, num_sequences])):
        parent = rng.choice([sequence, sequence, sequence, rng.randrange(num_sequences)])
        held = lengths[parent] if parent < len(lengths) else 0
        start = held - rng.choice([0, 0, 0, 1, min(held, 3), rng.randint(0, held)]) if held else 0
        count = min(rng.choice([0, 1, 1, 1, 1, 9, 40]), LENGTH - start)
        hidden = rows(count, seed=rng.randrange(10_000))
        inputs.append(SequenceInput(sequence=sequence, parent=parent, start=start, hidden=hidden))
    return inputs


def num_rows_sent(server: TamperingServer) -> int:
    return sum(item.num_rows for item in server.passed if item.is_request)


@pytest.mark.parametrize(("seed", "use_push"), [(0, True), (1, False), (2, True)])
def test_rewinds_forks_and_losses(llama: TinyLlama, doors: Doors, seed: int, use_push: bool) -> None:
    """Whatever the servers can not undo, the session ends up where it should, and nobody is blamed for it."""
    rng = random.Random(seed)
    client = doors.swarm.connect(max_step_tokens=24, use_push=use_push, ban_s=0.2)
    session = client.open_session(max_length=LENGTH, num_sequences=3)
    yardstick = llama.blocks.open_session(max_length=LENGTH, num_sequences=3)
    losses = set(rng.sample(range(40), 3))
    lost: set[str] = set()
    for number in range(40):
        inputs = random_inputs(rng, session.lengths, 3)
        if number in losses and session.route:
            server = doors.of(session, rng.randrange(3))
            lost.add(server.peer_id)
            server.die()
            doors.add(server.node.info.span.start, server.node.info.span.end)
        last_only = rng.random() < 0.3
        outputs = session.step(inputs, last_only=last_only)
        for output, expected in zip(outputs, yardstick.step(inputs, last_only=last_only), strict=True):
            assert output.shape == expected.shape
            assert not output.numel() or (output - expected).abs().max() < 1e-4
        assert session.lengths == tuple(yardstick.lengths[: len(session.lengths)])
        assert avoided(client) <= lost
    session.close()


def test_only_what_can_not_be_undone_is_sent_again(doors: Doors) -> None:
    """A rejected guess costs nothing; an edited turn costs what is left of the conversation."""
    client = doors.swarm.connect()
    session = client.open_session(max_length=LENGTH)

    def step(start: int, count: int) -> list[int]:
        """Run rows, and say how many were sent to each server for it, itself or in a replay."""
        before = {server.peer_id: num_rows_sent(server) for server in doors.servers}
        session.step([SequenceInput(sequence=0, parent=0, start=start, hidden=rows(256)[:count])])
        return [
            num_rows_sent(doors.of(session, index)) - before[hop.peer_id] for index, hop in enumerate(session.route)
        ]

    assert step(0, 100) == [100, 100, 100]
    assert step(100, 1) == [1, 1, 1]
    assert step(101, 3) == [3, 3, 3]
    assert step(102, 1) == [1, 1, 1], "the guesses after position 102 were wrong"
    peers = [hop.peer_id for hop in session.route]
    assert step(90, 5) == [95, 95, 95]
    assert step(95, 1) == [1, 1, 1]
    assert [hop.peer_id for hop in session.route] == peers
    assert session.num_failovers == 0, "nobody was replaced"
    assert step(0, 7) == [7, 7, 7], "what begins anew needs nothing"
    session.close()


def test_a_server_that_knows_better_is_believed(doors: Doors) -> None:
    """It has compressed for a step that was given up, of which the log knows nothing any more."""
    client = doors.swarm.connect()
    session = client.open_session(max_length=LENGTH)
    session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=rows(20))])
    for position in range(20, 37):
        session.step([SequenceInput(sequence=0, parent=0, start=position, hidden=rows(256)[position : position + 1])])
    # With position 36 the first event became due and was carried out; then the log forgot that.
    session.step([SequenceInput(sequence=0, parent=0, start=36, hidden=rows(0))])
    (output,) = session.step([SequenceInput(sequence=0, parent=0, start=35, hidden=rows(40)[35:])])
    (expected,) = session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=rows(40))])
    assert (output - expected[35:]).abs().max() < 1e-4
    assert avoided(client) == set()
    session.close()


def test_a_session_that_is_given_up_midway_is_taken_up_again(llama: TinyLlama, doors: Doors) -> None:
    """Also when it was going back just then: what the servers hold belongs to another past."""
    client = doors.swarm.connect(request_timeout_s=2.0, step_timeout_s=1.0)
    session = client.open_session(max_length=LENGTH)
    session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=rows(90))])
    session.step([SequenceInput(sequence=0, parent=0, start=90, hidden=rows(91)[90:])])
    for server in doors.servers:
        server.edit_reply = lambda method, body: None if method == "Session" and not _is_opened(body) else body
    with pytest.raises(DeadlineError):
        session.step([SequenceInput(sequence=0, parent=0, start=50, hidden=rows(60, seed=1)[50:])])
    assert session.lengths == (91,)
    for server in doors.servers:
        server.edit_reply = lambda method, body: body
    (output,) = session.step([SequenceInput(sequence=0, parent=0, start=91, hidden=rows(95)[91:])])
    (expected,) = llama.blocks.run_stateless([rows(95)])
    assert (output - expected[91:]).abs().max() < 1e-4
    session.close()


def _is_opened(body: bytes) -> bool:
    return decode_frame(body, pb.SessionReply)[0].HasField("opened")


def test_an_exact_session_on_a_server_that_compresses_anyway(llama: TinyLlama) -> None:
    """It is found out from its own word, and others are used."""
    with InProcessSwarm(llama.folder, []) as swarm:
        liar = TamperingServer.of_span(swarm, 0, 6)

        def lie(method: str, body: bytes) -> bytes:
            reply, _ = decode_frame(body, pb.SessionReply)
            if method == "Session" and reply.HasField("opened"):
                reply.opened.kv_policy = POLICY
                return encode_frame(reply)
            return body

        liar.edit_reply = lie
        client = swarm.connect(kv_policy="none", ban_s=60.0)
        session = client.open_session(max_length=64)
        swarm.begin(_add_later(swarm))
        (output,) = session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=rows(9))])
        (expected,) = llama.blocks.run_stateless([rows(9)])
        assert (output - expected).abs().max() < 1e-4
        assert liar.peer_id in avoided(client)
        session.close()


async def _add_later(swarm: InProcessSwarm) -> None:
    """An honest server, once the liar has been tried."""

    def add() -> Any:
        return swarm.add_server(0, 6)

    await asyncio.sleep(0.3)
    asyncio.get_running_loop().run_in_executor(None, add)
