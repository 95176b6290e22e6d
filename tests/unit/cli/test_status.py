"""What `swarm status` reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from swarm.cli.app import run
from swarm.datatypes import ModelHash, PeerId, ServerInfo, ServerState, Span

NUM_BLOCKS = 6


@dataclass(frozen=True)
class Source:
    """As much of a ModelSource as status reads."""

    model_hash = ModelHash("ab" * 32)
    num_blocks = NUM_BLOCKS


def make_server(peer: str, start: int, end: int, state: ServerState = ServerState.ONLINE) -> ServerInfo:
    return ServerInfo(
        peer_id=PeerId(peer),
        model_hash=Source.model_hash,
        model_name="m",
        num_blocks=NUM_BLOCKS,
        span=Span(start=start, end=end),
        state=state,
        weights="fp32",
        kv_policy="none",
        kv_tokens_free=900,
        kv_tokens_total=1000,
        num_sessions=2,
        tokens_per_s=12.5,
        addresses=["10.0.0.1:31331"],
        version="0.1.0",
    )


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[ServerInfo]:
    """What the swarm answers; fill it."""
    found: list[ServerInfo] = []

    async def look_up(join: Any, model_hash: ModelHash, num_blocks: int) -> list[ServerInfo]:
        assert (list(join), model_hash, num_blocks) == (["grpc://h:1"], Source.model_hash, NUM_BLOCKS)
        return found

    monkeypatch.setattr("swarm.cli.status.look_up", look_up)
    monkeypatch.setattr("swarm.models.resolve_model", lambda name, report: Source(), raising=False)
    return found


def test_json_has_the_promised_shape(servers: list[ServerInfo], capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts read this; its keys are promised to users. Only online servers cover blocks, all are listed."""
    servers += [make_server("a", 0, 4), make_server("b", 2, 6), make_server("c", 0, 2, ServerState.DRAINING)]
    assert run(["status", "m", "--join", "grpc://h:1", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["model"] == "m"
    assert status["num_blocks"] == NUM_BLOCKS
    assert status["coverage"] == [1, 1, 2, 2, 1, 1]
    assert [server["state"] for server in status["servers"]] == ["online", "online", "draining"]
    assert status["servers"][0] == {
        "peer_id": "a",
        "start": 0,
        "end": 4,
        "state": "online",
        "weights": "fp32",
        "kv_policy": "none",
        "kv_tokens_free": 900,
        "kv_tokens_total": 1000,
        "num_sessions": 2,
        "tokens_per_s": 12.5,
        "addresses": ["10.0.0.1:31331"],
        "version": "0.1.0",
        "adapters": [],
        "moving_to": None,
    }


def test_a_server_about_to_move_is_shown(servers: list[ServerInfo], capsys: pytest.CaptureFixture[str]) -> None:
    """An operator who sees blocks lose a server must see where it goes."""
    servers += [replace(make_server("a", 0, 4), moving_to=Span(start=2, end=6)), make_server("b", 0, 6)]
    assert run(["status", "m", "--join", "grpc://h:1", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [server["moving_to"] for server in status["servers"]] == [{"start": 2, "end": 6}, None]
    assert run(["status", "m", "--join", "grpc://h:1"]) == 0
    assert "0:4 → 2:6" in capsys.readouterr().out


def test_table_names_what_is_missing(servers: list[ServerInfo], capsys: pytest.CaptureFixture[str]) -> None:
    """The one thing an operator must see: which blocks keep the swarm from answering."""
    servers += [make_server("peer-of-a", 0, 2), make_server("peer-of-c", 0, 1, ServerState.JOINING)]
    assert run(["status", "m", "--join", "grpc://h:1"]) == 0
    shown = capsys.readouterr().out
    assert "11····" in shown
    assert "nobody serves blocks 2-5" in shown
    assert "joining" in shown
    assert "10.0.0.1:31331" in shown


def test_an_empty_swarm_is_an_answer(servers: list[ServerInfo], capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody there yet is a state to show, not an error."""
    assert run(["status", "m", "--join", "grpc://h:1"]) == 0
    assert "nobody serves blocks 0-5" in capsys.readouterr().out
