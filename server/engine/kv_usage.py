"""How a server's KV memory is used, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm.kvcache.page_table import PageTable

__all__ = ["KVUsage", "measure_usage"]


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


def measure_usage(
    tables: Sequence[PageTable],
    *,
    num_pages_total: int,
    num_pages_used: int,
    page_tokens: int,
    page_bytes: int,
    num_tokens_shared: int,
    num_spills: int,
) -> KVUsage:
    """The use that sessions' tables make of a pool; `num_pages_used` counts pages that several hold once."""
    num_owned = 0
    filled: dict[int, tuple[int, int]] = {}
    for table in tables:
        if not table.num_pages:
            continue
        num_owned += table.num_pages * table.num_layers
        num_filled = table.length - (table.num_pages - 1) * page_tokens
        # Of a last page that several hold, only what none of them fills is wasted.
        page = int(table.pages[0, -1])
        filled[page] = (max(num_filled, filled.get(page, (0, 0))[0]), table.num_layers)
    num_empty = sum((page_tokens - num_filled) * num_layers for num_filled, num_layers in filled.values())
    return KVUsage(
        total_bytes=num_pages_total * page_bytes,
        used_bytes=num_pages_used * page_bytes,
        wasted_bytes=num_empty * page_bytes // page_tokens,
        shared_bytes=max(num_owned - num_pages_used, 0) * page_bytes,
        num_tokens_shared=num_tokens_shared,
        num_spills=num_spills,
    )
