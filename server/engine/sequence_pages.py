"""Where a sequence's tokens are, as lists of pages that can be numbered anew."""

# Letters: L layers of a span.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm.kvcache.compressed_state import CompressedState

__all__ = ["HeldPages", "SequencePages"]


@dataclass(frozen=True)
class SequencePages:
    """What one exact sequence holds."""

    length: int
    """Positions."""
    pages: npt.NDArray[np.int64]
    """[L, pages of the sequence], in the numbering of the context; sequences may share."""

    def page_lists(self) -> list[npt.NDArray[np.int64]]:
        """[rows, pages] each; the pages of a row are best neighbours."""
        return [self.pages]

    def map_pages(self, change: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]) -> SequencePages:
        """The same with other numbers for pages."""
        return SequencePages(self.length, change(self.pages))


HeldPages = SequencePages | CompressedState
"""Of an exact sequence, or of a compressed one."""
