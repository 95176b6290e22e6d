"""Attention of new tokens over compressed sequences, for a CPU: one call per layer, compiled by numba.

What is stored is decoded in registers on its way into the sums and never lies in memory as numbers. Stored rows are
met in the coordinates of their codec (see row_codecs.py): queries come rotated into them and outputs leave in them.
"""

# Letters: S sequences, T new tokens of all, Hk KV heads, G query heads of each, D, Dv key and value dimensions,
# Q = t * G queries of one sequence and KV head, n stored rows of a head, m raw entries (summary, sinks, tail).

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numba import njit

from swarm.kvpolicy import row_codecs
from swarm.server.engine import tile_vectors as vectors

__all__ = ["attend_tiles"]

# Columns of `sequences`.
FIRST_ROW: Final = 0
NUM_NEW: Final = 1
START: Final = 2
STORED_END: Final = 3
TILES: Final = 4
"""Where the sequence's [L, Hk, capacity] begin in `tiles`."""
CAPACITY: Final = 5
COUNTS: Final = 6
"""Where its [L, Hk] begin in `num_tiles` and `num_dropped`."""
TILE_PAGES: Final = 7
RAW_PAGES: Final = 8
NUM_COLUMNS: Final = 9

# Places of `sizes`.
PAGE_BYTES: Final = 0
ROW_BYTES: Final = 1
TILES_PER_PAGE: Final = 2
POSITIONS_AT: Final = 3
POSITION_BYTES: Final = 4
SLOTS_PER_PAGE: Final = 5
SLOTS_PER_LAYER: Final = 6
SLOT_BYTES: Final = 7
NUM_SINKS: Final = 8
TAIL_SLOTS: Final = 9
HAS_SUMMARY: Final = 10
RAW_IS_BFLOAT: Final = 11
IS_RAW_CODEC: Final = 12
KEY_DIM: Final = 13
VALUE_DIM: Final = 14
SCALES_AT: Final = 15
NUM_SIZES: Final = 16

# Columns of `planes`: bits of a code, first coordinate, bytes, first byte in the row, which of the row's scales.
_LOWEST: Final = np.float32(-1e30)
_LOG2E: Final = np.float32(1.4426950408889634)
_R: Final = vectors.ROWS

_score8_1, _score8_3, _score8_4 = (vectors.score_codes(8, count) for count in (1, 3, 4))
_score4_1, _score4_3, _score4_4 = (vectors.score_codes(4, count) for count in (1, 3, 4))
_score2_1, _score2_3, _score2_4 = (vectors.score_codes(2, count) for count in (1, 3, 4))
_score16_1, _score16_3, _score16_4 = (vectors.score_halves("float16", count) for count in (1, 3, 4))
_sum8_1, _sum8_3, _sum8_4 = (vectors.sum_codes(8, count) for count in (1, 3, 4))
_sum4_1, _sum4_3, _sum4_4 = (vectors.sum_codes(4, count) for count in (1, 3, 4))
_sum2_1, _sum2_3, _sum2_4 = (vectors.sum_codes(2, count) for count in (1, 3, 4))
_sum16_1, _sum16_3, _sum16_4 = (vectors.sum_halves("float16", count) for count in (1, 3, 4))
_half_16, _half_1 = (vectors.halves_to_floats("float16", width) for width in (16, 1))
_bfloat_16, _bfloat_1 = (vectors.halves_to_floats("bfloat16", width) for width in (16, 1))
_spread = vectors.spread_scales
_exp2 = vectors.exp2_rows

_compiled: Any = njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, error_model="numpy")


@_compiled
def _score_plane(width, num_queries, codes, num_bytes, queries, stride, scores):  # type: ignore[no-untyped-def]
    if num_queries == 3:
        if width == 4:
            _score4_3(codes, num_bytes, queries, stride, scores, 0)
        elif width == 2:
            _score2_3(codes, num_bytes, queries, stride, scores, 0)
        elif width == 8:
            _score8_3(codes, num_bytes, queries, stride, scores, 0)
        else:
            _score16_3(codes, num_bytes, queries, stride, scores, 0)
    elif num_queries == 1:
        if width == 4:
            _score4_1(codes, num_bytes, queries, stride, scores, 0)
        elif width == 2:
            _score2_1(codes, num_bytes, queries, stride, scores, 0)
        elif width == 8:
            _score8_1(codes, num_bytes, queries, stride, scores, 0)
        else:
            _score16_1(codes, num_bytes, queries, stride, scores, 0)
    elif width == 4:
        _score4_4(codes, num_bytes, queries, stride, scores, 0)
    elif width == 2:
        _score2_4(codes, num_bytes, queries, stride, scores, 0)
    elif width == 8:
        _score8_4(codes, num_bytes, queries, stride, scores, 0)
    else:
        _score16_4(codes, num_bytes, queries, stride, scores, 0)


@_compiled
def _sum_column(width, num_queries, tiles, count, column, weights, stride, sums):  # type: ignore[no-untyped-def]
    if num_queries == 3:
        if width == 4:
            _sum4_3(tiles, count, column, weights, stride, sums)
        elif width == 2:
            _sum2_3(tiles, count, column, weights, stride, sums)
        elif width == 8:
            _sum8_3(tiles, count, column, weights, stride, sums)
        else:
            _sum16_3(tiles, count, column, weights, stride, sums)
    elif num_queries == 1:
        if width == 4:
            _sum4_1(tiles, count, column, weights, stride, sums)
        elif width == 2:
            _sum2_1(tiles, count, column, weights, stride, sums)
        elif width == 8:
            _sum8_1(tiles, count, column, weights, stride, sums)
        else:
            _sum16_1(tiles, count, column, weights, stride, sums)
    elif width == 4:
        _sum4_4(tiles, count, column, weights, stride, sums)
    elif width == 2:
        _sum2_4(tiles, count, column, weights, stride, sums)
    elif width == 8:
        _sum8_4(tiles, count, column, weights, stride, sums)
    else:
        _sum16_4(tiles, count, column, weights, stride, sums)


@_compiled
def _to_floats(is_bfloat, halves, floats, count):  # type: ignore[no-untyped-def]
    whole = count // 16
    rest = count - 16 * whole
    if is_bfloat:
        _bfloat_16(halves, floats, whole, 0, 0, 0)
        _bfloat_1(halves + 32 * whole, floats + 64 * whole, rest, 0, 0, 0)
    else:
        _half_16(halves, floats, whole, 0, 0, 0)
        _half_1(halves + 32 * whole, floats + 64 * whole, rest, 0, 0, 0)


@_compiled
def _attend(  # type: ignore[no-untyped-def]
    slab,
    sizes,
    key_planes,
    value_planes,
    sequences,
    tiles,
    num_tiles,
    num_dropped,
    tile_pages,
    raw_pages,
    queries,
    raw_queries,
    sink_scores,
    outputs,
    raw_outputs,
    layer,
    window,
    softcap,
    first_task,
    end_task,
):
    """Outputs of tasks [first_task, end_task), a task being one KV head of one sequence: sequence * Hk + head.

    Args:
        slab: uint8 [bytes of all pages].
        sizes: int64 [NUM_SIZES].
        key_planes: int64 [planes, 5]; value_planes likewise, their bytes counted from the row's begin.
        sequences: int64 [S, NUM_COLUMNS].
        tiles: int32, num_tiles: int32, num_dropped: int64, tile_pages: int64, raw_pages: int64: all sequences' own,
            one behind the other.
        queries: float32 [Hk, T, G, D + 1], scaled, in code coordinates; last, what the codec's mean adds to the scores
            of stored rows.
        raw_queries: float32 [Hk, T, G, D], scaled, as they are.
        sink_scores: float32 [Hk * G] or [0].
        outputs: float32 [Hk, T, G, Dv + 1], zeros: filled in code coordinates; last, the share of the stored rows'
            weights, by which their mean counts.
        raw_outputs: float32 [Hk, T, G, Dv], zeros: what raw entries add.
        layer: row of the layer in the tables.
        window: positions a query sees, itself included; 0 for all.
        softcap: bound of the scores; 0 for none.
    """
    num_heads, group, dim = raw_queries.shape[0], raw_queries.shape[2], raw_queries.shape[3]
    value_dim = raw_outputs.shape[3]
    base = np.int64(slab.ctypes.data)
    page_bytes, row_bytes, per_page = sizes[PAGE_BYTES], sizes[ROW_BYTES], sizes[TILES_PER_PAGE]
    is_raw_codec, scales_at = sizes[IS_RAW_CODEC], sizes[SCALES_AT]
    num_sinks, tail_slots = sizes[NUM_SINKS], sizes[TAIL_SLOTS]
    max_rows = 0
    for task in range(first_task, end_task):
        sequence = sequences[task // num_heads]
        count = num_tiles[sequence[COUNTS] + layer * num_heads + task % num_heads]
        max_rows = max(max_rows, count * _R)
    max_raw = 1 + num_sinks + tail_slots
    # One more vector at the end, so that weights of raw entries fill whole vectors, too.
    row_room = max_rows + (max_raw + _R - 1) // _R * _R
    scores = np.zeros((4, row_room), dtype=np.float32)
    fine = np.zeros((4, max(max_rows, 1)), dtype=np.float32)
    coarse = np.zeros((4, max(max_rows, 1)), dtype=np.float32)
    addresses = np.empty(max(max_rows // _R, 1), dtype=np.int64)
    partial = np.empty((2, 4, _R), dtype=np.float32)
    spread = np.empty((4, _R), dtype=np.float32)
    sums = np.empty(16, dtype=np.float32)
    bound = np.empty(2, dtype=np.float32)
    raw_keys = np.empty((max_raw, dim), dtype=np.float32)
    raw_values = np.empty((max_raw, value_dim), dtype=np.float32)
    raw_positions = np.empty(max_raw, dtype=np.int64)
    chunk_queries = np.zeros((4, dim), dtype=np.float32)
    chunk_address = np.int64(chunk_queries.ctypes.data)
    score_address = np.int64(scores.ctypes.data)
    score_stride = np.int64(scores.strides[0])
    weight_stride = np.int64(fine.strides[0])
    partial_address = np.int64(partial.ctypes.data)
    spread_address = np.int64(spread.ctypes.data)
    sum_address = np.int64(sums.ctypes.data)
    bound_address = np.int64(bound.ctypes.data)
    tile_address = np.int64(addresses.ctypes.data)

    for task in range(first_task, end_task):
        sequence = sequences[task // num_heads]
        head = task % num_heads
        place = sequence[COUNTS] + layer * num_heads + head
        count = np.int64(num_tiles[place])
        num_rows = count * _R
        first_tile = sequence[TILES] + (layer * num_heads + head) * sequence[CAPACITY]
        for index in range(count):
            tile = np.int64(tiles[first_tile + index])
            page = tile_pages[sequence[TILE_PAGES] + tile // per_page]
            addresses[index] = base + page * page_bytes + tile % per_page * (_R * row_bytes)

        # Raw entries as numbers.
        num_new, start = sequence[NUM_NEW], sequence[START]
        end = start + num_new
        dropped = num_dropped[place] if sizes[HAS_SUMMARY] and window == 0 else 0
        num_raw = 0
        for entry in range(max_raw):
            if entry == 0:
                if dropped == 0:
                    continue
                position = np.int64(-1)
                slot = np.int64(0)
            elif entry <= num_sinks:
                position = np.int64(entry - 1)
                slot = np.int64(entry)
                if position >= end:
                    continue
            else:
                position = sequence[STORED_END] + entry - 1 - num_sinks
                if position >= end:
                    break
                slot = 1 + num_sinks + (position - num_sinks) % tail_slots
            number = layer * sizes[SLOTS_PER_LAYER] + slot
            page = raw_pages[sequence[RAW_PAGES] + number // sizes[SLOTS_PER_PAGE]]
            address = base + page * page_bytes + number % sizes[SLOTS_PER_PAGE] * sizes[SLOT_BYTES]
            row_keys, row_values = raw_keys[num_raw], raw_values[num_raw]
            _to_floats(sizes[RAW_IS_BFLOAT], address + 2 * head * dim, np.int64(row_keys.ctypes.data), dim)
            _to_floats(
                sizes[RAW_IS_BFLOAT],
                address + 2 * num_heads * dim + 2 * head * value_dim,
                np.int64(row_values.ctypes.data),
                value_dim,
            )
            raw_positions[num_raw] = position
            num_raw += 1
        num_entries = num_rows + num_raw
        num_vectors = (num_entries + _R - 1) // _R

        num_queries = num_new * group
        first_query = 0
        while first_query < num_queries:
            # Never of two tokens: sums for one, three or four queries differ in their last bits, and those of a token
            # shall not depend on how many others stand beside it.
            left = group - first_query % group
            # Three are common (nine heads over three, 24 over 8); the vectors are made for 1, 3 or 4.
            if left == 1:
                handled, padded = 1, 1
            elif left <= 3:
                handled, padded = left, 3
            else:
                handled, padded = 4, 4
            for query in range(padded):
                for column in range(dim):
                    chunk_queries[query, column] = 0
            for query in range(handled):
                row = sequence[FIRST_ROW] + (first_query + query) // group
                source = queries[head, row, (first_query + query) % group]
                for column in range(dim):
                    chunk_queries[query, column] = source[column]

            # Scores of stored rows.
            for index in range(count):
                partial[:] = 0
                codes = addresses[index]
                for plane in range(key_planes.shape[0]):
                    _score_plane(
                        key_planes[plane, 0],
                        padded,
                        codes + key_planes[plane, 3] * _R,
                        key_planes[plane, 2],
                        chunk_address + 4 * key_planes[plane, 1],
                        4 * dim,
                        partial_address + key_planes[plane, 4] * (16 * _R),
                    )
                if is_raw_codec:
                    for query in range(handled):
                        for row in range(_R):
                            scores[query, index * _R + row] = partial[0, query, row]
                else:
                    _spread(codes + scales_at * _R, 0, 0, spread_address, 0, 0)
                    _spread(codes + (scales_at + 1) * _R, 0, 0, spread_address + 4 * _R, 0, 0)
                    for query in range(handled):
                        for row in range(_R):
                            scores[query, index * _R + row] = (
                                partial[0, query, row] * spread[0, row] + partial[1, query, row] * spread[1, row]
                            )
            for query in range(handled):
                row = sequence[FIRST_ROW] + (first_query + query) // group
                in_group = (first_query + query) % group
                bias = queries[head, row, in_group, dim]
                position = start + (first_query + query) // group
                line = scores[query]
                raw_query = raw_queries[head, row, in_group]
                for index in range(num_rows):
                    line[index] += bias
                for entry in range(num_raw):
                    total = np.float32(0)
                    for column in range(dim):
                        total += raw_keys[entry, column] * raw_query[column]
                    line[num_rows + entry] = total
                if softcap > 0:
                    for index in range(num_entries):
                        line[index] = np.tanh(line[index] / softcap) * softcap
                for entry in range(num_raw):
                    if raw_positions[entry] < 0:
                        line[num_rows + entry] += np.log(np.float32(dropped))
                    elif raw_positions[entry] > position or (window and raw_positions[entry] <= position - window):
                        line[num_rows + entry] = _LOWEST
                if window:
                    width = sizes[POSITION_BYTES]
                    for index in range(count):
                        tile = np.int64(tiles[first_tile + index])
                        page = tile_pages[sequence[TILE_PAGES] + tile // per_page]
                        at = page * page_bytes + sizes[POSITIONS_AT] + tile % per_page * (_R * width)
                        for lane in range(_R):
                            stored = np.int64(slab[at + lane * width]) | np.int64(slab[at + lane * width + 1]) << 8
                            if width == 4:
                                stored |= np.int64(slab[at + lane * width + 2]) << 16
                                stored |= np.int64(slab[at + lane * width + 3]) << 24
                            if stored <= position - window:
                                line[index * _R + lane] = _LOWEST
                for index in range(num_entries, num_vectors * _R):
                    line[index] = _LOWEST
                largest = _LOWEST
                if sink_scores.shape[0]:
                    largest = sink_scores[head * group + in_group]
                for index in range(num_entries):
                    largest = max(largest, line[index])
                for index in range(num_vectors * _R):
                    line[index] *= _LOG2E
                bound[0] = largest * _LOG2E
                _exp2(score_address + query * score_stride, num_vectors, bound_address, bound_address + 4, 0, 0)
                total = bound[1]
                if sink_scores.shape[0]:
                    total += np.exp(sink_scores[head * group + in_group] - largest)
                share = np.float32(1) / total
                mass = np.float32(0)
                for index in range(num_entries):
                    line[index] *= share
                for index in range(num_rows):
                    mass += line[index]
                outputs[head, row, in_group, value_dim] = mass
                raw_output = raw_outputs[head, row, in_group]
                for entry in range(num_raw):
                    weight = line[num_rows + entry]
                    for column in range(value_dim):
                        raw_output[column] += weight * raw_values[entry, column]

            # Weighted sums of stored values.
            if count:
                if not is_raw_codec:
                    for index in range(count):
                        codes = addresses[index]
                        _spread(codes + (scales_at + 2) * _R, 0, 0, spread_address + 8 * _R, 0, 0)
                        _spread(codes + (scales_at + 3) * _R, 0, 0, spread_address + 12 * _R, 0, 0)
                        for query in range(handled):
                            for row in range(_R):
                                weight = scores[query, index * _R + row]
                                fine[query, index * _R + row] = weight * spread[2, row]
                                coarse[query, index * _R + row] = weight * spread[3, row]
                for plane in range(value_planes.shape[0]):
                    width, first, num_bytes = value_planes[plane, 0], value_planes[plane, 1], value_planes[plane, 2]
                    if is_raw_codec:
                        weights, stride = score_address, score_stride
                    elif value_planes[plane, 4]:
                        weights, stride = np.int64(coarse.ctypes.data), weight_stride
                    else:
                        weights, stride = np.int64(fine.ctypes.data), weight_stride
                    step = 2 if width == 16 else 1
                    lanes = 1 if width == 16 else 8 // width
                    for byte in range(num_bytes):
                        column = (value_planes[plane, 3] + step * byte) * _R
                        _sum_column(width, padded, tile_address, count, column, weights, stride, sum_address)
                        for query in range(handled):
                            row = sequence[FIRST_ROW] + (first_query + query) // group
                            output = outputs[head, row, (first_query + query) % group]
                            for lane in range(lanes):
                                output[first + lane * num_bytes + byte] += sums[lane * padded + query]
            first_query += handled


def _fingerprint() -> int:
    """Of everything that the machine code is made from: code kept on disk must not outlive a change to any of it."""
    digest = hashlib.sha256()
    for path in (__file__, vectors.__file__, row_codecs.__file__):
        digest.update(Path(path).read_bytes())
    return int.from_bytes(digest.digest()[:4], "big") | 1


def _compile_entry() -> Any:
    """`_attend`, compiled at its first call, and kept on disk for the next start where that can be."""
    try:
        fingerprint = _fingerprint()

        def attend_tiles(*arguments):  # type: ignore[no-untyped-def]
            if fingerprint:  # read here, it becomes part of the name under which the code is kept
                _attend(*arguments)

        return njit(nogil=True, error_model="numpy", cache=True)(attend_tiles)
    except (OSError, RuntimeError):  # no sources to be read, or no place that can be written to
        return _attend


attend_tiles = _compile_entry()
"""Takes what `_attend` does; releases the interpreter's lock."""
