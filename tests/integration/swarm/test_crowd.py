"""Twice as many clients as fit: everybody is served in turn, and whoever gives up leaves no trace."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from swarm.client.blocks import SequenceInput
from swarm.client.connection import SwarmBlocks, SwarmSession
from swarm.errors import SwarmError
from tests.integration.conftest import TinyLlama
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until

NUM_CLIENTS = 20
PROMPT_TOKENS = 48
NEW_TOKENS = 16


def inputs(number: int) -> torch.Tensor:
    """[tokens, 32], another for each client."""
    return torch.randn(PROMPT_TOKENS + NEW_TOKENS, 32, generator=torch.Generator().manual_seed(number))


def decode(session: SwarmSession, hidden: torch.Tensor) -> torch.Tensor:
    """A prompt, then one token at a time; all outputs."""
    outputs = session.step([SequenceInput(sequence=0, parent=0, start=0, hidden=hidden[:PROMPT_TOKENS])])
    for position in range(PROMPT_TOKENS, hidden.shape[0]):
        rows = hidden[position : position + 1]
        outputs += session.step([SequenceInput(sequence=0, parent=0, start=position, hidden=rows)])
    return torch.cat(outputs)


def memory_for(num_sessions: int, swarm: InProcessSwarm) -> int:
    """KV memory of a server of three blocks that admits so many of our sessions, and not one more."""
    info = swarm.nodes[0].info
    tokens = num_sessions * (PROMPT_TOKENS + NEW_TOKENS)
    # Expectations may add up to 95 %, so a little more is needed, but less than for another session.
    return 2**24 // info.kv_tokens_total * int(tokens / 0.95 + 16)


@pytest.mark.timeout(180)
def test_twenty_clients_share_room_for_ten(llama: TinyLlama) -> None:
    """All finish with the right outputs, the rest wait with a place in the queue, and memory is free again."""
    with InProcessSwarm(llama.folder, [(0, 3)]) as measured:
        memory_bytes = memory_for(10, measured)
    with InProcessSwarm(llama.folder, [(0, 3), (3, 6)], kv_memory_bytes=memory_bytes) as swarm:
        outputs: dict[int, torch.Tensor] = {}
        errors: list[BaseException] = []
        places: set[int] = set()
        start = threading.Barrier(NUM_CLIENTS)

        def run(number: int, client: SwarmBlocks) -> None:
            try:
                start.wait()
                session = client.open_session(max_length=PROMPT_TOKENS + NEW_TOKENS)
                outputs[number] = decode(session, inputs(number))
                time.sleep(0.3)  # somebody reads the answer; the session still holds its memory
                session.close()
            except BaseException as error:
                errors.append(error)

        def watch() -> None:
            while len(outputs) + len(errors) < NUM_CLIENTS:
                places.add(max(node._sessions.num_waiting for node in swarm.nodes if node._sessions is not None))
                time.sleep(0.005)

        clients = [swarm.connect(request_timeout_s=100.0) for _ in range(NUM_CLIENTS)]
        threads = [threading.Thread(target=run, args=(number, client)) for number, client in enumerate(clients)]
        watcher = threading.Thread(target=watch)
        for thread in [*threads, watcher]:
            thread.start()
        for thread in [*threads, watcher]:
            thread.join(150)
        assert errors == []
        assert max(places) > 0, "nobody had to wait, so the test shows nothing"
        for number, output in outputs.items():
            (expected,) = llama.blocks.run_stateless([inputs(number)])
            assert (output - expected).abs().max() <= 1e-3 * expected.abs().max()
        wait_until(lambda: all(map(is_idle, swarm.nodes)))


def test_a_client_that_gives_up_waiting_leaves_nothing_behind(llama: TinyLlama) -> None:
    """Its place goes to the next, and no session or memory stays reserved for it."""
    with InProcessSwarm(llama.folder, [(0, 3)]) as measured:
        memory_bytes = memory_for(1, measured)
    with InProcessSwarm(llama.folder, [(0, 6)], kv_memory_bytes=2 * memory_bytes) as swarm:
        node = swarm.nodes[0]
        assert node._sessions is not None
        sessions = [swarm.connect().open_session(max_length=PROMPT_TOKENS + NEW_TOKENS) for _ in range(3)]
        first_rows = [SequenceInput(sequence=0, parent=0, start=0, hidden=inputs(0)[:PROMPT_TOKENS])]
        sessions[0].step(first_rows)

        def wait_in_vain() -> None:
            with pytest.raises(SwarmError):
                sessions[1].step(first_rows)

        impatient = threading.Thread(target=wait_in_vain)
        impatient.start()
        wait_until(lambda: node._sessions is not None and node._sessions.num_waiting == 1)
        sessions[1].close()
        impatient.join(20)
        wait_until(lambda: node._sessions is not None and node._sessions.num_waiting == 0)
        sessions[0].close()
        sessions[2].step(first_rows)
        sessions[2].close()
        wait_until(lambda: is_idle(node))
