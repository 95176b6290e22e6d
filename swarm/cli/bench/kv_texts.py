"""Texts and questions to judge KV compression by: what is on every machine, and codes hidden in it."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from swarm.errors import BadInputError

__all__ = ["Document", "HiddenCodes", "hide_codes", "load_texts", "take_documents"]

_STDLIB: Final = ("argparse", "_pydecimal", "inspect", "pathlib", "unittest.mock", "http.server")
"""Sources of Python itself, half prose, half code; none of them was calibrated on."""
_FIRST: Final = ("amber", "crimson", "silver", "golden", "quiet", "rapid", "hidden", "frozen", "ancient", "broken")
_SECOND: Final = (
    "falcon",
    "harbor",
    "lantern",
    "meadow",
    "bridge",
    "canyon",
    "glacier",
    "orchard",
    "compass",
    "anchor",
)
_DIGITS: Final = 5

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A context, and how it goes on."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True, kw_only=True)
class HiddenCodes:
    """A context with codes in it, each said twice, and the questions, which nobody knows while it is read."""

    context: list[int]
    questions: list[list[int]]
    answers: list[list[int]]


def load_texts(paths: Sequence[Path]) -> list[str]:
    """The files' contents, or texts that every Python brings.

    Raises:
        BadInputError: a file is missing, or no UTF-8 text.
    """
    if not paths:
        return [inspect.getsource(importlib.import_module(name)) for name in _STDLIB]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise BadInputError(f"{path} is no UTF-8 text; give plain text files") from error
        except OSError as error:
            raise BadInputError(f"{path} can not be read ({error.strerror}); give text files with --text") from error
    return texts


def take_documents(
    texts: Sequence[Sequence[int]], *, num_documents: int, context_tokens: int, continued_tokens: int
) -> list[Document]:
    """One stretch of each text in turn, as long as there is text.

    Raises:
        BadInputError: no text is long enough.
    """
    length = context_tokens + continued_tokens
    places = [(index * length, text) for index in range(num_documents) for text in texts]
    documents = [
        Document(
            context=list(text[start : start + context_tokens]),
            continuation=list(text[start + context_tokens : start + length]),
        )
        for start, text in places
        if len(text) >= start + length
    ][:num_documents]
    if not documents:
        raise BadInputError(f"no text has {length} tokens; give longer ones with --text, or lower --context")
    return documents


def hide_codes(
    filler: Sequence[int], tokenize: Tokenize, *, context_tokens: int, num_codes: int, seed: int
) -> HiddenCodes:
    """Codes of invented things, twice each, at random places of a stretch of text."""
    chance = random.Random(seed)
    names = chance.sample([f"{first} {second}" for first in _FIRST for second in _SECOND], num_codes)
    codes = ["".join(chance.choice("0123456789") for _ in range(_DIGITS)) for _ in names]
    facts = [tokenize(f"\n\nThe code of the {name} is {code}.\n\n") for name, code in zip(names, codes, strict=True)]
    order = list(range(num_codes)) * 2
    chance.shuffle(order)
    num_filler = context_tokens - 2 * sum(map(len, facts))
    if num_filler < 4 * len(order) or len(filler) < num_filler:
        raise BadInputError(
            f"{num_codes} codes do not fit into {context_tokens} tokens of text; raise --context or give more --text"
        )
    start = chance.randrange(len(filler) - num_filler + 1)
    body = filler[start : start + num_filler]
    places = sorted(chance.sample(range(8, num_filler - 8), len(order)))
    context: list[int] = []
    done = 0
    for place, index in zip(places, order, strict=True):
        context += [*body[done:place], *facts[index]]
        done = place
    return HiddenCodes(
        context=context + list(body[done:]),
        questions=[tokenize(f"\n\nThe code of the {name} is ") for name in names],
        answers=[tokenize(code) for code in codes],
    )
