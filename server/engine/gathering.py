"""How long a decoding step waits for sessions that are about to come back. Pure, no I/O.

Without waiting, sessions fall into two groups that take turns: while one group's step runs, the other's
clients choose their tokens, and each step carries half of what it could. A step costs mostly the same
whatever it carries, so two half steps cost almost two whole ones. Waiting for a client that returns sooner
than a step lasts is therefore a gain, and waiting for a slower one a loss. Who is how fast is measured.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Gathering"]

Key = TypeVar("Key", bound=Hashable)

_PATIENCE = 2.0
"""A session may take this multiple of its usual time before it counts as late."""


@dataclass
class Gathering(Generic[Key]):
    """Who was answered and is expected back."""

    share: float
    """Longest wait as a multiple of a decoding step; 0 never waits."""
    _answered_s: dict[Key, float] = field(default_factory=dict)
    """When each session that is away was answered."""
    _return_s: dict[Key, float] = field(default_factory=dict)
    """How long each session usually stays away."""

    def answered(self, key: Key, *, now_s: float) -> None:
        """A session's step was answered; its next one is up to the client."""
        self._answered_s[key] = now_s

    def arrived(self, key: Key, *, now_s: float) -> None:
        """A session's next step came at `now_s`."""
        answered_s = self._answered_s.pop(key, None)
        if answered_s is not None:
            away_s = max(now_s - answered_s, 0.0)
            old_s = self._return_s.get(key)
            self._return_s[key] = away_s if old_s is None else 0.7 * old_s + 0.3 * away_s

    def forget(self, key: Key) -> None:
        """A session has ended."""
        self._answered_s.pop(key, None)
        self._return_s.pop(key, None)

    def wait_s(self, *, step_s: float, now_s: float) -> float:
        """How long a decoding step that could run now should wait at most; `step_s` is the usual time of one.

        Each session is waited for from its answer on, so waits do not add up.
        """
        longest_s = self.share * step_s
        wait_s = 0.0
        for key, answered_s in self._answered_s.items():
            away_s = self._return_s.get(key)
            if away_s is not None and away_s <= longest_s:
                patience_s = min(_PATIENCE * away_s, longest_s)
                wait_s = max(wait_s, answered_s + patience_s - now_s)
        return wait_s
