"""When a decoding step waits for sessions that are about to come back."""

from __future__ import annotations

import pytest

from swarm.server.engine.gathering import Gathering


def make_gathering(**return_s: float) -> Gathering[str]:
    """Sessions that were answered at 0 and have usually come back after this many seconds."""
    gathering: Gathering[str] = Gathering(1.0)
    for name, away_s in return_s.items():
        gathering.answered(name, now_s=-away_s)
        gathering.arrived(name, now_s=0.0)
        gathering.answered(name, now_s=0.0)
    return gathering


def test_waits_for_a_session_that_returns_sooner_than_a_step() -> None:
    """Otherwise sessions fall into two groups, and every step carries half of what it could."""
    assert make_gathering(quick=0.02).wait_s(step_s=0.1, now_s=0.0) == pytest.approx(0.04)


def test_does_not_wait_for_a_slow_client() -> None:
    """Somebody far away must not slow down everybody else."""
    assert make_gathering(slow=0.2).wait_s(step_s=0.1, now_s=0.0) == 0.0


def test_gives_up_on_a_client_that_is_late() -> None:
    """A client that has stopped asking keeps the others waiting once, and then not any more."""
    gathering = make_gathering(quick=0.02)
    assert gathering.wait_s(step_s=0.1, now_s=0.05) <= 0.0
    assert gathering.wait_s(step_s=0.1, now_s=10.0) <= 0.0


def test_never_waits_longer_than_its_share_of_a_step() -> None:
    """The gain of a fuller step is at most one step's time."""
    assert make_gathering(medium=0.09).wait_s(step_s=0.1, now_s=0.0) == pytest.approx(0.1)


def test_does_not_wait_for_who_is_there_has_left_or_is_new() -> None:
    """Only measured behaviour counts."""
    gathering = make_gathering(here=0.02, gone=0.02)
    gathering.arrived("here", now_s=0.01)
    gathering.forget("gone")
    gathering.answered("new", now_s=0.0)
    assert gathering.wait_s(step_s=0.1, now_s=0.01) == 0.0
