"""Who can go on with a leaving server's sessions."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.datatypes import ServerInfo, ServerState, Span
from swarm.kvcache.footprint import Footprint
from swarm.kvpolicy.budget import default_curve
from swarm.kvpolicy.settings import find_policy
from swarm.server.draining import choose_successors
from swarm.server.rpc.session_claims import KVSizes
from tests.server_infos import make_server

OWN = make_server("own", 2, 6)
SPAN = Span(start=2, end=6)


def names(*servers: Any, num_tokens: int = 100, own: ServerInfo = OWN, **session: Any) -> list[str]:
    return [server.peer_id for server in choose_successors(servers, own, SPAN, num_tokens=num_tokens, **session)]


def test_who_has_most_room_is_asked_first() -> None:
    """Sessions of one server should not fill up another while a third stands empty."""
    servers = [make_server(f"peer{free}", 0, 12, kv_tokens_free=free) for free in (300, 500, 200)]
    assert names(*servers) == ["peer500", "peer300", "peer200"]


def test_only_a_few_are_asked_in_a_round() -> None:
    """A session does not wait for a hundred refusals."""
    assert len(names(*(make_server(f"peer{number}", 0, 12) for number in range(10)))) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"state": ServerState.DRAINING},
        {"state": ServerState.JOINING},
        {"weights": "int8"},
        {"model_hash": "cd" * 16},
        {"kv_tokens_free": 99},
        {"addresses": (), "state": ServerState.JOINING},
    ],
)
def test_who_could_not_go_on_is_not_asked(fields: dict[str, Any]) -> None:
    """Other weights would give other tokens; the rest would refuse."""
    assert names(make_server("peer", 2, 6, **fields)) == []


@pytest.mark.parametrize("other", ["none", "gear", "smallest"])
def test_a_compressed_session_stays_with_its_policy(other: str) -> None:
    """Codes of one preset are noise to another, and exact servers hold no codes."""
    own = make_server("own", 2, 6, kv_policy="pyramid+gear")
    others = make_server("other", 2, 6, kv_policy=other), make_server("same", 2, 6, kv_policy="pyramid+gear")
    assert names(*others, own=own, kv_policy="pyramid+gear") == ["same"]


@pytest.mark.parametrize("policy", ["none", "pyramid+gear"])
def test_an_exact_session_may_go_anywhere_but_asks_at_home_first(policy: str) -> None:
    """Every server serves exact sessions; pages are surely of one size only where the policy is the same."""
    other = "gear" if policy == "none" else "none"
    own = make_server("own", 2, 6, kv_policy=policy)
    servers = [
        make_server("roomy", 2, 6, kv_policy=other, kv_tokens_free=900),
        make_server("same", 2, 6, kv_policy=policy, kv_tokens_free=200),
    ]
    assert names(*servers, own=own) == ["same", "roomy"]


def test_room_is_told_in_the_sessions_own_tokens() -> None:
    """A compressing server announces ten times the tokens that it could hold exactly."""
    own = make_server("own", 2, 6, kv_policy="pyramid+gear")
    footprint = make_footprint()
    sizes = KVSizes(
        total_bytes=1 << 20,
        exact_bytes_per_token=10 * footprint.bytes_per_token,
        num_blocks=4,
        footprint=footprint,
    )
    server = make_server("peer", 2, 6, kv_policy="pyramid+gear", kv_tokens_free=500)
    assert names(server, own=own, num_tokens=51, sizes=sizes) == []
    assert names(server, own=own, num_tokens=50, sizes=sizes) == ["peer"]
    assert names(server, own=own, num_tokens=500, sizes=sizes, kv_policy="pyramid+gear") == ["peer"]


def make_footprint() -> Footprint:
    return Footprint(
        policy=find_policy("pyramid+gear"),
        curve=default_curve(12, 2),
        layers=(2, 3, 4, 5),
        num_kv_heads=2,
        key_dim=16,
        value_dim=16,
        row_bytes=18,
        page_bytes=2048,
        max_positions=4096,
    )


def test_the_whole_session_must_fit_the_blocks() -> None:
    """A session's blocks are not torn apart; what they are is the session's span, not the server's."""
    assert names(make_server("left", 0, 5), make_server("right", 3, 12), make_server("exact", 2, 6)) == ["exact"]


def test_a_server_is_not_its_own_successor() -> None:
    """Its record may still say ONLINE somewhere."""
    assert names(OWN) == []
