"""What a hostile or broken server can do to a client: it is found out, avoided, and changes no result."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.client.blocks import BlockSession, SequenceInput
from swarm.client.connection import SwarmBlocks
from swarm.errors import BadInputError, DeadlineError, NoRouteError
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.server.node import Node
from swarm.wire.frames import Frame, decode_frame, encode_frame
from tests.swarm_in_process import InProcessSwarm, wait_until
from tests.tampering_server import Edit, TamperingServer, edit_result

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    """Four honest servers: whoever offers more blocks than one of them is preferred for making fewer hops."""
    with InProcessSwarm(llama.folder, [(0, 1), (1, 3), (3, 5), (5, 6)]) as swarm:
        yield swarm


@contextmanager
def saboteur(swarm: InProcessSwarm, start: int, end: int) -> Iterator[TamperingServer]:
    server = TamperingServer.of_span(swarm, start, end)
    try:
        yield server
    finally:
        server.die()
        server.withdraw()
        swarm.run(server.node.leave())
        swarm.nodes.remove(server.node)


@pytest.fixture
def bad_alone(swarm: InProcessSwarm) -> Iterator[TamperingServer]:
    """Offers all blocks, so every route begins and ends with it."""
    with saboteur(swarm, 0, 6) as server:
        yield server


@pytest.fixture
def bad_in_the_middle(swarm: InProcessSwarm) -> Iterator[TamperingServer]:
    """Offers blocks 1:5, so every route has honest servers on both sides of it."""
    with saboteur(swarm, 1, 5) as server:
        yield server


def connect(swarm: InProcessSwarm, **options: Any) -> SwarmBlocks:
    return swarm.connect(**({"step_timeout_s": 0.5, "connect_timeout_s": 0.5} | options))


def rows(count: int) -> torch.Tensor:
    return torch.randn(64, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5))[:count].clone()


def step(session: BlockSession, start: int, end: int) -> torch.Tensor:
    (output,) = session.step([SequenceInput(sequence=0, parent=0, start=start, hidden=rows(end)[start:])])
    return output


def assert_right(llama: TinyLlama, outputs: torch.Tensor) -> None:
    (expected,) = llama.blocks.run_stateless([rows(len(outputs))])
    assert (outputs - expected).abs().max() < 1e-4


def uses(session: BlockSession, server: TamperingServer) -> bool:
    return server.peer_id in {hop.peer_id for hop in session.route}


def result_with(*tensors: torch.Tensor) -> Callable[[pb.StepResult, Frame], bytes]:
    return lambda result, frame: encode_frame(pb.SessionReply(result=result), tensors)


def _change(values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pb.StepResult, Frame], bytes]:
    return lambda result, frame: encode_frame(pb.SessionReply(result=result), [values(frame.tensor(0))])


def _answer(**failure: Any) -> Callable[[pb.StepResult, Frame], bytes]:
    return lambda result, frame: encode_frame(pb.SessionReply(failure=pb.Failure(step=result.step, **failure)))


BAD_RESULTS: dict[str, Callable[[pb.StepResult, Frame], bytes | None]] = {
    "no tensor": result_with(),
    "a row too many": _change(lambda values: torch.cat([values, values[:1]])),
    "a row too few": _change(lambda values: values[1:]),
    "another hidden size": _change(lambda values: values[:, 1:]),
    "one dimension": _change(lambda values: values.flatten()),
    "integers": _change(lambda values: values.long()),
    "not a number": _change(lambda values: values.index_fill(1, torch.tensor([3]), torch.nan)),
    "infinity": _change(lambda values: values.index_fill(1, torch.tensor([3]), torch.inf)),
    "two tensors": result_with(torch.zeros(1, HIDDEN_SIZE), torch.zeros(1, HIDDEN_SIZE)),
    "garbage": lambda result, frame: b"\xff" * 100,
    "a header of 4 GiB": lambda result, frame: struct.pack("<I", 2**32 - 1),
    "a result of another step": lambda result, frame: encode_frame(
        pb.SessionReply(result=pb.StepResult(epoch=result.epoch, step=result.step + 5)), [frame.tensor(0)]
    ),
    "nothing at all": lambda result, frame: None,
    "always busy": _answer(code=pb.FAILURE_BUSY, retry_after_ms=2**32 - 1),
    "always leaving": _answer(code=pb.FAILURE_DRAINING),
    "always failing": _answer(code=pb.FAILURE_INTERNAL, message="out of luck"),
    "always at another position": _answer(code=pb.FAILURE_STATE, epoch=9, positions=[77]),
    "blaming the client": _answer(code=pb.FAILURE_BAD_INPUT, message="your fault"),
    "blaming the length": _answer(code=pb.FAILURE_LENGTH, message="too long"),
    "blaming an unreachable hop": _answer(code=pb.FAILURE_UNREACHABLE),
    "a failure of unknown kind": _answer(code=77),
}


@pytest.mark.parametrize("change", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_a_bad_result_moves_the_session_to_honest_servers(
    llama: TinyLlama,
    swarm: InProcessSwarm,
    bad_alone: TamperingServer,
    change: Callable[[pb.StepResult, Frame], bytes | None],
) -> None:
    """Whatever a server answers in the middle of a session, the client ends with the outputs of an honest run."""
    client = connect(swarm)
    session = client.open_session(max_length=32)
    first = step(session, 0, 9)
    assert uses(session, bad_alone)
    bad_alone.edit_reply = edit_result(change)
    second = step(session, 9, 14)
    assert_right(llama, torch.cat([first, second]))
    assert not uses(session, bad_alone)
    assert session.num_failovers >= 1
    other = client.open_session(max_length=32)
    step(other, 0, 3)
    assert not uses(other, bad_alone), "who was found out is avoided by later sessions too"
    client.close()


def _reply_to_open(body: bytes | None) -> Edit:
    def edit(method: str, original: bytes) -> bytes | None:
        return body if method == "Session" else original

    return edit


def _opened_as_another(method: str, body: bytes) -> bytes | None:
    if method != "Session":
        return body
    header, _ = decode_frame(body, pb.SessionReply)
    header.opened.peer_id = "somebody else \x1b[2J"
    return encode_frame(header)


BAD_OPENINGS: dict[str, Edit] = {
    "garbage": _reply_to_open(b"\xff" * 100),
    "an empty message": _reply_to_open(b""),
    "nothing at all": _reply_to_open(None),
    "a result": _reply_to_open(encode_frame(pb.SessionReply(result=pb.StepResult()))),
    "a place in a queue nobody asked for": _reply_to_open(encode_frame(pb.SessionReply(queued=pb.Queued(position=1)))),
    "another's name": _opened_as_another,
    "blaming the client": _reply_to_open(
        encode_frame(pb.SessionReply(failure=pb.Failure(code=pb.FAILURE_BAD_INPUT, message="\x1b[2J")))
    ),
    "busy for 49 days": _reply_to_open(
        encode_frame(pb.SessionReply(failure=pb.Failure(code=pb.FAILURE_BUSY, retry_after_ms=2**32 - 1)))
    ),
    "not served": _reply_to_open(encode_frame(pb.SessionReply(failure=pb.Failure(code=pb.FAILURE_NOT_SERVED)))),
}


@pytest.mark.parametrize("edit", BAD_OPENINGS.values(), ids=BAD_OPENINGS)
def test_a_bad_opening_moves_the_session_to_honest_servers(
    llama: TinyLlama, swarm: InProcessSwarm, bad_alone: TamperingServer, edit: Edit
) -> None:
    """A client must not depend on the best-looking server being one."""
    bad_alone.edit_reply = edit
    client = connect(swarm)
    session = client.open_session(max_length=32)
    assert_right(llama, step(session, 0, 9))
    assert not uses(session, bad_alone)
    client.close()


CORRUPTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "not a number": lambda output: output * torch.nan,
    "another hidden size": lambda output: output[:, 1:],
    "a row too few": lambda output: output[1:],
}


def corrupt(node: Node, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let a server compute something else, so that it also pushes that."""
    backend: Any = node._engine._backend  # type: ignore[union-attr]
    run_steps = backend.run_steps
    backend.run_steps = lambda works: [
        change(result) if isinstance(result, torch.Tensor) else result for result in run_steps(works)
    ]


@pytest.mark.parametrize("change", CORRUPTIONS.values(), ids=CORRUPTIONS)
@pytest.mark.parametrize("use_push", [True, False])
def test_a_bad_server_between_honest_ones_is_found(
    llama: TinyLlama,
    swarm: InProcessSwarm,
    bad_in_the_middle: TamperingServer,
    change: Callable[[torch.Tensor], torch.Tensor],
    use_push: bool,
) -> None:
    """The one who complains is its honest neighbour, which must not be blamed for what was pushed to it."""
    client = connect(swarm, use_push=use_push)
    session = client.open_session(max_length=32)
    first = step(session, 0, 9)
    assert uses(session, bad_in_the_middle)
    corrupt(bad_in_the_middle.node, change)
    second = step(session, 9, 14)
    assert_right(llama, torch.cat([first, second]))
    honest = {node.info.peer_id for node in swarm.nodes[:4]}
    assert {hop.peer_id for hop in session.route} == honest, "all honest servers, the neighbours too, are in use"
    client.close()


def test_a_silent_server_between_honest_ones_is_found(
    llama: TinyLlama, swarm: InProcessSwarm, bad_in_the_middle: TamperingServer
) -> None:
    """It takes its steps, is in good health, and nothing ever comes of them."""
    client = connect(swarm)
    session = client.open_session(max_length=32)
    first = step(session, 0, 9)
    bad_in_the_middle.edit_request = lambda method, body: body if method not in ("Push", "Session") else None
    second = step(session, 9, 14)
    assert_right(llama, torch.cat([first, second]))
    assert not uses(session, bad_in_the_middle)
    client.close()


def test_a_server_that_never_stops_talking_is_not_listened_to(
    llama: TinyLlama, swarm: InProcessSwarm, bad_alone: TamperingServer
) -> None:
    """Between two steps nobody reads what it says, and it must not fill the client's memory meanwhile."""
    client = connect(swarm, step_timeout_s=2.0)
    session = client.open_session(max_length=32)
    first = step(session, 0, 9)
    assert uses(session, bad_alone)
    spam = encode_frame(pb.SessionReply(result=pb.StepResult(epoch=1, step=1)), [torch.zeros(500, HIDDEN_SIZE)])
    bad_alone.repeat(spam, 5000)
    driver: Any = session._driver
    wait_until(lambda: driver._latest.events.qsize() > 100)
    time.sleep(0.3)
    assert driver._latest.events.qsize() < 500
    second = step(session, 9, 14)
    assert_right(llama, torch.cat([first, second]))
    client.close()


def test_a_slow_server_is_waited_for_where_there_is_no_other(llama: TinyLlama) -> None:
    """Slow is not lost: giving up on the only server would start its work again from the beginning."""
    with InProcessSwarm(llama.folder, []) as swarm:
        slow = TamperingServer.of_span(swarm, 0, 6)
        client = connect(swarm, step_timeout_s=0.2)
        session = client.open_session(max_length=32)
        held: list[bytes] = []

        def hold_back(result: pb.StepResult, frame: Frame) -> bytes | None:
            held.append(frame.body)
            return held[0] if len(held) > 1 else None

        slow.edit_reply = edit_result(hold_back)
        assert_right(llama, step(session, 0, 9))
        assert session.num_failovers == 0
        slow.edit_reply = lambda method, body: body
        assert session.route[0].peer_id == slow.peer_id


def test_when_all_servers_refuse_the_refusal_is_believed(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Two who say the same are believed at once; the user hears why, and does not wait for the deadline."""
    with saboteur(swarm, 0, 6) as first, saboteur(swarm, 0, 6) as second:
        for server in (first, second):
            server.edit_reply = edit_result(_answer(code=pb.FAILURE_BAD_INPUT, message="\x1b[2Jnot today"))
        client = connect(swarm, allowed_peers=[first.peer_id, second.peer_id])
        session = client.open_session(max_length=32)
        with pytest.raises(BadInputError, match="not today") as raised:
            step(session, 0, 9)
        assert "\x1b" not in str(raised.value), "a peer's words must not steer the user's terminal"
        assert session.lengths == ()
        session.close()
        client.close()


def test_where_nobody_is_honest_the_deadline_holds(swarm: InProcessSwarm, bad_alone: TamperingServer) -> None:
    """No server can keep a client waiting beyond the time it has set itself.

    On a busy machine the only one may not even answer in time, and then counts as gone.
    """
    bad_alone.edit_reply = edit_result(BAD_RESULTS["not a number"])
    client = connect(swarm, allowed_peers=[bad_alone.peer_id], request_timeout_s=1.5)
    session = client.open_session(max_length=32)
    with pytest.raises((DeadlineError, NoRouteError), match=r"(within|tried for) 1\.5 s"):
        step(session, 0, 9)
    session.close()
    client.close()


def _run_reply(*tensors: torch.Tensor, **failure: Any) -> Edit:
    reply = node_pb2.RunReply(failure=pb.Failure(**failure)) if failure else node_pb2.RunReply()
    body = encode_frame(reply, tensors)
    return lambda method, original: body if method in ("Forward", "Backward") else original


BAD_RUNS: dict[str, Edit] = {
    "garbage": lambda method, body: b"\xff" * 100 if method in ("Forward", "Backward") else body,
    "no tensor": _run_reply(),
    "another shape": _run_reply(torch.zeros(3, 7)),
    "integers": _run_reply(torch.zeros(9, HIDDEN_SIZE, dtype=torch.int64)),
    "not a number": _run_reply(torch.full((9, HIDDEN_SIZE), torch.nan)),
    "nothing at all": lambda method, body: None if method in ("Forward", "Backward") else body,
    "always busy": _run_reply(code=pb.FAILURE_BUSY, retry_after_ms=2**32 - 1),
    "always failing": _run_reply(code=pb.FAILURE_INTERNAL),
    "blaming the client": _run_reply(code=pb.FAILURE_BAD_INPUT),
}


@pytest.mark.parametrize("edit", BAD_RUNS.values(), ids=BAD_RUNS)
@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_a_bad_run_is_repeated_by_honest_servers(
    llama: TinyLlama, swarm: InProcessSwarm, bad_alone: TamperingServer, edit: Edit, is_backward: bool
) -> None:
    """Fine-tuning must not learn from a saboteur's gradients."""
    if not is_backward:
        bad_alone.edit_reply = edit
    client = connect(swarm)
    inputs = rows(9).requires_grad_()
    (output,) = client.run_stateless([inputs])
    assert_right(llama, output.detach())
    bad_alone.edit_reply = edit
    output.square().sum().backward()
    local_inputs = rows(9).requires_grad_()
    (local_output,) = llama.blocks.run_stateless([local_inputs])
    local_output.square().sum().backward()
    assert inputs.grad is not None and local_inputs.grad is not None
    assert (inputs.grad - local_inputs.grad).abs().max() <= 1e-4 * local_inputs.grad.abs().max()
    client.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_inputs_never_leave_the_client(swarm: InProcessSwarm, value: float) -> None:
    """What every server would refuse is refused at home, so a server's refusal speaks against the server."""
    client = connect(swarm)
    session = client.open_session(max_length=8)
    hidden = torch.full((2, HIDDEN_SIZE), value)
    with pytest.raises(BadInputError, match="no numbers"):
        session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=hidden)])
    with pytest.raises(BadInputError, match="no numbers"):
        client.run_stateless([hidden])
    assert session.route == ()
    client.close()


def test_a_server_that_hangs_up_on_look_ups_is_survived(
    llama: TinyLlama, swarm: InProcessSwarm, bad_alone: TamperingServer
) -> None:
    """Nonsense from the server asked for others must not hide the others."""
    client = connect(swarm, asks_servers=True, lookup_ttl_s=0.0)
    session = client.open_session(max_length=32)
    first = step(session, 0, 9)
    bad_alone.edit_reply = lambda method, body: b"\xff" * 50
    second = step(session, 9, 14)
    assert_right(llama, torch.cat([first, second]))
    client.close()
