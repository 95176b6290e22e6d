"""The conformance table names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_REFERENCES = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (_ROOT / "docs" / "conformance.md").read_text())


def test_every_behaviour_has_a_row() -> None:
    """A row that is lost is a promise that nobody looks after."""
    rows = re.findall(r"^\| (C\d\d) \|", (_ROOT / "docs" / "conformance.md").read_text(), re.MULTILINE)
    assert rows == [f"C{number:02}" for number in range(1, 41)]


@pytest.mark.parametrize(("file", "name"), sorted(set(_REFERENCES)))
def test_what_is_named_exists(file: str, name: str) -> None:
    """Tests are renamed; a table that points nowhere shows nothing."""
    text = (_ROOT / file).read_text()
    assert not name or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file} has no {name}"
