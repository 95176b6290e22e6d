"""Who is to blame when a hop fails, and what to do differently on the next attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm.errors import (
    FinalError,
    PeerBusyError,
    PeerFaultError,
    PeerLeavingError,
    PeerLostError,
    RetryElsewhereError,
    SessionStateError,
    SwarmError,
)

if TYPE_CHECKING:
    from swarm.client.peer_health import PeerHealth
    from swarm.client.transport.channels import ServerChannels
    from swarm.datatypes import Hop, PeerId

__all__ = ["Blame"]

_NO_PUSH_S = 120.0
"""A cut line between two servers comes back, two routers that let nobody in stay as they are; trying costs a moment."""


class Blame:
    """Judges the failures of one session (or one stateless run) and tells the client's memory of peers.

    Only the guilty are avoided. Where servers push to each other the guilty one can be another than the one
    that complains; then the next attempt carries everything through the client, which checks every output.
    """

    def __init__(
        self,
        *,
        health: PeerHealth,
        channels: ServerChannels,
        use_push: bool,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health = health
        self._channels = channels
        self._wants_push = use_push
        self._now_s = now_s
        self._push_again_s = now_s()
        """When servers may be asked to push again."""
        self._is_searching = False
        self._refused_by: PeerId | None = None
        self._out_of_step: set[PeerId] = set()
        self._too_small: set[PeerId] = set()

    @property
    def use_push(self) -> bool:
        """Whether the next route's servers are to push to each other."""
        return self._wants_push and self._now_s() >= self._push_again_s and not self._is_searching

    async def record(self, hop: Hop, error: RetryElsewhereError) -> None:
        """A failure of this hop's own: the lost and the faulty are avoided, the full for as long as they ask.

        A server at another position than ours is no failure, unless it happens again after a replay.
        """
        if isinstance(error, PeerBusyError):
            self._health.record_busy(hop.peer_id, error.retry_after_s)
            return
        if isinstance(error, PeerLeavingError):
            self._health.record_leaving(hop.peer_id)
            return
        if isinstance(error, SessionStateError) and hop.peer_id not in self._out_of_step:
            self._out_of_step.add(hop.peer_id)
            return
        self._health.record_failure(hop.peer_id)
        # The guilty one is found, and the next route is another.
        self._push_again_s, self._is_searching = self._now_s(), False
        if isinstance(error, PeerLostError):
            await self._channels.drop(hop.server)

    def stop_pushing(self) -> None:
        """Two servers are both alive and can not reach each other, now at least: routes opened soon do without."""
        self._push_again_s = self._now_s() + _NO_PUSH_S

    def search(self) -> None:
        """Somebody on the route is at fault, and only carrying everything shows who."""
        self._is_searching = True

    def weigh(self, hop: Hop, refusal: FinalError) -> SwarmError:
        """What to raise for a server's word that no server would do better.

        One server alone could be lying, so another is asked; the second refusal is believed.
        """
        if self._refused_by is not None:
            self._health.withdraw_failure(self._refused_by)
            return refusal
        self._refused_by = hop.peer_id
        self._health.record_failure(hop.peer_id)
        return PeerFaultError(str(refusal))

    def note_too_small(self, hop: Hop) -> frozenset[PeerId]:
        """A hop finds the session too long for it, which is no failure: whoever has more room may take it.

        Returns all who have said so in this step.
        """
        self._health.record_too_small(hop.peer_id)
        self._too_small.add(hop.peer_id)
        self._is_searching = False
        return frozenset(self._too_small)

    def settle(self) -> None:
        """The step is done: what was held against servers during it is forgotten."""
        self._refused_by = None
        self._out_of_step.clear()
        self._too_small.clear()
