"""What a hostile or broken server can say when it hands a session over: refused, and nothing of it stays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.server.engine.page_transfer import page_format
from swarm.server.engine.session_memory import SessionMemory
from swarm.server.node import Node
from swarm.server.rpc.engine_calls import ask_engine
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import decode_frame, encode_frame
from swarm.wire.methods import HANDOVER
from tests.raw_client import RawClient, RawStream, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
NUM_BLOCKS = 6
PAGE_TOKENS = 16


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    limits = SessionLimits(
        admission=AdmissionConfig(max_sessions=4),
        takeover_grace_s=0.2,
        yield_after_s=0.1,
        max_takeovers=2,
        handover_message_timeout_s=0.5,
        handover_timeout_s=3.0,
        first_message_timeout_s=0.5,
    )
    with InProcessSwarm(llama.folder, [(0, NUM_BLOCKS)], limits=limits, kv_memory_bytes=2**21) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def node(swarm: InProcessSwarm) -> Node:
    return swarm.nodes[0]


@pytest.fixture
def memory(node: Node) -> SessionMemory:
    assert node._hosting is not None and node._hosting.engine.memory is not None
    return node._hosting.engine.memory


@pytest.fixture
def raw(swarm: InProcessSwarm, node: Node, memory: SessionMemory) -> Iterator[RawClient]:
    with RawClient(node.info) as client:
        yield client
    wait_until(lambda: is_idle(node))
    assert node._hosting is not None
    engine = node._hosting.engine

    async def check() -> None:
        await ask_engine(engine, memory.check_integrity)
        assert not memory.transfers and memory.num_sessions == 0

    swarm.run(check())


def offer(raw: RawClient, memory: SessionMemory, *, length: int = 20, **fields: Any) -> node_pb2.HandoverOffer:
    """A proper offer of one sequence, with `fields` set differently."""
    pages = page_format(memory.store)
    num_pages = NUM_BLOCKS * -(-length // PAGE_TOKENS)
    proper: dict[str, Any] = {
        "session_id": os.urandom(16),
        "epoch": 1,
        "model_hash": raw.server.model_hash,
        "start": 0,
        "end": NUM_BLOCKS,
        "max_length": 64,
        "max_sequences": 2,
        "weights": raw.server.weights,
        "kv_policy": raw.server.kv_policy,
        "page_tokens": pages.page_tokens,
        "page_values": pages.page_values,
        "dtype": pages.dtype,
        "num_pages": num_pages,
        "sequences": [node_pb2.HandoverSequence(sequence=0, length=length, pages=range(num_pages))],
        "checkpoints": [node_pb2.HandoverCheckpoint(epoch=1, step=1, positions=[length])],
    }
    return node_pb2.HandoverOffer(**(proper | fields))


def request(**kind: Any) -> bytes:
    return encode_frame(node_pb2.HandoverRequest(**kind))


def pages_message(first: int, contents: torch.Tensor) -> bytes:
    return encode_frame(node_pb2.HandoverRequest(pages=node_pb2.HandoverPages(first=first)), [contents])


def contents(memory: SessionMemory, count: int) -> torch.Tensor:
    return torch.zeros(count, page_format(memory.store).page_values)


def reply(stream: RawStream) -> node_pb2.HandoverReply:
    body = stream.receive_body()
    assert body is not None
    return decode_frame(body, node_pb2.HandoverReply)[0]


def begin(raw: RawClient, message: node_pb2.HandoverOffer) -> RawStream:
    """A hand-over whose offer was accepted."""
    stream = raw.stream(HANDOVER)
    stream.send(request(offer=message))
    assert reply(stream).accepted
    return stream


def test_a_proper_hand_over_is_accepted_and_kept_for_its_client(raw: RawClient, memory: SessionMemory) -> None:
    """The other tests here mean something only if this one passes."""
    message = offer(raw, memory)
    stream = begin(raw, message)
    stream.send(pages_message(0, contents(memory, 7)))
    stream.send(pages_message(7, contents(memory, 5)))
    stream.send(request(end=node_pb2.HandoverEnd()))
    assert reply(stream).accepted
    opening = raw.open_message(session_id=message.session_id, max_sequences=2)
    again, opened = raw.reopen(opening, epoch=2, keep=(1, 1))
    assert (opened.kept, list(opened.positions)) == (True, [20])
    again.send(step_frame(step_message(2, start=20, epoch=2), torch.randn(1, HIDDEN_SIZE)))
    answer = again.receive()
    assert answer is not None and answer[0].HasField("result")


def test_a_session_nobody_comes_for_ends(raw: RawClient, node: Node, memory: SessionMemory) -> None:
    """It held memory for its client's sake alone."""
    stream = begin(raw, offer(raw, memory))
    stream.send(pages_message(0, contents(memory, 12)))
    stream.send(request(end=node_pb2.HandoverEnd()))
    assert reply(stream).accepted
    assert node.info.num_sessions == 1
    wait_until(lambda: is_idle(node))


def sequence(number: int, length: int, pages: list[int]) -> node_pb2.HandoverSequence:
    return node_pb2.HandoverSequence(sequence=number, length=length, pages=pages)


def checkpoint(epoch: int, step: int, *positions: int) -> node_pb2.HandoverCheckpoint:
    return node_pb2.HandoverCheckpoint(epoch=epoch, step=step, positions=positions)


ALL = list(range(12))
BAD_OFFERS: dict[str, tuple[dict[str, Any], int]] = {
    "a short session id": ({"session_id": b"short"}, pb.FAILURE_BAD_INPUT),
    "epoch 0": ({"epoch": 0}, pb.FAILURE_BAD_INPUT),
    "another model": ({"model_hash": "0" * 32}, pb.FAILURE_NOT_SERVED),
    "blocks beyond the span": ({"end": NUM_BLOCKS + 1}, pb.FAILURE_NOT_SERVED),
    "no blocks": ({"end": 0}, pb.FAILURE_NOT_SERVED),
    "fewer blocks than pages": ({"end": NUM_BLOCKS - 1}, pb.FAILURE_BAD_INPUT),
    "another precision of weights": ({"weights": "int8"}, pb.FAILURE_NOT_SERVED),
    "another KV policy": ({"kv_policy": "pyramid"}, pb.FAILURE_NOT_SERVED),
    "another page size": ({"page_tokens": 8}, pb.FAILURE_NOT_SERVED),
    "pages of no tokens": ({"page_tokens": 0}, pb.FAILURE_NOT_SERVED),
    "other values": ({"page_values": 2**31}, pb.FAILURE_NOT_SERVED),
    "another dtype": ({"dtype": "bfloat16"}, pb.FAILURE_NOT_SERVED),
    "no length": ({"max_length": 0}, pb.FAILURE_LENGTH),
    "2^32 positions": ({"max_length": 2**32 - 1}, pb.FAILURE_LENGTH),
    "2^32 sequences": ({"max_sequences": 2**32 - 1}, pb.FAILURE_LENGTH),
    "no sequences at all": ({"max_sequences": 0}, pb.FAILURE_LENGTH),
    "more than max_length": ({"max_length": 19}, pb.FAILURE_LENGTH),
    "a sequence that holds nothing": ({"sequences": [sequence(0, 0, [])], "num_pages": 0}, pb.FAILURE_LENGTH),
    "an unknown sequence": ({"sequences": [sequence(2, 20, ALL)]}, pb.FAILURE_BAD_INPUT),
    "sequence 2^32": ({"sequences": [sequence(2**32 - 1, 20, ALL)]}, pb.FAILURE_BAD_INPUT),
    "a sequence twice": ({"sequences": [sequence(0, 20, ALL), sequence(0, 20, ALL)]}, pb.FAILURE_BAD_INPUT),
    "too few pages": ({"sequences": [sequence(0, 20, ALL[:-1])]}, pb.FAILURE_BAD_INPUT),
    "too many pages": ({"sequences": [sequence(0, 20, [*ALL, 12])], "num_pages": 13}, pb.FAILURE_BAD_INPUT),
    "a page twice": ({"sequences": [sequence(0, 20, [*ALL[:-1], 0])]}, pb.FAILURE_BAD_INPUT),
    "a page that is not offered": ({"sequences": [sequence(0, 20, [*ALL[:-1], 99])]}, pb.FAILURE_BAD_INPUT),
    "page 2^32": ({"sequences": [sequence(0, 20, [*ALL[:-1], 2**32 - 1])]}, pb.FAILURE_BAD_INPUT),
    "pages of nobody": ({"num_pages": 2**32 - 1}, pb.FAILURE_BAD_INPUT),
    "pages without sequences": ({"sequences": []}, pb.FAILURE_BAD_INPUT),
    "a checkpoint beyond the session": ({"checkpoints": [checkpoint(1, 1, 21)]}, pb.FAILURE_BAD_INPUT),
    "a checkpoint of the future": ({"checkpoints": [checkpoint(2, 1, 20)]}, pb.FAILURE_BAD_INPUT),
    "checkpoints in disorder": ({"checkpoints": [checkpoint(1, 2, 9), checkpoint(1, 1, 9)]}, pb.FAILURE_BAD_INPUT),
    "a checkpoint of more sequences": ({"checkpoints": [checkpoint(1, 1, 20, 1)]}, pb.FAILURE_BAD_INPUT),
}


@pytest.mark.parametrize(("fields", "code"), BAD_OFFERS.values(), ids=BAD_OFFERS)
def test_a_bad_offer_is_refused(raw: RawClient, memory: SessionMemory, fields: dict[str, Any], code: int) -> None:
    """Every claim is checked before memory is taken for it."""
    stream = raw.stream(HANDOVER)
    stream.send(request(offer=offer(raw, memory, **fields)))
    answer = reply(stream)
    assert not answer.accepted and answer.failure.code == code, answer
    assert answer.failure.message
    assert stream.receive_body() is None


def test_what_does_not_fit_is_refused(raw: RawClient, node: Node, memory: SessionMemory) -> None:
    """Pages are taken only where they are free; nobody makes room for what nobody may come for."""
    num_sessions, length = 64, 64
    pages = list(range(num_sessions * NUM_BLOCKS * 4))
    per = NUM_BLOCKS * 4
    sequences = [sequence(number, length, pages[number * per : (number + 1) * per]) for number in range(num_sessions)]
    assert len(pages) > memory.store.pool.num_pages
    stream = raw.stream(HANDOVER)
    message = offer(raw, memory, max_sequences=num_sessions, num_pages=len(pages), sequences=sequences, checkpoints=[])
    stream.send(request(offer=message))
    assert reply(stream).failure.code == pb.FAILURE_BUSY
    assert stream.receive_body() is None


def test_more_at_one_time_than_allowed_are_refused(raw: RawClient, memory: SessionMemory) -> None:
    """Each holds memory and a message."""
    streams = [begin(raw, offer(raw, memory)) for _ in range(2)]
    third = raw.stream(HANDOVER)
    third.send(request(offer=offer(raw, memory)))
    assert reply(third).failure.code == pb.FAILURE_BUSY
    for stream in streams:
        stream.hang_up()


BAD_PAGES: dict[str, Callable[[SessionMemory], bytes]] = {
    "no tensor": lambda memory: request(pages=node_pb2.HandoverPages(first=0)),
    "other pages": lambda memory: pages_message(2, contents(memory, 1)),
    "one page too many": lambda memory: pages_message(0, contents(memory, 13)),
    "no pages": lambda memory: pages_message(0, contents(memory, 0)),
    "other values": lambda memory: pages_message(0, contents(memory, 2)[:, 1:]),
    "one dimension": lambda memory: pages_message(0, contents(memory, 1)[0]),
    "another dtype": lambda memory: pages_message(0, contents(memory, 1).to(torch.float16)),
    "the end too early": lambda memory: request(end=node_pb2.HandoverEnd()),
    "another offer": lambda memory: request(offer=node_pb2.HandoverOffer()),
    "nothing of any kind": lambda memory: request(),
    "noise": lambda memory: bytes(range(256)),
}


@pytest.mark.parametrize("bad", BAD_PAGES.values(), ids=BAD_PAGES)
@pytest.mark.parametrize("is_first", [True, False], ids=["at once", "after good ones"])
def test_bad_pages_end_the_hand_over(
    raw: RawClient, memory: SessionMemory, bad: Callable[[SessionMemory], bytes], is_first: bool
) -> None:
    """Half a session is of no use to anybody."""
    stream = begin(raw, offer(raw, memory))
    if not is_first:
        stream.send(pages_message(0, contents(memory, 1)))
    stream.send(bad(memory))
    answer = reply(stream)
    assert not answer.accepted and answer.failure.code == pb.FAILURE_BAD_INPUT, answer


@pytest.mark.parametrize("num_pages", [0, 5, 12], ids=["before pages", "within pages", "before the end"])
def test_a_sender_that_dies_half_way_leaves_nothing(
    raw: RawClient, node: Node, memory: SessionMemory, num_pages: int
) -> None:
    """Its session is where it was; what was taken for it here is free again."""
    stream = begin(raw, offer(raw, memory))
    assert node.info.kv_tokens_free < node.info.kv_tokens_total
    if num_pages:
        stream.send(pages_message(0, contents(memory, num_pages)))
    stream.hang_up()


def test_a_sender_that_falls_silent_is_given_up(raw: RawClient, memory: SessionMemory) -> None:
    """Memory is not held for who says nothing."""
    stream = begin(raw, offer(raw, memory))
    started_s = time.monotonic()
    assert not reply(stream).accepted
    assert time.monotonic() - started_s < 10.0


def test_a_sender_that_dawdles_is_given_up(raw: RawClient, memory: SessionMemory) -> None:
    """Each message in time is not enough: there is an end to the whole."""
    stream = begin(raw, offer(raw, memory))
    for first in range(11):
        stream.send(pages_message(first, contents(memory, 1)))
        time.sleep(0.35)
    assert not reply(stream).accepted


def test_a_session_that_is_here_is_not_replaced(raw: RawClient, memory: SessionMemory) -> None:
    """One server's hand-over must not end what another client's connection holds here."""
    stream, message = raw.open(epoch=3)
    for epoch in (2, 3):
        refused = raw.stream(HANDOVER)
        refused.send(request(offer=offer(raw, memory, session_id=message.session_id, epoch=epoch)))
        assert reply(refused).failure.code == pb.FAILURE_STATE
    stream.send(step_frame(step_message(1, epoch=3), torch.randn(1, HIDDEN_SIZE)))
    answer = stream.receive()
    assert answer is not None and answer[0].HasField("result")


def test_a_session_opened_meanwhile_wins(raw: RawClient, memory: SessionMemory) -> None:
    """Its client knows best where it is."""
    message = offer(raw, memory)
    handover = begin(raw, message)
    stream, _ = raw.open(session_id=message.session_id, epoch=2)
    handover.send(pages_message(0, contents(memory, 12)))
    handover.send(request(end=node_pb2.HandoverEnd()))
    assert reply(handover).failure.code == pb.FAILURE_STATE
    stream.send(step_frame(step_message(1, epoch=2), torch.randn(1, HIDDEN_SIZE)))
    answer = stream.receive()
    assert answer is not None and answer[0].HasField("result")


def test_an_attempt_that_was_given_up_can_be_repeated(raw: RawClient, node: Node, memory: SessionMemory) -> None:
    """The answer to the end may get lost: the sender then tries again, and the first copy must not be in the way."""
    message = offer(raw, memory)
    for _ in range(2):
        stream = begin(raw, message)
        stream.send(pages_message(0, contents(memory, 12)))
        stream.send(request(end=node_pb2.HandoverEnd()))
        assert reply(stream).accepted
        assert node.info.num_sessions == 1


def test_a_silent_stream_is_ended(raw: RawClient) -> None:
    """Streams cost nothing to open, and a server has only so many."""
    stream = raw.stream(HANDOVER)
    assert not reply(stream).accepted
    assert stream.receive_body() is None
