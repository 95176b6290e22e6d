"""The yardstick: the demo model over one, two and three servers gives the tokens that transformers alone gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import swarm
from swarm.models import DEMO_MODEL, load_tokenizer, resolve_model
from tests.swarm_in_process import InProcessSwarm

SPANS = [(0, 30), (0, 12), (12, 30), (0, 7), (7, 19), (19, 30)]
ROUTES = {1: [0], 2: [1, 2], 3: [3, 4, 5]}
PROMPTS = [
    "Once upon a time there was a small robot who",
    "The capital of France is Paris. The capital of Italy is",
    "Hello",
    "A list of five fruits, in alphabetical order, each with its colour and its taste:",
]
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def local() -> Any:
    torch.set_num_threads(1)
    source = resolve_model(DEMO_MODEL)
    source.ensure_tensors()
    return AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = load_tokenizer(DEMO_MODEL)
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def servers() -> Iterator[InProcessSwarm]:
    with InProcessSwarm(DEMO_MODEL, SPANS) as servers:
        yield servers


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda hops: f"{hops}-hops")
def remote(request: pytest.FixtureRequest, servers: InProcessSwarm) -> Any:
    """The remote model over a route of so many hops, cut unevenly."""
    route = [servers.nodes[index].info.peer_id for index in ROUTES[request.param]]
    blocks = servers.connect(allowed_peers=route, request_timeout_s=100.0)
    return swarm.SwarmModelForCausalLM.from_blocks(servers.source, blocks)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """What the local model gave, kept: it is the same for every route."""
    return {}


def both(
    name: str, expected: dict[str, torch.Tensor], local: Any, remote: Any, *, seed: int = 0, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the local and the remote model."""
    if name not in expected:
        torch.manual_seed(seed)
        expected[name] = local.generate(**arguments)
    torch.manual_seed(seed)
    return expected[name], remote.generate(**arguments)


@pytest.mark.timeout(400)
def test_greedy_decoding(local: Any, remote: Any, tokenizer: Any, expected: dict[str, torch.Tensor]) -> None:
    """200 tokens: an error anywhere would soon lead elsewhere."""
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    left, right = both(
        "greedy", expected, local, remote, **inputs, max_new_tokens=200, min_new_tokens=200, do_sample=False
    )
    assert left.shape[1] == inputs["input_ids"].shape[1] + 200
    assert torch.equal(left, right)


@pytest.mark.timeout(400)
def test_seeded_sampling(local: Any, remote: Any, tokenizer: Any, expected: dict[str, torch.Tensor]) -> None:
    """Temperature, top-k, top-p and repetition penalty see the same logits and the same history."""
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    left, right = both("sampling", expected, local, remote, seed=7, **inputs, max_new_tokens=60, **SAMPLING)
    assert torch.equal(left, right)


@pytest.mark.timeout(400)
def test_a_padded_batch(local: Any, remote: Any, tokenizer: Any, expected: dict[str, torch.Tensor]) -> None:
    """Four lengths in one call; only real tokens travel, so each row is what it would be alone."""
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert len(set(inputs["attention_mask"].sum(dim=1).tolist())) == 4
    left, right = both("batch", expected, local, remote, **inputs, max_new_tokens=32, do_sample=False)
    assert torch.equal(left, right)
    sampled_left, sampled_right = both(
        "sampled batch", expected, local, remote, seed=3, **inputs, max_new_tokens=16, **SAMPLING
    )
    assert torch.equal(sampled_left, sampled_right)


@pytest.mark.timeout(400)
def test_beams(local: Any, remote: Any, tokenizer: Any, expected: dict[str, torch.Tensor]) -> None:
    """Five beams fork and swap on the servers."""
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    left, right = both("beams", expected, local, remote, **inputs, max_new_tokens=24, num_beams=5, do_sample=False)
    assert torch.equal(left, right)


def test_logits_whichever_way_the_tokens_come(local: Any, remote: Any, tokenizer: Any) -> None:
    """At once, in chunks, or one by one: the same logits, within 1e-3 of the local model's."""
    ids = tokenizer(PROMPTS[3], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        reference = local(ids).logits
        assert (remote(ids).logits - reference).abs().max() <= 1e-3
        for sizes in ([1] * ids.shape[1], [5, 1, ids.shape[1] - 6], [ids.shape[1]]):
            with remote.session(max_length=64) as session:
                logits = [remote(part, past_key_values=session.cache).logits for part in ids.split(sizes, dim=1)]
            assert (torch.cat(logits, dim=1) - reference).abs().max() <= 1e-3
