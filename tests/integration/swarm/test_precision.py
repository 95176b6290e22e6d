"""Servers in few bits, and clients that demand more of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.errors import BadInputError, NoRouteError
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


def test_sessions_go_on_where_servers_stream_their_weights(llama: TinyLlama) -> None:
    """What does not fit is slow, not different."""
    torch.manual_seed(1)
    hidden = torch.randn(7, llama.local.config.hidden_size)
    with InProcessSwarm(llama.folder, [(0, 6)]) as swarm:
        expected = run(swarm, hidden)
    with InProcessSwarm(llama.folder, [], weights="fp32") as swarm:
        node = swarm.add_server(0, 6, offload=True)
        assert "6 of 6 blocks" in node.plan
        torch.testing.assert_close(run(swarm, hidden), expected)
