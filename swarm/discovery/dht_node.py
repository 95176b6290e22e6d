"""What discovery needs of a distributed hash table, so that it can be replaced, and faked in tests."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BootstrapFailedError", "BootstrapFailure", "DhtEntry", "DhtNode"]


class BootstrapFailure(enum.Enum):
    """Why joining failed."""

    NOBODY = "nobody answered"
    CLOCK = "the clocks of both sides differ too much"
    UNREACHABLE = "the others can not reach this node"


class BootstrapFailedError(Exception):
    """None of the peers to join at could be used; the text is the table's own reason, for the log."""

    def __init__(self, failure: BootstrapFailure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True, kw_only=True)
class DhtEntry:
    """One value of one peer under one key."""

    key: str
    subkey: str
    """Peers' values under the same key do not replace each other; those of one subkey do."""
    value: bytes
    expires_at: float
    """Unix seconds. A value is replaced only by one that expires later."""


class DhtNode(ABC):
    """A running member of the table. Belongs to the event loop it was started on."""

    @abstractmethod
    async def store(self, entries: Sequence[DhtEntry]) -> int:
        """Store the entries and say how many were accepted somewhere. Raises PeerLostError past its deadline."""

    @abstractmethod
    async def fetch(self, keys: Sequence[str]) -> list[bytes]:
        """All values under any of the keys, in no order, unchecked. Raises PeerLostError past its deadline."""

    @abstractmethod
    async def visible_addresses(self) -> list[str]:
        """Multiaddrs, peer id included, at which this node listens; none in client mode."""

    @abstractmethod
    async def close(self) -> None:
        """Stop within seconds; harmless when repeated."""
