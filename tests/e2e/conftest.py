"""One small swarm of real processes, which most tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_processes import TinySwarm, running
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny chat model of six blocks and a context of 512 tokens."""
    folder = tmp_path_factory.mktemp("e2e") / "tiny"
    save_tiny_model("llama", folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_swarm(tiny_model: Path) -> Iterator[TinySwarm]:
    """The swarm that tests share which end none of its servers."""
    with running("bootstrap", "--host", "127.0.0.1") as entry, contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                running("serve", tiny_model, "--join", entry.address, "--blocks", blocks, "--host", "127.0.0.1")
            )
            for blocks in ("0:2", "2:6")
        ]
        yield TinySwarm(model=tiny_model, address=entry.address, servers=tuple(servers))
