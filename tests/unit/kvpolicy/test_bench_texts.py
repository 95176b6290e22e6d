"""Contexts and questions of `swarm bench kv`: equal for everybody, and the answer is really in the text."""

from __future__ import annotations

import pytest

from swarm.cli.bench.kv_texts import hide_codes, load_texts, take_documents
from swarm.errors import BadInputError


def tokenize(text: str) -> list[int]:
    return list(text.encode())


def test_codes_stand_twice_in_a_context_of_the_wanted_length() -> None:
    """A code that is not there, or a longer context, would make figures of nothing."""
    filler = list(range(1000, 4000))
    codes = hide_codes(filler, tokenize, context_tokens=2048, num_codes=8, seed=1)
    text = "".join(chr(token) if token < 256 else " " for token in codes.context)
    assert len(codes.context) == 2048 and len(codes.questions) == 8
    for question, answer in zip(codes.questions, codes.answers, strict=True):
        sentence = bytes(question).decode().strip() + " " + bytes(answer).decode()
        assert text.count(sentence) == 2


def test_the_same_seed_hides_the_same_codes() -> None:
    """Policies are compared on the same questions, on all machines."""
    filler = list(range(1000, 4000))
    assert hide_codes(filler, tokenize, context_tokens=1024, num_codes=4, seed=7) == hide_codes(
        filler, tokenize, context_tokens=1024, num_codes=4, seed=7
    )


def test_documents_come_from_all_texts_and_never_overlap() -> None:
    """Figures of one text say little, and of one stretch twice nothing more."""
    texts = [list(range(1000)), list(range(1000, 2000)), list(range(2000, 2050))]
    documents = take_documents(texts, num_documents=4, context_tokens=200, continued_tokens=50)
    assert [document.context[0] for document in documents] == [0, 1000, 250, 1250]
    assert all(document.continuation[0] == document.context[-1] + 1 for document in documents)


def test_short_texts_are_refused_with_the_length_that_is_needed() -> None:
    """The user can give a longer one, or ask for less."""
    with pytest.raises(BadInputError, match="250 tokens"):
        take_documents([[1] * 100], num_documents=1, context_tokens=200, continued_tokens=50)
    with pytest.raises(BadInputError, match="do not fit"):
        hide_codes([1] * 50, tokenize, context_tokens=300, num_codes=8, seed=1)


def test_python_brings_texts_of_its_own() -> None:
    """The bench runs anywhere without a file."""
    assert all(len(text) > 20_000 for text in load_texts([]))
