"""What an error means to whoever typed the command: one sentence, and an exit code.

0    done
1    a failure: the network, a server, a file system, or a bug of ours
2    usage: what was asked can not be done as asked (an option, a model's name, a prompt that is too long)
130  interrupted with Ctrl-C
"""

from __future__ import annotations

from typing import Final

import typer

from swarm.errors import BadInputError, SwarmError

__all__ = ["FAILURE", "INTERRUPTED", "USAGE", "exit_code_for", "sentence_for"]

FAILURE: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130

# Typer keeps the base class of its usage errors to itself, and has moved it between releases.
_USAGE_ERRORS: Final = tuple(base for base in typer.BadParameter.__mro__ if base not in Exception.__mro__)


def exit_code_for(error: BaseException) -> int:
    """USAGE where the user can ask for something else, FAILURE otherwise."""
    return USAGE if isinstance(error, (BadInputError, *_USAGE_ERRORS)) else FAILURE


def sentence_for(error: BaseException) -> str:
    """What was seen and what to do about it; empty where everything has been said already."""
    text = " ".join(str(error).split())
    if isinstance(error, _USAGE_ERRORS):
        return _usage_sentence(error)
    if isinstance(error, SwarmError):
        return text or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"the package {error.name} is needed for this and is not installed;"
            " pip install 'swarm-inference[server]' brings all that servers need"
        )
    return (
        f"swarm itself failed ({type(error).__name__}{': ' if text else ''}{text[:300]});"
        " run it again with SWARM_DEBUG=1 to see where, and report that"
    )


def _usage_sentence(error: BaseException) -> str:
    text: str = error.format_message() if hasattr(error, "format_message") else str(error)
    text = " ".join(text.split()).rstrip(".")
    text = f"{text[:1].lower()}{text[1:]}"
    context = getattr(error, "ctx", None)
    if not text or context is None:
        return text
    help_command = f"`{context.command_path} --help`"
    return f"{text} See {help_command}" if text.endswith("?") else f"{text}; see {help_command}"
