"""The compiled attention over compressed sequences as the engine calls it: what it needs, gathered once a step."""

# Letters: S sequences, R new tokens of all, Hq, Hk query and KV heads, G = Hq / Hk, D, Dv key and value dimensions.

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from swarm.kvpolicy.row_codecs import RawCodec, TokenCodec

if TYPE_CHECKING:
    from swarm.kvpolicy.layer_settings import LayerSettings
    from swarm.kvpolicy.packing import BitLayout
    from swarm.server.engine.attention_kind import AttentionKind
    from swarm.server.engine.compressed_attention import CompressedSlice
    from swarm.server.engine.compressed_layers import CodedLayer
    from swarm.server.engine.compressed_store import CompressedStore

__all__ = ["TileAttention", "TileStep", "load_tile_attention"]

logger = logging.getLogger(__name__)
_TILE_ROWS: Final = 16
_WIDTHS: Final = (2, 4, 8)
_BLOCK_ROWS: Final = 16
"""Rows of a product with a head's turning matrix: a decoding token of 16 query heads to a KV head still fits one."""
_MIN_SHARED_ROWS: Final = 512
"""Stored rows of a layer, all sequences' heads together, below which a second thread costs more than it saves."""


def load_tile_attention(store: CompressedStore, settings: Sequence[LayerSettings]) -> TileAttention | None:
    """None where the kernel can not serve this store; then the same is done step by step with torch."""
    if store.device.type != "cpu" or store.layout.tile_rows != _TILE_ROWS:
        return None
    planes = _planes_of(settings)
    if planes is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from swarm.server.engine import tile_kernel
    except ImportError as error:
        logger.warning("compressed sessions decode slowly here: %s; `pip install numba` makes them fast", error)
        return None
    return TileAttention(tile_kernel, store, settings, *planes)


def _planes_of(
    settings: Sequence[LayerSettings],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int] | None:
    """Planes of keys and of values, and where a row's scales begin; None if layers differ or widths are unusual."""
    codec = settings[0].codec
    if isinstance(codec, RawCodec):
        keys = np.array([[16, 0, codec.key_dim, 0, 0]], dtype=np.int64)
        values = np.array([[16, 0, codec.value_dim, 2 * codec.key_dim, 0]], dtype=np.int64)
        return keys, values, 0
    if not isinstance(codec, TokenCodec):
        return None
    layouts = codec.key_layout, codec.value_layout
    for other in settings:
        if not isinstance(other.codec, TokenCodec):
            return None
        others = other.codec.key_layout, other.codec.value_layout
        if any(left.widths != right.widths for left, right in zip(layouts, others, strict=True)):
            return None
    if any(width not in (0, *_WIDTHS) for layout in layouts for width in layout.widths):
        return None
    middle = layouts[0].num_bytes
    return _planes(layouts[0], 0), _planes(layouts[1], middle), middle + layouts[1].num_bytes


def _planes(layout: BitLayout, first_byte: int) -> npt.NDArray[np.int64]:
    """[planes, 5]: see tile_kernel.py."""
    rows = []
    for width in _WIDTHS[::-1]:
        count = layout.widths.count(width)
        if count:
            num_bytes = count * width // 8
            rows.append([width, layout.widths.index(width), num_bytes, first_byte, int(width <= 2)])
            first_byte += num_bytes
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


class TileAttention:
    """The kernel for one store."""

    def __init__(
        self,
        kernel: Any,
        store: CompressedStore,
        settings: Sequence[LayerSettings],
        key_planes: npt.NDArray[np.int64],
        value_planes: npt.NDArray[np.int64],
        scales_at: int,
    ) -> None:
        """`kernel` is the module tile_kernel."""
        self.kernel = kernel
        self.key_planes, self.value_planes = key_planes, value_planes
        layout = store.layout
        pruning = store.policy.pruning
        sizes = np.zeros(kernel.NUM_SIZES, dtype=np.int64)
        sizes[kernel.PAGE_BYTES] = store.page_bytes
        sizes[kernel.ROW_BYTES] = store.row_bytes
        sizes[kernel.TILES_PER_PAGE] = layout.tiles_per_page
        sizes[kernel.POSITIONS_AT] = store.position_offset
        sizes[kernel.POSITION_BYTES] = store.position_dtype.itemsize if store.position_dtype is not None else 0
        sizes[kernel.SLOTS_PER_PAGE] = layout.slots_per_page
        sizes[kernel.SLOTS_PER_LAYER] = layout.slots_per_layer
        sizes[kernel.SLOT_BYTES] = 2 * store.num_kv_heads * (store.key_dim + store.value_dim)
        sizes[kernel.NUM_SINKS] = layout.num_sinks
        sizes[kernel.TAIL_SLOTS] = layout.tail_slots
        sizes[kernel.HAS_SUMMARY] = pruning is not None and pruning.has_summary
        sizes[kernel.RAW_IS_BFLOAT] = store.raw_dtype is torch.bfloat16
        sizes[kernel.IS_RAW_CODEC] = isinstance(settings[0].codec, RawCodec)
        sizes[kernel.SCALES_AT] = scales_at
        self.sizes = sizes
        self.num_kv_heads, self.value_dim = store.num_kv_heads, store.value_dim
        self.slab: npt.NDArray[np.uint8] = store.bytes.numpy().reshape(-1)
        self._threads: ThreadPoolExecutor | None = None

    def plan(self, slices: Sequence[CompressedSlice]) -> TileStep:
        """What is the same in all layers of a step."""
        return TileStep(self, slices)

    @property
    def threads(self) -> ThreadPoolExecutor | None:
        """Threads beside the engine's own, as many as torch uses; None for none."""
        if self._threads is None and torch.get_num_threads() > 1:
            self._threads = ThreadPoolExecutor(torch.get_num_threads() - 1, thread_name_prefix="swarm-tiles")
        return self._threads


class TileStep:
    """Sequences whose new tokens stand in slots, for one step."""

    def __init__(self, attention: TileAttention, slices: Sequence[CompressedSlice]) -> None:
        kernel = attention.kernel
        self._attention = attention
        tables = [part.sequence.table for part in slices]
        self._sequences = np.zeros((len(slices), kernel.NUM_COLUMNS), dtype=np.int64)
        first_row = tiles_at = counts_at = tile_pages_at = raw_pages_at = 0
        for columns, part, table in zip(self._sequences, slices, tables, strict=True):
            columns[kernel.FIRST_ROW] = first_row
            columns[kernel.NUM_NEW] = part.num_new
            columns[kernel.START] = part.part.start
            columns[kernel.STORED_END] = table.tail.stored_end
            columns[kernel.TILES] = tiles_at
            columns[kernel.CAPACITY] = table.tiles.shape[2]
            columns[kernel.COUNTS] = counts_at
            columns[kernel.TILE_PAGES] = tile_pages_at
            columns[kernel.RAW_PAGES] = raw_pages_at
            first_row += part.num_new
            tiles_at += table.tiles.size
            counts_at += table.num_tiles.size
            tile_pages_at += len(table.tile_pages)
            raw_pages_at += len(table.raw_pages)
        self._num_rows = first_row
        self._tiles = _join([table.tiles for table in tables])
        self._num_tiles = _join([table.num_tiles for table in tables])
        self._num_dropped = _join([table.num_dropped for table in tables])
        self._tile_pages = _join([table.tile_pages for table in tables])
        self._raw_pages = _join([table.raw_pages for table in tables])
        self._borders = self._share_out(tables)

    def _share_out(self, tables: Sequence[Any]) -> list[tuple[int, int]]:
        """Which tasks (sequence and KV head) each thread does; about equally many tiles of the whole step each."""
        num_heads = self._attention.num_kv_heads
        weights = np.concatenate([table.num_tiles.sum(axis=0) + table.num_tiles.shape[0] for table in tables])
        num_layers = tables[0].num_tiles.shape[0]
        threads = self._attention.threads
        num_parts = 1
        if threads is not None and _TILE_ROWS * weights.sum() >= _MIN_SHARED_ROWS * num_layers:
            num_parts = min(torch.get_num_threads(), len(weights))
        assert len(weights) == len(tables) * num_heads
        cuts = np.searchsorted(np.cumsum(weights), weights.sum() * np.arange(1, num_parts) / num_parts) + 1
        borders = [0, *cuts.tolist(), len(weights)]
        return [(first, end) for first, end in itertools.pairwise(borders) if end > first]

    def attend(self, row: int, kind: AttentionKind, layer: CodedLayer, query: torch.Tensor) -> torch.Tensor:
        """Queries [Hq, R, D] of one layer to outputs [Hq, R, Dv] float32; `row` is the layer in the tables."""
        attention = self._attention
        num_heads, num_rows = attention.num_kv_heads, self._num_rows
        dim, value_dim = query.shape[2], attention.value_dim
        raw = query.float().reshape(num_heads, -1, num_rows, dim).transpose(1, 2) * kind.scale(dim)
        raw = raw.contiguous()
        group = raw.shape[2]
        turned = _multiply_in_blocks(raw.view(num_heads, -1, dim), layer.query_turn)
        coded_outputs = torch.zeros(num_heads, num_rows * group, value_dim + 1)
        raw_outputs = torch.zeros(num_heads, num_rows * group, value_dim)
        sinks = kind.sinks.detach().float().numpy() if kind.sinks is not None else _NO_SINKS
        arguments: tuple[Any, ...] = (
            attention.slab,
            attention.sizes,
            attention.key_planes,
            attention.value_planes,
            self._sequences,
            self._tiles,
            self._num_tiles,
            self._num_dropped,
            self._tile_pages,
            self._raw_pages,
            turned.reshape(num_heads, num_rows, group, dim + 1).numpy(),
            raw.numpy(),
            sinks,
            coded_outputs.view(num_heads, num_rows, group, value_dim + 1).numpy(),
            raw_outputs.view(num_heads, num_rows, group, value_dim).numpy(),
            row,
            kind.window,
            float(kind.softcap or 0.0),
        )
        run = attention.kernel.attend_tiles
        others: list[Future[None]] = []
        if attention.threads is not None:
            others = [attention.threads.submit(partial(run, *arguments, *border)) for border in self._borders[1:]]
        run(*arguments, *self._borders[0])
        for other in others:
            other.result()
        outputs = raw_outputs + _multiply_in_blocks(coded_outputs, layer.output_turn)
        return outputs.view(num_heads, num_rows, group, value_dim).transpose(1, 2).reshape(-1, num_rows, value_dim)


def _multiply_in_blocks(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[Hk, n, D] times [Hk, D, E] in products of always as many rows, so that their number changes no bit of any."""
    num_rows = rows.shape[1]
    room = -num_rows % _BLOCK_ROWS
    if room:
        rows = functional.pad(rows, (0, 0, 0, room))
    if num_rows <= _BLOCK_ROWS:
        return torch.bmm(rows, matrices)[:, :num_rows]
    products = [torch.bmm(block.contiguous(), matrices) for block in rows.split(_BLOCK_ROWS, dim=1)]
    return torch.cat(products, dim=1)[:, :num_rows]


_NO_SINKS: Final = np.zeros(0, dtype=np.float32)


def _join(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """All numbers, one array behind the other."""
    return np.concatenate([array.reshape(-1) for array in arrays])
