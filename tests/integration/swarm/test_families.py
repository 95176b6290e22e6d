"""Every supported family over three unevenly cut servers and a real network: the tokens of the local model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.client.remote_model import SwarmModelForCausalLM
from tests.model_pair import GREEDY, padded_batch, prompt
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tiny_models import FAMILIES, save_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_over_three_hops(family: str, tmp_path: Path) -> None:
    """Windows, experts, sinks, alibi, latent caches: whatever a family does stays within its server's span."""
    torch.set_num_threads(1)
    local: Any = save_tiny_model(family, tmp_path / family)
    with InProcessSwarm(tmp_path / family, [(0, 1), (1, 4), (4, 6)]) as swarm:
        remote: Any = SwarmModelForCausalLM.from_blocks(swarm.source, swarm.connect(max_step_tokens=7))
        ids, mask = padded_batch()
        settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY}
        with torch.no_grad():
            assert (remote(prompt()).logits - local(prompt()).logits).abs().max() < 1e-3
        assert torch.equal(remote.generate(prompt(30), **settings), local.generate(prompt(30), **settings))
        assert torch.equal(
            remote.generate(ids, attention_mask=mask, **settings), local.generate(ids, attention_mask=mask, **settings)
        )
        beams = {**settings, "max_new_tokens": 6, "num_beams": 3}
        assert torch.equal(remote.generate(prompt(), **beams), local.generate(prompt(), **beams))
        wait_until(lambda: all(map(is_idle, swarm.nodes)))
