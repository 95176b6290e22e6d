"""forward() over remote blocks: logits, losses and gradients of the local model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DynamicCache, GenerationMixin

from swarm.client.remote_model import SwarmModelForCausalLM, SwarmModelForSequenceClassification
from swarm.errors import BadInputError, LengthLimitError
from tests.local_blocks import local_blocks
from tests.model_pair import LENGTHS, Pair, padded_batch, prompt


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_a_remote_model_is_a_transformers_model(pair: Pair) -> None:
    """Pipelines, trainers and PEFT decide by class."""
    assert isinstance(pair.remote, SwarmModelForCausalLM)
    assert isinstance(pair.remote, GenerationMixin)
    assert isinstance(pair.remote, type(pair.local))
    assert pair.remote.generation_config.eos_token_id == 2
    num_parameters = sum(parameter.numel() for parameter in pair.remote.parameters())
    assert num_parameters == 2 * 128 * 32 + 32, "embeddings, head and final norm are all that is loaded"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom", "falcon", "deepseek_v3"])
def test_logits_of_a_padded_batch(make_pair: Callable[..., Pair], family: str, side: str) -> None:
    """Training pads on the right, generation on the left; neither kind of padding may travel."""
    pair = make_pair(family)
    ids, mask = padded_batch()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad():
        expected = pair.local(ids, attention_mask=mask).logits[mask.bool()]
        got = pair.remote(ids, attention_mask=mask).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[mask.bool()], expected, atol=1e-4, rtol=0)
    assert pair.blocks.stateless_runs == [LENGTHS]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom", "falcon", "deepseek_v3"])
def test_gradients_with_respect_to_embeddings(make_pair: Callable[..., Pair], family: str) -> None:
    """Prompt tuning learns input embeddings through all remote blocks."""
    pair = make_pair(family)
    ids, mask = (batch.flip(1) for batch in padded_batch())
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for model in (pair.local, pair.remote):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
        (gradient,) = torch.autograd.grad(loss, embeddings)
        results.append((loss.detach(), gradient[mask.bool()]))
    (expected_loss, expected), (loss, gradient) = results
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert _relative_error(gradient, expected) < 1e-4


def test_embeddings_and_head_are_trainable(pair: Pair) -> None:
    """As in transformers: who wants them frozen says so."""
    for model in (pair.local, pair.remote):
        model.zero_grad()
        model(prompt(), labels=prompt()).loss.backward()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        expected, got = (model.get_parameter(name).grad for model in (pair.local, pair.remote))
        assert _relative_error(got, expected) < 1e-4
    pair.local.zero_grad()


def test_last_logits_only(pair: Pair) -> None:
    """Scoring the next token needs no vocabulary-sized row per token."""
    with torch.no_grad():
        expected = pair.local(prompt()).logits[:, -2:]
        got = pair.remote(prompt(), logits_to_keep=2).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_state_is_kept_only_in_a_session(pair: Pair) -> None:
    """use_cache is on by default in every config; a call without a session must still leave nothing behind."""
    outputs = pair.remote(prompt(), use_cache=True)
    assert outputs.past_key_values is None
    assert isinstance(pair.remote(prompt(), return_dict=False), tuple)
    assert not pair.blocks.sessions
    with pytest.raises(BadInputError, match="a DynamicCache can not hold a swarm's state"):
        pair.remote(prompt(), past_key_values=DynamicCache())


def test_bad_input_is_refused_before_anything_is_sent(pair: Pair) -> None:
    """Servers can only see that something is odd; here it can be named."""
    remote = pair.remote
    ids = prompt()
    with pytest.raises(LengthLimitError, match=r"a sequence has 513 tokens, and .* holds 512"):
        remote(prompt(513))
    with pytest.raises(BadInputError, match="output_hidden_states is not available"):
        remote(ids, output_hidden_states=True)
    with pytest.raises(BadInputError, match="output_attentions is not available"):
        remote(ids, output_attentions=True)
    with pytest.raises(BadInputError, match="either input_ids or inputs_embeds"):
        remote()
    with pytest.raises(BadInputError, match=r"input_ids must have shape \[batch, tokens\]"):
        remote(ids[0])
    with pytest.raises(BadInputError, match="attention_mask has shape"):
        remote(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(BadInputError, match="not at consecutive positions"):
        remote(ids, attention_mask=torch.tensor([[1, 1, 0] * 4]))
    with pytest.raises(BadInputError, match="not at consecutive positions"):
        remote(ids, position_ids=torch.arange(6).repeat(1, 2))
    with pytest.raises(BadInputError, match="call the model itself"):
        remote.model(ids)
    assert not pair.blocks.stateless_runs


def test_positions_may_begin_anywhere(pair: Pair) -> None:
    """Only distances matter to rotary positions; callers that number padding too get the same logits."""
    with torch.no_grad():
        expected = pair.local(prompt()).logits
        got = pair.remote(prompt(), position_ids=torch.arange(3, 15).unsqueeze(0)).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_closing_the_model_closes_its_blocks(pair: Pair) -> None:
    """Connections must not outlive the model."""
    with pair.remote as model:
        session = model.session()
    assert pair.blocks.is_closed
    assert pair.blocks.sessions[0].is_closed
    session.close()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom", "falcon"])
def test_sequence_classification(make_pair: Callable[..., Pair], family: str) -> None:
    """A fresh head on a language model's checkpoint, to be trained; padding is handled as in transformers."""
    pair = make_pair(family)
    source, blocks = local_blocks(pair.folder, 2)
    remote: Any = SwarmModelForSequenceClassification.from_blocks(source, blocks, num_labels=3)
    local: Any = AutoModelForSequenceClassification.from_pretrained(pair.folder, num_labels=3)
    assert isinstance(remote, SwarmModelForSequenceClassification)
    assert remote.config.num_labels == 3
    assert source.config.num_labels != 3, "the source is shared with others"
    weights = [model.get_parameter("score.weight") for model in (local, remote)]
    weights[0].data.copy_(weights[1].data)
    ids, mask = padded_batch()
    for batch, of_batch in ((ids, mask), (ids.flip(1), mask.flip(1))):
        results = [
            model(batch, attention_mask=of_batch, labels=torch.tensor([0, 1, 2, 1])) for model in (local, remote)
        ]
        torch.testing.assert_close(results[1].logits, results[0].logits, atol=1e-4, rtol=0)
        for result in results:
            result.loss.backward()
        expected, got = (weight.grad for weight in weights)
        assert expected is not None
        assert got is not None
        assert _relative_error(got, expected) < 1e-4


def test_other_dtypes(make_pair: Callable[..., Pair]) -> None:
    """bf16 halves the client's memory and what travels."""
    pair = make_pair()
    source, _ = local_blocks(pair.folder)
    model: Any = SwarmModelForCausalLM.from_blocks(source, pair.blocks, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    with pytest.raises(BadInputError, match="int8 is not a dtype for hidden states"):
        SwarmModelForCausalLM.from_blocks(source, pair.blocks, dtype="int8")


def test_options_of_from_pretrained_are_checked(pair: Pair) -> None:
    """A misspelt option must not vanish."""
    with pytest.raises(BadInputError, match="no client setting step_timeout; there are request_timeout_s"):
        SwarmModelForCausalLM.from_pretrained(str(pair.folder), ["grpc://127.0.0.1:1"], step_timeout=3)
    with pytest.raises(BadInputError, match="step_timeout_s is -1"):
        SwarmModelForCausalLM.from_pretrained(str(pair.folder), ["grpc://127.0.0.1:1"], step_timeout_s=-1)
    with pytest.raises(BadInputError, match="give initial_peers"):
        SwarmModelForCausalLM.from_pretrained(str(pair.folder))
