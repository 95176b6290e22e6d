"""How a server's KV memory is used, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swarm.kvcache.compressed_table import CompressedTable
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
    """Of `used_bytes`, what holds no token: the ends of last pages, and of compressed sequences unused tiles."""
    shared_bytes: int = 0
    """What sessions would need on top if no page were shared."""
    num_tokens_shared: int = 0
    """Tokens since start that were found in shared prefixes instead of being run."""
    num_spills: int = 0
    """How often since start a session was moved to host memory."""


def measure_usage(
    tables: Sequence[PageTable],
    compressed: Sequence[CompressedTable] = (),
    *,
    num_pages_total: int,
    num_pages_used: int,
    page_tokens: int,
    page_bytes: int,
    num_tokens_shared: int,
    num_spills: int,
) -> KVUsage:
    """The use that sessions' tables make of a pool; `num_pages_used` counts pages that several hold once."""
    tables = [*tables, *(table.staged for table in compressed)]
    num_owned = sum(table.num_pages * table.num_layers for table in tables)
    num_owned += sum(len(table.raw_pages) + len(table.tile_pages) + len(table.note_pages) for table in compressed)
    num_empty_tokens = _count_empty_tokens(tables, page_tokens)
    return KVUsage(
        total_bytes=num_pages_total * page_bytes,
        used_bytes=num_pages_used * page_bytes,
        wasted_bytes=num_empty_tokens * page_bytes // page_tokens + _count_unused_tiles(compressed, page_bytes),
        shared_bytes=max(num_owned - num_pages_used, 0) * page_bytes,
        num_tokens_shared=num_tokens_shared,
        num_spills=num_spills,
    )


def _count_empty_tokens(tables: Sequence[PageTable], page_tokens: int) -> int:
    """Tokens' places in last pages that hold none."""
    filled: dict[int, tuple[int, int]] = {}
    for table in tables:
        if not table.num_pages:
            continue
        num_filled = table.length - (table.num_pages - 1) * page_tokens
        # Of a last page that several hold, only what none of them fills is wasted.
        page = int(table.pages[0, -1])
        filled[page] = (max(num_filled, filled.get(page, (0, 0))[0]), table.num_layers)
    return sum((page_tokens - num_filled) * num_layers for num_filled, num_layers in filled.values())


def _count_unused_tiles(tables: Sequence[CompressedTable], page_bytes: int) -> int:
    """Bytes of tile pages beside the tiles in use; forks' pages count with the first of them."""
    seen: set[int] = set()
    num_bytes = 0
    for table in tables:
        new = [page for page in table.tile_pages.tolist() if page not in seen]
        if not new:
            continue
        seen.update(new)
        share = len(new) / len(table.tile_pages)
        per_page = table.layout.tiles_per_page
        num_unused = len(table.tile_pages) * per_page - int(np.sum(table.num_tiles))
        num_bytes += int(num_unused * share) * (page_bytes // per_page)
    return num_bytes
