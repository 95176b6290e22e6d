"""What of logs and warnings reaches the terminal."""

from __future__ import annotations

import logging
import warnings

import pytest

from swarm.cli.quietness import prepare_process


def test_libraries_are_silent_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings of libraries are for us, and frighten people who only want an answer."""
    prepare_process(0)
    logging.getLogger("urllib3").error("noise")
    logging.getLogger("transformers.generation").warning("noise")
    warnings.warn("noise", stacklevel=1)
    logging.getLogger("swarm.client").warning("recovered by itself")
    assert capsys.readouterr().err == ""


def test_our_own_warnings_show_where_somebody_operates_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    """An operator should hear that announcing fails; in one line, without a traceback."""
    prepare_process(0, swarm_level=logging.WARNING)
    try:
        raise OSError("wire cut")
    except OSError:
        logging.getLogger("swarm.server").exception("could not announce to %d peers", 3)
    shown = capsys.readouterr().err
    assert "could not announce to 3 peers (OSError: wire cut)" in shown
    assert "Traceback" not in shown


def test_verbose_shows_what_happens(capsys: pytest.CaptureFixture[str]) -> None:
    """-v is for finding out why; -vv for everything."""
    prepare_process(1)
    logging.getLogger("swarm.client").info("looking for a route")
    logging.getLogger("urllib3").warning("a library's warning")
    logging.getLogger("urllib3").info("a library's detail")
    shown = capsys.readouterr().err
    assert "looking for a route" in shown
    assert "a library's warning" in shown
    assert "a library's detail" not in shown
    prepare_process(2)
    logging.getLogger("urllib3").info("a library's detail")
    assert capsys.readouterr().err.count("a library's detail") == 1
