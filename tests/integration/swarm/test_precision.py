"""Servers in few bits, and clients that demand more of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from swarm.errors import BadInputError, NoRouteError
from swarm.models.block_sizes import measure_model_shape
from swarm.server import planning
from swarm.server.capacity_plan import STEP_TOKENS, DeviceMemory
from swarm.weights import parse_precision
from tests.integration.conftest import TinyLlama
from tests.swarm_in_process import InProcessSwarm


def run(swarm: InProcessSwarm, hidden: torch.Tensor, **config: Any) -> torch.Tensor:
    """All blocks over one sequence."""
    (output,) = swarm.connect(**config).run_stateless([hidden])
    return output


def test_weights_are_announced_and_can_be_demanded(llama: TinyLlama) -> None:
    """A route never falls below what its client asked for, and says what is missing when nobody is so precise."""
    torch.manual_seed(0)
    hidden = torch.randn(5, llama.local.config.hidden_size)
    with InProcessSwarm(llama.folder, []) as swarm:
        swarm.add_server(0, 6, weights="nf4")
        assert [node.info.weights for node in swarm.nodes] == ["nf4"]
        coarse = run(swarm, hidden)
        with pytest.raises(NoRouteError, match=r"in int8 or more precisely .*--weights int8"):
            run(swarm, hidden, precision="int8", no_route_wait_s=0.1)
        swarm.add_server(0, 6, weights="fp32")
        exact = run(swarm, hidden, precision="bf16")
        torch.testing.assert_close(exact, run(swarm, hidden, precision="fp32"))
        scale = exact.abs().max()
        assert 0 < (coarse - exact).abs().max() / scale < 0.5


def test_an_unknown_precision_is_named(llama: TinyLlama) -> None:
    """A typing mistake must not look like a swarm without servers."""
    with InProcessSwarm(llama.folder, [(0, 6)]) as swarm, pytest.raises(BadInputError, match="there are fp32"):
        swarm.connect(precision="fp23")


@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_blocks_beyond_the_memory_stream_in(llama: TinyLlama, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """A machine that is too small is slow, and answers the same; without --offload it says what would help."""
    torch.manual_seed(2)
    hidden = torch.randn(7, llama.local.config.hidden_size)
    with InProcessSwarm(llama.folder, [(0, 6)], weights=weights) as swarm:
        expected = run(swarm, hidden)
    config: dict[str, Any] = {"weights": weights, "kv_memory_bytes": 2**20}
    with InProcessSwarm(llama.folder, [], **config) as swarm:
        sizes = measure_model_shape(swarm.source.config).sizes(parse_precision(weights), "cpu")
        needed = 2**20 + sizes.step_bytes(STEP_TOKENS)
        usable = needed + 4 * sizes.largest_bytes
        memory = DeviceMemory(name="a small machine", free_bytes=2 * usable, total_bytes=2 * usable, is_host=True)
        monkeypatch.setattr(planning, "measure_device_memory", lambda device: memory)
        with pytest.raises(BadInputError, match=r"a small machine.*--offload"):
            swarm.add_server(0, 6)
        node = swarm.add_server(0, 6, offload=True)
        assert "stream" in node.plan
        torch.testing.assert_close(run(swarm, hidden), expected, rtol=0, atol=0)
        swarm.run(node.leave())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("swarm-offload")]
