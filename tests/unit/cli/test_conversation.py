"""What a chat template adds after an answer, which is all that travels in the next turn."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.cli.conversation import Message, new_text

CONVERSATION: list[Message] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "Who are you?"},
]


def render_marked(messages: Sequence[Message]) -> str:
    """A template with an end mark, that trims what people and models say, as most do."""
    return "".join(f"<{message['role']}>{message['content'].strip()}<end>\n" for message in messages) + "<assistant>"


def test_only_what_follows_the_answer_is_new() -> None:
    """The answer's tokens are in the session; writing it anew, trimmed, would give other tokens."""
    assert new_text(render_marked, CONVERSATION) == "<end>\n<user>Who are you?<end>\n<assistant>"


def test_earlier_answers_do_not_confuse() -> None:
    """The newest answer counts, even if it says the same as an earlier one."""
    longer = [*CONVERSATION, {"role": "assistant", "content": " Hello! "}, {"role": "user", "content": "Again?"}]
    assert new_text(render_marked, longer) == "<end>\n<user>Again?<end>\n<assistant>"


def test_a_template_that_hides_answers_is_noticed() -> None:
    """Some templates leave parts of answers out; then the whole conversation has to be sent."""

    def render_without_answers(messages: Sequence[Message]) -> str:
        return "|".join(message["content"] for message in messages if message["role"] == "user")

    assert new_text(render_without_answers, CONVERSATION) is None
