"""`swarm chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swarm.cli.failures import sentence_for
from swarm.cli.options import (
    AdapterOption,
    JoinOption,
    ModelArgument,
    PolicyOption,
    PrecisionOption,
    VerboseOption,
    WaitTimeoutOption,
)
from swarm.cli.quietness import prepare_process
from swarm.cli.terminal import complain, say, write_text
from swarm.errors import SessionClosedError, SwarmError

if TYPE_CHECKING:
    from swarm.cli.conversation import Conversation

__all__ = ["chat"]

_DEFAULT_NEW_TOKENS: Final = 512
_HELP: Final = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    model: ModelArgument,
    join: JoinOption,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="At most this many tokens an answer.")
    ] = _DEFAULT_NEW_TOKENS,
    temperature: Annotated[
        float,
        typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token; above, samples."),
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="Makes sampling repeatable.", show_default=False)
    ] = None,
    adapter: AdapterOption = None,
    precision: PrecisionOption = None,
    kv: PolicyOption = None,
    wait_timeout: WaitTimeoutOption = 30.0,
    verbose: VerboseOption = 0,
) -> None:
    """Talk with a model of the swarm, in one session: only what is new is sent.

    Each line is a message; lines may come from a pipe. /reset forgets the conversation, /quit or Ctrl-D
    leaves, Ctrl-C stops an answer.
    """
    prepare_process(verbose)
    from swarm.cli.answering import AnswerSettings
    from swarm.cli.conversation import Conversation
    from swarm.cli.open_client import open_client

    settings = AnswerSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    remote, tokenizer = open_client(
        model, join, wait_timeout_s=wait_timeout, adapter=adapter, precision=precision, kv_policy=kv
    )
    with remote, Conversation(remote, tokenizer, settings) as conversation:
        if sys.stdin.isatty():
            say(_HELP, style="dim")
            _talk(conversation, _typed_lines(), is_interactive=True)
        else:
            _talk(conversation, iter(sys.stdin), is_interactive=False)


def _talk(conversation: Conversation, lines: Iterator[str], *, is_interactive: bool) -> None:
    """Answer line by line. At a keyboard an error ends only the turn."""
    for line in lines:
        text = line.strip()
        match text:
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                conversation.reset()
                say("Forgotten.", style="dim")
                continue
            case "/help":
                say(_HELP, style="dim")
                continue
        try:
            _answer(conversation, text)
        except SessionClosedError:
            raise
        except SwarmError as error:
            write_text("\n")
            if not is_interactive:
                raise
            complain(sentence_for(error))


def _answer(conversation: Conversation, text: str) -> None:
    num_failovers = conversation.session.num_failovers
    with _ctrl_c_stops() as stop, contextlib.suppress(KeyboardInterrupt):
        conversation.ask(text, on_text=write_text, is_stopped=stop.is_wanted)
    write_text("\n")
    if stop.num_asked:
        say("(stopped)", style="dim")
    if conversation.session.num_failovers > num_failovers:
        say("(a server was lost and replaced on the way)", style="dim")


class _Stop:
    """How often Ctrl-C was pressed during an answer."""

    def __init__(self) -> None:
        self.num_asked = 0

    def is_wanted(self) -> bool:
        return self.num_asked > 0


@contextlib.contextmanager
def _ctrl_c_stops() -> Iterator[_Stop]:
    """Within, Ctrl-C ends the answer at its next token; pressed again, it does not wait for that."""
    stop = _Stop()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        stop.num_asked += 1
        if stop.num_asked > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _typed_lines() -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D. Ctrl-C drops a line, and twice in a row leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() editing and history)
    was_interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            write_text("\n")
            return
        except KeyboardInterrupt:
            write_text("\n")
            if was_interrupted:
                raise
            was_interrupted = True
            say("Ctrl-C again or Ctrl-D leaves.", style="dim")
            continue
        was_interrupted = False
        yield line
