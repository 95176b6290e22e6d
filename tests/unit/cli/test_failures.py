"""What errors mean to people: exit codes and sentences."""

from __future__ import annotations

import pytest

from swarm.cli.failures import exit_code_for, sentence_for
from swarm.errors import (
    AddressInUseError,
    BadInputError,
    DownloadError,
    JoinError,
    LengthLimitError,
    ModelNotFoundError,
    NoRouteError,
    PeerLostError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInputError("x"), 2),
        (ModelNotFoundError("x"), 2),
        (LengthLimitError("x"), 2),
        (JoinError("x"), 1),
        (NoRouteError("x"), 1),
        (AddressInUseError("x"), 1),
        (DownloadError("x"), 1),
        (PeerLostError("x"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyError("x"), 1),
    ],
)
def test_exit_code_tells_usage_from_failure(error: Exception, code: int) -> None:
    """Scripts repeat what failed (1), and stop at what can never work as asked (2)."""
    assert exit_code_for(error) == code


def test_our_errors_speak_for_themselves() -> None:
    """Their messages already are sentences; line breaks would make them look like several errors."""
    assert sentence_for(JoinError("nobody answers\n  at x; check it")) == "nobody answers at x; check it"


def test_system_errors_name_the_file() -> None:
    """`Permission denied` alone helps nobody."""
    assert sentence_for(PermissionError(13, "Permission denied", "/x/y")) == "/x/y: Permission denied"


def test_a_missing_package_says_what_to_install() -> None:
    """Extras are optional, so this happens to people who did nothing wrong."""
    said = sentence_for(ModuleNotFoundError("No module named 'psutil'", name="psutil"))
    assert "psutil" in said
    assert "pip install 'swarm-inference[server]'" in said
