"""--adapter on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.cli.options import parse_adapters
from swarm.errors import BadInputError
from swarm.server.node_config import NodeConfig


def test_names_and_folders() -> None:
    """A folder's own name may hold an equals sign; an adapter's may not."""
    assert parse_adapters(["poet=./a", "coder=/x/b=c"]) == {"poet": Path("./a"), "coder": Path("/x/b=c")}
    assert parse_adapters([]) == {}


@pytest.mark.parametrize("text", ["poet", "=./a", "poet=", ""])
def test_without_name_or_folder(text: str) -> None:
    """The sentence shows the form."""
    with pytest.raises(BadInputError, match="NAME=FOLDER"):
        parse_adapters([text])


def test_a_name_given_twice() -> None:
    """The second would silently win."""
    with pytest.raises(BadInputError, match="poet is given twice"):
        parse_adapters(["poet=./a", "poet=./b"])


def test_too_many() -> None:
    """More than fit an announcement would make the server invisible."""
    with pytest.raises(BadInputError, match="16 are the most"):
        NodeConfig(adapters={f"a{number}": Path() for number in range(17)})
