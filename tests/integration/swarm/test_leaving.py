"""Servers that leave in good order: sessions move with their memory, and nobody notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from swarm.client.blocks import BlockSession, SequenceInput
from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.server.node import Node
from swarm.server.rpc.sessions import SessionLimits
from tests.model_pair import GREEDY, prompt
from tests.raw_client import RawClient
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

HIDDEN_SIZE = 32


@contextmanager
def swarm_of(llama: TinyLlama, *spans: tuple[int, int]) -> Iterator[InProcessSwarm]:
    """At its end nothing of any session may be left on those that stayed."""
    limits = SessionLimits(detach_grace_s=5.0)
    with InProcessSwarm(llama.folder, spans, limits=limits, drain_timeout_s=30.0) as swarm:
        yield swarm
        for client in swarm._clients:
            client.close()
        wait_until(lambda: all(map(is_idle, swarm.nodes)), timeout_s=20.0)


def node_of(swarm: InProcessSwarm, session: Any, index: int) -> Node:
    (node,) = [node for node in swarm.nodes if node.info.peer_id == session.route[index].peer_id]
    return node


def tokens_run(node: Node) -> int:
    """Tokens a server has computed since it started."""
    with RawClient(node.info) as raw:
        return raw.info().num_tokens_run


def drain(swarm: InProcessSwarm, node: Node) -> threading.Thread:
    """As SIGTERM does; the thread ends when the server has left."""
    swarm.nodes.remove(node)
    thread = threading.Thread(target=lambda: swarm.run(node.drain()))
    thread.start()
    return thread


def rows(count: int) -> torch.Tensor:
    return torch.randn(128, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))[:count].clone()


def append(session: BlockSession, count: int) -> torch.Tensor:
    held = session.lengths[0] if session.lengths else 0
    hidden = rows(held + count)[held:]
    (output,) = session.step([SequenceInput(sequence=0, parent=0, start=held, hidden=hidden)])
    return output


def assert_right(llama: TinyLlama, output: torch.Tensor, length: int) -> None:
    (expected,) = llama.blocks.run_stateless([rows(length)])
    assert (output - expected[-len(output) :]).abs().max() < 1e-4


@pytest.mark.parametrize("index", range(3))
def test_an_idle_session_is_moved_and_nothing_is_computed_again(llama: TinyLlama, index: int) -> None:
    """The chat that was open when a volunteer switched off costs nobody a second prefill."""
    with swarm_of(llama, (0, 2), (2, 4), (4, 6)) as swarm:
        client = swarm.connect()
        session = client.open_session(max_length=64)
        append(session, 37)
        start, end = (0, 2, 4)[index], (2, 4, 6)[index]
        leaving = node_of(swarm, session, index)
        successor = swarm.add_server(start, end)
        stay = [node for node in swarm.nodes if node is not leaving]
        before = {node.info.peer_id: tokens_run(node) for node in stay}
        drain(swarm, leaving).join(30.0)
        assert_right(llama, append(session, 1), 38)
        assert session.route[index].peer_id == successor.info.peer_id
        assert {node.info.peer_id: tokens_run(node) - before[node.info.peer_id] for node in stay} == dict.fromkeys(
            before, 1
        )
        assert [peer.peer_id for peer in client.peer_health() if peer.num_failures] == []
        session.close()


class DrainAt(BaseStreamer):
    """Begins to drain a server when token `index` arrives."""

    def __init__(self, index: int, swarm: InProcessSwarm, session: Any, hop: int) -> None:
        self._left = index + 1
        self._swarm, self._session, self._hop = swarm, session, hop
        self.thread: threading.Thread | None = None

    def put(self, value: torch.Tensor) -> None:
        if self._left == 0:
            self.thread = drain(self._swarm, node_of(self._swarm, self._session, self._hop))
        self._left -= 1
        time.sleep(0.02)  # so that the answer is still under way when the session moves

    def end(self) -> None:
        pass


@pytest.mark.parametrize("index", range(3))
def test_leaving_amid_an_answer_changes_no_token_and_computes_no_prompt_again(llama: TinyLlama, index: int) -> None:
    """A step that is under way waits for the move; only that one token may be run twice."""
    settings: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None, **GREEDY}
    expected = llama.local.generate(prompt(40), **settings)
    with swarm_of(llama, (0, 2), (2, 4), (4, 6), (0, 2), (2, 4), (4, 6)) as swarm:
        client = swarm.connect()
        model: Any = SwarmModelForCausalLM.from_blocks(swarm.source, client)
        before = {node.info.peer_id: tokens_run(node) for node in swarm.nodes}  # those of measuring itself
        with model.session(max_length=96) as session:
            streamer = DrainAt(3, swarm, session, index)
            ids = model.generate(prompt(40), session=session, streamer=streamer, **settings)
            assert torch.equal(ids, expected)
            assert streamer.thread is not None
            streamer.thread.join(30.0)
            assert session.num_failovers == 1
            for hop in range(3):
                node = node_of(swarm, session, hop)
                ran = tokens_run(node) - before[node.info.peer_id]
                assert ran <= (40 if hop == index else 40 + 39 + 1), (hop, ran)
            assert [peer.peer_id for peer in client.peer_health() if peer.num_failures] == []


@pytest.mark.parametrize("index", range(2))
def test_leaving_amid_a_long_prompt_costs_only_what_was_under_way(llama: TinyLlama, index: int) -> None:
    """Parts that are done move with the session; the prompt goes on where it was."""
    with swarm_of(llama, (0, 3), (3, 6)) as swarm:
        client = swarm.connect(max_step_tokens=4, max_steps_in_flight=2)
        session = client.open_session(max_length=128)
        append(session, 5)
        leaving = node_of(swarm, session, index)
        swarm.add_server(3 * index, 3 * index + 3)
        stay = [node for node in swarm.nodes if node is not leaving]
        before = [tokens_run(node) for node in stay]
        moving: list[threading.Thread] = []

        def leave_in_the_middle() -> None:
            wait_until(lambda: session.lengths[0] > 40)
            moving.append(drain(swarm, leaving))

        watching = threading.Thread(target=leave_in_the_middle)
        watching.start()
        output = append(session, 120)
        watching.join(10.0)
        assert_right(llama, append(session, 1), 126)
        assert_right(llama, output, 125)
        moving[0].join(30.0)
        assert leaving.info.peer_id not in {hop.peer_id for hop in session.route}
        again = [tokens_run(node) - ran for node, ran in zip(stay, before, strict=True)]
        assert max(again) <= 121 + 4 * 4 and sum(again) <= 2 * 121 - 40 + 4 * 4, again
        session.close()


def test_without_a_successor_the_session_is_served_to_its_end(llama: TinyLlama) -> None:
    """Leaving waits, up to its deadline, for those whom nobody else can serve."""
    with swarm_of(llama, (0, 3), (3, 6)) as swarm:
        client = swarm.connect()
        session = client.open_session(max_length=64)
        append(session, 20)
        leaving = node_of(swarm, session, 1)
        thread = drain(swarm, leaving)
        for length in range(21, 26):
            assert_right(llama, append(session, 1), length)
            time.sleep(0.05)
        assert session.num_failovers == 0
        assert thread.is_alive()
        session.close()
        thread.join(30.0)
        assert not thread.is_alive()


def test_one_server_after_the_other_can_be_replaced(llama: TinyLlama) -> None:
    """An update of a whole swarm, machine by machine, under a session that has forks."""
    with swarm_of(llama, (0, 3), (3, 6)) as swarm:
        client = swarm.connect()
        session = client.open_session(max_length=64, num_sequences=2)
        append(session, 20)
        session.step([SequenceInput(sequence=1, parent=0, start=10, hidden=rows(64)[40:43])])
        before: dict[str, int] = {}
        for index in (0, 1, 0, 1):
            old = node_of(swarm, session, index)
            newcomer = swarm.add_server(3 * index, 3 * index + 3)
            before[newcomer.info.peer_id] = tokens_run(newcomer)
            drain(swarm, old).join(30.0)
            length = session.lengths[0] + 1
            assert_right(llama, append(session, 1), length)
        (output,) = session.step([SequenceInput(sequence=1, parent=1, start=13, hidden=rows(64)[43:45])])
        (expected,) = llama.blocks.run_stateless([torch.cat([rows(10), rows(64)[40:45]])])
        assert (output - expected[-2:]).abs().max() < 1e-4
        ran = [tokens_run(node) - before[node.info.peer_id] for node in swarm.nodes]
        assert max(ran) <= 6, "the newest have run only what came after them"
        session.close()


def test_a_session_that_ends_after_it_was_moved_frees_its_successor(llama: TinyLlama) -> None:
    """Its client never came for the copy, and nobody should have to wait for it."""
    with swarm_of(llama, (0, 6)) as swarm:
        client = swarm.connect()
        session = client.open_session(max_length=64)
        append(session, 20)
        old = node_of(swarm, session, 0)
        (new,) = [swarm.add_server(0, 6)]
        client.servers()
        leaving = drain(swarm, old)
        wait_until(lambda: new.info.num_sessions == 1)
        session.close()
        wait_until(lambda: is_idle(new), timeout_s=5.0)
        leaving.join(20)
