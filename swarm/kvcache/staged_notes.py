"""How much memory what is noted of staged tokens takes beside the pages: scores and newest queries. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["NO_NOTES", "StagedNotes"]


@dataclass(frozen=True, kw_only=True)
class StagedNotes:
    """A sequence holds empty pages of the same size, so that nobody takes more memory than pages are counted for."""

    page_bytes: int
    score_bytes: int = 0
    """Of a staged token, all layers."""
    query_bytes: int = 0
    """Of one of the newest staged tokens, all layers."""
    max_queries: int = 0
    """Tokens whose queries are kept."""

    def pages_for(self, num_staged: int) -> int:
        """Pages as large as the notes of `num_staged` tokens."""
        size_bytes = num_staged * self.score_bytes + min(num_staged, self.max_queries) * self.query_bytes
        return -(-size_bytes // self.page_bytes)


NO_NOTES: Final = StagedNotes(page_bytes=1)
