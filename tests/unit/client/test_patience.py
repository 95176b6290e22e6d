"""Deadlines of a step: a long input may take long, a standstill may not, and nothing goes on for ever."""

from __future__ import annotations

import pytest

from swarm.client.config import ClientConfig
from swarm.client.session.patience import Patience


class Clock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def patience(clock: Clock) -> Patience:
    config = ClientConfig(request_timeout_s=10.0, step_timeout_s=4.0, queue_timeout_s=30.0)
    patience = Patience(config, now_s=clock)
    patience.begin_step()
    patience.note_movement()
    return patience


def test_a_standstill_is_noticed_before_the_deadline(clock: Clock, patience: Patience) -> None:
    """There must be time left to do something about it."""
    clock.time_s += 4.0
    assert (patience.standstill_left_s, patience.left_s) == (0.0, 6.0)
    patience.note_movement()
    assert patience.standstill_left_s == 4.0
    clock.time_s += 3.0
    assert patience.standstill_left_s == 1.0
    patience.note_movement()
    assert patience.standstill_left_s == 3.0, "never beyond the deadline"


def test_getting_further_renews_the_deadline(clock: Clock, patience: Patience) -> None:
    """A prompt of many chunks takes as long as it takes."""
    for _ in range(5):
        clock.time_s += 9.0
        patience.note_done(100)
        assert patience.left_s == 10.0


def test_doing_the_same_again_does_not(clock: Clock, patience: Patience) -> None:
    """Else a server that always fails at the very end could keep a client busy for ever."""
    patience.note_done(100)
    for _ in range(3):
        clock.time_s += 3.0
        patience.begin_attempt()
        patience.note_done(100)
    assert patience.left_s == 1.0
    patience.note_done(1)
    assert patience.left_s == 10.0


def test_what_the_servers_have_kept_counts_as_done(clock: Clock, patience: Patience) -> None:
    """A loss amid a long step must not make its second half look like a repetition of the first."""
    patience.note_done(100)
    patience.note_done(100)
    clock.time_s += 3.0
    patience.begin_attempt(200)
    assert patience.left_s == 7.0
    patience.note_done(1)
    assert patience.left_s == 10.0


def test_time_in_queues_is_counted_apart(clock: Clock, patience: Patience) -> None:
    """A place in a queue is worth keeping for longer than a step may take, but not again and again."""
    clock.time_s += 20.0
    patience.note_queueing(20.0)
    assert (patience.left_s, patience.queueing_left_s) == (10.0, 10.0)
    clock.time_s += 20.0
    patience.note_queueing(20.0)
    assert (patience.left_s, patience.queueing_left_s) == (0.0, 0.0)


def test_each_step_begins_afresh(clock: Clock, patience: Patience) -> None:
    """The trouble of one token is not held against the next."""
    patience.note_done(50)
    clock.time_s += 60.0
    patience.note_queueing(30.0)
    patience.begin_step()
    assert (patience.left_s, patience.queueing_left_s) == (10.0, 30.0)
    clock.time_s += 5.0
    patience.begin_attempt()
    patience.note_done(1)
    assert patience.left_s == 10.0
