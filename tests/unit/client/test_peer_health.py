"""Experience with peers: bans that end, counts that stay, and a reliability that forgives."""

from __future__ import annotations

import pytest

from swarm.client.peer_health import PeerExperience, PeerHealth
from swarm.datatypes import PeerId

PEER = PeerId("a")


class Clock:
    def __init__(self) -> None:
        self.time_s = 1000.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> PeerHealth:
    return PeerHealth(ban_s=10.0, now_s=clock)


def only(health: PeerHealth) -> PeerExperience:
    (experience,) = health.experience()
    return experience


def test_bans_double_and_end(clock: Clock, health: PeerHealth) -> None:
    """Who fails again and again costs less and less, and is never written off."""
    for expected_s in (10.0, 20.0, 40.0, 80.0, 80.0):
        health.record_failure(PEER)
        assert only(health).avoided_for_s == expected_s
        clock.time_s += expected_s
        assert health.avoided() == set()


def test_a_success_ends_the_ban_and_not_the_memory(health: PeerHealth) -> None:
    """It is used again at once, and somewhat less often than those that never failed."""
    health.record_failure(PEER)
    health.record_success(PEER)
    assert health.avoided() == set()
    experience = only(health)
    assert (experience.num_failures, experience.num_successes, experience.avoided_for_s) == (1, 1, 0.0)
    assert 0.5 < experience.reliability < 1.0
    health.record_failure(PEER)
    assert only(health).avoided_for_s == 10.0, "the doubling begins anew"


def test_what_is_long_ago_counts_less(health: PeerHealth) -> None:
    """A machine that was mended deserves its work back."""
    for _ in range(5):
        health.record_failure(PEER)
    assert health.reliability()[PEER] < 0.2
    for _ in range(300):
        health.record_success(PEER)
    assert health.reliability()[PEER] > 0.99


def test_full_and_leaving_are_no_failures(clock: Clock, health: PeerHealth) -> None:
    """They are passed by for a while, and nothing is held against them."""
    health.record_busy(PEER, 3.0)
    assert (only(health).is_busy, only(health).avoided_for_s, only(health).reliability) == (True, 3.0, 1.0)
    health.record_leaving(PEER)
    clock.time_s += 9.9
    assert health.avoided() == {PEER}
    clock.time_s += 0.2
    assert health.avoided() == set()
    assert only(health).num_failures == 0


def test_a_failure_can_be_taken_back(health: PeerHealth) -> None:
    """Who refused what another server refuses, too, told the truth."""
    health.record_failure(PEER)
    health.withdraw_failure(PEER)
    assert (only(health).num_failures, only(health).reliability, len(health.avoided())) == (0, 1.0, 0)


def test_answer_times_are_smoothed(health: PeerHealth) -> None:
    """One slow answer says little."""
    assert only_after(health, 0.1) == pytest.approx(0.1)
    assert only_after(health, 1.1) == pytest.approx(0.3)
    assert only(health).num_successes == 0, "to answer is no work done"


def only_after(health: PeerHealth, seconds: float) -> float | None:
    health.record_answer(PEER, seconds)
    return only(health).answer_s
