"""Orders to leave, and what a server does about them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import typer

from swarm.cli.failures import INTERRUPTED
from swarm.cli.long_running import Orders
from swarm.cli.serve import _leave


class Node:
    """Drains until told otherwise."""

    is_loading = False

    def __init__(self, num_sessions: int) -> None:
        self.num_sessions = num_sessions
        self.drained = asyncio.Event()
        self.has_left = False

    @property
    def info(self) -> Node:
        return self

    async def drain(self) -> None:
        await self.drained.wait()
        await self.leave()

    async def leave(self) -> None:
        self.has_left = True


def leave(node: Node, orders: Orders) -> asyncio.Task[None]:
    stand_in: Any = node
    return asyncio.create_task(_leave(stand_in, orders, drain_timeout_s=60.0))


async def let_others_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_first_order_drains(capsys: pytest.CaptureFixture[str]) -> None:
    """Sessions under way finish, and whoever pressed Ctrl-C learns what is being waited for."""
    node, orders = Node(num_sessions=2), Orders()
    orders.give()
    leaving = leave(node, orders)
    await let_others_run()
    assert not node.has_left
    said = capsys.readouterr().err
    assert "waiting up to 60 s for 2 open ones; interrupt again to leave at once" in said
    node.drained.set()
    await leaving
    assert node.has_left


async def test_second_order_leaves_at_once() -> None:
    """Somebody who insists is not kept waiting for other people's sessions."""
    node, orders = Node(num_sessions=1), Orders()
    orders.give()
    leaving = leave(node, orders)
    await let_others_run()
    orders.give()
    with pytest.raises(typer.Exit) as caught:
        await leaving
    assert node.has_left
    assert caught.value.exit_code == INTERRUPTED


async def test_without_the_parent_nobody_waits(capsys: pytest.CaptureFixture[str]) -> None:
    """When a demo is gone its servers go too, at once and in silence."""
    node, orders = Node(num_sessions=1), Orders()
    orders.give(parent_is_gone=True)
    await leave(node, orders)
    assert node.has_left
    assert capsys.readouterr().err == ""


async def test_orders_are_counted_even_when_nobody_waits() -> None:
    """A signal between two waits must not be lost."""
    orders = Orders()
    orders.give()
    orders.give()
    await asyncio.wait_for(orders.first(), 1.0)
    await asyncio.wait_for(orders.second(), 1.0)


async def test_start_that_is_done_hands_its_result_over() -> None:
    """Without an order, starting is just starting; errors pass through."""

    async def start() -> int:
        return 5

    async def fail() -> int:
        raise ValueError("x")

    assert await Orders().unless_given(start()) == 5
    with pytest.raises(ValueError, match="x"):
        await Orders().unless_given(fail())


async def test_an_order_during_the_start_cancels_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a big model loads must not wait until it has loaded, and leaves nothing behind."""
    ended: list[int] = []
    monkeypatch.setattr("swarm.cli.long_running.os._exit", ended.append)
    orders, cleaned_up = Orders(), asyncio.Event()

    async def start() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned_up.set()

    starting = asyncio.create_task(orders.unless_given(start()))
    await let_others_run()
    orders.give()
    with pytest.raises(asyncio.CancelledError):  # only because the process did not really end
        await starting
    assert cleaned_up.is_set()
    assert ended == [INTERRUPTED]
