"""Reads and writes what compressed sequences hold in pages: slots of single tokens, and tiles of stored rows."""

# Letters: N pages of the pool, t tiles of a page, s slots of a page, L layers of a sequence, Hk KV heads, D, Dv head
# dimensions, n tokens, slots or rows.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from swarm.errors import UnsupportedModelError
from swarm.kvcache.compressed_layout import plan_layout
from swarm.kvcache.compressed_table import CompressedTable
from swarm.kvcache.staged_notes import NO_NOTES

if TYPE_CHECKING:
    import numpy.typing as npt

    from swarm.kvcache.staged_notes import StagedNotes
    from swarm.kvpolicy.settings import KVPolicy
    from swarm.server.engine.page_store import PageStore

__all__ = ["SUMMARY_SLOT", "CompressedStore"]

SUMMARY_SLOT: Final = 0
"""Of each layer: mean key and value of the dropped tokens of each head."""
_POSITION_DTYPES: Final = {2: torch.int16, 4: torch.int32}


class CompressedStore:
    """A page store's memory, cut up for one policy.

    A page of slots is [keys and values of all its slots][scores of all its slots], a page of tiles [codes of all its
    tiles][positions][scores]. The codes of a tile stand byte-major, so that one byte of all its rows is contiguous.
    """

    def __init__(
        self, store: PageStore, *, policy: KVPolicy, row_bytes: int, position_bytes: int, has_scores: bool
    ) -> None:
        """Raises UnsupportedModelError when the layers differ or a page is too small.

        Args:
            row_bytes: of a stored (key, value) pair.
            position_bytes: 2 or 4 for each stored row; 0 when positions need not be known.
            has_scores: whether tokens are chosen by scores, which then are kept.
        """
        shape = store.shapes[0]
        if any(other != shape for other in store.shapes):
            raise UnsupportedModelError("the model's layers store keys and values of different sizes")
        self.store = store
        self.policy = policy
        self.row_bytes = row_bytes
        self.has_scores = has_scores
        self.num_kv_heads, self.key_dim, self.value_dim = shape.num_kv_heads, shape.key_dim, shape.value_dim
        try:
            self.layout = plan_layout(
                policy,
                page_bytes=store.page_bytes,
                num_layers=store.num_layers,
                num_kv_heads=shape.num_kv_heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                row_bytes=row_bytes,
                position_bytes=position_bytes,
                has_scores=has_scores,
            )
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from error
        self.raw_dtype = torch.bfloat16 if store.dtype is torch.bfloat16 else torch.float16
        """Of keys and values in slots."""
        layout, heads = self.layout, shape.num_kv_heads
        num_rows = layout.tiles_per_page * layout.tile_rows
        self.page_bytes = store.page_bytes
        self.raw_score_offset = 2 * layout.slots_per_page * shape.values_per_token
        """Where scores begin in a page of slots, in bytes."""
        self.position_offset = num_rows * row_bytes
        """Where positions begin in a page of tiles, in bytes."""
        self.score_offset = self.position_offset + num_rows * position_bytes
        """Where scores begin in a page of tiles, in bytes."""
        self.bytes = store.bytes_as(torch.uint8)
        """u8 [N, page_bytes]"""
        self.raw = self._cut(self.raw_dtype, 0, (layout.slots_per_page, shape.values_per_token))
        """[N, s, Hk*D + Hk*Dv] 16 bit; keys first"""
        self.raw_scores = (
            self._cut(torch.float16, self.raw_score_offset, (layout.slots_per_page, heads)) if has_scores else None
        )
        """[N, s, Hk] or None"""
        self.codes = self._cut(torch.uint8, 0, (layout.tiles_per_page, row_bytes, layout.tile_rows))
        """u8 [N, t, row_bytes, tile_rows]"""
        self.position_dtype = _POSITION_DTYPES.get(position_bytes)
        """None when positions are not kept."""
        self.positions = (
            self._cut(self.position_dtype, self.position_offset, (layout.tiles_per_page, layout.tile_rows))
            if self.position_dtype is not None
            else None
        )
        """[N, t, tile_rows] or None"""
        self.scores = (
            self._cut(torch.float16, self.score_offset, (layout.tiles_per_page, layout.tile_rows))
            if has_scores
            else None
        )
        """[N, t, tile_rows] or None"""

    def _cut(self, dtype: torch.dtype, offset_bytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A view [N, *shape] of contiguous values that begin at an offset in each page."""
        pages = self.store.bytes_as(dtype)
        strides = [1]
        for size in shape[:0:-1]:
            strides.insert(0, strides[0] * size)
        offset = pages.storage_offset() + offset_bytes // dtype.itemsize
        return pages.as_strided((len(pages), *shape), (pages.shape[1], *strides), offset)

    @property
    def device(self) -> torch.device:
        return self.bytes.device

    def new_table(self, num_layers: int, notes: StagedNotes = NO_NOTES) -> CompressedTable:
        """An empty table for a sequence in `num_layers` layers, which keeps such notes of staged tokens."""
        layout = self.layout.for_layers(num_layers)
        return CompressedTable(
            self.store.pool, layout, policy=self.policy, page_tokens=self.store.page_tokens, notes=notes
        )

    def own_raw(self, table: CompressedTable) -> None:
        """Have slots that may be written to."""
        self.store.copy_pages(table.own_raw_pages())

    def own_tiles(self, table: CompressedTable, tiles: npt.NDArray[np.int32] | None = None) -> None:
        """Have tiles (these local ones, or all) that may be written to."""
        indices = None if tiles is None else tiles.astype(np.int64) // table.layout.tiles_per_page
        self.store.copy_pages(table.own_tile_pages(indices))

    # -- slots ---------------------------------------------------------------------------------

    def slot_places(
        self, table: CompressedTable, layers: npt.NDArray[np.int64], slots: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(pages, slots within them), int64 on the device, of slots within layers; shapes broadcast."""
        index, within = table.layout.places_of(layers, slots)
        return self.to_device(table.raw_pages[index]), self.to_device(within)

    def token_places(
        self, table: CompressedTable, positions: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, [L, n] each, of tokens [n] in all layers."""
        layers = np.arange(table.layout.num_layers)[:, None]
        return self.slot_places(table, layers, table.layout.slots_of(positions))

    def read_slots(
        self, pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys [..., Hk, D], values [..., Hk, Dv] in 16 bit, and scores [..., Hk] float16, at places [...]; copies."""
        rows = self.raw[pages, slots]
        keys, values = rows.split([self.num_kv_heads * self.key_dim, self.num_kv_heads * self.value_dim], dim=-1)
        scores = self.raw_scores[pages, slots] if self.raw_scores is not None else None
        return keys.unflatten(-1, (self.num_kv_heads, -1)), values.unflatten(-1, (self.num_kv_heads, -1)), scores

    def write_slots(
        self,
        pages: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Fill slots at places [...] with keys [..., Hk, D] and values [..., Hk, Dv], and scores [..., Hk] if given."""
        rows = torch.cat((keys.flatten(-2).to(self.raw_dtype), values.flatten(-2).to(self.raw_dtype)), dim=-1)
        self.raw[pages, slots] = rows
        if scores is not None and self.raw_scores is not None:
            self.raw_scores[pages, slots] = scores.to(torch.float16)

    # -- rows ----------------------------------------------------------------------------------

    def row_places(
        self,
        table: CompressedTable,
        layers: npt.NDArray[np.int64],
        heads: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(pages, tiles within them, rows within those), int64 on the device, of the heads' rows [n]."""
        columns, within = np.divmod(rows, table.layout.tile_rows)
        pages, tiles = table.tile_places(table.tiles[layers, heads, columns])
        return self.to_device(pages), self.to_device(tiles), self.to_device(within)

    def read_rows(
        self, places: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rows u8 [n, row_bytes], positions [n] int64 and scores [n] float16 (None when not kept); copies."""
        pages, tiles, within = places
        positions = self.positions[pages, tiles, within].long() if self.positions is not None else None
        scores = self.scores[pages, tiles, within] if self.scores is not None else None
        return self.codes[pages, tiles, :, within], positions, scores

    def write_rows(
        self,
        places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
        positions: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Fill places [n] with rows u8 [n, row_bytes]; positions and scores [n] where they are given and kept."""
        pages, tiles, within = places
        self.codes[pages, tiles, :, within] = rows
        if positions is not None and self.positions is not None:
            self.positions[pages, tiles, within] = positions.to(self.positions.dtype)
        if scores is not None and self.scores is not None:
            self.scores[pages, tiles, within] = scores.to(torch.float16)

    def read_head(
        self, table: CompressedTable, layer: int, head: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """All rows of one head as `read_rows` gives them, in the order of its tiles."""
        return self.read_tiles(*table.tile_places(table.tiles_of(layer, head)))

    def read_tiles(
        self, pages: npt.NDArray[np.int64], tiles: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The rows of whole tiles at these places, as `read_rows` gives them."""
        where = self.to_device(pages), self.to_device(tiles)
        rows = self.codes[where].transpose(1, 2).reshape(-1, self.row_bytes)
        positions = self.positions[where].flatten().long() if self.positions is not None else None
        return rows, positions, self.scores[where].flatten() if self.scores is not None else None

    def to_device(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Numbers to index the views by; same shape."""
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device)
