"""Which blocks a server should hold when its operator does not say: those that the swarm lacks most."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.datatypes import ServerInfo, ServerState, Span
from swarm.errors import BadInputError

__all__ = ["choose_span", "count_replicas"]


def count_replicas(servers: Sequence[ServerInfo], num_blocks: int) -> list[int]:
    """How many servers hold each block, those that are still loading included: they will be there soon."""
    replicas = [0] * num_blocks
    for server in servers:
        if server.state in (ServerState.ONLINE, ServerState.JOINING):
            for block in range(server.span.start, min(server.span.end, num_blocks)):
                replicas[block] += 1
    return replicas


def choose_span(servers: Sequence[ServerInfo], num_blocks: int, num_held: int) -> Span:
    """The `num_held` consecutive blocks whose rarest are rarest in the swarm.

    Spans are compared by their replica counts, rarest block first; the leftmost of equals wins, so servers
    that start one after the other line up without gaps. Raises BadInputError unless 1 <= num_held <= num_blocks.
    """
    if not 1 <= num_held <= num_blocks:
        raise BadInputError(f"{num_held} blocks can not be held of a model of {num_blocks}; choose 1 to {num_blocks}")
    replicas = count_replicas(servers, num_blocks)
    start = min(range(num_blocks - num_held + 1), key=lambda first: (sorted(replicas[first : first + num_held]), first))
    return Span(start=start, end=start + num_held)
