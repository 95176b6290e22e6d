"""Servers that choose and change their blocks in a running swarm: gaps are filled, sessions go on."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.datatypes import PeerId, ServerState, Span
from swarm.errors import FinalError, ModelFilesError
from swarm.server import hosting as hosting_module
from swarm.server import node as node_module
from swarm.server.moving import MoveOutcome
from swarm.server.node import Node
from swarm.server.rpc.sessions import SessionLimits
from tests.model_pair import GREEDY, prompt
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

LIMITS = SessionLimits(detach_grace_s=0.5)
QUICK: dict[str, Any] = {"limits": LIMITS, "announce_period_s": 0.25, "settle_s": 0.5, "drain_timeout_s": 5.0}
ANSWER: dict[str, Any] = {"eos_token_id": None, **GREEDY}
MOVES: dict[str, Any] = {"span": None, "rebalance_period_s": 2.0}
"""A server that may move, and looks for gaps every 0.2 s."""


def span_of(node: Node) -> tuple[int, int]:
    return (node.info.span.start, node.info.span.end)


@pytest.fixture(autouse=True)
def _equal_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices depend on measured speeds, and those on what else the machine does."""
    monkeypatch.setattr(hosting_module, "measure_tokens_per_s", lambda loaded: 600.0 / len(loaded.span))


def remote_model(swarm: InProcessSwarm) -> Any:
    return SwarmModelForCausalLM.from_blocks(swarm.source, swarm.connect())


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


def is_online_at(node: Node, start: int, end: int) -> bool:
    return node.info.state is ServerState.ONLINE and span_of(node) == (start, end)


def start_together(swarm: InProcessSwarm, count: int, **config: Any) -> list[Node]:
    threads = [threading.Thread(target=lambda: swarm.add_server(0, 1, **MOVES | config)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return swarm.nodes


def test_servers_that_start_at_once_share_the_blocks(llama: TinyLlama) -> None:
    """One command on each of three machines, switched on together, must give one working swarm."""
    with InProcessSwarm(llama.folder, [], **QUICK) as swarm:
        nodes = start_together(swarm, 3, num_blocks=2)
        assert sorted(map(span_of, nodes)) == [(0, 2), (2, 4), (4, 6)]
        assert all(node.why for node in nodes)


def test_a_spare_server_fills_the_gap_that_another_leaves(llama: TinyLlama) -> None:
    """The swarm heals itself: same peer, same port, other blocks; and answers as the model does."""
    with InProcessSwarm(llama.folder, [(0, 3), (3, 6)], **QUICK) as swarm:
        spare = swarm.add_server(0, 1, **MOVES | {"num_blocks": 3})
        assert span_of(spare) == (0, 3)
        told: list[str] = []
        spare.on_moved = lambda left, move: told.append(f"{left} {move}")
        before = spare.info
        swarm.run(swarm.nodes[1].leave())
        wait_until(lambda: is_online_at(spare, 3, 6), timeout_s=60)
        assert (spare.info.peer_id, spare.info.addresses) == (before.peer_id, before.addresses)
        assert spare.info.moving_to is None
        assert told == ["0:3 to blocks 3:6, 3 of which nobody serves"]
        given = prompt(9)
        found = remote_model(swarm).generate(given, max_new_tokens=8, **ANSWER)
        assert torch.equal(found, llama.local.generate(given, max_new_tokens=8, **ANSWER))


def test_of_two_spare_servers_one_fills_the_gap(llama: TinyLlama) -> None:
    """If both went, the blocks they leave would be the next gap."""
    with InProcessSwarm(llama.folder, [(3, 6)], **QUICK) as swarm:
        spare = [swarm.add_server(0, 1, **MOVES | {"num_blocks": 3}) for _ in range(2)]
        assert [span_of(node) for node in spare] == [(0, 3), (0, 3)]
        swarm.run(swarm.nodes[0].leave())
        wait_until(lambda: sorted({span_of(node) for node in spare}) == [(0, 3), (3, 6)], timeout_s=60)
        wait_until(lambda: all(node.info.state is ServerState.ONLINE for node in spare), timeout_s=60)


def test_a_server_told_its_blocks_stays(llama: TinyLlama) -> None:
    """--blocks is an order, not a suggestion."""
    with InProcessSwarm(llama.folder, [(0, 3), (0, 3), (3, 6)], rebalance_period_s=0.5, **QUICK) as swarm:
        swarm.run(swarm.nodes[2].leave())
        time.sleep(2.0)
        assert [span_of(node) for node in swarm.nodes[:2]] == [(0, 3), (0, 3)]
        assert all(node.info.state is ServerState.ONLINE and node.info.moving_to is None for node in swarm.nodes[:2])


def test_a_session_goes_on_through_a_move(llama: TinyLlama) -> None:
    """Clients must not notice that a server thought better of its blocks: the same tokens as without any swarm."""
    with InProcessSwarm(llama.folder, [(0, 3), (3, 6)], **QUICK | {"drain_timeout_s": 0.5}) as swarm:
        mover = swarm.add_server(0, 3)
        given, more = prompt(12), prompt(4, seed=1)
        model = remote_model(swarm)
        for _ in range(20):
            with model.session(max_length=128) as session:
                first = model.generate(given, session=session, max_new_tokens=6, **ANSWER)
                if mover.info.peer_id not in {hop.peer_id for hop in session.route}:
                    continue  # the route was drawn by lot
                assert swarm.run(mover.change_blocks(Span(start=3, end=6), yes)) is MoveOutcome.MOVED
                second = model.generate(more, session=session, max_new_tokens=6, **ANSWER)
                assert mover.info.peer_id not in peers_of(session, until=3)
            break
        else:
            pytest.fail("no session went through the server that moves")
        expected = llama.local.generate(given, max_new_tokens=6, **ANSWER)
        assert torch.equal(first, expected)
        whole = torch.cat([expected, more], dim=1)
        assert torch.equal(second[:, -6:], llama.local.generate(whole, max_new_tokens=6, **ANSWER)[:, -6:])
        assert is_online_at(mover, 3, 6)


def peers_of(session: Any, *, until: int) -> set[PeerId]:
    return {hop.peer_id for hop in session.route if hop.end <= until}


def test_a_move_gives_the_old_blocks_back(llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it loads others: a machine with room for both would hold more blocks in the first place."""
    was_free: list[bool] = []

    async def load_hosting(*args: Any, **options: Any) -> Any:
        was_free.append(left() is None)
        return await hosting_module.load_hosting(*args, **options)

    with InProcessSwarm(llama.folder, [(0, 3)], **QUICK) as swarm:
        (node,) = swarm.nodes
        assert node._engine is not None
        left = weakref.ref(node._engine._backend)
        monkeypatch.setattr(node_module, "load_hosting", load_hosting)
        assert swarm.run(node.change_blocks(Span(start=3, end=6), yes)) is MoveOutcome.MOVED
        assert was_free == [True]
        assert is_idle(node)
        assert swarm.run(names_of_tasks()).count("close-abandoned") == 1


async def names_of_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks()]


def test_an_operator_may_stop_a_server_that_is_moving(llama: TinyLlama) -> None:
    """The order to leave must not wait for a load to end."""
    with InProcessSwarm(llama.folder, [(3, 6)], **QUICK) as swarm:
        spare = swarm.add_server(0, 1, **MOVES | {"num_blocks": 3})
        swarm.add_server(0, 3)
        swarm.run(swarm.nodes[0].leave())
        wait_until(lambda: spare.info.state is not ServerState.ONLINE)
        swarm.run(spare.drain())
        assert spare.info.state is ServerState.OFFLINE
        assert spare.info.moving_to is None
        assert "move" not in swarm.run(names_of_tasks())


def test_a_server_stays_if_its_blocks_were_needed_after_all(llama: TinyLlama) -> None:
    """Another holder may leave while this one drains; then it must serve on as if nothing had been."""
    with InProcessSwarm(llama.folder, [(0, 6)], **QUICK) as swarm:
        (node,) = swarm.nodes
        assert swarm.run(node.change_blocks(Span(start=3, end=6), no)) is MoveOutcome.STAYED
        assert is_online_at(node, 0, 6)
        assert node.info.moving_to is None
        given = prompt(7)
        found = remote_model(swarm).generate(given, max_new_tokens=4, **ANSWER)
        assert torch.equal(found, llama.local.generate(given, max_new_tokens=4, **ANSWER))


def test_blocks_that_can_not_be_loaded_send_a_server_back(llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a broken download must cost a move, not a server."""
    with InProcessSwarm(llama.folder, [(0, 3)], **QUICK) as swarm:
        (node,) = swarm.nodes
        break_loading(monkeypatch, [Span(start=3, end=6)])
        assert swarm.run(node.change_blocks(Span(start=3, end=6), yes)) is MoveOutcome.WENT_BACK
        assert is_online_at(node, 0, 3)
        assert node.info.moving_to is None


def test_a_server_that_can_load_nothing_says_so(llama: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator must learn that it serves nothing any more, and others must not wait for it."""
    with InProcessSwarm(llama.folder, [(0, 3)], **QUICK) as swarm:
        (node,) = swarm.nodes
        break_loading(monkeypatch, [Span(start=3, end=6), Span(start=0, end=3)])
        with pytest.raises(FinalError, match="neither its new blocks nor the old ones"):
            swarm.run(node.change_blocks(Span(start=3, end=6), yes))
        swarm.run(node.leave())
        assert node.info.state is ServerState.OFFLINE


def break_loading(monkeypatch: pytest.MonkeyPatch, spans: list[Span]) -> None:
    load = hosting_module.load_hosting

    async def load_hosting(source: Any, span: Span, *args: Any, **options: Any) -> Any:
        if span in spans:
            raise ModelFilesError("the disk is full")
        return await load(source, span, *args, **options)

    monkeypatch.setattr(node_module, "load_hosting", load_hosting)
