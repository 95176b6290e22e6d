"""The caching registry: many who ask cost one look-up, and nobody waits for somebody else's haste."""

from __future__ import annotations

import asyncio

import pytest

from swarm.datatypes import ModelHash
from swarm.discovery import CachedRegistry, MemoryNetwork, MemoryRegistry
from swarm.discovery.registry import FetchedRecords
from swarm.errors import PeerLostError
from swarm.identity import Identity
from tests.server_infos import MODEL_HASH, make_server

A = Identity.generate()
INFO = make_server(A.peer_id, 0, 6)


class SlowRegistry(MemoryRegistry):
    """Counts look-ups, answers when let, and fails when told to."""

    def __init__(self) -> None:
        super().__init__(A, network=MemoryNetwork())
        self.num_fetches = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.is_broken = False
        self.is_closed = False

    async def _fetch(self, model_hash: ModelHash, num_blocks: int) -> FetchedRecords:
        self.num_fetches += 1
        await self.may_answer.wait()
        if self.is_broken:
            raise PeerLostError("nobody there")
        return await super()._fetch(model_hash, num_blocks)

    async def close(self) -> None:
        self.is_closed = True


class Clock:
    def __init__(self) -> None:
        self.now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


async def _announced() -> tuple[SlowRegistry, CachedRegistry, Clock]:
    inner, clock = SlowRegistry(), Clock()
    cached = CachedRegistry(inner, ttl_s=2.0, now_s=clock)
    await cached.announce(INFO, ttl_s=60)
    inner.num_fetches = 0
    return inner, cached, clock


async def test_a_recent_answer_is_given_again() -> None:
    """A server asked by a thousand clients must not search the DHT a thousand times."""
    inner, cached, clock = await _announced()
    for _ in range(3):
        assert await cached.lookup(MODEL_HASH, 12) == [INFO]
        assert len(await cached.lookup_records(MODEL_HASH, 12)) == 1
    assert inner.num_fetches == 1
    clock.now_s += 2.1
    await cached.lookup(MODEL_HASH, 12)
    assert inner.num_fetches == 2


async def test_those_who_ask_at_once_share_one_look_up_and_may_leave() -> None:
    """The first one giving up must not fail the others."""
    inner, cached, _ = await _announced()
    inner.may_answer.clear()
    first, *others = [asyncio.create_task(cached.lookup(MODEL_HASH, 12)) for _ in range(4)]
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    inner.may_answer.set()
    assert await asyncio.gather(*others) == [[INFO]] * 3
    assert first.cancelled()
    assert inner.num_fetches == 1


async def test_a_failure_is_told_and_not_remembered() -> None:
    """After a short outage the next look-up works."""
    inner, cached, _ = await _announced()
    inner.is_broken = True
    with pytest.raises(PeerLostError):
        await cached.lookup(MODEL_HASH, 12)
    inner.is_broken = False
    assert await cached.lookup(MODEL_HASH, 12) == [INFO]


async def test_closing_ends_what_is_under_way() -> None:
    """No task outlives its owner."""
    inner, cached, _ = await _announced()
    inner.may_answer.clear()
    waiting = asyncio.create_task(cached.lookup(MODEL_HASH, 12))
    await asyncio.sleep(0)
    await cached.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert inner.is_closed


async def test_memory_is_bounded() -> None:
    """Anybody may ask for any model hash."""
    _, cached, _ = await _announced()
    for number in range(500):
        await cached.lookup(ModelHash(f"{number:08x}"), 1)
    assert len(cached._answers) <= 64
