"""Who may start a session, who waits and in which place. Pure.

Sessions state what they expect to use. Pages are never reserved for it; the sum of the expectations only
decides whether one more session is let in, so that those inside rarely have to make room for each other.
Who is let in stays in: a session that uses more than it said is a matter for the page store.

A session that is compressed needs more for a moment, while a prompt is read. Prompts are read one after the other
where memory is short, so only the largest such need of all sessions inside is kept free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["AdmissionConfig", "AdmissionQueue", "Claim", "Decision"]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """Bounds of a server's admission."""

    max_sessions: int = 256
    """Sessions inside."""
    max_waiting: int = 64
    """Sessions in the queue; one more is sent away."""
    fill_share: float = 0.95
    """Part of the KV memory that expectations may add up to."""

    def __post_init__(self) -> None:
        if self.max_sessions < 1 or self.max_waiting < 0:
            raise ValueError("AdmissionConfig needs max_sessions >= 1 and max_waiting >= 0")
        if not 0 < self.fill_share <= 1:
            raise ValueError(f"AdmissionConfig.fill_share is {self.fill_share}; give a share above 0 and up to 1")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a session expects to use of the KV memory."""

    lasting_bytes: int
    passing_bytes: int = 0
    """On top, while it reads an input."""


@dataclass(frozen=True)
class Decision:
    """Outcome of a request to start."""

    is_admitted: bool
    position: int | None
    """Place in the queue, from 1; None when admitted or sent away."""


class AdmissionQueue(Generic[Key]):
    """Sessions inside and waiting, first come first served."""

    def __init__(self, *, total_bytes: int, config: AdmissionConfig | None = None) -> None:
        self._config = config or AdmissionConfig()
        self._limit_bytes = max(int(total_bytes * self._config.fill_share), 1)
        self._inside: dict[Key, Claim] = {}
        self._waiting: OrderedDict[Key, Claim] = OrderedDict()
        self._lasting_bytes = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_inside(self) -> int:
        return len(self._inside)

    def _fits(self, claim: Claim) -> bool:
        """A session alone is always let in: nothing would ever change by waiting."""
        if not self._inside:
            return True
        passing_bytes = max(claim.passing_bytes, *(each.passing_bytes for each in self._inside.values()))
        expected_bytes = self._lasting_bytes + claim.lasting_bytes + passing_bytes
        return len(self._inside) < self._config.max_sessions and expected_bytes <= self._limit_bytes

    def has_place(self, claim: Claim) -> bool:
        """Whether a session that expects to use so much would be let in now."""
        return not self._waiting and self._fits(claim)

    def request(self, key: Key, claim: Claim, *, may_wait: bool) -> Decision:
        """Ask to start. Nobody overtakes those who wait."""
        if key in self._inside or key in self._waiting:
            raise ValueError("this session has asked before")
        if self.has_place(claim):
            self._admit(key, claim)
            return Decision(True, None)
        if not may_wait or len(self._waiting) >= self._config.max_waiting:
            return Decision(False, None)
        self._waiting[key] = claim
        return Decision(False, len(self._waiting))

    def _admit(self, key: Key, claim: Claim) -> None:
        self._inside[key] = claim
        self._lasting_bytes += claim.lasting_bytes

    def leave(self, key: Key) -> list[Key]:
        """A session has ended or given up waiting; returns those who are let in now, in order."""
        self._waiting.pop(key, None)
        left = self._inside.pop(key, None)
        if left is not None:
            self._lasting_bytes -= left.lasting_bytes
        admitted: list[Key] = []
        while self._waiting:
            candidate, claim = next(iter(self._waiting.items()))
            if not self._fits(claim):
                break
            del self._waiting[candidate]
            self._admit(candidate, claim)
            admitted.append(candidate)
        return admitted

    def positions(self) -> dict[Key, int]:
        """Place in the queue of everybody who waits, from 1."""
        return {key: place for place, key in enumerate(self._waiting, start=1)}
