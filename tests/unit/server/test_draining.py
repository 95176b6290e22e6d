"""Who can go on with a leaving server's sessions."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.datatypes import ServerState, Span
from swarm.server.draining import choose_successors
from tests.server_infos import make_server

OWN = make_server("own", 2, 6)
SPAN = Span(start=2, end=6)


def names(*servers: Any, num_tokens: int = 100) -> list[str]:
    return [server.peer_id for server in choose_successors(servers, OWN, SPAN, num_tokens=num_tokens)]


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
        {"kv_policy": "pyramid"},
        {"model_hash": "cd" * 16},
        {"kv_tokens_free": 99},
        {"addresses": (), "state": ServerState.JOINING},
    ],
)
def test_who_could_not_go_on_is_not_asked(fields: dict[str, Any]) -> None:
    """Other weights or another policy would give other tokens; the rest would refuse."""
    assert names(make_server("peer", 2, 6, **fields)) == []


def test_the_whole_session_must_fit_the_blocks() -> None:
    """A session's blocks are not torn apart; what they are is the session's span, not the server's."""
    assert names(make_server("left", 0, 5), make_server("right", 3, 12), make_server("exact", 2, 6)) == ["exact"]


def test_a_server_is_not_its_own_successor() -> None:
    """Its record may still say ONLINE somewhere."""
    assert names(OWN) == []
