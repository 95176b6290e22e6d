"""Turns token ids that arrive one by one into text, and notes when they came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["AnswerStreamer", "IncrementalText"]


class IncrementalText:
    """Decodes a growing sequence of tokens, without decoding all of it again each time.

    A tokenizer may write a token differently at the start of a text, and one character may take several
    tokens. So new tokens are decoded together with those of the piece before, and held back while they
    end in an incomplete character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context_start = 0
        self._num_written = 0

    def add(self, token_ids: list[int]) -> str:
        """The text that these tokens complete."""
        self._ids += token_ids
        written = self._decode(self._ids[self._context_start : self._num_written])
        with_new = self._decode(self._ids[self._context_start :])
        if len(with_new) <= len(written) or with_new.endswith("\ufffd"):
            return ""
        self._context_start, self._num_written = self._num_written, len(self._ids)
        return with_new[len(written) :]

    def flush(self) -> str:
        """What has been held back, complete or not."""
        written = self._decode(self._ids[self._context_start : self._num_written])
        rest = self._decode(self._ids[self._context_start :])[len(written) :]
        self._context_start = self._num_written = len(self._ids)
        return rest


class AnswerStreamer:
    """A streamer for transformers' generate: passes text on as it comes, and keeps the times.

    Special tokens are not part of the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None] = lambda text: None,
        *,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        def decode(ids: list[int]) -> str:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            return text if isinstance(text, str) else "".join(text)

        self._text = IncrementalText(decode)
        self._on_text = on_text
        self._now_s = now_s
        self._has_prompt = False
        self.started_s = now_s()
        """When the streamer was made: just before generating."""
        self.token_times_s: list[float] = []
        """When each new token came."""

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers: first with the prompt, then with each new token."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        ids: list[int] = value.reshape(-1).tolist()
        self.token_times_s += [self._now_s()] * len(ids)
        if text := self._text.add(ids):
            self._on_text(text)

    def end(self) -> None:
        """Called by transformers when it is done."""
        if text := self._text.flush():
            self._on_text(text)

    @property
    def seconds_to_first_token(self) -> float:
        """From making the streamer to the first new token; 0 when none came."""
        return self.token_times_s[0] - self.started_s if self.token_times_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Speed of the tokens after the first; of a lone token, the first one counts instead."""
        times_s = self.token_times_s
        if len(times_s) > 1 and times_s[-1] > times_s[0]:
            return (len(times_s) - 1) / (times_s[-1] - times_s[0])
        return 1.0 / self.seconds_to_first_token if self.seconds_to_first_token > 0 else 0.0
