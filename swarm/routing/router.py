"""What a client asks of whatever chooses its routes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from swarm.datatypes import PeerId, Route, ServerInfo

__all__ = ["Router"]


_UNKNOWN: Mapping[PeerId, float] = MappingProxyType({})


class Router(Protocol):
    """A way of choosing routes; may remember what it learns between calls."""

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
        """A route over blocks [start, end) of a model of `num_blocks` blocks; `end` None means all that follow.

        Only ONLINE servers outside `avoid` are used. `reliability` says for peers that the caller has experience
        with how far they can be relied on, between 0 and 1: a preference, no more. Raises NoRouteError naming
        the blocks that none of them serves, BadInputError for blocks outside the model or servers of different
        models.
        """
        ...
