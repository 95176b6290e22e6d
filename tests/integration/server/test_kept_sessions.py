"""What a server keeps of a session across epochs and lost connections, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import session_pb2 as pb
from swarm.server.node import Node
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import encode_frame
from tests.raw_client import RawClient, RawStream, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
LIMITS = SessionLimits(admission=AdmissionConfig(max_sessions=2, max_waiting=2), detach_grace_s=5.0, yield_after_s=0.3)


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    with InProcessSwarm(llama.folder, [(0, 6)], limits=LIMITS) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def node(swarm: InProcessSwarm) -> Node:
    return swarm.nodes[0]


@pytest.fixture
def raw(node: Node) -> Iterator[RawClient]:
    with RawClient(node.info) as client:
        yield client
    wait_until(lambda: is_idle(node))


def rows(count: int) -> torch.Tensor:
    """[count, HIDDEN_SIZE]; longer ones begin with the shorter ones."""
    return torch.randn(64, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))[:count].clone()


def assert_right(llama: TinyLlama, output: torch.Tensor, hidden: torch.Tensor) -> None:
    (expected,) = llama.blocks.run_stateless([hidden])
    assert (output - expected[-len(output) :]).abs().max() < 1e-4


def run(stream: RawStream, step: int, start: int, end: int, **fields: Any) -> torch.Tensor:
    """Rows [start, end) as one step of sequence 0; its output."""
    stream.send(step_frame(step_message(step, start=start, count=end - start, **fields), rows(end)[start:]))
    reply = stream.receive()
    assert reply is not None and reply[0].HasField("result"), reply
    output: torch.Tensor = reply[1].tensor(0)
    return output


def test_a_new_epoch_goes_on_with_what_is_held(llama: TinyLlama, raw: RawClient) -> None:
    """Losing one hop must not make the others compute anything again."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    run(stream, 2, 20, 21)
    num_run = raw.info().num_tokens_run
    again, opened = raw.reopen(message, epoch=2, keep=(1, 2))
    assert (opened.kept, list(opened.positions)) == (True, [21])
    assert_right(llama, run(again, 3, 21, 22, epoch=2), rows(22))
    assert raw.info().num_tokens_run == num_run + 1


def test_later_steps_are_undone(llama: TinyLlama, raw: RawClient) -> None:
    """A step that one hop ran and another did not is no part of the session."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    stream.send(step_frame(step_message(2, start=20, count=5), -rows(5)))
    stream.receive()
    again, opened = raw.reopen(message, epoch=2, keep=(1, 1))
    assert (opened.kept, list(opened.positions)) == (True, [20])
    assert_right(llama, run(again, 2, 20, 25, epoch=2), rows(25))


def test_the_same_state_is_kept_as_often_as_asked(llama: TinyLlama, raw: RawClient) -> None:
    """The answer to an open may get lost, or another hop may refuse: then the client asks at a yet higher epoch."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    for epoch in range(2, 6):
        stream, opened = raw.reopen(message, epoch=epoch, keep=(1, 1))
        assert opened.kept
        run(stream, 2, 20, 22, epoch=epoch)
    assert_right(llama, run(stream, 3, 22, 30, epoch=5), rows(30))


def test_goodbye_on_an_old_stream_leaves_the_new_epoch_alone(llama: TinyLlama, raw: RawClient, node: Node) -> None:
    """The old stream's end may arrive after the new one's begin."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    again, _ = raw.reopen(message, epoch=2, keep=(1, 1))
    stream.close()
    assert node.info.num_sessions == 1
    assert_right(llama, run(again, 2, 20, 21, epoch=2), rows(21))


@pytest.mark.parametrize(
    ("fields", "keep"),
    [({}, (1, 9)), ({}, (2, 1)), ({"max_length": 63}, (1, 1)), ({"max_sequences": 2}, (1, 1))],
    ids=["no such step", "no such epoch", "another length", "more sequences"],
)
def test_what_is_not_here_is_not_kept(
    llama: TinyLlama, raw: RawClient, fields: dict[str, Any], keep: tuple[int, int]
) -> None:
    """The server says so and starts empty; it never guesses."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    again, opened = raw.reopen(message, epoch=2, keep=keep, **fields)
    assert (opened.kept, list(opened.positions)) == (False, [])
    assert_right(llama, run(again, 1, 0, 20, epoch=2), rows(20))


def test_other_blocks_keep_nothing(raw: RawClient) -> None:
    """What is held was computed by the old blocks."""
    stream, message = raw.open(start=2, end=6)
    run(stream, 1, 0, 20)
    _, opened = raw.reopen(message, epoch=2, keep=(1, 1), end=5)
    assert not opened.kept


def test_a_rewound_state_is_not_kept(raw: RawClient) -> None:
    """Its end has been overwritten; saying yes would give wrong tokens."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    run(stream, 2, 10, 12)
    _, opened = raw.reopen(message, epoch=2, keep=(1, 1))
    assert not opened.kept


def test_a_failed_session_keeps_nothing(raw: RawClient) -> None:
    """Its positions can not be trusted; only starting empty is safe."""
    stream, message = raw.open()
    run(stream, 1, 0, 5)
    stream.send(step_frame(step_message(2, start=5), torch.full((1, HIDDEN_SIZE), torch.nan)))
    assert stream.failure().code == pb.FAILURE_BAD_INPUT
    _, opened = raw.reopen(message, epoch=2, keep=(1, 1))
    assert not opened.kept


def test_a_lost_connection_resumes(llama: TinyLlama, raw: RawClient) -> None:
    """After a short network loss nothing is recomputed."""
    stream, message = raw.open()
    run(stream, 1, 0, 20)
    stream.hang_up()
    again, opened = raw.reopen(message, epoch=2, keep=(1, 1))
    assert opened.kept
    assert_right(llama, run(again, 2, 20, 21, epoch=2), rows(21))


def test_a_step_that_nobody_waits_for_holds_nobody_up(llama: TinyLlama, raw: RawClient) -> None:
    """A kept session's client has asked for another continuation; the old one must not come first, nor change it."""
    stream, message = raw.open()
    run(stream, 1, 0, 4)
    for step in range(2, 12):
        stream.send(step_frame(step_message(step, start=4 + (step - 2) * 6, count=6), -rows(6)))
    again, opened = raw.reopen(message, epoch=2, keep=(1, 1))
    assert opened.kept
    assert_right(llama, run(again, 2, 4, 30, epoch=2), rows(30))


def test_an_absent_client_gives_way_to_who_waits(raw: RawClient, node: Node) -> None:
    """Nobody waits a minute for the dead; but while nobody waits, a session may well come back."""
    gone = [raw.open()[0] for _ in range(2)]
    for stream in gone:
        run(stream, 1, 0, 20)
        stream.hang_up()
    time.sleep(1.2)
    assert node.info.num_sessions == 2
    raw.open()
    assert node.info.num_sessions == 2


def test_an_absent_client_gives_way_to_who_is_in_the_queue(raw: RawClient) -> None:
    """The one that hung up just now gets a moment, then the queue moves."""
    streams = [raw.open()[0] for _ in range(2)]
    waiting = raw.stream()
    waiting.send(encode_frame(pb.SessionRequest(open=raw.open_message(may_wait=True))))
    reply = waiting.receive()
    assert reply is not None and reply[0].HasField("queued")
    streams[0].hang_up()
    started_s = time.monotonic()
    reply = waiting.receive()
    assert reply is not None and reply[0].HasField("opened")
    assert time.monotonic() - started_s < 10.0


def test_the_end_of_a_replay_answers_without_outputs(raw: RawClient) -> None:
    """The hops after it hold everything already; sending them what they have would be work for nothing."""
    next_hop = pb.NextHop(peer_id="nobody", addresses=["127.0.0.1:1"])
    stream, _ = raw.open(next=next_hop, end=4)
    stream.send(step_frame(step_message(7, count=20, replay_end=4), rows(20)))
    reply = stream.receive()
    assert reply is not None and reply[0].result.step == 7 and not reply[0].result.relay
    assert not reply[1].tensors and not reply[0].result.push_problem
    stream.send(step_frame(step_message(8, start=20, count=1, replay_end=6), rows(21)[20:]))
    reply = stream.receive()
    assert reply is not None and reply[0].result.relay and reply[0].result.push_problem
    assert reply[1].tensor(0).shape == (1, HIDDEN_SIZE)


def test_steps_are_estimated_and_the_idle_engine_is_not_silent(raw: RawClient) -> None:
    """A client that knows what a step should take finds out in seconds that a server hangs."""
    stream, message = raw.open()
    run(stream, 1, 0, 60)
    run(stream, 2, 60, 61)
    _, opened = raw.reopen(message, epoch=2, keep=(1, 2))
    assert 0 < opened.token_us < opened.step_us < 5_000_000
    wait_until(lambda: raw.health().engine_silent_ms == 0)
