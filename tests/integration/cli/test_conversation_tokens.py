"""A conversation over a real (tiny) model: what travels, and what the model has seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.cli.answering import AnswerSettings, answer
from swarm.cli.conversation import Conversation
from swarm.client.remote_model import SwarmModelForCausalLM
from swarm.errors import BadInputError, LengthLimitError
from tests.local_blocks import LocalBlocks, local_blocks
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizer import save_tiny_tokenizer

MAX_NEW_TOKENS = 12


def ignore(text: str) -> None:
    """For answers that nobody reads."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_tiny_model("llama", folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def blocks_and_model(folder: Path) -> tuple[LocalBlocks, SwarmModelForCausalLM]:
    source, blocks = local_blocks(folder, 2)
    return blocks, SwarmModelForCausalLM.from_blocks(source, blocks)


@pytest.fixture
def conversation(folder: Path, blocks_and_model: tuple[LocalBlocks, SwarmModelForCausalLM]) -> Iterator[Conversation]:
    tokenizer = save_tiny_tokenizer(folder)
    settings = AnswerSettings(max_new_tokens=MAX_NEW_TOKENS)
    with Conversation(blocks_and_model[1], tokenizer, settings) as conversation:
        yield conversation


def decode_history(conversation: Conversation, folder: Path) -> str:
    """All that the session holds, special tokens included."""
    return str(save_tiny_tokenizer(folder).decode(conversation.session.token_ids[0]))


def test_bytes_that_are_no_text_end_only_the_turn(conversation: Conversation) -> None:
    """A terminal with another encoding; the conversation so far must not be lost to it."""
    conversation.ask("Hi", on_text=ignore, is_stopped=lambda: False)
    before = conversation.session.token_ids
    with pytest.raises(BadInputError, match="the message is no UTF-8 text"):
        conversation.ask("caf\udce9", on_text=ignore, is_stopped=lambda: False)
    assert conversation.session.token_ids == before


def test_only_new_tokens_travel(
    conversation: Conversation, blocks_and_model: tuple[LocalBlocks, SwarmModelForCausalLM], folder: Path
) -> None:
    """A long conversation must not get slower with every turn, as it does where the history is sent again."""
    blocks, _ = blocks_and_model
    for text in ("Hi", "And you?", "Bye"):
        conversation.ask(text, on_text=ignore, is_stopped=lambda: False)
    session = blocks.sessions[-1]
    # The newest token has not been computed with yet.
    assert session.num_tokens_sent == len(conversation.session.token_ids[0]) - 1
    history = decode_history(conversation, folder)
    assert history.startswith("<|user|>Hi<|end|>\n<|assistant|>")
    assert history.count("<|user|>") == 3
    assert "<|end|>\n<|user|>And you?<|end|>\n<|assistant|>" in history
    assert "<|end|><|end|>" not in history  # the end that the model wrote is not written again


def test_streamed_text_is_the_answer(conversation: Conversation) -> None:
    """What appears on the screen is what is remembered."""
    shown: list[str] = []
    answer_text = conversation.ask("Hi", on_text=shown.append, is_stopped=lambda: False)
    assert answer_text == "".join(shown) != ""


def test_a_stopped_answer_is_part_of_the_conversation(conversation: Conversation) -> None:
    """Ctrl-C ends an answer, not the chat: the next turn continues after what was said so far."""
    shown: list[str] = []
    answer_text = conversation.ask("Hi", on_text=shown.append, is_stopped=lambda: len(shown) >= 3)
    assert 0 < len(answer_text) < MAX_NEW_TOKENS
    position = conversation.session.position
    conversation.ask("Go on", on_text=ignore, is_stopped=lambda: False)
    assert conversation.session.position > position


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(
    conversation: Conversation, blocks_and_model: tuple[LocalBlocks, SwarmModelForCausalLM]
) -> None:
    """After an interrupt in mid-answer the same question must give the same answer as if nothing had happened."""
    blocks, _ = blocks_and_model
    conversation.ask("Hi", on_text=ignore, is_stopped=lambda: False)
    before = conversation.session.token_ids[0]
    blocks.fail_at_step = len(blocks.sessions[-1].steps) + 2
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("And you?", on_text=ignore, is_stopped=lambda: False)
    blocks.fail_at_step = None
    assert conversation.session.token_ids[0] == before
    retried = conversation.ask("And you?", on_text=ignore, is_stopped=lambda: False)
    conversation.reset()
    conversation.ask("Hi", on_text=ignore, is_stopped=lambda: False)
    assert conversation.ask("And you?", on_text=ignore, is_stopped=lambda: False) == retried


def test_reset_forgets(conversation: Conversation, folder: Path) -> None:
    """After /reset the model knows nothing of what was said before."""
    first = conversation.ask("Hi", on_text=ignore, is_stopped=lambda: False)
    conversation.reset()
    assert conversation.ask("Hi", on_text=ignore, is_stopped=lambda: False) == first
    assert decode_history(conversation, folder).count("<|user|>") == 1


def test_a_full_context_is_one_clear_error(conversation: Conversation) -> None:
    """It must be said before anything is computed, and the conversation stays as it was."""
    conversation.ask("Hi", on_text=ignore, is_stopped=lambda: False)
    position = conversation.session.position
    with pytest.raises(LengthLimitError, match="start anew with /reset"):
        conversation.ask("x" * 600, on_text=ignore, is_stopped=lambda: False)
    assert conversation.session.position == position


def test_an_answer_reports_its_route_and_tokens(
    folder: Path, blocks_and_model: tuple[LocalBlocks, SwarmModelForCausalLM]
) -> None:
    """What `generate --json` prints comes from here."""
    shown: list[str] = []
    tokenizer = save_tiny_tokenizer(folder)
    settings = AnswerSettings(max_new_tokens=8)
    result = answer(blocks_and_model[1], tokenizer, "Hi", settings, on_text=shown.append)
    assert [(hop.start, hop.end) for hop in result.route] == [(0, 2), (2, 6)]
    assert 1 <= len(result.token_ids) <= 8
    assert result.text == "".join(shown) == tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert tokenizer.decode(result.prompt_token_ids) == "<|user|>Hi<|end|>\n<|assistant|>"


def test_a_prompt_beyond_the_context_is_refused(
    folder: Path, blocks_and_model: tuple[LocalBlocks, SwarmModelForCausalLM]
) -> None:
    """Before any compute, and saying both lengths."""
    blocks, model = blocks_and_model
    with pytest.raises(LengthLimitError, match="512"):
        answer(model, save_tiny_tokenizer(folder), "x" * 600, AnswerSettings())
    assert not any(session.steps for session in blocks.sessions)


def test_sampling_is_repeatable_by_seed(
    folder: Path, blocks_and_model: tuple[LocalBlocks, SwarmModelForCausalLM]
) -> None:
    """The same seed gives the same answer, another seed another one."""
    tokenizer = save_tiny_tokenizer(folder)
    first, again, other = (
        answer(blocks_and_model[1], tokenizer, "Hi", AnswerSettings(max_new_tokens=20, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first.token_ids == again.token_ids != other.token_ids
