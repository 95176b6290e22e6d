"""Text that appears token by token."""

from __future__ import annotations

import pytest
import torch

from swarm.cli.text_stream import AnswerStreamer, IncrementalText

PIECES = [b"Gr", b"\xc3", b"\xbc", b"\xc3\x9fe", b" ", b"\xf0\x9f", b"\x90", b"\x9d", b"!"]


def decode_bytes(ids: list[int]) -> str:
    """A byte-level tokenizer: characters may be cut anywhere."""
    return b"".join(PIECES[token_id] for token_id in ids).decode(errors="replace")


def decode_words(ids: list[int]) -> str:
    """A tokenizer that drops the space before the first word of whatever it is given."""
    return " ".join(f"word{token_id}" for token_id in ids)


def test_characters_appear_only_when_they_are_complete() -> None:
    """Half a character would show as a question mark, and stay there."""
    text = IncrementalText(decode_bytes)
    shown = [text.add([token_id]) for token_id in range(len(PIECES))]
    assert shown == ["Gr", "", "ü", "ße", " ", "", "", "🐝", "!"]
    assert text.flush() == ""


def test_pieces_make_up_the_whole_text() -> None:
    """Tokenizers that treat a text's start specially must not lose spaces in between."""
    text = IncrementalText(decode_words)
    assert "".join(text.add([token_id]) for token_id in range(30)) == decode_words(list(range(30)))


def test_what_is_held_back_comes_at_the_end() -> None:
    """An answer that ends in the middle of a character still ends where the final text does."""
    text = IncrementalText(decode_bytes)
    assert text.add([0]) + text.add([1]) + text.flush() == decode_bytes([0, 1])


class Tokenizer:
    """As much of a tokenizer as a streamer uses."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(f"<{token_id}>" for token_id in ids)


def stream(times_s: list[float]) -> tuple[AnswerStreamer, list[str]]:
    """A streamer that was given a prompt and then a token at each of `times_s`."""
    clock = iter([0.0, *times_s])
    shown: list[str] = []
    streamer = AnswerStreamer(Tokenizer(), shown.append, now_s=lambda: next(clock))  # type: ignore[arg-type]
    streamer.put(torch.tensor([[7, 8, 9]]))
    for token_id in range(len(times_s)):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    return streamer, shown


def test_streamer_shows_new_tokens_only() -> None:
    """The prompt comes first through the same door, and is not part of the answer."""
    assert stream([1.0, 2.0])[1] == ["<0>", "<1>"]


@pytest.mark.parametrize(
    ("times_s", "to_first_s", "tokens_per_s"),
    [([0.5, 1.0, 1.5, 2.0], 0.5, 2.0), ([0.5], 0.5, 2.0), ([], 0.0, 0.0)],
)
def test_speed_leaves_the_first_token_out(times_s: list[float], to_first_s: float, tokens_per_s: float) -> None:
    """The first token pays for the prompt; mixed into the speed, it would depend on the prompt's length."""
    streamer, _ = stream(times_s)
    assert streamer.seconds_to_first_token == to_first_s
    assert streamer.tokens_per_s == tokens_per_s
