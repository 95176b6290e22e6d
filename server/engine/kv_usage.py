"""How a server's KV memory is used, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KVUsage"]


@dataclass(frozen=True, kw_only=True)
class KVUsage:
    """Bytes of KV memory at one moment, and totals since start."""

    total_bytes: int = 0
    """Of all pages."""
    used_bytes: int = 0
    """Of the pages that sessions hold; a page that several hold counts once."""
    wasted_bytes: int = 0
    """Of `used_bytes`, what holds no token: the ends of last pages."""
    shared_bytes: int = 0
    """What sessions would need on top if no page were shared."""
    num_tokens_shared: int = 0
    """Tokens since start that were found in shared prefixes instead of being run."""
    num_spills: int = 0
    """How often since start a session was moved to host memory."""
