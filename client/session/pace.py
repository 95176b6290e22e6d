"""How long a step should take along a route, and when its silence is suspicious. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["HopPace", "RoutePace"]

_UNKNOWN_STEP_S = 0.1
_UNKNOWN_TOKEN_S = 0.01
_SMOOTHING = 0.2
"""Weight of the newest step in what was measured."""
_SHORTEST_QUIET_S = 1.0
"""Below this a pause is more likely the network's, or a busy machine's, than the end of a server."""
_QUIET_STEPS = 4.0
_LONGEST_QUIET_S = 10.0
"""Asking is cheap, and what servers say of their speed may be anything."""
_SHORTEST_STUCK_S = 5.0
_STUCK_STEPS = 20.0


@dataclass(frozen=True, kw_only=True)
class HopPace:
    """A server's own estimate of its speed for us, at its load when the session was opened."""

    step_s: float
    """Seconds of a step of one token."""
    token_s: float
    """Seconds of each further token of a step."""

    @classmethod
    def announced(cls, *, step_us: int, token_us: int) -> HopPace:
        """From what a server announces, where 0 stands for not known yet."""
        return cls(step_s=step_us / 1e6 or _UNKNOWN_STEP_S, token_s=token_us / 1e6 or _UNKNOWN_TOKEN_S)

    def expected_s(self, num_tokens: int) -> float:
        """Seconds that so many tokens should take."""
        return self.step_s + self.token_s * max(num_tokens - 1, 0)


class RoutePace:
    """Expectations of one route: what its servers announced, corrected by what was measured."""

    def __init__(self, hops: Sequence[HopPace]) -> None:
        self._hops = tuple(hops)
        self._slowness = 1.0
        """Measured time over announced time, smoothed; the network is in it."""

    def note_step(self, num_tokens: int, elapsed_s: float) -> None:
        """A step that travelled alone took so long from the first hop to the answer."""
        slowness = elapsed_s / max(self._announced_s(num_tokens), 1e-6)
        self._slowness += _SMOOTHING * (slowness - self._slowness)

    def expected_s(self, num_tokens: int) -> float:
        """Seconds that so many tokens should take from the first hop to the answer."""
        return self._announced_s(num_tokens) * max(self._slowness, 1.0)

    def quiet_s(self, num_tokens: int) -> float:
        """How long the route may be silent with so many tokens under way before somebody asks whether it lives."""
        return min(max(_SHORTEST_QUIET_S, _QUIET_STEPS * self.expected_s(num_tokens)), _LONGEST_QUIET_S)

    def stuck_s(self, hop_index: int, num_tokens: int) -> float:
        """How long a server's engine may work without finishing anything before it counts as stuck."""
        return max(_SHORTEST_STUCK_S, _STUCK_STEPS * self._hops[hop_index].expected_s(num_tokens))

    def _announced_s(self, num_tokens: int) -> float:
        return sum(hop.expected_s(num_tokens) for hop in self._hops)
