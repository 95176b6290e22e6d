"""Finds pages of earlier sequences that began the same, and remembers new ones for later sequences."""

# Letters: T tokens of one sequence, H hidden size.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from swarm.kvcache.page_table import PageTable
from swarm.kvcache.prefix_index import PrefixEntry, PrefixIndex, PrefixTrail
from swarm.server.engine.page_store import PageStore

if TYPE_CHECKING:
    from swarm.datatypes import AdapterHash, Span
    from swarm.kvcache.page_pool import PageNumbers

__all__ = ["PrefixSharing", "Trail"]

Trail = PrefixTrail[torch.Tensor]


class PrefixSharing:
    """An index over a store's full pages; lives on the engine thread."""

    def __init__(self, store: PageStore, *, max_bytes: int) -> None:
        """`max_bytes` of host memory for outputs; 0 shares nothing."""
        self._store = store
        self._is_on = max_bytes > 0
        self._index: PrefixIndex[torch.Tensor] = PrefixIndex(max_bytes=max_bytes)

    @property
    def num_entries(self) -> int:
        return len(self._index)

    def new_trail(self, span: Span, adapter: AdapterHash) -> Trail:
        """The trail of an empty sequence in the blocks of `span`; with another adapter all keys are others."""
        return PrefixTrail(self._index.root(f"{span} {adapter}"), page_tokens=self._store.page_tokens)

    def match(self, table: PageTable, trail: Trail, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Outputs [page_tokens, H] of the known leading pages of new tokens [T, H]; `table` holds these then."""
        page_tokens = self._store.page_tokens
        if not len(self._index) or trail.is_broken or trail.length != table.length or table.length % page_tokens:
            return []
        found: list[PrefixEntry[torch.Tensor]] = []
        for first in range(0, hidden.shape[0] - page_tokens + 1, page_tokens):
            digest = self._index.extend(trail.last, _content(hidden[first : first + page_tokens]))
            entry = self._index.find(digest)
            if entry is None:
                break
            trail.skip_page(digest)
            found.append(entry)
        if found:
            pages = np.array([entry.pages for entry in found], dtype=np.int64).T
            table.adopt(pages, table.length + len(found) * page_tokens)
            self._index.touch(trail.digests)
        return [entry.outputs for entry in found]

    def record(self, table: PageTable, trail: Trail, start: int, hidden: torch.Tensor, outputs: torch.Tensor) -> None:
        """Follow tokens [T, H] that ran from position `start` and gave `outputs` [T, H], both on the host."""
        if not self._is_on or not hidden.shape[0] or trail.is_broken:
            return
        if trail.length != start:
            trail.give_up()
            return
        content = _content(hidden)
        token_bytes = len(content) // hidden.shape[0]
        has_new = False
        # A copy, because the outputs of a whole batch share one tensor.
        for token, output in enumerate(outputs.clone().unbind()):
            page = trail.append(content[token * token_bytes : (token + 1) * token_bytes], output)
            if page is not None:
                has_new |= self._add(table, trail, *page)
        if has_new:
            self._index.touch(trail.digests)
            self._drop(self._index.trim())

    def _add(self, table: PageTable, trail: Trail, content: bytes, outputs: Sequence[torch.Tensor]) -> bool:
        """Index the page that the trail has filled; one whose predecessor is gone could never be found."""
        is_reachable = not trail.digests or self._index.find(trail.last) is not None
        digest = self._index.extend(trail.last, content)
        trail.close_page(digest)
        if not is_reachable or self._index.find(digest) is not None:
            return False
        pages: list[int] = table.pages[:, len(trail.digests) - 1].tolist()
        stacked = torch.stack(list(outputs))
        self._store.pool.keep(pages)
        self._index.insert(digest, PrefixEntry(pages, stacked, stacked.numel() * stacked.element_size()))
        return True

    def reclaim(self, num_pages: int) -> None:
        """Give up pages that nobody else holds, least recently used first, until `num_pages` became free."""
        if num_pages > 0 and self._store.pool.num_reclaimable:
            self._drop(self._index.evict(num_pages, self._is_unused))

    def _is_unused(self, entry: PrefixEntry[torch.Tensor]) -> bool:
        return self._store.pool.num_owners(entry.pages[0]) == 1

    def _drop(self, entries: Sequence[PrefixEntry[torch.Tensor]]) -> None:
        for entry in entries:
            self._store.pool.drop(entry.pages)

    def kept_pages(self) -> list[PageNumbers]:
        """Pages of every entry, for integrity checks."""
        assert self._index.size_bytes == sum(entry.size_bytes for entry in self._index)
        return [entry.pages for entry in self._index]


def _content(hidden: torch.Tensor) -> bytes:
    """What the server received, [T, H] on the host, as bytes."""
    content: bytes = hidden.contiguous().view(torch.uint8).numpy().tobytes()
    return content
