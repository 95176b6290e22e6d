"""Routes around peers that failed lately, without giving up blocks that only they serve."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from swarm.client.config import ClientConfig
from swarm.client.peer_health import PeerHealth
from swarm.client.route_finder import RouteFinder
from swarm.client.session.holdings import Holding
from swarm.datatypes import Hop, PeerId, ServerInfo
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


async def test_holders_that_all_failed_take_turns() -> None:
    """The one that fails again must not be tried for ever while the other one is well by now."""
    finder = make_finder(make_server("a", 0, 12), make_server("b", 0, 12), failed=["a", "b"])
    tried: list[str] = []
    for _ in range(6):
        (peer,) = await peers(finder)
        tried.append(peer)
        finder._health.record_failure(PeerId(peer))
    assert tried[:2] == ["a", "b"]
    assert set(tried[2:]) == {"a", "b"}


async def test_whether_a_peer_can_be_avoided() -> None:
    """A slow server is left only for one that can do its work, and has not failed itself."""
    servers = [make_server("whole", 0, 12), make_server("left", 0, 6), make_server("right", 6, 12)]
    assert await make_finder(*servers).can_avoid(PeerId("whole"))
    assert not await make_finder(*servers, failed=["left"]).can_avoid(PeerId("whole"))
    assert not await make_finder(servers[0]).can_avoid(PeerId("whole"))


async def test_a_full_server_is_a_way_around_one_that_is_too_small() -> None:
    """One will have room again, the other never has; who failed once may have recovered, who failed again has not."""
    small, other = make_server("small", 0, 12), make_server("other", 0, 12)
    finder = make_finder(small, other)
    assert await finder.can_route_without({small.peer_id})
    finder._health.record_busy(other.peer_id, 60.0)
    assert await finder.can_route_without({small.peer_id})
    assert not await finder.can_route_without({small.peer_id, other.peer_id})
    finder = make_finder(small, other, failed=["other"])
    assert await finder.can_route_without({small.peer_id})
    finder._health.record_failure(other.peer_id)
    assert not await finder.can_route_without({small.peer_id})


def held(*servers: ServerInfo) -> list[Holding]:
    return [Holding(peer_id=server.peer_id, span=server.span, epoch=1, step=1, server=server) for server in servers]


async def kept_peers(finder: RouteFinder, holdings: Sequence[Holding]) -> list[str]:
    return [hop.peer_id for hop in (await finder.find(wait_s=0.0, fresh=True, held=holdings)).hops]


async def test_who_holds_the_session_stays_in_its_route() -> None:
    """However few hops another route had."""
    left, middle, right = make_server("left", 0, 4), make_server("middle", 4, 8), make_server("right", 8, 12)
    servers = [left, middle, right, make_server("spare", 4, 8), make_server("whole", 0, 12)]
    finder = make_finder(*servers, failed=["middle", "whole"])
    assert await kept_peers(finder, held(left, middle, right)) == ["left", "spare", "right"]


async def test_nobody_is_looked_up_when_nobody_is_missing() -> None:
    """Coming back after a moment without network needs no look-up, which takes longest."""
    left, right = make_server("left", 0, 6), make_server("right", 6, 12)
    finder = make_finder(left, right)
    assert await kept_peers(finder, held(left, right)) == ["left", "right"]
    assert finder._list._registry.num_lookups == 0  # type: ignore[attr-defined]
    heir = Holding(peer_id=PeerId("right"), span=right.span, epoch=1, step=1, server=None)
    assert await kept_peers(finder, [*held(left), heir]) == ["left", "right"]
    assert finder._list._registry.num_lookups == 1, "a successor is only a name until then"  # type: ignore[attr-defined]


async def test_who_failed_is_asked_to_go_on_where_nobody_replaces_it() -> None:
    """It may be back, and hold the session still."""
    left, right = make_server("left", 0, 6), make_server("right", 6, 12)
    finder = make_finder(left, right, make_server("spare", 0, 6), failed=["left", "right"])
    assert await kept_peers(finder, held(left, right)) == ["spare", "right"]


async def test_who_is_lost_is_replaced_by_its_like_where_there_is_one() -> None:
    """Other weights round otherwise, and a token that depends on the last digit would come out differently."""
    left, lost = make_server("left", 0, 6, weights="int8"), make_server("lost", 6, 12, weights="int8")
    other, alike = make_server("other", 6, 12), [make_server(f"{n}", n, n + 2, weights="int8") for n in (6, 8, 10)]
    route = [Hop(server=server, span=server.span) for server in (left, lost)]

    async def replaced_by(*servers: ServerInfo) -> list[str]:
        finder = make_finder(left, lost, *servers, failed=["lost"])
        found = await finder.find(wait_s=0.0, fresh=True, held=held(left), like=route)
        return [hop.peer_id for hop in found.hops]

    assert await replaced_by(other, *alike) == ["left", "6", "8", "10"]
    assert await replaced_by(other, *alike[:2]) == ["left", "other"]


async def test_a_look_up_that_hangs_is_not_waited_for_where_others_are_known() -> None:
    """The server that was lost may be the one it asks; the list that comes in later is used later."""
    left, lost, spare = make_server("left", 0, 6), make_server("lost", 6, 12), make_server("spare", 6, 12)
    finder = make_finder(left, lost, spare, failed=["lost"])
    await finder.servers()
    registry: Any = finder._list._registry
    answers = asyncio.Event()

    async def lookup(model_hash: str, num_blocks: int) -> list[ServerInfo]:
        await answers.wait()
        return [left, make_server("new", 6, 12)]

    registry.lookup = lookup
    assert await kept_peers(finder, held(left)) == ["left", "spare"]
    waiting = asyncio.create_task(finder.servers(fresh=True))
    await asyncio.sleep(0)
    answers.set()
    assert [server.peer_id for server in await waiting] == ["left", "new"], "one look-up serves both"
    answers.clear()
    assert await kept_peers(finder, held(left)) == ["left", "new"]
    await finder.close()


async def test_blocks_that_only_silent_peers_announce_are_named() -> None:
    """Their announcements outlive them for a while; the error must not wait for that."""
    servers = [make_server("left", 0, 6), make_server("right", 6, 12)]
    finder = make_finder(*servers, failed=["right"])
    await finder.servers()
    error = finder.missing_error(waited_s=5.0)
    assert error is not None
    assert error.missing_blocks == tuple(range(6, 12))
    assert "blocks 6-11" in str(error) and "do not answer" in str(error)
    finder = make_finder(*servers)
    await finder.servers()
    assert finder.missing_error(waited_s=5.0) is None


async def test_blocked_and_unlisted_peers_are_never_used() -> None:
    """These are the user's decisions, not the client's guesses."""
    servers = [make_server("whole", 0, 12), make_server("left", 0, 6), make_server("right", 6, 12)]
    assert await peers(make_finder(*servers, blocked_peers=["whole"])) == ["left", "right"]
    with pytest.raises(NoRouteError) as raised:
        await peers(make_finder(*servers, allowed_peers=["left"]))
    assert raised.value.missing_blocks == tuple(range(6, 12))


async def test_only_servers_of_the_wanted_policy_are_used() -> None:
    """Who asks for exact caches gets them anywhere; who asks for others is told what nobody serves."""
    servers = [make_server("plain", 0, 12), make_server("gear", 0, 12, kv_policy="gear")]
    assert await peers(make_finder(*servers, kv_policy="gear")) == ["gear"]
    assert await peers(make_finder(servers[1], kv_policy="none")) == ["gear"]
    with pytest.raises(NoRouteError, match=r"blocks 0-11 of tiny under the KV policy pyramid .* --kv pyramid`$"):
        await peers(make_finder(*servers, kv_policy="pyramid"))


async def test_other_policies_are_no_other_kind_to_who_asks_for_exact_caches() -> None:
    """All servers compute the same for it, so a better route is not passed by for the sake of likeness."""
    left, right = make_server("left", 0, 6), make_server("right", 6, 12)
    whole = make_server("whole", 6, 12, kv_policy="gear")
    lost = Hop(server=right, span=right.span)
    for policy, expected in (("none", {"right", "whole"}), (None, {"right"})):
        finder = make_finder(left, right, whole, kv_policy=policy)
        found = {(await finder.find(wait_s=0.0, like=[lost])).hops[1].peer_id for _ in range(40)}
        assert found == expected


async def test_whether_caches_may_be_compressed_is_known_before_a_route_is() -> None:
    """Candidates are tried out with the first step already."""
    plain, gear = make_server("plain", 0, 12), make_server("gear", 0, 12, kv_policy="gear")
    assert not await make_finder(plain).may_compress()
    assert await make_finder(plain, gear).may_compress()
    assert not await make_finder(plain, gear, kv_policy="none").may_compress()
    assert await make_finder(kv_policy="gear").may_compress()
