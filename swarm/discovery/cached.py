"""A registry that answers repeated look-ups from memory, for servers that many clients ask."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from swarm.datatypes import ModelHash, ServerInfo
from swarm.discovery.records import VerifiedRecord
from swarm.discovery.registry import Registry

__all__ = ["CachedRegistry"]

_MAX_MODELS = 64
_Key = tuple[ModelHash, int]


@dataclass(frozen=True)
class _Answer:
    records: list[VerifiedRecord]
    at_s: float


class CachedRegistry(Registry):
    """Passes everything on to `inner`; a look-up younger than `ttl_s`, or under way, is shared by all who ask."""

    def __init__(self, inner: Registry, *, ttl_s: float = 2.0, now_s: Callable[[], float] = time.monotonic) -> None:
        """`now_s`: seconds of a clock that never goes back."""
        self._inner = inner
        self._ttl_s = ttl_s
        self._now_s = now_s
        self._answers: OrderedDict[_Key, _Answer] = OrderedDict()
        self._under_way: dict[_Key, asyncio.Task[list[VerifiedRecord]]] = {}

    async def announce(self, info: ServerInfo, *, ttl_s: float) -> None:
        """See Registry."""
        await self._inner.announce(info, ttl_s=ttl_s)

    async def withdraw(self, info: ServerInfo) -> None:
        """See Registry."""
        await self._inner.withdraw(info)

    async def lookup_verified(self, model_hash: ModelHash, num_blocks: int) -> list[VerifiedRecord]:
        """See Registry; at most `ttl_s` old."""
        key = (model_hash, num_blocks)
        answer = self._answers.get(key)
        if answer is not None and self._now_s() - answer.at_s <= self._ttl_s:
            return list(answer.records)
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._ask(key), name=f"look-up {model_hash[:12]}")
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        # One who stops waiting must not take the answer away from the others.
        return list(await asyncio.shield(task))

    def join_addresses(self) -> list[str]:
        """See Registry."""
        return self._inner.join_addresses()

    async def close(self) -> None:
        """Stop look-ups under way and close the inner registry."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._inner.close()

    async def _ask(self, key: _Key) -> list[VerifiedRecord]:
        asked_at_s = self._now_s()
        records = await self._inner.lookup_verified(*key)
        self._answers[key] = _Answer(records, asked_at_s)
        self._answers.move_to_end(key)
        while len(self._answers) > _MAX_MODELS:
            self._answers.popitem(last=False)
        return records

    def _forget(self, key: _Key, task: asyncio.Task[list[VerifiedRecord]]) -> None:
        self._under_way.pop(key, None)
        if not task.cancelled():
            task.exception()  # everyone who waited has seen it; if nobody does any more, it is not worth a warning
