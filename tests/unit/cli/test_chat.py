"""The loop of a chat: commands, errors, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from swarm.cli.chat import _talk
from swarm.errors import NoRouteError, SessionClosedError


class Session:
    num_failovers = 0


class Conversation:
    """Answers by repeating; does what `on_ask` says before."""

    def __init__(self, on_ask: Callable[[], None] = lambda: None) -> None:
        self.session = Session()
        self.asked: list[str] = []
        self.num_resets = 0
        self._on_ask = on_ask

    def ask(self, text: str, *, on_text: Callable[[str], None], is_stopped: Callable[[], bool]) -> str:
        self.asked.append(text)
        for letter in f"you said {text}":
            self._on_ask()
            if is_stopped():
                break
            on_text(letter)
        return ""

    def reset(self) -> None:
        self.num_resets += 1


def talk(conversation: Conversation, *lines: str, is_interactive: bool = False) -> None:
    stand_in: Any = conversation
    _talk(stand_in, iter(lines), is_interactive=is_interactive)


def test_each_line_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a chat can be fed from a pipe; only answers go to standard output."""
    conversation = Conversation()
    talk(conversation, "one\n", "\n", "two\n")
    assert conversation.asked == ["one", "two"]
    assert capsys.readouterr().out == "you said one\nyou said two\n"


def test_slash_commands_are_not_sent() -> None:
    """They are for us; after /quit nothing more is read."""
    conversation = Conversation()
    talk(conversation, "/reset", "hello", "/help", "/quit", "never")
    assert conversation.num_resets == 1
    assert conversation.asked == ["hello"]


def fail() -> None:
    raise NoRouteError("nobody serves block 3")


def test_at_a_keyboard_an_error_ends_only_the_turn(capsys: pytest.CaptureFixture[str]) -> None:
    """A server may come back in a minute; the conversation should still be there."""
    conversation = Conversation(on_ask=fail)
    talk(conversation, "one", "two", is_interactive=True)
    assert conversation.asked == ["one", "two"]
    assert capsys.readouterr().err.count("error: nobody serves block 3\n") == 2


def test_from_a_pipe_an_error_ends_the_command() -> None:
    """A script must learn of it by the exit code."""
    with pytest.raises(NoRouteError):
        talk(Conversation(on_ask=fail), "one", "two")


def test_a_closed_session_ends_the_chat() -> None:
    """Nothing more could be answered."""

    def close() -> None:
        raise SessionClosedError("closed")

    with pytest.raises(SessionClosedError):
        talk(Conversation(on_ask=close), "one", "two", is_interactive=True)


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    """Long answers are common; so is the wish to cut one short and ask again."""
    num_letters = 0

    def interrupt_once() -> None:
        nonlocal num_letters
        num_letters += 1
        if num_letters == 4:
            signal.raise_signal(signal.SIGINT)

    conversation = Conversation(on_ask=interrupt_once)
    before = signal.getsignal(signal.SIGINT)
    talk(conversation, "one", "two")
    shown = capsys.readouterr()
    assert shown.out == "you\nyou said two\n"
    assert shown.err == "(stopped)\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    """While a lost server is being replaced no token comes, and nobody should have to sit that out."""

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    conversation = Conversation(on_ask=interrupt_twice)
    talk(conversation, "one", "two")
    assert conversation.asked == ["one", "two"]
    assert capsys.readouterr().out == "\n\n"
