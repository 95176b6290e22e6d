"""A client that is killed leaves no session and no KV memory behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swarm.server.rpc.sessions import SessionLimits
from tests.integration.conftest import TinyLlama
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

CLIENT = """
import sys, time, torch
from swarm.client.blocks import SequenceInput
from swarm.client.connection import connect
address, model_hash = sys.argv[1:]
client = connect(model_hash=model_hash, model_name="tiny", num_blocks=6, initial_peers=[address])
session = client.open_session(max_length=64)
session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=torch.randn(40, 32))])
print("holding", flush=True)
time.sleep(600)
"""


@pytest.mark.timeout(120)
def test_memory_of_a_killed_client_is_free_again_after_the_grace(llama: TinyLlama) -> None:
    """SIGKILL says no goodbye: the servers must find out by themselves, and free exactly what was used."""
    with InProcessSwarm(llama.folder, [(0, 2), (2, 6)], limits=SessionLimits(detach_grace_s=0.5)) as swarm:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, swarm.address, swarm.source.model_hash],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        try:
            assert client.stdout is not None
            assert client.stdout.readline().strip() == "holding"
            for node in swarm.nodes:
                assert node.info.num_sessions == 1
                # 40 tokens take three pages of 16.
                assert node.info.kv_tokens_total - node.info.kv_tokens_free == 48
        finally:
            client.kill()
            client.wait(10)
            if client.stdout is not None:
                client.stdout.close()
        wait_until(lambda: all(map(is_idle, swarm.nodes)))
