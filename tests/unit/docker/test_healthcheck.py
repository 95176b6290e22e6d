"""The container's health check, which decides when the servers and the client of a compose file may start."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

HEALTHCHECK = Path(__file__).parents[3] / "docker" / "healthcheck"


def check(ready_file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HEALTHCHECK)],
        env={"SWARM_READY_FILE": str(ready_file)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_command_that_is_no_node_is_healthy(tmp_path: Path) -> None:
    """`docker run IMAGE generate ...` must not be reported as sick: it never becomes ready."""
    assert check(tmp_path / "missing.json").returncode == 0


def test_a_node_is_unhealthy_until_it_says_that_it_is_ready(tmp_path: Path) -> None:
    """The ready file exists, empty, from the start; taking it for readiness would start clients too early."""
    ready_file = tmp_path / "ready.json"
    ready_file.write_text("")
    result = check(ready_file)
    assert result.returncode == 1
    assert result.stderr.startswith("not ready")


def test_a_ready_node_is_healthy_only_while_its_port_answers(tmp_path: Path) -> None:
    """Both kinds of address are understood, and a node that has died after it was ready is noticed."""
    ready_file = tmp_path / "ready.json"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        bootstrap = {"address": f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooW", "peer_id": "12D3KooW"}
        server = {"address": "/ip4/127.0.0.1/tcp/1/p2p/12D3KooW", "grpc_address": f"grpc://127.0.0.1:{port}"}
        for ready in (bootstrap, server):
            ready_file.write_text(json.dumps(ready))
            assert check(ready_file).returncode == 0
    assert check(ready_file).returncode == 1
