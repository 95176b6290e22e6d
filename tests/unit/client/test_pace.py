"""When silence is suspicious: later for slow servers and long inputs, never much later."""

from __future__ import annotations

import pytest

from swarm.client.session.pace import HopPace, RoutePace


def route(*hops: tuple[float, float]) -> RoutePace:
    return RoutePace([HopPace(step_s=step_s, token_s=token_s) for step_s, token_s in hops])


def test_fast_servers_are_given_a_second() -> None:
    """A pause of less is more often the network's."""
    assert route((0.01, 0.001), (0.01, 0.001)).quiet_s(1) == 1.0


def test_long_inputs_and_slow_servers_are_given_more() -> None:
    """Four times what they say of themselves, all hops together."""
    assert route((0.2, 0.01), (0.3, 0.01)).quiet_s(51) == pytest.approx(4 * (0.2 + 0.3 + 50 * 0.02))


def test_nobody_talks_us_into_waiting_for_ever() -> None:
    """Asking is cheap, and what a server says of its speed is only its word."""
    assert route((1000.0, 1000.0)).quiet_s(1000) == 10.0


def test_what_was_measured_corrects_what_was_announced() -> None:
    """A slow network is not in the servers' estimates; being faster than announced makes nobody suspicious sooner."""
    pace = route((0.1, 0.01))
    for _ in range(50):
        pace.note_step(1, 0.5)
    assert pace.expected_s(1) == pytest.approx(0.5, rel=0.01)
    for _ in range(50):
        pace.note_step(1, 0.001)
    assert pace.expected_s(1) == pytest.approx(0.1)


def test_unknown_speeds_are_guessed() -> None:
    """A server that has run nothing yet says 0."""
    assert HopPace.announced(step_us=0, token_us=0).expected_s(11) > 0
    assert HopPace.announced(step_us=200_000, token_us=3_000).expected_s(11) == pytest.approx(0.23)


def test_an_engine_is_stuck_long_after_it_is_slow() -> None:
    """Leaving a server that works costs more than waiting a little for one that does not."""
    pace = route((0.01, 0.001), (1.0, 0.1))
    assert pace.stuck_s(0, 1) == 5.0
    assert pace.stuck_s(1, 11) == pytest.approx(40.0)
