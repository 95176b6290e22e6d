"""Gradients through remote blocks: those of the local model, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.errors import NoRouteError
from tests.model_pair import padded_batch, prompt
from tests.swarm_in_process import InProcessSwarm, is_idle, wait_until
from tests.tampering_server import TamperingServer, let_one_die

if TYPE_CHECKING:
    from tests.integration.conftest import TinyLlama

SPANS = [(0, 1), (1, 4), (4, 6)]


@pytest.fixture(scope="module")
def swarm(llama: TinyLlama) -> Iterator[InProcessSwarm]:
    with InProcessSwarm(llama.folder, SPANS) as swarm:
        yield swarm
        assert all(map(is_idle, swarm.nodes)), "stateless runs leave nothing behind"


@pytest.fixture
def doors(llama: TinyLlama) -> Iterator[list[TamperingServer]]:
    """Three hops that can be killed."""
    with InProcessSwarm(llama.folder, []) as swarm:
        yield [TamperingServer.of_span(swarm, start, end) for start, end in SPANS]


def remote_model(swarm: InProcessSwarm, **options: Any) -> Any:
    return SwarmModelForCausalLM.from_blocks(swarm.source, swarm.connect(**options))


def embed(llama: TinyLlama, ids: torch.Tensor) -> torch.Tensor:
    embeddings: torch.Tensor = llama.local.get_input_embeddings()(ids).detach().requires_grad_()
    return embeddings


def local_gradient(llama: TinyLlama, ids: torch.Tensor, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    embeddings = embed(llama, ids)
    llama.local(inputs_embeds=embeddings, labels=labels, **inputs).loss.backward()
    assert embeddings.grad is not None
    return embeddings.grad


def assert_same_gradient(found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gradients_over_three_hops(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Fine-tuning by prompts and heads needs nothing else from the blocks."""
    ids = prompt(24)
    model, embeddings = remote_model(swarm), embed(llama, ids)
    output = model(inputs_embeds=embeddings, labels=ids)
    output.loss.backward()
    local = llama.local(ids, labels=ids)
    assert (output.logits - local.logits).abs().max() < 1e-3
    assert (output.loss - local.loss).abs() < 1e-4
    assert_same_gradient(embeddings.grad, local_gradient(llama, ids, ids))


def test_gradients_of_a_padded_batch(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Sequences of several lengths travel together, and padding has no gradient."""
    ids, mask = padded_batch()
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model, embeddings = remote_model(swarm), embed(llama, ids)
    model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
    expected = local_gradient(llama, ids, labels, attention_mask=mask, position_ids=positions)
    assert embeddings.grad is not None
    assert_same_gradient(embeddings.grad[mask != 0], expected[mask != 0])
    assert not embeddings.grad[mask == 0].any()


def test_gradients_add_up_over_several_passes(llama: TinyLlama, swarm: InProcessSwarm) -> None:
    """Two forward passes may be under way before either goes back, as in gradient accumulation."""
    batches = [prompt(12, seed=1), prompt(20, seed=2)]
    model = remote_model(swarm)
    embeddings = [embed(llama, ids) for ids in batches]
    losses = [model(inputs_embeds=given, labels=ids).loss for given, ids in zip(embeddings, batches, strict=True)]
    torch.stack(losses).sum().backward()
    for given, ids in zip(embeddings, batches, strict=True):
        assert_same_gradient(given.grad, local_gradient(llama, ids, ids))


@pytest.mark.parametrize("index", range(3))
def test_backward_is_repeated_on_another_server(llama: TinyLlama, doors: list[TamperingServer], index: int) -> None:
    """A server that dies between forward and backward costs a retry and changes no gradient."""
    ids = prompt(16)
    model, embeddings = remote_model(doors[0].swarm), embed(llama, ids)
    loss = model(inputs_embeds=embeddings, labels=ids).loss
    doors[index].die()
    replacement = doors[0].swarm.add_server(*SPANS[index])
    loss.backward()
    assert_same_gradient(embeddings.grad, local_gradient(llama, ids, ids))
    wait_until(lambda: is_idle(replacement))


def test_backward_is_repeated_on_two_smaller_servers(llama: TinyLlama, doors: list[TamperingServer]) -> None:
    """They have not seen the forward pass, so what lies between them is computed again."""
    ids = prompt(16)
    model, embeddings = remote_model(doors[0].swarm), embed(llama, ids)
    loss = model(inputs_embeds=embeddings, labels=ids).loss
    doors[1].die()
    for start, end in [(1, 2), (2, 4)]:
        doors[0].swarm.add_server(start, end)
    loss.backward()
    assert_same_gradient(embeddings.grad, local_gradient(llama, ids, ids))


def test_forward_is_repeated_from_where_it_was_lost(llama: TinyLlama, doors: list[TamperingServer]) -> None:
    """What the hops before the lost one have done is kept."""
    let_one_die(1, doors[1], TamperingServer.of_span(doors[0].swarm, *SPANS[1]))
    num_forwards = 0

    def count(method: str, body: bytes) -> bytes:
        nonlocal num_forwards
        num_forwards += method == "Forward"
        return body

    doors[0].edit_request = count
    ids = prompt(16)
    embeddings = embed(llama, ids)
    remote_model(doors[0].swarm)(inputs_embeds=embeddings, labels=ids).loss.backward()
    assert num_forwards == 1


def test_a_gradient_nobody_can_compute_ends_in_an_error(llama: TinyLlama, doors: list[TamperingServer]) -> None:
    """A training loop must stop, within its deadline, with a sentence that names the blocks."""
    ids = prompt(8)
    model, embeddings = remote_model(doors[0].swarm, no_route_wait_s=0.5), embed(llama, ids)
    loss = model(inputs_embeds=embeddings, labels=ids).loss
    doors[2].die()
    doors[2].withdraw()
    with pytest.raises(NoRouteError, match="blocks 4-5"):
        loss.backward()
    assert embeddings.grad is None
