"""What one client has learnt about peers: who failed lately, and for how long to avoid them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarm.datatypes import PeerId

__all__ = ["PeerHealth"]

_MAX_DOUBLINGS = 3


@dataclass
class _Record:
    num_failures_in_row: int = 0
    is_busy: bool = False
    avoided_until_s: float = 0.0


class PeerHealth:
    """Failures per peer with a backoff that doubles and always ends; a success clears it."""

    def __init__(self, *, ban_s: float, now_s: Callable[[], float]) -> None:
        self._ban_s = ban_s
        self._now_s = now_s
        self._records: dict[PeerId, _Record] = {}

    def record_failure(self, peer: PeerId) -> None:
        """The peer was lost or at fault."""
        record = self._records.setdefault(peer, _Record())
        factor = 2 ** min(record.num_failures_in_row, _MAX_DOUBLINGS)
        record.num_failures_in_row += 1
        record.is_busy = False
        record.avoided_until_s = self._now_s() + self._ban_s * factor

    def record_busy(self, peer: PeerId, retry_after_s: float) -> None:
        """The peer is well but full: avoid it for as long as it asked, which is no failure."""
        record = self._records.setdefault(peer, _Record())
        record.is_busy = True
        record.avoided_until_s = max(record.avoided_until_s, self._now_s() + min(retry_after_s, self._ban_s))

    def record_leaving(self, peer: PeerId) -> None:
        """The peer leaves in good order, which is no failure: its announcement may be older than its farewell."""
        record = self._records.setdefault(peer, _Record())
        record.avoided_until_s = max(record.avoided_until_s, self._now_s() + self._ban_s)

    def record_success(self, peer: PeerId) -> None:
        """The peer did its work."""
        self._records.pop(peer, None)

    def busy(self) -> frozenset[PeerId]:
        """Peers that were full when last asked."""
        return frozenset(peer for peer, record in self._records.items() if record.is_busy)

    def avoided(self) -> frozenset[PeerId]:
        """Peers to avoid now."""
        now_s = self._now_s()
        return frozenset(peer for peer, record in self._records.items() if record.avoided_until_s > now_s)
