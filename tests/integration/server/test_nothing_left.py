"""After any mix of opening, keeping, handing over, breaking off and vanishing, servers stand as at the start."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from swarm.errors import SwarmError
from swarm.kvcache.admission import AdmissionConfig
from swarm.pb import session_pb2 as pb
from swarm.server.hosting import Hosting
from swarm.server.node import Node
from swarm.server.rpc.engine_calls import ask_engine
from swarm.server.rpc.handing_over import HandoverSender
from swarm.server.rpc.server_session import ServerSession
from swarm.server.rpc.sessions import SessionLimits
from swarm.wire.frames import Frame, decode_frame, encode_frame
from swarm.wire.limits import PROTOCOL_VERSION
from tests.raw_client import step_message
from tests.swarm_in_process import InProcessSwarm

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32
MIN_ROUNDS = 1000
MAX_ROUNDS = 10_000
MIN_COUNT = 20
"""How often each end of a hand-over must be seen; how often it is depends on how busy the machine is."""
LIMITS = SessionLimits(
    admission=AdmissionConfig(max_sessions=6, max_waiting=2), detach_grace_s=60.0, yield_after_s=0.05
)


@pytest.fixture
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    with InProcessSwarm(llama.folder, [(0, 6), (0, 6)], limits=LIMITS, kv_memory_bytes=2**19) as swarm:
        yield swarm


def hosting_of(node: Node) -> Hosting:
    assert node._hosting is not None
    return node._hosting


@dataclass(eq=False)
class _Held:
    """A session as its client knows it."""

    hosting: Hosting
    message: pb.Open
    session: ServerSession
    step: int = 0
    position: int = 0


async def ignore(body: bytes) -> None:
    """A client that does nothing with what it is told."""


async def open_session(hosting: Hosting, chooser: random.Random) -> _Held | None:
    message = pb.Open(
        session_id=chooser.randbytes(16),
        epoch=1,
        model_hash=hosting.model.model_hash,
        start=0,
        end=6,
        max_length=64,
        max_sequences=2,
        protocol=PROTOCOL_VERSION,
        expected_tokens=chooser.choice((1, 60)),
        may_wait=chooser.random() < 0.3,
    )
    try:
        async with asyncio.timeout(0.05):
            session, _ = await hosting.sessions.open(message, ignore)
    except (SwarmError, TimeoutError):
        return None
    return _Held(hosting, message, session)


async def take_step(held: _Held, chooser: random.Random) -> None:
    """Append, rewind or fork; sometimes nonsense."""
    start = held.position if chooser.random() < 0.7 else chooser.randint(0, held.position)
    count = min(chooser.choice((1, 3, 20)), 64 - start)
    sequence = chooser.choice((0, 0, 0, 1))
    hidden = torch.randn(count, HIDDEN_SIZE)
    if chooser.random() < 0.02:
        hidden[:] = torch.nan
    step = step_message(held.step + 1, start=start, count=count, epoch=held.message.epoch, sequence=sequence, parent=0)
    frame: Frame = decode_frame(encode_frame(pb.SessionRequest(step=step), [hidden]), pb.SessionRequest)[1]
    await held.hosting.sessions.take_step(held.session, step, frame)
    held.step += 1
    if sequence == 0:
        held.position = start + count


async def keep(held: _Held, hosting: Hosting, chooser: random.Random) -> bool:
    """Open at the next epoch, here or at the other server, asking for some earlier state."""
    epoch = held.message.epoch
    held.message.keep.CopyFrom(pb.Keep(epoch=epoch, step=max(held.step - chooser.choice((0, 0, 1, 5)), 0)))
    held.message.epoch = epoch + 1
    try:
        async with asyncio.timeout(0.05):
            held.session, opened = await hosting.sessions.open(held.message, ignore)
    except (SwarmError, TimeoutError):
        return False
    held.hosting = hosting
    held.step = 0
    held.position = opened.positions[0] if opened.positions else 0
    return True


@pytest.mark.parametrize("seed", range(2))
def test_hundreds_of_random_rounds_leave_nothing(swarm: InProcessSwarm, seed: int) -> None:
    """A page, a place or a task lost in one of a thousand hand-overs would end a server within days."""
    nodes = [hosting_of(node) for node in swarm.nodes]
    chooser = random.Random(seed)

    async def run() -> dict[str, int]:
        num_tasks = len(asyncio.all_tasks())
        senders = [HandoverSender(node.model, node.engine, node.sessions) for node in nodes]
        sessions: list[_Held] = []
        counts: dict[str, int] = {"handed over": 0, "broken off": 0, "refused": 0, "kept": 0}
        for number in range(MAX_ROUNDS):
            if number >= MIN_ROUNDS and min(counts.values()) > MIN_COUNT:
                break
            action = chooser.random()
            if not sessions or action < 0.2:
                held = await open_session(chooser.choice(nodes), chooser)
                if held is not None:
                    sessions.append(held)
                continue
            held = chooser.choice(sessions)
            if held.session.is_over and chooser.random() < 0.5:
                await held.hosting.sessions.close(held.session)
                sessions.remove(held)
            elif action < 0.55:
                await take_step(held, chooser)
                if chooser.random() < 0.5:
                    await held.session.settled.wait()
            elif action < 0.65:
                if await keep(held, chooser.choice((held.hosting, held.hosting, *nodes)), chooser):
                    counts["kept"] += 1
            elif action < 0.9:
                source = nodes.index(held.hosting)
                target = swarm.nodes[1 - source].info
                moving = asyncio.ensure_future(senders[source].hand_over(held.session, target))
                if chooser.random() < 0.4:
                    await asyncio.sleep(chooser.choice((0, 0.001, 0.003, 0.006, 0.01)))
                    moving.cancel()
                (problem,) = await asyncio.gather(moving, return_exceptions=True)
                if isinstance(problem, asyncio.CancelledError):
                    counts["broken off"] += 1
                elif problem is None:
                    counts["handed over"] += 1
                    await keep(held, nodes[1 - source], chooser)
                else:
                    assert isinstance(problem, SwarmError), problem
                    counts["refused"] += 1
            elif action < 0.95:
                held.hosting.sessions.detach(held.session, ignore)
                sessions.remove(held)
            else:
                await held.hosting.sessions.close(held.session)
                sessions.remove(held)
            if number % 100 == 0:
                for node in nodes:
                    assert node.engine.memory is not None
                    await ask_engine(node.engine, node.engine.memory.check_integrity)
        for node in nodes:
            for session in list(node.sessions._sessions.values()):
                await node.sessions.close(session)
        for sender in senders:
            await sender.close()
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > num_tasks:
                await asyncio.sleep(0.01)
        for node in nodes:
            memory = node.engine.memory
            assert memory is not None
            await ask_engine(node.engine, memory.check_integrity)
            assert memory.num_sessions == 0 and not memory.transfers
            assert not memory._lost and not memory._away
            assert memory.num_tokens_free == memory.store.num_tokens_total
            queue = node.sessions.admission._queue
            assert (queue.num_inside, queue.num_waiting, queue._lasting_bytes) == (0, 0, 0)
        return counts

    counts = swarm.run(run())
    assert min(counts.values()) > MIN_COUNT, counts
