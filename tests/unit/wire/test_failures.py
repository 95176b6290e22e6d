"""Errors keep their meaning across the wire: what another server can mend stays apart from what it can not."""

from __future__ import annotations

import pytest

from swarm.errors import (
    BadInputError,
    FinalError,
    LengthLimitError,
    NoRouteError,
    PeerBusyError,
    PeerFaultError,
    PeerLostError,
    RetryElsewhereError,
    SessionStateError,
    SwarmError,
)
from swarm.wire.failures import error_from_failure, failure_from_error


@pytest.mark.parametrize(
    ("sent", "received_type"),
    [
        (BadInputError("x"), BadInputError),
        (LengthLimitError("x"), LengthLimitError),
        (PeerBusyError("x", retry_after_s=2.5, queue_position=3), PeerBusyError),
        (PeerLostError("x"), PeerLostError),
        (PeerFaultError("x"), PeerFaultError),
        (SessionStateError("x", epoch=4, positions=[5, 6]), SessionStateError),
        (NoRouteError("not served"), PeerFaultError),
        (RuntimeError("bug"), PeerFaultError),
    ],
)
def test_an_error_arrives_as_its_kind(sent: Exception, received_type: type[SwarmError]) -> None:
    """The client acts on the type, so the type must survive."""
    received = error_from_failure(failure_from_error(sent, epoch=4, step=9), peer="P")
    assert type(received) is received_type
    assert "P" in str(received)


def test_details_survive() -> None:
    """Backoff and replay need the numbers, not only the type."""
    busy = error_from_failure(failure_from_error(PeerBusyError("x", retry_after_s=2.5, queue_position=3)), peer="P")
    assert isinstance(busy, PeerBusyError) and (busy.retry_after_s, busy.queue_position) == (2.5, 3)
    state = error_from_failure(failure_from_error(SessionStateError("x", epoch=4, positions=[5, 6])), peer="P")
    assert isinstance(state, SessionStateError) and (state.epoch, state.positions) == (4, (5, 6))


def test_a_peers_text_is_cut() -> None:
    """A hostile peer can not fill a user's terminal."""
    failure = failure_from_error(PeerFaultError("x" * 10_000))
    failure.message = "y" * 10_000
    assert len(str(error_from_failure(failure, peer="P"))) < 600


def test_a_peers_text_can_not_steer_a_terminal() -> None:
    """Escape sequences could hide what came before, or pretend to be the program."""
    failure = failure_from_error(PeerFaultError("x"))
    failure.message = "\x1b[2Jall is well\r\n\x07"
    shown = str(error_from_failure(failure, peer="P"))
    assert shown.isprintable()
    assert "all is well" in shown


def test_the_first_split_of_the_tree_is_complete() -> None:
    """Every error is either worth another server or final; nothing is in between."""
    leaves = [SwarmError]
    while leaves:
        error_type = leaves.pop()
        leaves.extend(error_type.__subclasses__())
        if error_type is not SwarmError:
            assert issubclass(error_type, RetryElsewhereError) != issubclass(error_type, FinalError)
