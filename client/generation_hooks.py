"""Where remote models listen in on transformers' generate."""

# Letters: T columns of a batch.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from swarm.client.generation_cache import GenerationCache

__all__ = ["PromptStreamer", "WatchedCriteria", "bounded_candidates"]


class WatchedCriteria(StoppingCriteriaList):
    """Stop criteria whose verdicts a cache hears of."""

    def __init__(self, criteria: StoppingCriteriaList, cache: GenerationCache) -> None:
        super().__init__(criteria)
        self._cache = cache

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_done: torch.Tensor = super().__call__(input_ids, scores, **kwargs)
        self._cache.note_sampled(input_ids, is_done)
        return is_done


class PromptStreamer(BaseStreamer):
    """Streams what the caller gave as the prompt, where transformers would stream the whole history."""

    def __init__(self, streamer: BaseStreamer, prompt: torch.Tensor) -> None:
        self._streamer = streamer
        self._prompt: torch.Tensor | None = prompt

    def put(self, value: torch.Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def bounded_candidates(
    get_candidates: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    max_length: int,
    num_allowed: Callable[[int], int | None],
    input_ids: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Candidates [1, T + candidates] and their logits (None for none), with room for the token after the last of them.

    Args:
        num_allowed: how many candidates may follow so many columns; None: any number.
    """
    candidate_ids, logits = get_candidates(input_ids, **kwargs)
    num_columns = input_ids.shape[1]
    most = num_allowed(num_columns)
    end = max_length - 1 if most is None else min(max_length - 1, num_columns + most)
    candidate_ids = candidate_ids[:, :end]
    num_left = candidate_ids.shape[1] - num_columns
    # Of no candidates there are no logits either: transformers would take a tensor without columns for all of them.
    return candidate_ids, logits[:, :num_left] if logits is not None and num_left > 0 else None
