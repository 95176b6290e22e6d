"""Routes around peers that failed lately, without giving up blocks that only they serve."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.datatypes import PeerId, ServerInfo
from swarm.errors import NoRouteError
from swarm.routing import FewestHopsRouter
from tests.server_infos import MODEL_HASH, make_server


class OneList:
    """A registry that always knows the same servers."""

    def __init__(self, servers: Sequence[ServerInfo]) -> None:
        self.servers = list(servers)
        self.num_lookups = 0

    async def lookup(self, model_hash: str, num_blocks: int) -> list[ServerInfo]:
        self.num_lookups += 1
        return list(self.servers)


def make_finder(*servers: ServerInfo, failed: Sequence[str] = (), **config: Any) -> RouteFinder:
    health = PeerHealth(ban_s=60.0, now_s=time.monotonic)
    for peer in failed:
        health.record_failure(PeerId(peer))
    registry: Any = OneList(servers)
    return RouteFinder(
        registry=registry,
        router=FewestHopsRouter(random.Random(0)),
        model_hash=MODEL_HASH,
        model_name="tiny",
        num_blocks=12,
        health=health,
        config=ClientConfig(**config),
    )


async def peers(finder: RouteFinder) -> list[str]:
    return [hop.peer_id for hop in (await finder.find(wait_s=0.0)).hops]


async def test_a_failed_peer_is_passed_by_even_at_the_price_of_hops() -> None:
    """It will most likely fail again."""
    servers = [make_server("whole", 0, 12), make_server("left", 0, 6), make_server("right", 6, 12)]
    assert await peers(make_finder(*servers)) == ["whole"]
    assert await peers(make_finder(*servers, failed=["whole"])) == ["left", "right"]


async def test_only_those_are_forgiven_whom_nobody_replaces() -> None:
    """That one block has no other server is no reason to try all the other dead ones again."""
    servers = [
        make_server("dead", 0, 6),
        make_server("spare", 0, 6),
        make_server("only", 6, 12),
    ]
    for _ in range(20):
        assert await peers(make_finder(*servers, failed=["dead", "only"])) == ["spare", "only"]


async def test_where_all_have_failed_all_are_tried_again() -> None:
    """A ban must never turn a bad moment into an outage."""
    servers = [make_server("left", 0, 6), make_server("right", 6, 12)]
    assert await peers(make_finder(*servers, failed=["left", "right"])) == ["left", "right"]


async def test_whether_a_peer_can_be_avoided() -> None:
    """A slow server is left only for one that can do its work, and has not failed itself."""
    servers = [make_server("whole", 0, 12), make_server("left", 0, 6), make_server("right", 6, 12)]
    assert await make_finder(*servers).can_avoid(PeerId("whole"))
    assert not await make_finder(*servers, failed=["left"]).can_avoid(PeerId("whole"))
    assert not await make_finder(servers[0]).can_avoid(PeerId("whole"))


async def test_blocked_and_unlisted_peers_are_never_used() -> None:
    """These are the user's decisions, not the client's guesses."""
    servers = [make_server("whole", 0, 12), make_server("left", 0, 6), make_server("right", 6, 12)]
    assert await peers(make_finder(*servers, blocked_peers=["whole"])) == ["left", "right"]
    with pytest.raises(NoRouteError) as raised:
        await peers(make_finder(*servers, allowed_peers=["left"]))
    assert raised.value.missing_blocks == tuple(range(6, 12))
