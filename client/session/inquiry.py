"""Finds out who failed, and what follows: who is avoided, who is asked again, who still holds the session."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from swarm.client.transport.liveness import SignOfLife, SilentPeerError, look_for_life, watch_over
from swarm.datatypes import Hop, PeerId
from swarm.errors import (
    FinalError,
    LengthLimitError,
    PeerFaultError,
    PeerLeavingError,
    PeerLostError,
    RetryElsewhereError,
    SessionStateError,
    SwarmError,
)

if TYPE_CHECKING:
    from swarm.client.peer_health import PeerHealth
    from swarm.client.route_finder import RouteFinder
    from swarm.client.session.blame import Blame
    from swarm.client.session.holdings import Holdings
    from swarm.client.session.pace import RoutePace
    from swarm.client.session.patience import Patience
    from swarm.client.transport.channels import ServerChannels
    from swarm.client.transport.hop_stream import HopEvent

__all__ = ["Inquiry"]

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_HEALTH_TIMEOUT_S = 2.0
_SHORTEST_LOOK_S = 0.5
"""For somebody who is well, also when the step's time is over."""
_MAX_RETURNS = 2
"""How often we come back to a server that hangs up on us, and is alive, without getting any further."""


class Inquiry:
    """Questions about the hops of one session; lives on the event loop."""

    def __init__(
        self,
        *,
        blame: Blame,
        holdings: Holdings,
        channels: ServerChannels,
        health: PeerHealth,
        finder: RouteFinder,
        patience: Patience,
    ) -> None:
        self._blame = blame
        self._holdings = holdings
        self._channels = channels
        self._health = health
        self._finder = finder
        self._patience = patience
        self._num_returns: Counter[PeerId] = Counter()

    def note_progress(self) -> None:
        """The session got further: whoever hung up on us before it may do so again."""
        self._num_returns.clear()

    def settle(self) -> None:
        """The step is done: what was held against servers during it is forgotten."""
        self._num_returns.clear()
        self._blame.settle()

    # -- what a hop said -----------------------------------------------------------------------

    async def into_event(self, event: HopEvent, hops: Sequence[Hop], *, is_pushing: bool) -> SwarmError:
        """What to raise for a failure on a hop's stream, after drawing the consequences for whoever is guilty of it."""
        assert event.error is not None
        hop, error = hops[event.hop_index], event.error
        if not event.is_report:
            return await self.into_broken_stream(hop, error)
        can_have_pushed = is_pushing and event.hop_index + 1 < len(hops)
        if isinstance(error, PeerLostError):
            if not can_have_pushed:
                return await self.into_fault(hop, PeerFaultError(f"{error} (it had nobody to reach)"))
            next_hop = hops[event.hop_index + 1]
            if await self._is_lost(next_hop):
                return PeerLostError(f"server {next_hop.peer_id} can not be reached by us or by {hop.peer_id}")
            self._blame.stop_pushing()
            return error
        if is_pushing and event.hop_index > 0 and isinstance(error, FinalError | SessionStateError):
            # What it refuses came from another server; carried by us, every output is checked.
            self._holdings.forget(hop.peer_id)
            self._blame.search()
            fault = PeerFaultError(str(error))
            fault.__cause__ = error
            return fault
        return await self._into_refusal(hop, error)

    async def into_refused_open(self, hop: Hop, error: SwarmError) -> SwarmError:
        """What to raise when a hop could not be opened."""
        if isinstance(error, PeerLostError):
            sign = await self._look_after(hop, error)
            if isinstance(sign, SignOfLife) and sign.has_new_connection and self._may_return(hop):
                logger.info("the connection to %s had broken; opening it anew", hop.peer_id)
                return error
            await self._blame.record(hop, error)
            return error
        return await self._into_refusal(hop, error)

    async def into_broken_stream(self, hop: Hop, error: SwarmError) -> SwarmError:
        """What to raise when a stream to a hop has ended.

        Where the server is alive only the connection was lost: what it holds can be kept, and nobody is to blame.
        """
        if not isinstance(error, PeerLostError):
            return await self._into_refusal(hop, error)
        sign = await self._look_after(hop, error)
        if isinstance(sign, SignOfLife) and self._may_return(hop):
            logger.info("the connection to %s was lost (%s), but it is alive; coming back", hop.peer_id, error)
            return error
        await self._blame.record(hop, error)
        return error

    async def into_fault(self, hop: Hop, fault: RetryElsewhereError) -> SwarmError:
        """What to raise when a hop answered with something impossible."""
        self._holdings.forget(hop.peer_id)
        await self._blame.record(hop, fault)
        return fault

    def note_leaving(self, hop: Hop, error: PeerLeavingError) -> None:
        """A hop leaves in good order: what it held is at its successor, if it has one."""
        self._health.record_leaving(hop.peer_id)
        if error.successor is not None:
            self._holdings.hand_over(hop.peer_id, PeerId(error.successor))
        else:
            self._holdings.forget(hop.peer_id)

    async def _into_refusal(self, hop: Hop, error: SwarmError) -> SwarmError:
        """A hop's own word that it does not do what it was asked to."""
        if isinstance(error, PeerLeavingError):
            self.note_leaving(hop, error)
            return error
        self._holdings.forget(hop.peer_id)
        if isinstance(error, LengthLimitError):
            return await self._into_too_long(hop, error)
        if isinstance(error, FinalError):
            return self._blame.weigh(hop, error)
        if isinstance(error, RetryElsewhereError):
            await self._blame.record(hop, error)
        return error

    async def _into_too_long(self, hop: Hop, refusal: LengthLimitError) -> SwarmError:
        """What is too long for one server may fit another: the refusal is final once no route is left to try."""
        too_small = self._blame.note_too_small(hop)
        if not await self._finder.can_route_without(too_small):
            return refusal
        elsewhere = PeerFaultError(str(refusal))
        elsewhere.__cause__ = refusal
        return elsewhere

    # -- what nobody said ----------------------------------------------------------------------

    async def look_around(self, hops: Sequence[Hop], pace: RoutePace, num_tokens: int) -> None:
        """The route is silent: raise PeerLostError when one of its servers is lost, stuck, or out of reach.

        Returns when all are well, which a slow one may be.
        """
        signs = await asyncio.gather(*map(self._look, hops))
        problem: PeerLostError | None = None
        for index, (hop, sign) in enumerate(zip(hops, signs, strict=True)):
            if isinstance(sign, RetryElsewhereError):
                await self._blame.record(hop, sign)
                problem = PeerLostError(f"server {hop.peer_id} does not answer: {sign}")
            elif sign.has_new_connection:
                if self._may_return(hop):
                    problem = PeerLostError(f"the connection to server {hop.peer_id} had broken")
            elif sign.engine_silent_s > pace.stuck_s(index, num_tokens) and await self._finder.can_avoid(hop.peer_id):
                problem = PeerLostError(
                    f"server {hop.peer_id} has been at work for {sign.engine_silent_s:.0f} s without finishing anything"
                )
                await self._blame.record(hop, problem)
        if problem is not None:
            raise problem

    async def watch_over(self, hop: Hop, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Wait for something a hop does, and ask now and then whether it is alive. Raises PeerLostError if not."""
        return await watch_over(hop.peer_id, work, lambda: self._look_hard(hop))

    async def _is_lost(self, hop: Hop) -> bool:
        """Whether a hop is dead; if so, it is avoided."""
        sign = await self._look(hop)
        if isinstance(sign, SignOfLife):
            return False
        await self._blame.record(hop, sign)
        return True

    async def _look_after(self, hop: Hop, error: PeerLostError) -> SignOfLife | RetryElsewhereError:
        return error if isinstance(error, SilentPeerError) else await self._look(hop)

    async def _look(self, hop: Hop) -> SignOfLife | RetryElsewhereError:
        try:
            return await self._look_hard(hop)
        except RetryElsewhereError as error:
            return error
        except FinalError as error:
            return PeerFaultError(str(error))

    async def _look_hard(self, hop: Hop) -> SignOfLife:
        timeout_s = min(_HEALTH_TIMEOUT_S, max(self._patience.left_s, _SHORTEST_LOOK_S))
        return await look_for_life(self._channels, hop.server, self._health, timeout_s=timeout_s)

    def _may_return(self, hop: Hop) -> bool:
        self._num_returns[hop.peer_id] += 1
        return self._num_returns[hop.peer_id] <= _MAX_RETURNS
