"""A session's open streams, by peer: kept until they are replaced, so that no server forgets us during a recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

from swarm.client.transport.hop_stream import HopStream
from swarm.datatypes import PeerId

__all__ = ["SessionStreams"]


class SessionStreams:
    """At most one stream to each peer; lives on the event loop."""

    def __init__(self) -> None:
        self._by_peer: dict[PeerId, HopStream] = {}
        self._endings: set[asyncio.Task[None]] = set()

    def add(self, stream: HopStream) -> None:
        """A stream that has just been opened. It takes over from the one before, which is let go without a goodbye."""
        before = self._by_peer.get(stream.hop.peer_id)
        self._by_peer[stream.hop.peer_id] = stream
        if before is not None:
            self._spawn(before.close(say_goodbye=False))

    def leave(self, peers: Collection[PeerId]) -> None:
        """Tell servers, in the background, that the session is over for them."""
        for peer in peers:
            stream = self._by_peer.pop(peer, None)
            if stream is not None:
                self._spawn(stream.close(say_goodbye=True))

    def leave_others(self, peers: Collection[PeerId]) -> None:
        """Leave everybody but these."""
        self.leave([peer for peer in self._by_peer if peer not in peers])

    def end_elsewhere(self, ending: Coroutine[Any, Any, None]) -> None:
        """A goodbye to somebody there is no stream to; waited for like the others."""
        self._spawn(ending)

    async def leave_all(self, *, timeout_s: float) -> None:
        """Leave everybody, and wait until the goodbyes are said, or the time is over."""
        self.leave(list(self._by_peer))
        if self._endings:
            _, late = await asyncio.wait(self._endings, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _spawn(self, ending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
