"""What a compressed sequence holds, as plain values: for host memory and for other servers."""

# Letters: L layers of the sequence, Hk KV heads.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from swarm.kvpolicy.streaming import TailState, stop_staging

__all__ = ["CompressedState", "can_go_back"]


def can_go_back(tail: TailState, *, length: int, input_start: int, start: int) -> bool:
    """Whether a sequence of `length` tokens can go on from `start` exactly as if it had never been further.

    Not past its last event; and inside an input only to before its first token, `input_start`: what is known of its
    newest tokens is not kept back.
    """
    if start in (0, length):
        return True
    if not tail.compressed_at <= start < length:
        return False
    return not tail.is_staging or start <= input_start


@dataclass(frozen=True, kw_only=True)
class CompressedState:
    """Everything about a sequence but the pages' contents."""

    length: int
    tail: TailState
    staged_start: int
    """Position of the first staged token; `length` when there is none."""
    input_start: int
    """Where the input began that is being staged; `length` when there is none."""
    tiles: npt.NDArray[np.int32]
    """[L, Hk, most tiles of a head] local numbers; 0 where there is none."""
    num_tiles: npt.NDArray[np.int32]
    """[L, Hk]"""
    num_dropped: npt.NDArray[np.int64]
    """[L, Hk]"""
    raw_pages: npt.NDArray[np.int64]
    tile_pages: npt.NDArray[np.int64]
    staged_pages: npt.NDArray[np.int64]
    """[L, pages]"""

    @property
    def num_staged(self) -> int:
        """Positions in staged pages."""
        return self.length - self.staged_start if self.staged_pages.size else 0

    def used_tiles(self) -> npt.NDArray[np.int32]:
        """All heads' tiles, in no order."""
        used: npt.NDArray[np.int32] = self.tiles[np.arange(self.tiles.shape[2]) < self.num_tiles[..., None]]
        return used

    def page_lists(self) -> list[npt.NDArray[np.int64]]:
        """[rows, pages] each: raw pages, tile pages, staged pages; the pages of a row are best neighbours."""
        return [self.raw_pages[None], self.tile_pages[None], self.staged_pages]

    def map_pages(self, change: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]) -> CompressedState:
        """The same with other numbers for pages."""
        return replace(
            self,
            raw_pages=change(self.raw_pages),
            tile_pages=change(self.tile_pages),
            staged_pages=change(self.staged_pages),
        )

    def rewind(self, start: int) -> CompressedState:
        """The same after going back to `start` > 0. Raises ValueError where `can_go_back` says no."""
        if start == self.length:
            return self
        if start <= 0 or not can_go_back(self.tail, length=self.length, input_start=self.input_start, start=start):
            raise ValueError(f"a sequence of {self.length} positions can not go back to {start}: {self.tail}")
        staged = self.staged_pages[:, :0]
        return replace(
            self, length=start, tail=stop_staging(self.tail), staged_start=start, input_start=start, staged_pages=staged
        )
