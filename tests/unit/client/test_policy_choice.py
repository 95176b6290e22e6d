"""Which KV policy servers are asked for: a session never comes to lose more than it was begun with."""

from __future__ import annotations

import pytest

from swarm.client.config import ClientConfig
from swarm.client.session.policy_choice import PolicyChoice, serves_policy
from swarm.datatypes import PeerId, Span
from swarm.errors import BadInputError, PeerFaultError
from swarm.kvpolicy.settings import FULL_CACHE, find_policy
from tests.server_infos import make_server

PEER = PeerId("peer")
SPAN = Span(start=0, end=12)


def test_a_mistyped_policy_is_named_at_once() -> None:
    """Before anybody is looked up; else it would look like a swarm without servers."""
    with pytest.raises(BadInputError, match=r"no KV policy 'pyramide'; known are none, pyramid"):
        ClientConfig(kv_policy="pyramide")
    assert ClientConfig(kv_policy="smallest").kv_policy == "smallest"


@pytest.mark.parametrize(
    ("offered", "wanted", "is_served"),
    [
        ("none", None, True),
        ("pyramid+gear", None, True),
        ("pyramid+gear", "none", True),
        ("something new", "none", True),
        ("pyramid+gear", "pyramid+gear", True),
        ("none", "pyramid+gear", False),
        ("smallest", "pyramid+gear", False),
    ],
)
def test_every_server_is_exact_when_asked(offered: str, wanted: str | None, is_served: bool) -> None:
    """Only a compressing policy narrows the choice, and its presets are different things."""
    assert serves_policy(make_server("a", 0, 12, kv_policy=offered), wanted) is is_served


def test_without_a_wish_the_first_route_decides() -> None:
    """A spare with other losses than those the session has taken on is asked for none."""
    choice = PolicyChoice(None)
    gear, pyramid = (make_server(name, 0, 12, kv_policy=name) for name in ("gear", "pyramid"))
    assert choice.ask(gear, SPAN) == choice.ask(pyramid, SPAN) == ""
    choice.note(gear.peer_id, SPAN, find_policy("gear"))
    assert choice.ask(gear, SPAN) == "gear"
    assert choice.ask(pyramid, SPAN) == "none"
    assert choice.ask(make_server("plain", 0, 12), SPAN) == "none"


def test_each_block_keeps_what_it_had() -> None:
    """Where operators differ, the loss of an exact server must not make its blocks lose tokens."""
    choice = PolicyChoice(None)
    gear = make_server("gear", 0, 12, kv_policy="gear")
    choice.note(PeerId("plain"), Span(start=0, end=5), FULL_CACHE)
    choice.note(PeerId("other"), Span(start=5, end=12), find_policy("gear"))
    assert choice.ask(gear, Span(start=0, end=5)) == "none"
    assert choice.ask(gear, Span(start=6, end=12)) == "gear"
    assert choice.ask(gear, SPAN) == "none", "a replacement of both takes the exact one"
    assert choice.ask(gear, Span(start=0, end=5), keeps=True) == "none", "a successor holds what it was handed"


def test_an_exact_session_stays_exact() -> None:
    """Also where its servers are lost and only those that compress are left, and at one that does both."""
    choice = PolicyChoice(None)
    gear = make_server("gear", 0, 12, kv_policy="gear")
    choice.note(PeerId("plain"), SPAN, FULL_CACHE)
    assert choice.ask(gear, SPAN) == "none"
    choice.note(gear.peer_id, SPAN, FULL_CACHE)
    choice.note(PeerId("other"), SPAN, find_policy("gear"))
    assert choice.ask(gear, SPAN) == "none"


def test_what_is_kept_is_asked_for_by_its_name() -> None:
    """An announcement may be older than what the server said itself."""
    choice = PolicyChoice(None)
    server = make_server("a", 0, 12)
    choice.note(server.peer_id, SPAN, find_policy("gear"))
    assert choice.ask(server, SPAN, keeps=True) == "gear"
    assert choice.ask(server, SPAN) == "none"


def test_a_wish_is_asked_of_all() -> None:
    """By the name of its preset, which is what servers announce."""
    gear = make_server("gear", 0, 12, kv_policy="gear")
    assert PolicyChoice("none").ask(gear, SPAN) == "none"
    assert PolicyChoice("gear").ask(gear, SPAN) == "gear"


def test_a_policy_of_the_future_is_not_used() -> None:
    """We could not tell what such a server has dropped, so we could not replace it."""
    assert PolicyChoice(None).ask(make_server("a", 0, 12, kv_policy="hologram"), SPAN) == "none"


def test_an_answer_must_be_what_was_asked() -> None:
    """A server that compresses an exact session is at fault."""
    choice = PolicyChoice(None)
    assert choice.check("", "gear", PEER) == find_policy("gear")
    assert choice.check("none", "", PEER) == FULL_CACHE
    with pytest.raises(PeerFaultError, match="'none' and says 'gear'"):
        choice.check("none", "gear", PEER)
    with pytest.raises(PeerFaultError, match="unknown policy, 'hologram'"):
        choice.check("", "hologram", PEER)
