"""Planning a route after a loss: who still holds the session stays, only the gaps are planned anew. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from swarm.datatypes import Hop, PeerId, Route, ServerInfo, ServerState, Span
from swarm.errors import NoRouteError

if TYPE_CHECKING:
    from swarm.client.session.holdings import Holding

__all__ = ["PlanSpan", "gaps_between", "hops_to_keep", "last_to_restore", "plan_around"]

PlanSpan = Callable[[Span, Collection[PeerId]], Route]
"""Plans a route over a span without some peers. Raises NoRouteError naming the blocks nobody else serves."""


def hops_to_keep(
    holdings: Sequence[Holding], servers: Sequence[ServerInfo], *, avoid: Collection[PeerId]
) -> tuple[Hop, ...]:
    """The hops that can go on with what they hold, in block order; of overlapping ones the first named.

    `servers` are those looked up, of peers that may be used. One that has vanished from the look-ups is still
    asked, because what it announced may have got lost; a successor must be announced, and online.
    """
    by_peer = {server.peer_id: server for server in servers}
    kept: list[Hop] = []
    for holding in holdings:
        if holding.peer_id in avoid:
            continue
        server = by_peer.get(holding.peer_id, holding.server)
        if server is None or server.state is ServerState.OFFLINE or not server.span.contains_span(holding.span):
            continue
        if holding.server is None and server.state is not ServerState.ONLINE:
            continue
        if not any(holding.span.start < hop.end and hop.start < holding.span.end for hop in kept):
            kept.append(Hop(server=server, span=holding.span))
    return tuple(sorted(kept, key=lambda hop: hop.start))


def gaps_between(hops: Sequence[Hop], num_blocks: int) -> tuple[Span, ...]:
    """The spans of [0, num_blocks) that hops in block order leave out."""
    edges = [0, *(edge for hop in hops for edge in (hop.start, hop.end)), num_blocks]
    return tuple(Span(start=start, end=end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end)


def plan_around(kept: Sequence[Hop], num_blocks: int, *, avoid: Collection[PeerId], plan_span: PlanSpan) -> Route:
    """A route over all blocks with the kept hops in it, and others in the gaps. Each peer appears once.

    Where a gap can be filled only by a peer that is kept for other blocks, that peer's hop is given up: what it holds
    can be built up again, and a route with a gap can not be used. Raises NoRouteError naming the missing blocks.
    """
    kept = tuple(kept)
    while True:
        try:
            return Route(_fill_gaps(kept, num_blocks, avoid, plan_span))
        except NoRouteError as error:
            if not kept:
                raise
            needed = {hop.peer_id for hop in kept if any(block in hop.server.span for block in error.missing_blocks)}
            # Without any, a peer that fills one gap is needed in another, too: then all is planned at once.
            kept = tuple(hop for hop in kept if hop.peer_id not in needed) if needed else ()


def _fill_gaps(kept: Sequence[Hop], num_blocks: int, avoid: Collection[PeerId], plan_span: PlanSpan) -> tuple[Hop, ...]:
    hops = list(kept)
    for gap in gaps_between(kept, num_blocks):
        used = {hop.peer_id for hop in hops}
        hops.extend(plan_span(gap, used | set(avoid)).hops)
    return tuple(sorted(hops, key=lambda hop: hop.start))


def last_to_restore(is_kept: Sequence[bool]) -> int | None:
    """Up to which hop the log must be sent again; None when every hop has kept its state."""
    return max((index for index, kept in enumerate(is_kept) if not kept), default=None)
