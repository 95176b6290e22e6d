"""Something that happens in the middle of an answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer

__all__ = ["AtToken"]


class AtToken(BaseStreamer):
    """A streamer that calls `act` when token `index` of the answer arrives."""

    def __init__(self, index: int, act: Callable[[], object]) -> None:
        self._left = index + 1  # the prompt comes first
        self._act = act

    def put(self, value: torch.Tensor) -> None:
        if self._left == 0:
            self._act()
        self._left -= 1

    def end(self) -> None:
        pass
