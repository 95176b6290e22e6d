"""Waiting for peers that may be dead: as long as they live, and no longer; and who cancelled what."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from swarm.client.transport import liveness
from swarm.client.transport.channels import lost_when_closed
from swarm.client.transport.liveness import SilentPeerError, watch_over
from swarm.datatypes import PeerId
from swarm.errors import PeerLostError

PEER = PeerId("a")


@pytest.fixture(autouse=True)
def _doubts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_FIRST_DOUBT_S", 0.01)


class Look:
    """Answers as told; counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_times = 0

    async def __call__(self) -> None:
        self.num_times += 1
        if self.error is not None:
            raise self.error


async def _after(delay_s: float) -> str:
    await asyncio.sleep(delay_s)
    return "done"


async def test_a_slow_peer_that_lives_is_waited_for() -> None:
    """It is asked again and again, less and less often."""
    look = Look()
    assert await watch_over(PEER, _after(0.3), look) == "done"
    assert 1 <= look.num_times <= 6


async def test_a_quick_peer_is_not_asked() -> None:
    """Doubt costs a round trip."""
    look = Look()
    assert await watch_over(PEER, _after(0.0), look) == "done"
    assert look.num_times == 0


async def test_a_dead_peer_is_given_up_and_its_work_ended() -> None:
    """Nothing goes on in the background for somebody who is not there."""
    has_ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(600.0)
        finally:
            has_ended.set()

    with pytest.raises(SilentPeerError, match="server a does not answer: gone"):
        await watch_over(PEER, work(), Look(PeerLostError("gone")))
    assert has_ended.is_set()


async def test_who_answers_while_being_asked_is_heard() -> None:
    """A health call that fails says nothing against an answer that arrived meanwhile."""

    async def slow_look() -> None:
        await asyncio.sleep(0.2)
        raise PeerLostError("gone")

    assert await watch_over(PEER, _after(0.05), slow_look) == "done"


async def test_what_the_work_raises_is_raised() -> None:
    """The peer's own word counts for more than our doubts."""

    async def work() -> None:
        await asyncio.sleep(0.05)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await watch_over(PEER, work(), Look())


async def test_a_call_ended_by_its_channel_is_a_lost_peer() -> None:
    """Another session may close the channel that both use; nobody has cancelled us."""
    call: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.01, call.cancel)
    with pytest.raises(PeerLostError, match="given up"), lost_when_closed(PEER):
        await call


async def test_our_own_cancellation_stays_one() -> None:
    """Ctrl-C must end a step, not begin a recovery."""

    async def wait() -> None:
        with lost_when_closed(PEER):
            await asyncio.sleep(600.0)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await wait()
