"""Bad input that shows only in a real process gets one clear sentence: what was seen, and what to do."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_processes import TinySwarm, run_swarm, running

NOBODY_GRPC = "grpc://127.0.0.1:1"
NOBODY_DHT = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWQyVQSypjeFkTZ4hbTHZN1ihdT4Q652id71Y3qQXspE27"


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_truncated_weight_file(tiny_model: Path, tmp_path: Path) -> None:
    """An interrupted copy must not be served half."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    done = run_swarm("serve", folder, "--new-swarm")
    assert done.exit_code == 2
    assert shard.name in done.sentence


def test_blocks_outside_the_model(tiny_model: Path) -> None:
    """The sentence says which blocks there are."""
    done = run_swarm("serve", tiny_model, "--new-swarm", "--host", "127.0.0.1", "--blocks", "4:9")
    assert done.exit_code == 2
    assert "4:9" in done.sentence
    assert "0:6" in done.sentence


@pytest.mark.parametrize(
    ("command", "address"), [("status", NOBODY_DHT), ("serve", NOBODY_DHT), ("generate", NOBODY_GRPC)]
)
def test_nobody_at_the_join_address(command: str, address: str, tiny_model: Path) -> None:
    """Said within seconds, with the address, whoever asks and whatever kind of address it is."""
    options = ["--prompt", "x"] if command == "generate" else []
    started_s = time.monotonic()
    done = run_swarm(command, tiny_model, "--join", address, *options)
    assert time.monotonic() - started_s < 45
    assert done.exit_code == 1
    assert "127.0.0.1" in done.sentence


def test_grpc_port_in_use(tiny_model: Path, taken_port: int) -> None:
    """The port is named, so that one can see who has it."""
    done = run_swarm("serve", tiny_model, "--new-swarm", "--host", "127.0.0.1", "--port", str(taken_port))
    assert done.exit_code == 1
    assert str(taken_port) in done.sentence


@pytest.mark.parametrize("command", ["bootstrap", "serve"])
def test_dht_port_in_use(command: str, tiny_model: Path, taken_port: int) -> None:
    """The same for the other port."""
    options = [tiny_model, "--new-swarm", "--dht-port"] if command == "serve" else ["--port"]
    done = run_swarm(command, *options, str(taken_port), "--host", "127.0.0.1")
    assert done.exit_code == 1
    assert str(taken_port) in done.sentence


def test_a_prompt_longer_than_the_context(tiny_swarm: TinySwarm) -> None:
    """Both lengths are named, and nothing is computed."""
    join = tiny_swarm.servers[0].grpc_address
    done = run_swarm("generate", tiny_swarm.model, "--join", join, "--prompt", "x" * 600, "--raw")
    assert done.exit_code == 2
    assert "600" in done.sentence
    assert "512" in done.sentence
    assert done.out == ""


def test_no_server_for_some_blocks(tiny_swarm: TinySwarm, tmp_path: Path) -> None:
    """The blocks are named, and the wait is as long as was said, not longer."""
    # A model of its own: with other weights it has nothing to do with the one that is fully served.
    folder = tmp_path / "other"
    shutil.copytree(tiny_swarm.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with running("serve", folder, "--join", tiny_swarm.address, "--blocks", "0:4", "--host", "127.0.0.1") as node:
        started_s = time.monotonic()
        options = ("--prompt", "x", "--wait-timeout", "3")
        done = run_swarm("generate", folder, "--join", node.grpc_address, *options)
        took_s = time.monotonic() - started_s
    assert done.exit_code == 1
    assert "blocks 4-5" in done.sentence
    assert "swarm serve" in done.sentence
    assert 3 <= took_s < 30


def test_identity_file_that_is_damaged(tiny_model: Path, tmp_path: Path) -> None:
    """A key is not replaced in silence: others know this peer by it."""
    path = tmp_path / "key"
    path.write_bytes(b"not a key")
    done = run_swarm("bootstrap", "--host", "127.0.0.1", "--identity", path)
    assert done.exit_code == 2
    assert str(path) in done.sentence
    assert path.read_bytes() == b"not a key"
