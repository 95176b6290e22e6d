"""A server that leaves hands its sessions over: nothing is recomputed, and nothing is left behind on either side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.datatypes import ServerInfo
from swarm.errors import SwarmError
from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import session_pb2 as pb
from swarm.server.engine.page_transfer import PageExport
from swarm.server.engine.session_memory import SessionMemory
from swarm.server.hosting import Hosting
from swarm.server.node import Node
from swarm.server.rpc.engine_calls import ask_engine
from swarm.server.rpc.handing_over import HandoverSender
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import encode_frame
from tests.raw_client import RawClient, RawStream, step_frame, step_message
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
LIMITS = SessionLimits(admission=AdmissionConfig(max_sessions=4, max_waiting=2), detach_grace_s=5.0, yield_after_s=0.3)


@pytest.fixture
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    with InProcessSwarm(llama.folder, [], limits=LIMITS) as swarm:
        yield swarm


def rows(count: int, *, seed: int = 5) -> torch.Tensor:
    """[count, HIDDEN_SIZE]; longer ones begin with the shorter ones."""
    return torch.randn(256, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))[:count].clone()


def assert_right(llama: TinyLlama, output: torch.Tensor, hidden: torch.Tensor) -> None:
    (expected,) = llama.blocks.run_stateless([hidden])
    assert (output - expected[-len(output) :]).abs().max() < 1e-4


def result(stream: RawStream) -> torch.Tensor:
    reply = stream.receive()
    assert reply is not None and reply[0].HasField("result"), reply
    output: torch.Tensor = reply[1].tensor(0)
    return output


def run(stream: RawStream, step: int, start: int, end: int, **fields: Any) -> torch.Tensor:
    """Rows [start, end) as one step of one sequence; its output."""
    stream.send(step_frame(step_message(step, start=start, count=end - start, **fields), rows(end)[start:]))
    return result(stream)


def start_draining(swarm: InProcessSwarm, node: Node) -> Future[None]:
    """The server leaves as after its first SIGTERM."""
    return swarm.begin(node.drain())


def moved_to(stream: RawStream) -> tuple[str, int]:
    """The successor, and the step answered, that the leaving server names."""
    failure = stream.failure()
    assert failure.code == pb.FAILURE_DRAINING, failure
    return failure.successor, failure.step


def hosting_of(node: Node) -> Hosting:
    assert node._hosting is not None
    return node._hosting


def memory_of(node: Node) -> SessionMemory:
    memory = hosting_of(node).engine.memory
    assert memory is not None
    return memory


def contents(swarm: InProcessSwarm, node: Node, key: tuple[bytes, int], positions: list[int]) -> torch.Tensor:
    """All pages that a server holds of a session, [pages, values of a page]."""

    async def read() -> torch.Tensor:
        export = PageExport(memory_of(node), key, positions)
        try:
            await ask_engine(hosting_of(node).engine, export.begin)
            return await ask_engine(hosting_of(node).engine, lambda: export.read(0, len(export.pages)))
        finally:
            await ask_engine(hosting_of(node).engine, export.release)

    return swarm.run(read())


def check_integrity(swarm: InProcessSwarm, node: Node) -> None:
    async def check() -> None:
        await ask_engine(hosting_of(node).engine, memory_of(node).check_integrity)
        assert not memory_of(node).transfers

    swarm.run(check())


def num_tokens_run(node: Node) -> int:
    return hosting_of(node).engine.num_tokens_run


def test_a_session_goes_on_at_the_successor_without_recomputing(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """The promise of a graceful leave: the pages travel, bit for bit, and no token is computed again."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open()
        run(stream, 1, 0, 40)
        run(stream, 2, 40, 41)
        key = (message.session_id, 1)
        before = contents(swarm, leaving, key, [41])
        num_run = num_tokens_run(successor)
        draining = start_draining(swarm, leaving)
        assert moved_to(stream) == (successor.info.peer_id, 0)
        stream.hang_up()
        assert torch.equal(contents(swarm, successor, key, [41]), before)
        again, opened = new.reopen(message, epoch=2, keep=(1, 2))
        assert (opened.kept, list(opened.positions)) == (True, [41])
        assert_right(llama, run(again, 3, 41, 50, epoch=2), rows(50))
        assert num_tokens_run(successor) == num_run + 9
        assert new.info().num_sessions_taken_over == 1
        draining.result(10)
        check_integrity(swarm, successor)
        again.close()
    wait_until(lambda: is_idle(successor))
    check_integrity(swarm, successor)


def test_forks_that_share_pages_still_share_them(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Beams hold most pages together; a hand-over must neither multiply nor mix them."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open(max_sequences=3)
        run(stream, 1, 0, 40)
        step = pb.Step(
            epoch=1,
            step=2,
            sequences=[pb.SequenceStep(sequence=sequence, parent=0, start=40, count=1) for sequence in (0, 1, 2)],
        )
        forks = rows(3, seed=9)
        stream.send(step_frame(step, forks))
        result(stream)
        used = leaving.info.kv_tokens_total - leaving.info.kv_tokens_free
        start_draining(swarm, leaving)
        moved_to(stream)
        again, opened = new.reopen(message, epoch=2, keep=(1, 2))
        assert list(opened.positions) == [41, 41, 41]
        assert successor.info.kv_tokens_total - successor.info.kv_tokens_free == used
        for number in (0, 1, 2):
            more = rows(4, seed=10 + number)
            again.send(
                step_frame(step_message(3 + number, start=41, count=4, epoch=2, sequence=number, parent=number), more)
            )
            assert_right(llama, result(again), torch.cat([rows(40), forks[number : number + 1], more]))
        check_integrity(swarm, successor)


def test_earlier_states_can_be_kept_at_the_successor(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """The last step may not have reached the client: it goes on from the one before."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open()
        run(stream, 1, 0, 20)
        run(stream, 2, 20, 25)
        start_draining(swarm, leaving)
        moved_to(stream)
        again, opened = new.reopen(message, epoch=2, keep=(1, 1))
        assert list(opened.positions) == [20]
        assert_right(llama, run(again, 2, 20, 60, epoch=2), rows(60))


def test_a_part_of_the_successors_blocks_is_enough(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """A larger server can take over from a smaller one."""
    leaving, successor = swarm.add_server(2, 4), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open()
        run(stream, 1, 0, 20)
        start_draining(swarm, leaving)
        moved_to(stream)
        again, opened = new.reopen(message, epoch=2, keep=(1, 1))
        assert opened.kept
        again.send(step_frame(step_message(2, start=20, count=5, epoch=2), rows(25)[20:]))
        local = swarm.add_server(2, 4)
        with RawClient(local.info) as third:
            whole, _ = third.open()
            expected = run(whole, 1, 0, 25)
            assert (result(again) - expected[20:]).abs().max() < 1e-4


def test_a_session_whose_client_is_away_is_handed_over(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Its client may come back within the grace, and is told where to go."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open()
        run(stream, 1, 0, 20)
        stream.hang_up()
        wait_until(lambda: sessions_of(leaving)[0].away_s() is not None)
        start_draining(swarm, leaving)
        wait_until(lambda: successor.info.num_sessions == 1)
        again, opened = new.reopen(message, epoch=2, keep=(1, 1))
        assert opened.kept
        assert_right(llama, run(again, 2, 20, 21, epoch=2), rows(21))


def test_a_copy_nobody_was_told_of_does_not_wait_for_long(llama: TinyLlama) -> None:
    """A client that left for another server hears of no hand-over; what it left must not follow it for minutes."""
    with InProcessSwarm(llama.folder, [(0, 6), (0, 6)], limits=SessionLimits(detach_grace_s=5.0)) as swarm:
        leaving, successor = swarm.nodes
        with RawClient(leaving.info) as old:
            stream, _ = old.open()
            run(stream, 1, 0, 20)
            stream.hang_up()
            wait_until(lambda: sessions_of(leaving)[0].away_s() is not None)
            start_draining(swarm, leaving)
            wait_until(lambda: successor.info.num_sessions == 1)
            wait_until(lambda: is_idle(successor), timeout_s=30.0)


def test_a_session_in_host_memory_is_handed_over(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """What made room for others is no less a session; its copy is read where it lies."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open()
        run(stream, 1, 0, 40)
        key = (message.session_id, 1)
        before = contents(swarm, leaving, key, [40])
        memory = memory_of(leaving)
        engine = hosting_of(leaving).engine

        async def spill() -> None:
            assert await ask_engine(engine, lambda: memory._spill(memory._sessions[key]))

        swarm.run(spill())
        assert torch.equal(contents(swarm, leaving, key, [40]), before)
        start_draining(swarm, leaving)
        moved_to(stream)
        again, opened = new.reopen(message, epoch=2, keep=(1, 1))
        assert opened.kept
        assert_right(llama, run(again, 2, 40, 50, epoch=2), rows(50))


def test_what_other_sessions_left_in_a_page_does_not_travel(swarm: InProcessSwarm) -> None:
    """Pages are used again without being wiped; a page's unused end may hold somebody else's conversation."""
    node = swarm.add_server(0, 6)
    with RawClient(node.info) as raw:
        other, _ = raw.open(max_length=256)
        other.send(step_frame(step_message(1, count=250), rows(250)))
        result(other)
        other.close()
        wait_until(lambda: is_idle(node))
        stream, message = raw.open()
        run(stream, 1, 0, 3)
        pages = contents(swarm, node, (message.session_id, 1), [3])
        tokens = pages.view(len(pages), 16, -1)
        assert tokens[:, :3].abs().min() > 0 and not tokens[:, 3:].any()


def test_a_step_under_way_ends_first_and_the_next_is_sent_on(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """A long prefill is not thrown away; what comes during the hand-over is refused by number."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old, RawClient(successor.info) as new:
        stream, message = old.open(max_length=256)
        gate = hold_engine(leaving)
        stream.send(step_frame(step_message(1, count=200), rows(200)))
        wait_until(lambda: sessions_of(leaving)[0].num_under_way == 1)
        start_draining(swarm, leaving)
        wait_until(lambda: any(session.held_back is not None for session in sessions_of(leaving)))
        stream.send(step_frame(step_message(2, start=200), rows(201)[200:]))
        wait_until(lambda: any(session.held_back for session in sessions_of(leaving)))
        gate()
        assert_right(llama, result(stream), rows(200))
        assert moved_to(stream) == (successor.info.peer_id, 2)
        num_run = num_tokens_run(successor)
        again, opened = new.reopen(message, epoch=2, keep=(1, 1))
        assert list(opened.positions) == [200]
        assert_right(llama, run(again, 2, 200, 201, epoch=2), rows(201))
        assert num_tokens_run(successor) == num_run + 1


def hold_engine(node: Node) -> Callable[[], None]:
    """Stop a server's engine until the function returned is called."""
    gate = threading.Event()

    def wait() -> None:
        assert gate.wait(20)

    hosting_of(node).engine.call(wait)
    return gate.set


def sessions_of(node: Node) -> list[Any]:
    return hosting_of(node).sessions.open_sessions()


def test_without_a_successor_sessions_finish(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Leaving then waits for them, up to its deadline; nobody is sent away."""
    leaving = swarm.add_server(0, 6)
    swarm.add_server(0, 3)
    with RawClient(leaving.info) as raw:
        stream, _ = raw.open()
        run(stream, 1, 0, 20)
        draining = start_draining(swarm, leaving)
        wait_until(lambda: leaving.info.state.value == "draining")
        assert raw.refused_open().code == pb.FAILURE_DRAINING
        assert_right(llama, run(stream, 2, 20, 30), rows(30))
        stream.close()
        draining.result(10)


def test_nobody_waits_for_a_client_that_is_gone(swarm: InProcessSwarm) -> None:
    """Where nobody takes its session over, a vanished client must not keep a server from leaving."""
    leaving = swarm.add_server(0, 6)
    with RawClient(leaving.info) as raw:
        stream, _ = raw.open()
        run(stream, 1, 0, 20)
        stream.hang_up()
        start_draining(swarm, leaving).result(10)


def test_a_successor_that_joins_later_is_used(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """The deadline is long enough for somebody to come."""
    leaving = swarm.add_server(0, 6)
    with RawClient(leaving.info) as old:
        stream, message = old.open()
        run(stream, 1, 0, 20)
        start_draining(swarm, leaving)
        wait_until(lambda: leaving.info.state.value == "draining")
        successor = swarm.add_server(0, 6)
        assert moved_to(stream)[0] == successor.info.peer_id
        with RawClient(successor.info) as new:
            again, _ = new.reopen(message, epoch=2, keep=(1, 1))
            assert_right(llama, run(again, 2, 20, 21, epoch=2), rows(21))


def test_a_full_successor_refuses_and_disturbs_nobody(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Its own sessions come first; the next server takes the session instead."""
    leaving = swarm.add_server(0, 6)
    full, roomy = swarm.add_server(0, 6), swarm.add_server(0, 6, kv_memory_bytes=2**22)
    with RawClient(leaving.info) as old, RawClient(full.info) as inside, RawClient(roomy.info) as new:
        streams = [inside.open()[0] for _ in range(4)]
        run(streams[0], 1, 0, 10)
        assert full.info.kv_tokens_free > roomy.info.kv_tokens_free  # so it is asked first
        stream, message = old.open()
        run(stream, 1, 0, 20)
        start_draining(swarm, leaving)
        assert moved_to(stream)[0] == roomy.info.peer_id
        assert full.info.num_sessions == 4
        assert_right(llama, run(streams[0], 2, 10, 12), rows(12))
        again, _ = new.reopen(message, epoch=2, keep=(1, 1))
        assert_right(llama, run(again, 2, 20, 21, epoch=2), rows(21))


def test_too_little_memory_is_a_refusal(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Pages are taken only where they are free, whatever was announced."""
    leaving = swarm.add_server(0, 6, drain_timeout_s=2.0)
    page_bytes = memory_of(leaving).store.page_bytes
    small = swarm.add_server(0, 6, kv_memory_bytes=page_bytes * 6 * 5)
    with RawClient(leaving.info) as old, RawClient(small.info) as new:
        beside, _ = new.open()
        run(beside, 1, 0, 40)
        stream, _ = old.open()
        run(stream, 1, 0, 40)
        assert run_handover(swarm, leaving, small).startswith("PeerBusyError")
        assert_right(llama, run(stream, 2, 40, 41), rows(41))
        assert_right(llama, run(beside, 2, 40, 41), rows(41))
        for node in (leaving, small):
            check_integrity(swarm, node)


def run_handover(swarm: InProcessSwarm, source: Node, target: Node, **fields: Any) -> str:
    """Hand the only session of `source` over to `target`; why not, or nothing."""

    async def hand_over() -> str:
        hosting = hosting_of(source)
        sender = HandoverSender(hosting.model, hosting.engine, hosting.sessions)
        info: ServerInfo = replace(target.info, **fields)
        try:
            await sender.hand_over(hosting.sessions.open_sessions()[0], info)
        except SwarmError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            await sender.close()
        return ""

    return swarm.run(hand_over())


def test_a_successor_that_can_not_be_reached_costs_nothing(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Records outlive servers by seconds; the session goes on here."""
    leaving = swarm.add_server(0, 6)
    with RawClient(leaving.info) as old:
        stream, _ = old.open()
        run(stream, 1, 0, 20)
        problem = run_handover(swarm, leaving, leaving, addresses=["127.0.0.1:1"])
        assert problem.startswith("PeerLostError")
        assert_right(llama, run(stream, 2, 20, 21), rows(21))
        check_integrity(swarm, leaving)


def test_a_closed_queue_sends_everybody_elsewhere(swarm: InProcessSwarm) -> None:
    """Who waits for a place at a leaving server would wait for nothing."""
    leaving = swarm.add_server(0, 6)
    with RawClient(leaving.info) as raw:
        streams = [raw.open()[0] for _ in range(4)]
        waiting = raw.stream()
        waiting.send(encode_frame(pb.SessionRequest(open=raw.open_message(may_wait=True))))
        reply = waiting.receive()
        assert reply is not None and reply[0].HasField("queued")
        draining = start_draining(swarm, leaving)
        assert waiting.failure().code == pb.FAILURE_DRAINING
        for stream in streams:
            stream.close()
        draining.result(10)


def test_leaving_at_once_does_not_wait_for_a_hand_over(swarm: InProcessSwarm) -> None:
    """The second signal means now."""
    leaving, successor = swarm.add_server(0, 6), swarm.add_server(0, 6)
    with RawClient(leaving.info) as old:
        stream, _ = old.open()
        run(stream, 1, 0, 20)
        gate = hold_engine(successor)
        draining = start_draining(swarm, leaving)
        wait_until(lambda: any(session.held_back is not None for session in sessions_of(leaving)))
        leave = swarm.begin(leaving.leave())
        leave.result(10)
        draining.result(10)
        gate()
    wait_until(lambda: is_idle(successor))
    check_integrity(swarm, successor)
