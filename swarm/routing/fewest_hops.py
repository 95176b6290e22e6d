"""The simplest sound router: as few hops as possible, and among equals a server with room, at random.

Each hop costs a network round trip and few servers are faster than that is slow, so fewest hops is a fair
first guess; it knows nothing of speed, distance or load.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from swarm.datatypes import Hop, PeerId, Route, ServerInfo, ServerState, Span, blocks_without_server, format_blocks
from swarm.errors import BadInputError, NoRouteError

__all__ = ["FewestHopsRouter", "plan_route"]

_SMALLEST_WEIGHT = 0.05
"""A full server still gets a share: what it announced may be seconds old, and all may be full."""
_SMALLEST_RELIABILITY = 0.1
"""Who failed again and again is still tried now and then, or it could never show that it has been mended."""
_UNKNOWN: Mapping[PeerId, float] = MappingProxyType({})


class FewestHopsRouter:
    """A Router without memory; see `plan_route`."""

    def __init__(self, rng: random.Random | None = None) -> None:
        """`rng` breaks ties; a test passes its own."""
        self._rng = rng if rng is not None else random.Random()

    def plan_route(
        self,
        servers: Sequence[ServerInfo],
        num_blocks: int,
        *,
        start: int = 0,
        end: int | None = None,
        avoid: Collection[PeerId] = (),
        reliability: Mapping[PeerId, float] = _UNKNOWN,
    ) -> Route:
        """See Router."""
        return plan_route(
            servers, num_blocks, start=start, end=end, avoid=avoid, reliability=reliability, rng=self._rng
        )


def plan_route(
    servers: Sequence[ServerInfo],
    num_blocks: int,
    *,
    start: int = 0,
    end: int | None = None,
    avoid: Collection[PeerId] = (),
    reliability: Mapping[PeerId, float] = _UNKNOWN,
    rng: random.Random,
) -> Route:
    """A route of fewest hops; see Router.plan_route for arguments and errors.

    Among servers that lead to equally few hops, those with a larger free part of their KV memory are chosen
    more often, so that clients spread out; those that the caller could rely on less are chosen less often.
    """
    wanted = _check_span(num_blocks, start, end)
    usable = _usable(servers, num_blocks, avoid)
    # Each server is used to its last block: stopping earlier never saves a hop, because whoever could serve
    # the blocks left over can also begin further on. So a hop ends where its server's span does.
    hops_left = _count_hops(usable, wanted)
    position = wanted.start
    hops: list[Hop] = []
    while position < wanted.end:
        candidates = [
            server
            for server in usable
            if position in server.span and hops_left[_end(server, wanted)] == hops_left[position] - 1
        ]
        server = rng.choices(candidates, weights=[_weight(server, reliability) for server in candidates])[0]
        hops.append(Hop(server=server, span=Span(start=position, end=_end(server, wanted))))
        position = hops[-1].end
    return Route(tuple(hops))


def _check_span(num_blocks: int, start: int, end: int | None) -> Span:
    if end is None:
        end = num_blocks
    if not 0 <= start < end <= num_blocks:
        raise BadInputError(f"blocks {start}:{end} are not in the model, which has blocks 0:{num_blocks}")
    return Span(start=start, end=end)


def _usable(servers: Sequence[ServerInfo], num_blocks: int, avoid: Collection[PeerId]) -> list[ServerInfo]:
    if len({server.model_hash for server in servers}) > 1 or any(s.num_blocks != num_blocks for s in servers):
        raise BadInputError("a route can not mix servers of different models; look up one model hash at a time")
    return [server for server in servers if server.state is ServerState.ONLINE and server.peer_id not in avoid]


def _count_hops(usable: Sequence[ServerInfo], wanted: Span) -> dict[int, int]:
    """Fewest hops from each position of `wanted` to its end. Raises NoRouteError for blocks nobody serves."""
    missing = [block for block in blocks_without_server(usable, wanted.end) if block >= wanted.start]
    if missing:
        raise NoRouteError(
            f"nobody serves block{'s' if len(missing) > 1 else ''} {format_blocks(missing)}; start a server for "
            f"{'them' if len(missing) > 1 else 'it'} with `swarm serve`",
            missing_blocks=missing,
        )
    hops_left = {wanted.end: 0}
    for position in reversed(range(wanted.start, wanted.end)):
        reached = [hops_left[_end(server, wanted)] for server in usable if position in server.span]
        hops_left[position] = 1 + min(reached)
    return hops_left


def _end(server: ServerInfo, wanted: Span) -> int:
    return min(server.span.end, wanted.end)


def _weight(server: ServerInfo, reliability: Mapping[PeerId, float]) -> float:
    share_free = server.kv_tokens_free / server.kv_tokens_total if server.kv_tokens_total > 0 else 1.0
    # Squared, because a loss costs more than a wait: of two whom half and all went well with, the first gets a fifth.
    return max(share_free, _SMALLEST_WEIGHT) * max(reliability.get(server.peer_id, 1.0), _SMALLEST_RELIABILITY) ** 2
