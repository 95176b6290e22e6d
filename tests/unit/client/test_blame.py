"""Blame: only the guilty are avoided, and one server's word does not end a request."""

from __future__ import annotations

from typing import Any

import pytest

from swarm.client.peer_health import PeerHealth
from swarm.client.session.blame import Blame
from swarm.datatypes import Hop
from swarm.errors import (
    BadInputError,
    LengthLimitError,
    PeerBusyError,
    PeerFaultError,
    PeerLostError,
    RetryElsewhereError,
    SessionStateError,
)
from tests.server_infos import make_server


class Channels:
    """Notes whose channel was dropped."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    async def drop(self, server: Any) -> None:
        self.dropped.append(server.peer_id)


@pytest.fixture
def health() -> PeerHealth:
    return PeerHealth(ban_s=15.0, now_s=lambda: 100.0)


@pytest.fixture
def channels() -> Channels:
    return Channels()


@pytest.fixture
def blame(health: PeerHealth, channels: Any) -> Blame:
    return Blame(health=health, channels=channels, use_push=True)


def hop(name: str) -> Hop:
    server = make_server(name, 0, 4)
    return Hop(server=server, span=server.span)


@pytest.mark.parametrize(
    ("error", "is_dropped"), [(PeerLostError("x"), True), (PeerFaultError("x"), False), (PeerBusyError("x"), False)]
)
async def test_the_guilty_are_avoided(
    blame: Blame, health: PeerHealth, channels: Channels, error: RetryElsewhereError, is_dropped: bool
) -> None:
    """Only who was lost is dialled anew: hanging up on others' sessions mends no fault."""
    await blame.record(hop("a"), error)
    assert health.avoided() == {"a"}
    assert channels.dropped == ["a"] * is_dropped
    assert health.busy() == ({"a"} if isinstance(error, PeerBusyError) else set())


async def test_another_position_is_a_fault_only_when_it_happens_again(blame: Blame, health: PeerHealth) -> None:
    """A replay mends it, for those it can be mended for."""
    await blame.record(hop("a"), SessionStateError("x"))
    await blame.record(hop("b"), SessionStateError("x"))
    assert health.avoided() == set()
    await blame.record(hop("a"), SessionStateError("x"))
    assert health.avoided() == {"a"}
    blame.settle()
    await blame.record(hop("b"), SessionStateError("x"))
    assert health.avoided() == {"a"}


def test_a_refusal_is_believed_when_a_second_server_repeats_it(blame: Blame, health: PeerHealth) -> None:
    """The first one is avoided meanwhile, and rehabilitated when it turns out to have told the truth."""
    first = blame.weigh(hop("a"), BadInputError("no"))
    assert isinstance(first, PeerFaultError) and str(first) == "no"
    assert health.avoided() == {"a"}
    refusal = LengthLimitError("no")
    assert blame.weigh(hop("b"), refusal) is refusal
    assert health.avoided() == set()


def test_who_is_too_small_has_not_failed(blame: Blame, health: PeerHealth) -> None:
    """It is passed by for the moment, remembered for the step, and no worse for others' short sessions afterwards."""
    blame.search()
    assert blame.note_too_small(hop("a")) == {"a"}
    assert blame.note_too_small(hop("b")) == {"a", "b"}
    assert blame.use_push
    assert health.avoided() == {"a", "b"} and health.busy() == set()
    assert all(peer.num_failures == 0 and peer.reliability == 1.0 for peer in health.experience())
    blame.settle()
    assert blame.note_too_small(hop("b")) == {"b"}


def test_a_new_step_asks_two_again(blame: Blame) -> None:
    """Two refusals of different steps are no agreement."""
    blame.weigh(hop("a"), BadInputError("no"))
    blame.settle()
    assert isinstance(blame.weigh(hop("b"), BadInputError("no")), PeerFaultError)


async def test_pushing_ends_for_a_search_and_comes_back_when_somebody_is_found(blame: Blame) -> None:
    """Carrying everything is dear: it lasts until the guilty one is known."""
    use_push = [blame.use_push]
    blame.search()
    use_push.append(blame.use_push)
    await blame.record(hop("a"), PeerBusyError("x"))
    use_push.append(blame.use_push)
    await blame.record(hop("a"), PeerFaultError("x"))
    use_push.append(blame.use_push)
    assert use_push == [True, False, False, True]


def test_servers_that_can_not_reach_each_other_are_not_asked_to_again_soon(health: PeerHealth, channels: Any) -> None:
    """What two routers forbid in one step they forbid in the next; a line that was cut comes back."""
    clock = [100.0]
    blame = Blame(health=health, channels=channels, use_push=True, now_s=lambda: clock[0])
    use_push = [blame.use_push]
    blame.stop_pushing()
    blame.settle()
    for _ in range(2):
        clock[0] += 60.0
        use_push.append(blame.use_push)
    assert use_push == [True, False, True]


def test_who_does_not_want_pushing_never_gets_it(health: PeerHealth, channels: Any) -> None:
    """The setting wins."""
    assert not Blame(health=health, channels=channels, use_push=False).use_push
