"""Servers pass outputs on to each other: the client's data makes one trip round the chain, not a star."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.errors import PeerLostError
from swarm.pb import session_pb2 as pb
from swarm.server.rpc.push import PushStream
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import decode_frame, encode_frame
from tests.model_pair import GREEDY, prompt
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tampering_server import TamperingServer

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

NUM_PROMPT, NUM_NEW = 12, 20
ROW_BYTES = 32 * 4
SETTINGS: dict[str, Any] = {"max_new_tokens": NUM_NEW, "eos_token_id": None, **GREEDY}


@pytest.fixture
def doors(llama: TinyLlama) -> Iterator[list[TamperingServer]]:
    """Three hops, each behind a door that counts."""
    limits = SessionLimits(detach_grace_s=0.2, push_timeout_s=1.0)
    with InProcessSwarm(llama.folder, [], limits=limits) as swarm:
        yield [TamperingServer.of_span(swarm, start, end) for start, end in [(0, 1), (1, 4), (4, 6)]]
        wait_until(lambda: all(map(is_idle, swarm.nodes)))


@pytest.fixture
def expected(llama: TinyLlama) -> torch.Tensor:
    ids: torch.Tensor = llama.local.generate(prompt(NUM_PROMPT), **SETTINGS)
    return ids


def generate(doors: list[TamperingServer], **options: Any) -> torch.Tensor:
    swarm = doors[0].swarm
    model: Any = SwarmModelForCausalLM.from_blocks(swarm.source, swarm.connect(**options))
    ids: torch.Tensor = model.generate(prompt(NUM_PROMPT), **SETTINGS)
    return ids


def num_rows(door: TamperingServer, method: str, kind: str) -> int:
    return sum(item.num_rows for item in door.passed if item.method == method and item.kind == kind)


def test_each_hidden_state_leaves_the_client_once_and_comes_back_once(
    doors: list[TamperingServer], expected: torch.Tensor
) -> None:
    """A home connection's uplink is the bottleneck: three hops must not cost it three times."""
    assert torch.equal(generate(doors), expected)
    num_sent = NUM_PROMPT + NUM_NEW - 1
    assert [num_rows(door, "Session", "step") for door in doors] == [num_sent, 0, 0]
    assert [num_rows(door, "Push", "step") for door in doors] == [0, num_sent, num_sent]
    assert [door.count("Session", "result") for door in doors] == [0, 0, NUM_NEW]
    assert num_rows(doors[2], "Session", "result") == NUM_NEW, "of the prompt only the last row comes back"
    assert [door.count("Session", "step") for door in doors] == [NUM_NEW, 0, 0]


def test_headers_are_small_beside_the_data(doors: list[TamperingServer], expected: torch.Tensor) -> None:
    """What the client sends to all hops together is its hidden states and little else."""
    generate(doors)
    sent_bytes = sum(item.num_bytes for door in doors for item in door.passed if item.is_request and item.num_rows)
    received_bytes = sum(item.num_bytes for door in doors for item in door.passed if not item.is_request)
    client_rows = NUM_PROMPT + NUM_NEW - 1
    assert sent_bytes < 3 * (client_rows * ROW_BYTES + NUM_NEW * 80)
    assert received_bytes < NUM_NEW * (ROW_BYTES + 60) + 3 * 200
    control = [item for item in doors[1].passed if item.method == "Session"]
    assert [item.kind for item in control] == ["open", "opened", "close"]


def test_without_push_the_client_carries_everything(doors: list[TamperingServer], expected: torch.Tensor) -> None:
    """For servers that cannot reach each other: dearer, and the same answer."""
    assert torch.equal(generate(doors, use_push=False), expected)
    num_sent = NUM_PROMPT + NUM_NEW - 1
    assert [num_rows(door, "Session", "step") for door in doors] == [num_sent] * 3
    assert [door.count("Push", "step") for door in doors] == [0, 0, 0]


def test_where_a_next_hop_is_out_of_reach_the_client_carries_that_hop(
    doors: list[TamperingServer], expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both may be fine and still not see each other, behind two routers; nobody is to blame."""
    middle = doors[1].info.addresses[0]

    async def connect(stream: PushStream) -> None:
        if middle in stream._next_hop.addresses:
            raise PeerLostError("no way there")
        await original(stream)

    original = PushStream._connect
    monkeypatch.setattr(PushStream, "_connect", connect)
    assert torch.equal(generate(doors), expected)
    num_sent = NUM_PROMPT + NUM_NEW - 1
    assert [num_rows(door, "Session", "step") for door in doors] == [num_sent, num_sent, 0]
    assert [num_rows(door, "Push", "step") for door in doors] == [0, 0, num_sent]
    assert [door.count("Session", "open") for door in doors] == [1, 1, 1], "no hop was opened again"


def test_an_unreachable_address_beside_a_good_one_does_no_harm(
    doors: list[TamperingServer], expected: torch.Tensor
) -> None:
    """A server announces its home address and its public one; only one of them works from here."""

    def add_address(method: str, body: bytes) -> bytes:
        if method == "Session":
            header, _ = decode_frame(body, pb.SessionRequest)
            if header.HasField("open") and header.open.HasField("next"):
                header.open.next.addresses.insert(0, "127.0.0.1:1")
                return encode_frame(header)
        return body

    for door in doors:
        door.edit_request = add_address
    assert torch.equal(generate(doors), expected)
    assert [door.count("Session", "step") for door in doors] == [NUM_NEW, 0, 0]


def test_a_push_that_breaks_later_is_carried_from_then_on(
    doors: list[TamperingServer], expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection between two servers can die while theirs to the client live."""
    num_writes = 0

    async def write(stream: PushStream, frame: bytes) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes > 9 and stream._call is not None:
            stream._call.cancel()
        await original(stream, frame)

    original = PushStream.write
    monkeypatch.setattr(PushStream, "write", write)
    assert torch.equal(generate(doors), expected)
    assert doors[1].count("Session", "step") > 0
    assert doors[2].count("Session", "step") > 0


@pytest.mark.parametrize("code", [pb.FAILURE_STATE, pb.FAILURE_BAD_INPUT, pb.FAILURE_INTERNAL])
def test_a_next_hop_that_refuses_pushes_is_carried_to(
    doors: list[TamperingServer], expected: torch.Tensor, code: pb.FailureCode
) -> None:
    """The one who pushes hears of it, and tells the client."""

    def refuse(method: str, body: bytes) -> bytes:
        if method != "Push":
            return body
        # An old epoch: the server behind answers with a refusal on the push stream alone.
        header, frame = decode_frame(body, pb.SessionRequest)
        header.step.epoch += 7
        return encode_frame(header, [frame.tensor(0)])

    def translate(method: str, body: bytes) -> bytes:
        if method != "Push":
            return body
        return encode_frame(pb.SessionReply(failure=pb.Failure(code=code, message="no")))

    doors[1].edit_request, doors[1].edit_reply = refuse, translate
    assert torch.equal(generate(doors), expected)
    assert num_rows(doors[1], "Session", "step") >= NUM_PROMPT + NUM_NEW - 1


def test_a_push_that_is_swallowed_is_asked_for_again(doors: list[TamperingServer], expected: torch.Tensor) -> None:
    """Nothing fails, nothing arrives: after the step's timeout the client carries that step itself."""
    swallowed = 0

    def swallow(method: str, body: bytes) -> bytes | None:
        nonlocal swallowed
        if method == "Push" and swallowed < 1 and doors[2].count("Push", "step") == 5:
            swallowed += 1
            return None
        return body

    doors[2].edit_request = swallow
    assert torch.equal(generate(doors, step_timeout_s=0.4), expected)
    assert swallowed == 1
    assert [door.count("Session", "open") for door in doors] == [1, 1, 1], "the route stands"


def test_a_tampered_push_is_found_and_carried(doors: list[TamperingServer], expected: torch.Tensor) -> None:
    """What one server sends another is checked like everything else that comes from outside."""

    def damage(method: str, body: bytes) -> bytes:
        if method == "Push":
            header, frame = decode_frame(body, pb.SessionRequest)
            return encode_frame(header, [frame.tensor(0) * torch.nan])
        return body

    doors[2].edit_request = damage
    assert torch.equal(generate(doors), expected)


def test_a_slow_push_holds_nobody_up_for_ever(
    doors: list[TamperingServer], expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A next hop that neither refuses nor reads costs the push timeout once."""

    async def connect(stream: PushStream) -> None:
        await asyncio.sleep(600.0)

    monkeypatch.setattr(PushStream, "_connect", connect)
    assert torch.equal(generate(doors), expected)
    assert [door.count("Session", "open") for door in doors] == [1, 1, 1]
