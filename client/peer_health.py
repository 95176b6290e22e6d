"""What one client has learnt about peers: who can be relied on, and whom to avoid for how long. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from swarm.datatypes import PeerId

__all__ = ["PeerExperience", "PeerHealth"]

_MAX_DOUBLINGS = 3
_SMOOTHING = 0.2
"""Weight of the newest answer time."""
_MEMORY = 0.98
"""What a past failure or success weighs in the reliability beside the next one: some fifty count."""


@dataclass(frozen=True, kw_only=True)
class PeerExperience:
    """One client's experience with one peer, over all its sessions and runs."""

    peer_id: PeerId
    num_successes: int
    """Steps and runs it did for us."""
    num_failures: int
    """How often it was lost or at fault; being full or leaving in good order is no failure."""
    reliability: float
    """Between 0 and 1: the share of successes, those long ago counting less."""
    answer_s: float | None
    """Seconds its answers to openings and health calls take, smoothed; None before the first."""
    is_busy: bool
    """Whether it was full when last asked."""
    avoided_for_s: float
    """Seconds for which it is still avoided; 0 when it is not."""


@dataclass
class _Record:
    num_successes: int = 0
    num_failures: int = 0
    success_weight: float = 0.0
    failure_weight: float = 0.0
    answer_s: float | None = None
    num_failures_in_row: int = 0
    is_busy: bool = False
    avoided_until_s: float = 0.0

    def count(self, *, is_success: bool) -> None:
        self.success_weight = self.success_weight * _MEMORY + is_success
        self.failure_weight = self.failure_weight * _MEMORY + (not is_success)
        self.num_successes += is_success
        self.num_failures += not is_success

    @property
    def reliability(self) -> float:
        return (self.success_weight + 1.0) / (self.success_weight + self.failure_weight + 1.0)


class PeerHealth:
    """Experience per peer; failures are followed by a backoff that doubles and always ends, a success clears it."""

    def __init__(self, *, ban_s: float, now_s: Callable[[], float]) -> None:
        self._ban_s = ban_s
        self._now_s = now_s
        self._records: dict[PeerId, _Record] = {}

    def record_failure(self, peer: PeerId) -> None:
        """The peer was lost or at fault."""
        record = self._record(peer)
        record.count(is_success=False)
        factor = 2 ** min(record.num_failures_in_row, _MAX_DOUBLINGS)
        record.num_failures_in_row += 1
        record.is_busy = False
        record.avoided_until_s = self._now_s() + self._ban_s * factor

    def record_busy(self, peer: PeerId, retry_after_s: float) -> None:
        """The peer is well but full: avoid it for as long as it asked, which is no failure."""
        record = self._record(peer)
        record.is_busy = True
        record.avoided_until_s = max(record.avoided_until_s, self._now_s() + min(retry_after_s, self._ban_s))

    def record_leaving(self, peer: PeerId) -> None:
        """The peer leaves in good order, which is no failure: its announcement may be older than its farewell."""
        record = self._record(peer)
        record.avoided_until_s = max(record.avoided_until_s, self._now_s() + self._ban_s)

    def record_too_small(self, peer: PeerId) -> None:
        """The peer is well, but could never hold what was asked of it, which is no failure: others are used now."""
        record = self._record(peer)
        record.avoided_until_s = max(record.avoided_until_s, self._now_s() + self._ban_s)

    def record_success(self, peer: PeerId) -> None:
        """The peer did its work."""
        record = self._record(peer)
        record.count(is_success=True)
        self._rehabilitate(record)

    def record_answer(self, peer: PeerId, seconds: float) -> None:
        """The peer answered an opening or a health call after so long. Says nothing about its work."""
        record = self._record(peer)
        record.answer_s = (
            seconds if record.answer_s is None else record.answer_s + _SMOOTHING * (seconds - record.answer_s)
        )

    def withdraw_failure(self, peer: PeerId) -> None:
        """What was held against the peer turned out to be no fault of its own."""
        record = self._record(peer)
        record.num_failures = max(record.num_failures - 1, 0)
        record.failure_weight = max(record.failure_weight - 1.0, 0.0)
        self._rehabilitate(record)

    def busy(self) -> frozenset[PeerId]:
        """Peers that were full when last asked."""
        return frozenset(peer for peer, record in self._records.items() if record.is_busy)

    def avoided(self) -> frozenset[PeerId]:
        """Peers to avoid now."""
        now_s = self._now_s()
        return frozenset(peer for peer, record in self._records.items() if record.avoided_until_s > now_s)

    def given_up(self) -> frozenset[PeerId]:
        """Peers to avoid now that have failed more than once since they last did their work."""
        return frozenset(peer for peer in self.avoided() if self._record(peer).num_failures_in_row > 1)

    def next_to_try(self, peers: Collection[PeerId]) -> PeerId:
        """Of peers that are all to be avoided, the one whose time is over first; each failure puts it further back."""
        return min(peers, key=lambda peer: (self._record(peer).avoided_until_s, peer))

    def reliability(self) -> dict[PeerId, float]:
        """Between 0 and 1 for every peer there is experience with; 1 stands for nothing but successes."""
        return {peer: record.reliability for peer, record in self._records.items()}

    def experience(self) -> list[PeerExperience]:
        """All that is known, a record for each peer."""
        now_s = self._now_s()
        return [
            PeerExperience(
                peer_id=peer,
                num_successes=record.num_successes,
                num_failures=record.num_failures,
                reliability=record.reliability,
                answer_s=record.answer_s,
                is_busy=record.is_busy,
                avoided_for_s=max(record.avoided_until_s - now_s, 0.0),
            )
            for peer, record in self._records.items()
        ]

    def _record(self, peer: PeerId) -> _Record:
        return self._records.setdefault(peer, _Record())

    def _rehabilitate(self, record: _Record) -> None:
        record.num_failures_in_row = 0
        record.is_busy = False
        record.avoided_until_s = 0.0
