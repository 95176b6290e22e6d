"""A server's life as its operator and its users see it: ready, found, asked, drained, gone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli_processes import SWARM, Node, TinySwarm, run_swarm, running

PROMPT = "What is a swarm?"


@pytest.fixture(params=["dht", "grpc"])
def join(request: pytest.FixtureRequest, tiny_swarm: TinySwarm) -> str:
    """Both kinds of address."""
    return tiny_swarm.address if request.param == "dht" else tiny_swarm.servers[1].grpc_address


def test_ready_object_has_the_promised_keys(tiny_swarm: TinySwarm) -> None:
    """Scripts and containers read it to learn where to join."""
    first, second = (server.ready for server in tiny_swarm.servers)
    assert set(first) >= {
        "address",
        "peer_id",
        "model",
        "start",
        "end",
        "weights",
        "kv_policy",
        "kv_tokens_total",
        "grpc_address",
        "why",
    }
    assert (first["start"], first["end"], second["start"], second["end"]) == (0, 2, 2, 6)
    assert first["weights"] == "fp32"
    assert first["kv_tokens_total"] > 1000
    for ready in (first, second):
        assert re.fullmatch(r"/ip4/127\.0\.0\.1/tcp/\d+/p2p/" + str(ready["peer_id"]), str(ready["address"]))
        assert re.fullmatch(r"grpc://127\.0\.0\.1:\d+", str(ready["grpc_address"]))


def test_status_shows_every_server(tiny_swarm: TinySwarm, join: str) -> None:
    """The same picture, through the DHT and through any server."""
    status = run_swarm("status", tiny_swarm.model, "--join", join, "--json").json
    assert status["num_blocks"] == 6
    assert status["coverage"] == [1] * 6
    assert [(server["start"], server["end"], server["state"]) for server in status["servers"]] == [
        (0, 2, "online"),
        (2, 6, "online"),
    ]
    assert {server["peer_id"] for server in status["servers"]} == {node.ready["peer_id"] for node in tiny_swarm.servers}
    assert all(server["tokens_per_s"] > 0 and server["addresses"] for server in status["servers"])


def test_generate_gives_the_local_models_tokens(tiny_swarm: TinySwarm, join: str) -> None:
    """The whole point: a swarm answers as the model does, through either kind of address."""
    options = ("--prompt", PROMPT, "--max-new-tokens", "20", "--json")
    result = run_swarm("generate", tiny_swarm.model, "--join", join, *options).json
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_swarm.model, dtype=torch.float32)
    prompt_ids = torch.tensor([result["prompt_token_ids"]])
    expected = model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=20, do_sample=False
    )
    assert result["token_ids"] == expected[0, prompt_ids.shape[1] :].tolist()
    assert result["num_new_tokens"] == len(result["token_ids"])
    assert [(hop["start"], hop["end"]) for hop in result["route"]] == [(0, 2), (2, 6)]
    assert [hop["peer_id"] for hop in result["route"]] == [node.ready["peer_id"] for node in tiny_swarm.servers]
    assert result["failovers"] == 0
    assert result["seconds_to_first_token"] > 0
    assert result["tokens_per_s"] > 0


def test_generate_streams_only_the_answer_to_standard_output(tiny_swarm: TinySwarm) -> None:
    """So that it can be piped on; what is for people goes to the other stream, and libraries stay silent."""
    join = tiny_swarm.servers[0].grpc_address
    options = ("generate", tiny_swarm.model, "--join", join, "--prompt", PROMPT, "--max-new-tokens", "20")
    plain, as_json = run_swarm(*options), run_swarm(*options, "--json")
    assert plain.exit_code == 0
    assert plain.out == as_json.json["text"] + "\n"
    assert "tokens/s" in plain.err
    assert plain.err.count("\n") == 1
    assert as_json.err == ""


def test_chat_takes_lines_from_a_pipe(tiny_swarm: TinySwarm) -> None:
    """One session over several messages, and the end of the input ends the chat."""
    join = tiny_swarm.servers[0].grpc_address
    done = run_swarm(
        "chat", tiny_swarm.model, "--join", join, "--max-new-tokens", "10", stdin="Hello\n\n/reset\nHello\n/quit\nx\n"
    )
    assert done.exit_code == 0, done.err
    first, second = done.out.splitlines()
    assert first == second != ""


def test_doctor_reaches_a_server(tiny_swarm: TinySwarm) -> None:
    """The same answer as `nobody there` would be useless: it says who answers, how fast, and what is covered."""
    join = tiny_swarm.servers[0].grpc_address
    report = run_swarm("doctor", "--join", join, "--model", tiny_swarm.model, "--json").json
    seen = {check["subject"]: check for check in report["checks"]}
    assert seen["swarm"]["verdict"] == "ok"
    assert "blocks 0:2 of 6" in seen["swarm"]["seen"]
    assert "2 servers" in seen["coverage"]["seen"]
    assert seen["model"]["verdict"] == "ok"


def test_sigterm_drains_and_leaves_nothing_behind(tiny_model: Path) -> None:
    """Service managers stop servers this way, and take any other exit code for a crash."""
    with running("serve", tiny_model, "--new-swarm", "--host", "127.0.0.1") as node:
        assert len(node.family) > 1  # the DHT's daemon is a process of its own
        done = node.end(signal.SIGTERM)
        assert done.exit_code == 0, done.err
        *progress, last = done.err.splitlines()  # on a busy machine loading takes long enough to be told
        assert last == "Leaving."
        assert all(line.endswith("...") for line in progress)
        assert node.survivors() == []


def test_a_server_that_left_is_no_longer_online(tiny_swarm: TinySwarm) -> None:
    """Clients must not be sent to it."""
    join = tiny_swarm.address
    with running("serve", tiny_swarm.model, "--join", join, "--blocks", "1:3", "--host", "127.0.0.1") as node:
        grpc = tiny_swarm.servers[0].grpc_address
        before = run_swarm("status", tiny_swarm.model, "--join", grpc, "--json").json
        assert before["coverage"] == [1, 2, 2, 1, 1, 1]
        assert node.end(signal.SIGTERM).exit_code == 0
        after = run_swarm("status", tiny_swarm.model, "--join", grpc, "--json").json
    assert after["coverage"] == [1] * 6


@pytest.mark.timeout(300)
def test_servers_started_at_once_share_the_blocks_and_one_fills_a_gap(tiny_model: Path) -> None:
    """A swarm that nobody plans: started together over a real DHT, one vanishes, and a spare one takes its place."""
    quick = ("--host", "127.0.0.1", "--num-blocks", "3", "--rebalance-period", "10")
    with running("bootstrap", "--host", "127.0.0.1") as entry, contextlib.ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(Node, "serve", tiny_model, "--join", entry.address, *quick) for _ in range(3)]
            nodes = [start.result() for start in starts]
        for node in nodes:
            stack.callback(node.close)
        spans = [(node.ready["start"], node.ready["end"]) for node in nodes]
        assert sorted(set(spans)) == [(0, 3), (3, 6)]
        alone = next(index for index, span in enumerate(spans) if spans.count(span) == 1)
        nodes[alone].process.kill()
        join = nodes[alone - 1].grpc_address
        deadline_s = time.monotonic() + 120
        while run_swarm("status", tiny_model, "--join", join, "--json").json["coverage"] != [1] * 6:
            assert time.monotonic() < deadline_s
        ended = [node.end(signal.SIGTERM) for index, node in enumerate(nodes) if index != alone]
        assert sorted(done.exit_code for done in ended) == [0, 0]
        assert "".join(done.err for done in ended).count("Moved from blocks") == 1


def test_the_announced_port_may_be_another(tiny_model: Path) -> None:
    """Behind a port forward others must be told the outer port; the server itself can not know it."""
    options = ("--new-swarm", "--host", "127.0.0.1", "--announce-host", "swarm.example", "--announce-port", "4321")
    with running("serve", tiny_model, *options) as node:
        assert node.grpc_address == "grpc://swarm.example:4321"
        assert node.end(signal.SIGTERM).exit_code == 0


def test_drain_lets_a_session_finish(tiny_model: Path) -> None:
    """The first signal waits for whoever is being served, and says so; a second one does not."""
    with running("serve", tiny_model, "--new-swarm", "--host", "127.0.0.1") as node:
        chat = subprocess.Popen(
            [*SWARM, "chat", str(tiny_model), "--join", node.grpc_address, "--max-new-tokens", "10"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert chat.stdin is not None
            assert chat.stdout is not None
            chat.stdin.write("Hello\n")
            chat.stdin.flush()
            assert chat.stdout.readline() != ""
            node.process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            assert node.process.poll() is None
            chat.stdin.write("Go on\n")
            chat.stdin.flush()
            assert chat.stdout.readline() != ""
            assert chat.communicate(timeout=30)[1] == ""
            assert chat.returncode == 0
            _, err = node.process.communicate(timeout=30)
        finally:
            chat.kill()
            chat.wait()
        assert node.process.returncode == 0
        assert "for 1 open ones; interrupt again" in err
        assert node.survivors() == []


def test_a_second_signal_leaves_at_once(tiny_model: Path) -> None:
    """Even with a session open."""
    with running("serve", tiny_model, "--new-swarm", "--host", "127.0.0.1") as node:
        chat = subprocess.Popen(
            [*SWARM, "chat", str(tiny_model), "--join", node.grpc_address, "--max-new-tokens", "5"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert chat.stdin is not None
            assert chat.stdout is not None
            chat.stdin.write("Hello\n")
            chat.stdin.flush()
            assert chat.stdout.readline() != ""
            node.process.send_signal(signal.SIGINT)
            time.sleep(1.0)
            assert node.process.poll() is None
            done = node.end(signal.SIGINT, timeout_s=15)
        finally:
            chat.kill()
            chat.communicate()
        assert done.exit_code == 130
        assert node.survivors() == []


def test_bootstrap_keeps_its_address_over_restarts(tmp_path: Path) -> None:
    """What is written down in other machines' start scripts must stay true."""
    options = ("bootstrap", "--host", "127.0.0.1", "--identity", tmp_path / "key")
    with running(*options) as node:
        first = node.ready["peer_id"]
        port = node.address.split("/")[4]
        assert node.end(signal.SIGTERM).exit_code == 0
    with running(*options, "--port", port) as node:
        assert node.ready["peer_id"] == first
        assert node.address == f"/ip4/127.0.0.1/tcp/{port}/p2p/{first}"


def test_nodes_end_with_their_parent() -> None:
    """However a demo ends, even by SIGKILL, its servers must not stay behind and eat the machine."""
    program = (
        "import json, sys, time\n"
        "from swarm.cli.node_process import NodeProcess\n"
        "node = NodeProcess('entry point', ['bootstrap', '--host', '127.0.0.1'], num_threads=1)\n"
        "node.ready(deadline_s=time.monotonic() + 60)\n"
        "print(node.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    node = psutil.Process(int(parent.stdout.readline()))
    family = [node, *node.children(recursive=True)]
    assert len(family) > 1
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    assert psutil.wait_procs(family, timeout=20)[1] == []
