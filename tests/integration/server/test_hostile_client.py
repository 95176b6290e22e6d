"""What a hostile or broken client can say to a server: each is refused by type, and nobody else notices.

After every test the server must stand as before it: no session, all KV memory free, the right answer for an
honest client.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch

from swarm.client.blocks import SequenceInput
from swarm.client.connection import SwarmBlocks
from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.server.node import Node
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import encode_frame
from swarm.wire.methods import BACKWARD, FORWARD, LOOKUP
from tests.raw_client import RawClient, RawStream, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
MAX_SESSIONS = 8


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    limits = SessionLimits(
        admission=AdmissionConfig(max_sessions=MAX_SESSIONS, max_waiting=2),
        default_expected_tokens=1,
        max_steps_under_way=16,
        max_runs_under_way=4,
        first_message_timeout_s=0.5,
        detach_grace_s=0.2,
    )
    with InProcessSwarm(llama.folder, [(0, 6)], limits=limits) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def node(swarm: InProcessSwarm) -> Node:
    return swarm.nodes[0]


@pytest.fixture(scope="module")
def honest(swarm: InProcessSwarm) -> SwarmBlocks:
    return swarm.connect()


@pytest.fixture
def raw(node: Node) -> Iterator[RawClient]:
    with RawClient(node.info) as client:
        yield client


@pytest.fixture(autouse=True)
def _unharmed(node: Node, honest: SwarmBlocks, llama: TinyLlama, raw: RawClient) -> Iterator[None]:
    yield
    raw.__exit__(None, None, None)
    wait_until(lambda: is_idle(node))
    session = honest.open_session(max_length=16)
    assert_right(llama, session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=rows(9))])[0], rows(9))
    assert session.num_failovers == 0
    session.close()
    wait_until(lambda: is_idle(node))


def rows(count: int, *, seed: int = 0) -> torch.Tensor:
    """[count, HIDDEN_SIZE] that depend only on `seed`; longer ones begin with the shorter ones."""
    return torch.randn(64, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))[:count].clone()


def assert_right(llama: TinyLlama, output: torch.Tensor, hidden: torch.Tensor) -> None:
    """`output` [n, H] must be the last n rows of what all blocks make of `hidden` [T, H]."""
    (expected,) = llama.blocks.run_stateless([hidden])
    assert (output - expected[-len(output) :]).abs().max() < 1e-4


def answer(reply: tuple[pb.SessionReply, Any] | None) -> torch.Tensor:
    assert reply is not None and reply[0].HasField("result"), reply
    tensor: torch.Tensor = reply[1].tensor(0)
    return tensor


GARBAGE = {
    "nothing": b"",
    "one byte": b"\x00",
    "noise": bytes(range(256)),
    "a header longer than the message": struct.pack("<I", 100) + b"x" * 50,
    "a header of 4 GiB": struct.pack("<I", 2**32 - 1) + b"x" * 50,
    "a header that is no message": struct.pack("<I", 50) + b"\xff" * 50,
    "a header over the limit": struct.pack("<I", 70_000) + b"\x00" * 70_000,
    "a message of no kind": struct.pack("<I", 0),
    "a tensor of unknown dtype": encode_frame(pb.SessionRequest(close=pb.Close())) + b"\x63" * 40,
    "a tensor cut off": step_frame(step_message(1), rows(1))[:-7],
    "a tensor of 2^60 bytes": encode_frame(pb.SessionRequest(step=step_message(1)))
    + struct.pack("<BBBBIIQ", 1, 0, 2, 0, 2**29, 2**29, 2**60),
    "dimensions that lie about the size": encode_frame(pb.SessionRequest(step=step_message(1)))
    + struct.pack("<BBBBIIQ", 1, 0, 2, 0, 4, HIDDEN_SIZE, 16)
    + bytes(16),
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("is_open", [False, True], ids=["first", "within a session"])
def test_garbage_ends_the_session(raw: RawClient, body: bytes, is_open: bool) -> None:
    """Anything can arrive on an open port; it must cost an error message, not a crash or an allocation."""
    stream = raw.open()[0] if is_open else raw.stream()
    stream.send(body)
    assert stream.failure().code == pb.FAILURE_BAD_INPUT
    assert stream.receive() is None


BAD_OPENS: dict[str, tuple[dict[str, Any], int]] = {
    "a short session id": ({"session_id": b"short"}, pb.FAILURE_BAD_INPUT),
    "a long session id": ({"session_id": bytes(17)}, pb.FAILURE_BAD_INPUT),
    "no session id": ({"session_id": b""}, pb.FAILURE_BAD_INPUT),
    "another protocol": ({"protocol": 99}, pb.FAILURE_BAD_INPUT),
    "epoch 0": ({"epoch": 0}, pb.FAILURE_BAD_INPUT),
    "another model": ({"model_hash": "cd" * 32}, pb.FAILURE_NOT_SERVED),
    "no model": ({"model_hash": ""}, pb.FAILURE_NOT_SERVED),
    "blocks beyond the span": ({"start": 3, "end": 7}, pb.FAILURE_NOT_SERVED),
    "blocks backwards": ({"start": 4, "end": 2}, pb.FAILURE_NOT_SERVED),
    "no blocks": ({"start": 4, "end": 4}, pb.FAILURE_NOT_SERVED),
    "no length": ({"max_length": 0}, pb.FAILURE_LENGTH),
    "more than the context": ({"max_length": 513}, pb.FAILURE_LENGTH),
    "2^32 positions": ({"max_length": 2**32 - 1}, pb.FAILURE_LENGTH),
    "2^32 sequences": ({"max_sequences": 2**32 - 1}, pb.FAILURE_LENGTH),
    "an unknown KV policy": ({"kv_policy": "psychic"}, pb.FAILURE_NOT_SERVED),
    "a next hop that is a file": ({"next": {"addresses": ["unix:/run/secret.sock"]}}, pb.FAILURE_BAD_INPUT),
    "a next hop without port": ({"next": {"addresses": ["example.org"]}}, pb.FAILURE_BAD_INPUT),
    "a next hop of 10 kB": ({"next": {"addresses": ["a" * 10_000 + ":80"]}}, pb.FAILURE_BAD_INPUT),
}


@pytest.mark.parametrize(("fields", "code"), BAD_OPENS.values(), ids=BAD_OPENS)
def test_a_bad_open_is_refused(raw: RawClient, node: Node, fields: dict[str, Any], code: int) -> None:
    """What is claimed at the door decides what is allocated later, so all of it is checked there."""
    failure = raw.refused_open(**fields)
    assert failure.code == code
    assert len(failure.message) < 500
    assert node.info.num_sessions == 0


def test_a_step_before_open_is_refused(raw: RawClient) -> None:
    """There is no session it could belong to, even if it names one."""
    stream = raw.stream()
    stream.send(step_frame(step_message(1, session_id=os.urandom(16)), rows(1)))
    assert stream.failure().code == pb.FAILURE_BAD_INPUT
    assert stream.receive() is None


def test_a_stream_holds_one_session(raw: RawClient, node: Node) -> None:
    """Sessions opened one over the other would stay behind, with their memory, when the stream ends."""
    stream, _ = raw.open()
    stream.send(step_frame(step_message(1, count=20), rows(20)))
    answer(stream.receive())
    stream.send(encode_frame(pb.SessionRequest(open=raw.open_message())))
    assert stream.failure().code == pb.FAILURE_BAD_INPUT
    assert stream.receive() is None
    wait_until(lambda: is_idle(node))


BAD_STEPS: dict[str, tuple[pb.Step, torch.Tensor | None, int]] = {
    "no tensor": (step_message(1), None, pb.FAILURE_BAD_INPUT),
    "another hidden size": (step_message(1), torch.zeros(1, HIDDEN_SIZE + 1), pb.FAILURE_BAD_INPUT),
    "one dimension": (step_message(1), torch.zeros(HIDDEN_SIZE), pb.FAILURE_BAD_INPUT),
    "three dimensions": (step_message(1), torch.zeros(1, 1, HIDDEN_SIZE), pb.FAILURE_BAD_INPUT),
    "integers": (step_message(1), torch.zeros(1, HIDDEN_SIZE, dtype=torch.int64), pb.FAILURE_BAD_INPUT),
    "bytes": (step_message(1), torch.zeros(1, HIDDEN_SIZE, dtype=torch.uint8), pb.FAILURE_BAD_INPUT),
    "fewer rows than named": (step_message(1, count=3), rows(2), pb.FAILURE_BAD_INPUT),
    "more rows than named": (step_message(1, count=1), rows(2), pb.FAILURE_BAD_INPUT),
    "2^32 tokens": (step_message(1, count=2**32 - 1), rows(1), pb.FAILURE_LENGTH),
    "a position beyond max_length": (step_message(1, count=64 + 1), torch.zeros(65, HIDDEN_SIZE), pb.FAILURE_LENGTH),
    "an unknown sequence": (step_message(1, sequence=1), rows(1), pb.FAILURE_LENGTH),
    "sequence 2^32": (step_message(1, sequence=2**32 - 1), rows(1), pb.FAILURE_LENGTH),
    "an unknown parent": (step_message(1, parent=7), rows(1), pb.FAILURE_LENGTH),
    "a gap": (step_message(1, start=1), rows(1), pb.FAILURE_STATE),
    "step 0": (step_message(0), rows(1), pb.FAILURE_STATE),
    "another epoch": (step_message(1, epoch=2), rows(1), pb.FAILURE_STATE),
    "not a number": (step_message(1), torch.full((1, HIDDEN_SIZE), torch.nan), pb.FAILURE_BAD_INPUT),
    "infinity": (step_message(1), torch.full((1, HIDDEN_SIZE), torch.inf), pb.FAILURE_BAD_INPUT),
    "a sequence named twice": (
        pb.Step(epoch=1, step=1, sequences=[pb.SequenceStep(count=1), pb.SequenceStep(count=1)]),
        rows(2),
        pb.FAILURE_BAD_INPUT,
    ),
}


@pytest.mark.parametrize(("step", "hidden", "code"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_a_bad_step_is_refused(
    llama: TinyLlama, raw: RawClient, step: pb.Step, hidden: torch.Tensor | None, code: int
) -> None:
    """A refusal says of what kind it is, and a session beside it goes on as if nothing had happened."""
    beside, _ = raw.open()
    beside.send(step_frame(step_message(1, count=5), rows(5)))
    answer(beside.receive())
    stream, _ = raw.open()
    stream.send(step_frame(step, hidden))
    failure = stream.failure()
    assert failure.code == code
    assert failure.step == step.step
    beside.send(step_frame(step_message(2, start=5, count=4), rows(9)[5:]))
    assert_right(llama, answer(beside.receive()), rows(9))


def test_a_refused_step_can_be_put_right(llama: TinyLlama, raw: RawClient) -> None:
    """Where only the position was wrong the session is unharmed, and the refusal says where it stands."""
    stream, _ = raw.open()
    stream.send(step_frame(step_message(1, count=5), rows(5)))
    answer(stream.receive())
    stream.send(step_frame(step_message(2, start=7, count=2), rows(9)[7:]))
    failure = stream.failure()
    assert (failure.code, failure.epoch, list(failure.positions)) == (pb.FAILURE_STATE, 1, [5])
    stream.send(step_frame(step_message(2, start=5, count=4), rows(9)[5:]))
    assert_right(llama, answer(stream.receive()), rows(9))


def test_a_dead_session_holds_no_memory(raw: RawClient, node: Node) -> None:
    """A client that never reads its refusals must not keep pages nobody can use."""
    stream, _ = raw.open()
    stream.send(step_frame(step_message(1, count=60), rows(60)))
    answer(stream.receive())
    assert node.info.kv_tokens_free < node.info.kv_tokens_total
    stream.send(step_frame(step_message(2, start=60), torch.full((1, HIDDEN_SIZE), torch.nan)))
    assert stream.failure().code == pb.FAILURE_BAD_INPUT
    wait_until(lambda: node.info.kv_tokens_free == node.info.kv_tokens_total)
    stream.send(step_frame(step_message(3, start=61), rows(1)))
    assert stream.failure().code == pb.FAILURE_INTERNAL


def test_steps_follow_each_other(raw: RawClient) -> None:
    """Only the first step of an epoch may have any number; a gap after it means that something got lost."""
    stream, _ = raw.open()
    stream.send(step_frame(step_message(2**63), rows(1)))
    answer(stream.receive())
    stream.send(step_frame(step_message(2**63 + 2, start=1), rows(1)))
    assert stream.failure().code == pb.FAILURE_STATE


def test_a_repeated_step_is_answered_from_memory(llama: TinyLlama, raw: RawClient) -> None:
    """Retries are safe only if they neither compute nor move the position again."""
    stream, _ = raw.open()
    num_steps = raw.info().num_steps
    stream.send(step_frame(step_message(1, count=5), rows(5)))
    first = answer(stream.receive())
    for _ in range(3):
        stream.send(step_frame(step_message(1, count=5), rows(5)))
        assert torch.equal(answer(stream.receive()), first)
    assert raw.info().num_steps == num_steps + 1
    stream.send(step_frame(step_message(2, start=5, count=4), rows(9)[5:]))
    assert_right(llama, answer(stream.receive()), rows(9))


def test_endless_repeats_end(raw: RawClient) -> None:
    """A retry has a last attempt; more of them are an attack on the network rather than on the engine."""
    stream, _ = raw.open()
    for _ in range(50):
        stream.send(step_frame(step_message(1, count=5), rows(5)))
    replies = [stream.receive() for _ in range(20)]
    assert any(reply is not None and reply[0].failure.code == pb.FAILURE_BAD_INPUT for reply in replies)


def test_a_route_that_bites_its_own_tail_ends(raw: RawClient, node: Node) -> None:
    """A session that pushes to itself would repeat its last step for ever."""
    next_hop = pb.NextHop(peer_id="somebody else", addresses=[node.info.addresses[0]])
    stream, _ = raw.open(next=next_hop)
    before = raw.info().num_steps
    stream.send(step_frame(step_message(1, count=5), rows(5)))
    failure = stream.failure()
    assert failure.code in (pb.FAILURE_BAD_INPUT, pb.FAILURE_UNREACHABLE)
    assert raw.info().num_steps == before + 1


def test_an_old_epoch_is_refused(llama: TinyLlama, raw: RawClient) -> None:
    """The newest route is the only one: a client that fell behind must hear where the session is."""
    stream, message = raw.open(epoch=3)
    stream.send(step_frame(step_message(1, epoch=3, count=5), rows(5)))
    answer(stream.receive())
    failure = raw.refused_open(session_id=message.session_id, epoch=2)
    assert (failure.code, failure.epoch) == (pb.FAILURE_STATE, 3)
    stream.send(step_frame(step_message(2, epoch=2, start=5, count=4), rows(9)[5:]))
    assert stream.failure().code == pb.FAILURE_STATE
    stream.send(step_frame(step_message(2, epoch=3, start=5, count=4), rows(9)[5:]))
    assert_right(llama, answer(stream.receive()), rows(9))


def test_a_new_epoch_starts_anew(llama: TinyLlama, raw: RawClient, node: Node) -> None:
    """After a loss the client replays from position 0; the old epoch's memory is free by then."""
    old, message = raw.open()
    old.send(step_frame(step_message(1, count=60), rows(60)))
    answer(old.receive())
    stream, _ = raw.open(session_id=message.session_id, epoch=2)
    wait_until(lambda: node.info.kv_tokens_free == node.info.kv_tokens_total)
    assert node.info.num_sessions == 1
    stream.send(step_frame(step_message(1, epoch=2, count=9), rows(9)))
    assert_right(llama, answer(stream.receive()), rows(9))


def test_epochs_opened_at_once_leave_one_session(raw: RawClient, node: Node) -> None:
    """A client that gives up an open and tries again at once must not leave a session nobody can close."""
    session_id = os.urandom(16)
    next_hop = pb.NextHop(peer_id="nobody", addresses=["127.0.0.1:1"])
    streams = [raw.stream() for _ in range(6)]
    for epoch, stream in enumerate(streams, start=1):
        stream.send(
            encode_frame(pb.SessionRequest(open=raw.open_message(session_id=session_id, epoch=epoch, next=next_hop)))
        )
    replies = [stream.receive() for stream in streams]
    assert all(reply is not None for reply in replies)
    assert node.info.num_sessions == 1


def test_an_epoch_is_opened_once(raw: RawClient) -> None:
    """Whoever comes back to a session raises its epoch: two streams of one epoch could not be told apart."""
    _, message = raw.open()
    failure = raw.refused_open(session_id=message.session_id)
    assert (failure.code, failure.epoch) == (pb.FAILURE_STATE, 1)


def test_a_push_to_an_unknown_session_is_refused(raw: RawClient) -> None:
    """The pusher must hear of it, or it would believe its work arrived."""
    stream = raw.push_stream()
    stream.send(step_frame(step_message(1, session_id=os.urandom(16)), rows(1)))
    failure = stream.failure()
    assert (failure.code, failure.epoch) == (pb.FAILURE_STATE, 0)
    assert stream.receive() is None


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_push_of_another_epoch_is_refused_without_a_word_to_the_client(
    llama: TinyLlama, raw: RawClient, epoch: int
) -> None:
    """Outputs of the old route may still be under way while the new one is at work; they are nobody's fault."""
    stream, message = raw.open(epoch=2)
    stream.send(step_frame(step_message(1, epoch=2, count=5), rows(5)))
    answer(stream.receive())
    push = raw.push_stream()
    push.send(step_frame(step_message(2, epoch=epoch, start=5, session_id=message.session_id), rows(1)))
    failure = push.failure()
    assert (failure.code, failure.epoch) == (pb.FAILURE_STATE, 2)
    stream.send(step_frame(step_message(2, epoch=2, start=5, count=4), rows(9)[5:]))
    assert_right(llama, answer(stream.receive()), rows(9))


def test_only_steps_can_be_pushed(raw: RawClient, node: Node) -> None:
    """A push stream is no second way to open sessions or to close those of others."""
    _, message = raw.open()
    for request in (
        pb.SessionRequest(open=raw.open_message()),
        pb.SessionRequest(close=pb.Close()),
        pb.SessionRequest(),
    ):
        push = raw.push_stream()
        push.send(encode_frame(request))
        assert push.failure().code == pb.FAILURE_BAD_INPUT
        assert push.receive() is None
    assert node.info.num_sessions == 1
    assert message.epoch == 1


def test_a_flood_of_opens_is_answered_with_busy(raw: RawClient, node: Node) -> None:
    """One client must not be able to fill the server's memory with sessions; it hears when to come back."""
    for _ in range(MAX_SESSIONS):
        raw.open()
    failures = [raw.refused_open() for _ in range(30)]
    assert {failure.code for failure in failures} == {pb.FAILURE_BUSY}
    assert all(failure.retry_after_ms > 0 for failure in failures)
    assert node.info.num_sessions == MAX_SESSIONS


def test_an_exaggerated_claim_keeps_nobody_out(raw: RawClient, node: Node) -> None:
    """Expectations decide who is let in, so a session may not expect more than it may use."""
    raw.open(expected_tokens=2**32 - 1)
    for _ in range(MAX_SESSIONS - 1):
        raw.open(expected_tokens=2**32 - 1)
    assert node.info.num_sessions == MAX_SESSIONS


def test_a_silent_stream_is_ended(raw: RawClient) -> None:
    """Streams cost nothing to open, and a server has only so many."""
    session, push = raw.stream(), raw.push_stream()
    started_s = time.monotonic()
    assert session.receive() is None
    assert push.receive() is None
    assert time.monotonic() - started_s < 3.0


def test_who_never_reads_holds_nobody_up(llama: TinyLlama, raw: RawClient) -> None:
    """Answers that nobody takes wait for their own client alone."""
    deaf, _ = raw.open()
    for step in range(1, 16):
        deaf.send(step_frame(step_message(step, count=60), rows(60)))
    beside, _ = raw.open()
    for step, (start, end) in enumerate([(0, 5), (5, 9)], start=1):
        beside.send(step_frame(step_message(step, start=start, count=end - start), rows(9)[start:end]))
        assert_right(llama, answer(beside.receive()), rows(9)[:end])


def _full(raw: RawClient) -> list[RawStream]:
    """As many sessions as the server takes."""
    return [raw.open()[0] for _ in range(MAX_SESSIONS)]


def _wait_in_queue(raw: RawClient, **fields: Any) -> RawStream:
    stream = raw.stream()
    stream.send(encode_frame(pb.SessionRequest(open=raw.open_message(may_wait=True, **fields))))
    reply = stream.receive()
    assert reply is not None and reply[0].HasField("queued"), reply
    return stream


def test_a_session_opened_anew_while_it_waits_enters_once(raw: RawClient, node: Node) -> None:
    """A client that lost patience and comes again must not take two places, of which one is never given back."""
    streams = _full(raw)
    session_id = os.urandom(16)
    waiting = [_wait_in_queue(raw, session_id=session_id, epoch=epoch) for epoch in (1, 2)]
    assert raw.refused_open(session_id=session_id, epoch=2, may_wait=True).code == pb.FAILURE_BAD_INPUT
    for stream in streams:
        stream.close()
    for stream in waiting:
        while (reply := stream.receive()) is not None and reply[0].HasField("queued"):
            pass
        assert reply is not None and reply[0].HasField("opened")
    assert node.info.num_sessions == 1
    waiting[1].close()
    wait_until(lambda: is_idle(node))
    _full(raw)


def test_who_hangs_up_in_the_queue_leaves_it(raw: RawClient, node: Node) -> None:
    """Else the place would be given to nobody, and everybody behind would wait for ever."""
    streams = _full(raw)
    for stream in [_wait_in_queue(raw), _wait_in_queue(raw)]:
        stream.hang_up()

    def is_first() -> bool:
        stream = raw.stream()
        stream.send(encode_frame(pb.SessionRequest(open=raw.open_message(may_wait=True))))
        reply = stream.receive()
        stream.hang_up()
        return reply is not None and reply[0].queued.position == 1

    wait_until(is_first)
    streams[0].close()
    wait_until(lambda: node.info.num_sessions == MAX_SESSIONS - 1)
    raw.open()


def test_a_flood_of_steps_is_refused(raw: RawClient) -> None:
    """Steps that wait hold their inputs in memory, so their number has a bound."""
    stream, _ = raw.open()
    for step in range(1, 200):
        stream.send(step_frame(step_message(step, count=60), rows(60)))
    codes = []
    while (reply := stream.receive()) is not None:
        codes.append(reply[0].failure.code)
        if reply[0].HasField("failure"):
            break
    assert codes[-1] == pb.FAILURE_BAD_INPUT


BAD_RUNS: dict[str, tuple[list[torch.Tensor], dict[str, Any], int]] = {
    "another model": ([rows(3)], {"model_hash": "cd" * 32}, pb.FAILURE_NOT_SERVED),
    "blocks outside": ([rows(3)], {"end": 7}, pb.FAILURE_NOT_SERVED),
    "no sequence": ([rows(3)], {"counts": []}, pb.FAILURE_BAD_INPUT),
    "an empty sequence": ([rows(3)], {"counts": [3, 0]}, pb.FAILURE_BAD_INPUT),
    "2^32 tokens": ([rows(3)], {"counts": [2**32 - 1]}, pb.FAILURE_BAD_INPUT),
    "16000 sequences": ([rows(3)], {"counts": [500] * 16_000}, pb.FAILURE_BAD_INPUT),
    "fewer rows than named": ([rows(3)], {"counts": [4]}, pb.FAILURE_BAD_INPUT),
    "no tensor": ([], {"counts": [3]}, pb.FAILURE_BAD_INPUT),
    "another hidden size": ([torch.zeros(3, 7)], {}, pb.FAILURE_BAD_INPUT),
    "integers": ([torch.zeros(3, HIDDEN_SIZE, dtype=torch.int32)], {}, pb.FAILURE_BAD_INPUT),
    "too many tensors": ([rows(3), rows(3)], {"counts": [3]}, pb.FAILURE_BAD_INPUT),
}


@pytest.mark.parametrize(("hidden", "fields", "code"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_bad_run_is_refused(raw: RawClient, hidden: list[torch.Tensor], fields: dict[str, Any], code: int) -> None:
    """Stateless runs come from strangers too."""
    reply, frame = raw.forward(hidden, **fields)
    assert reply.failure.code == code
    assert not frame.tensors


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
def test_garbage_instead_of_a_run_is_refused(raw: RawClient, method: str, body: bytes) -> None:
    """As in sessions: a typed answer, no allocation."""
    reply = raw.unary(method, body)
    (header_size,) = struct.unpack_from("<I", reply)
    assert node_pb2.RunReply.FromString(reply[4 : 4 + header_size]).failure.code in (
        pb.FAILURE_BAD_INPUT,
        pb.FAILURE_NOT_SERVED,
    )


def test_a_flood_of_runs_is_answered_with_busy(raw: RawClient, llama: TinyLlama) -> None:
    """Runs that wait hold their inputs in memory, so their number has a bound; those let in are right."""
    request = node_pb2.RunRequest(model_hash=llama.source.model_hash, start=0, end=6, counts=[60] * 20)
    body = encode_frame(request, [torch.cat([rows(60)] * 20)])
    calls = [raw.unary_later(FORWARD, body) for _ in range(40)]
    codes = []
    for call in calls:
        reply = call.result()
        (header_size,) = struct.unpack_from("<I", reply)
        codes.append(node_pb2.RunReply.FromString(reply[4 : 4 + header_size]).failure.code)
    assert set(codes) == {0, pb.FAILURE_BUSY}


def test_a_look_up_that_is_none_is_refused(raw: RawClient) -> None:
    """The one method anybody may call without naming a model that is served here."""
    with pytest.raises(grpc.RpcError) as raised:
        raw.unary(LOOKUP, b"\xff" * 100)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_clients_that_come_and_vanish_leave_nothing(raw: RawClient, node: Node) -> None:
    """A crash, a closed laptop, a port scan: the grace ends and the memory is free."""
    for _ in range(MAX_SESSIONS):
        stream, _ = raw.open()
        stream.send(step_frame(step_message(1, count=20), rows(20)))
        stream.hang_up()
    wait_until(lambda: is_idle(node))
    started_s = time.monotonic()
    raw.open()
    assert time.monotonic() - started_s < 1.0
