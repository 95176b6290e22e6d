"""A compressing swarm of the real demo model: what a user asks of it, and what a lost server costs."""

from __future__ import annotations

import contextlib
import pydoc_data.topics
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import swarm
from swarm.models import resolve_model
from swarm.server.engine.rowwise import make_rows_independent
from tests.at_token import AtToken
from tests.cli_processes import Node, run_swarm, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MODEL = "smollm2-135m-instruct"
POLICY = "pyramid+gear"
PASSAGE_TOKENS = 300
PROMPT_TOKENS = 900
"""Two messages on the wire, and so many blocks beyond the tail that most of them are dropped."""
NEW_TOKENS = 56
"""Three events on the way, so the model is still copying at the end."""
CLEAR_MARGIN = 1.0
"""Logits. Two runs that group their sums differently mostly differ by less than 0.6; see docs/kv-cache.md."""


@dataclass(frozen=True)
class DemoSwarm:
    first: Node
    seconds: list[Node]

    @property
    def address(self) -> str:
        return self.first.address


def serve(blocks: str, *join: str) -> contextlib.AbstractContextManager[Node]:
    return running("serve", MODEL, *join, "--blocks", blocks, "--kv", POLICY, "--host", "127.0.0.1")


@pytest.fixture(scope="module")
def demo_swarm() -> Iterator[DemoSwarm]:
    """One server of the first blocks, two of the others."""
    with serve("0:13", "--new-swarm") as first, contextlib.ExitStack() as stack:
        yield DemoSwarm(first, [stack.enter_context(serve("13:30", "--join", first.address)) for _ in range(2)])


@pytest.fixture(scope="module")
def prompt_ids() -> torch.Tensor:
    """A passage said three times, [1, PROMPT_TOKENS].

    The model goes on copying, which takes what is stored of tokens far back, and leaves it little doubt.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL).folder)
    ids: list[int] = tokenizer(pydoc_data.topics.topics["import"])["input_ids"]
    passage = ids[:PASSAGE_TOKENS]
    assert len(passage) == PASSAGE_TOKENS
    return torch.tensor([passage * 3])


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    scores: torch.Tensor
    """Logits each token was chosen by, [NEW_TOKENS, vocabulary]."""


def generate(model: Any, prompt_ids: torch.Tensor, **options: Any) -> Answer:
    output = model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return Answer(output.sequences[0, prompt_ids.shape[1] :].tolist(), torch.cat(output.logits))


def mean_divergence(answer: Answer, other: Answer) -> float:
    """Kullback-Leibler divergence of the next token's distributions, nats, of two answers of the same tokens."""
    assert answer.tokens == other.tokens
    return functional.kl_div(
        other.scores.log_softmax(-1), answer.scores.log_softmax(-1), reduction="batchmean", log_target=True
    ).item()


def test_the_policy_is_announced_as_capacity(demo_swarm: DemoSwarm) -> None:
    """Room is told in tokens under the policy: about ten times what exact sessions of 16 bit would find."""
    ready = demo_swarm.first.ready
    assert ready["kv_policy"] == POLICY
    status = run_swarm("status", MODEL, "--join", demo_swarm.address, "--json").json
    assert {server["kv_policy"] for server in status["servers"]} == {POLICY}
    bytes_per_token_16_bit = 13 * 2 * 3 * 64 * 2
    assert ready["kv_tokens_total"] > 9.5 * 2**30 / bytes_per_token_16_bit


@pytest.fixture(scope="module")
def exact(demo_swarm: DemoSwarm, prompt_ids: torch.Tensor) -> Answer:
    """What an exact session of the same swarm answers."""
    with swarm.SwarmModelForCausalLM.from_pretrained(
        MODEL, initial_peers=[demo_swarm.address], kv_policy="none"
    ) as model:
        return generate(model, prompt_ids)


def test_exact_sessions_are_exact(demo_swarm: DemoSwarm, prompt_ids: torch.Tensor, exact: Answer) -> None:
    """Who asks for `none` gets the tokens of plain transformers, from servers that compress for others."""
    plain = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL).folder, dtype=torch.float32)
    assert exact.tokens == generate(plain, prompt_ids).tokens


def test_a_killed_server_changes_no_token(demo_swarm: DemoSwarm, prompt_ids: torch.Tensor, exact: Answer) -> None:
    """The replacement repeats the recorded steps, so it makes the same events, keeps the same tokens and stores them
    in the same codes.

    It takes many of them at once. Where that changes the last bits (see rowwise.py), tokens must be clear ones, and
    what is left of a difference small beside what compression itself makes of the exact answer.
    """
    with swarm.SwarmModelForCausalLM.from_pretrained(MODEL, initial_peers=[demo_swarm.address]) as model:
        undisturbed = generate(model, prompt_ids)
        best, second = undisturbed.scores.topk(2).values.unbind(-1)
        assert (best - second).min() > CLEAR_MARGIN
        with model.session(max_length=1024) as session:

            def kill_second_hop() -> None:
                (peer_id,) = [hop.peer_id for hop in session.route if hop.start == 13]
                (node,) = [node for node in demo_swarm.seconds if node.ready["peer_id"] == peer_id]
                node.process.send_signal(signal.SIGKILL)

            disturbed = generate(model, prompt_ids, session=session, streamer=AtToken(37, kill_second_hop))
            assert session.num_failovers == 1
    assert disturbed.tokens == undisturbed.tokens
    assert mean_divergence(undisturbed, disturbed) < mean_divergence(exact, undisturbed) / 10
    if make_rows_independent(nn.Linear(576, 192), max_bytes=1 << 30):
        assert torch.equal(disturbed.scores, undisturbed.scores)
