"""Whether a server is alive: asked over the connection in use, and over a new one in case that is what broke."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from swarm.client.transport.unary import check_health
from swarm.errors import PeerLostError, RetryElsewhereError

if TYPE_CHECKING:
    import grpc.aio

    from swarm.client.peer_health import PeerHealth
    from swarm.client.transport.channels import ServerChannels
    from swarm.datatypes import PeerId, ServerInfo
    from swarm.pb import node_pb2

__all__ = ["SignOfLife", "SilentPeerError", "look_for_life", "watch_over"]

_Result = TypeVar("_Result")
_FIRST_DOUBT_S = 1.0
_LONGEST_PAUSE_S = 10.0
_HEDGE_S = 0.5
"""How long only the connection in use is asked; a new one costs the server a little."""


@dataclass(frozen=True, kw_only=True)
class SignOfLife:
    """A server's answer."""

    engine_silent_s: float
    """How long its engine has been at work without finishing anything."""
    has_new_connection: bool
    """Whether only a new connection led there. It is in use now; streams over the old one are lost."""


class SilentPeerError(PeerLostError):
    """A peer that has been asked whether it lives, and did not answer."""


async def watch_over(
    peer: PeerId, work: Coroutine[Any, Any, _Result], look: Callable[[], Coroutine[Any, Any, object]]
) -> _Result:
    """Wait for something a peer does, and now and then `look` whether it lives. Raises SilentPeerError if not."""
    doing = asyncio.create_task(work)
    tasks: list[asyncio.Task[Any]] = [doing]
    pause_s = _FIRST_DOUBT_S
    try:
        while True:
            await asyncio.wait([doing], timeout=pause_s)
            if doing.done():
                return doing.result()
            looking = asyncio.create_task(look())
            tasks.append(looking)
            await asyncio.wait([doing, looking], return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            tasks.remove(looking)
            try:
                looking.result()
            except RetryElsewhereError as error:
                raise SilentPeerError(f"server {peer} does not answer: {error}") from error
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def look_for_life(
    channels: ServerChannels, server: ServerInfo, health: PeerHealth, *, timeout_s: float
) -> SignOfLife:
    """Ask a server for its health.

    Raises PeerLostError at once when nobody listens at its address, and after `timeout_s` when nobody answers;
    PeerFaultError for nonsense.
    """
    started_s = time.monotonic()
    in_use = asyncio.create_task(check_health(channels.to(server), server.peer_id, timeout_s=timeout_s))
    fresh: grpc.aio.Channel | None = None
    tasks = [in_use]
    try:
        await asyncio.wait(tasks, timeout=_HEDGE_S)
        if not _has_answered(in_use):
            fresh = channels.dial(server)
            left_s = max(timeout_s - (time.monotonic() - started_s), _HEDGE_S)
            tasks.append(asyncio.create_task(check_health(fresh, server.peer_id, timeout_s=left_s)))
            waiting = set(tasks)
            while waiting and not any(map(_has_answered, tasks)):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        answered = next((task for task in tasks if _has_answered(task)), in_use)
        reply: node_pb2.HealthReply = answered.result()
        health.record_answer(server.peer_id, time.monotonic() - started_s)
        is_new = answered is not in_use
        if is_new and fresh is not None:
            fresh, adopted = None, fresh
            await channels.adopt(server, adopted)
        return SignOfLife(engine_silent_s=reply.engine_silent_ms / 1000, has_new_connection=is_new)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if fresh is not None:
            await fresh.close()


def _has_answered(task: asyncio.Task[node_pb2.HealthReply]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
