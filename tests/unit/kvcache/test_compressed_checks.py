"""What a compressed sequence is said to hold, before anybody believes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from swarm.errors import BadInputError
from swarm.kvcache.compressed_checks import check_states, check_tail, drop_idle_pages
from swarm.kvcache.compressed_layout import CompressedLayout, plan_layout
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvcache.footprint import Footprint, position_bytes_for
from swarm.kvpolicy.budget import default_curve
from swarm.kvpolicy.settings import find_policy
from swarm.kvpolicy.streaming import TailState, advance, new_tail
from tests.compressed_states import make_state, number_pages

LAYERS, HEADS, DIM, PAGE_BYTES, ROW_BYTES = 4, 2, 16, 2048, 18
WINDOWS = {1: 40}


def terms(preset: str, windows: dict[int, int] | None = None) -> tuple[CompressedLayout, Footprint]:
    policy = find_policy(preset)
    shapes: dict[str, Any] = {"num_kv_heads": HEADS, "key_dim": DIM, "value_dim": DIM, "row_bytes": ROW_BYTES}
    footprint = Footprint(
        policy=policy,
        curve=default_curve(LAYERS, HEADS),
        layers=tuple(range(LAYERS)),
        page_bytes=PAGE_BYTES,
        max_positions=4096,
        windows=windows or {},
        **shapes,
    )
    layout = plan_layout(
        policy,
        page_bytes=PAGE_BYTES,
        num_layers=LAYERS,
        position_bytes=position_bytes_for(policy, max_positions=4096, has_windows=bool(windows)),
        has_scores=policy.pruning is not None,
        **shapes,
    )
    return layout, footprint


def check(states: dict[int, CompressedState], layout: CompressedLayout, footprint: Footprint, num_pages: int) -> None:
    check_states(states.values(), layout, footprint, first_layer=0, num_pages=num_pages)


@pytest.mark.parametrize("preset", ["pyramid", "gear", "pyramid+gear", "smallest", "pyramidinfer", "gear-2bit"])
@pytest.mark.parametrize("windows", [{}, WINDOWS])
@pytest.mark.parametrize(
    ("length", "compressed_at"), [(1, None), (20, None), (52, 52), (60, 52), (700, 700), (708, 700)]
)
def test_what_can_be_is_accepted(preset: str, windows: dict[int, int], length: int, compressed_at: int | None) -> None:
    """A check that refuses honest sessions costs their clients a replay."""
    layout, footprint = terms(preset, windows)
    states = {0: make_state(layout, footprint, length, compressed_at=compressed_at)}
    check(states, layout, footprint, number_pages(states))


def test_forks_may_share_pages() -> None:
    """Beams hold most of what they hold together."""
    layout, footprint = terms("pyramid+gear")
    state = make_state(layout, footprint, 700)
    own = state.tile_pages.copy()
    own[-1] = own[-1] + 1
    check({0: state, 1: replace(state, tile_pages=own)}, layout, footprint, number_pages({0: state}) + 1)


def _wrong_tiles(change: Callable[[CompressedState], Any]) -> Callable[[CompressedState], CompressedState]:
    def made(state: CompressedState) -> CompressedState:
        copied = replace(
            state,
            tiles=state.tiles.copy(),
            num_tiles=state.num_tiles.copy(),
            num_dropped=state.num_dropped.copy(),
            raw_pages=state.raw_pages.copy(),
            tile_pages=state.tile_pages.copy(),
        )
        changed = change(copied)
        return changed if isinstance(changed, CompressedState) else copied

    return made


def _put(array: str, place: Any, value: int) -> Callable[[CompressedState], CompressedState]:
    return _wrong_tiles(lambda state: getattr(state, array).__setitem__(place, value))


def _swap_rows(state: CompressedState) -> CompressedState:
    """A head that stores one tile more than its budget, and has dropped as much less."""
    tiles = np.concatenate((state.tiles, np.zeros_like(state.tiles[..., :1])), axis=2)
    used = int(state.num_tiles[0, 0])
    tiles[0, 0, used] = tiles[0, 1, int(state.num_tiles[0, 1]) - 1]
    num_tiles, num_dropped = state.num_tiles.copy(), state.num_dropped.copy()
    num_tiles[0] += np.array([1, -1], dtype=np.int32)
    num_dropped[0] += np.array([-16, 16])
    return replace(state, tiles=tiles, num_tiles=num_tiles, num_dropped=num_dropped)


WRONG: dict[str, Callable[[CompressedState], CompressedState]] = {
    "nothing held": lambda state: replace(state, length=0, staged_start=0, input_start=0),
    "inside an input": lambda state: replace(state, tail=replace(state.tail, is_staging=True)),
    "staged pages": lambda state: replace(state, staged_pages=np.zeros((LAYERS, 1), dtype=np.int64)),
    "staged since": lambda state: replace(state, staged_start=5),
    "an end that is no whole block": lambda state: replace(state, tail=TailState(661, compressed_at=700)),
    "an end of another length": lambda state: replace(state, tail=TailState(676, compressed_at=690)),
    "an event in the future": lambda state: replace(state, tail=TailState(692, compressed_at=716)),
    "a tail that is too long": lambda state: replace(state, tail=TailState(628, compressed_at=660)),
    "an event without stored tokens": lambda state: replace(state, tail=TailState(4, compressed_at=700)),
    "stored tokens without an event": lambda state: replace(state, tail=TailState(676)),
    "a budget exceeded": _swap_rows,
    "a negative count": _put("num_tiles", (1, 1), -1),
    "a count of 2^31": _put("num_tiles", (1, 1), 2**31 - 1),
    "fewer tiles than rows": lambda state: replace(state, num_tiles=state.num_tiles[:-1]),
    "one layer less": lambda state: replace(state, num_dropped=state.num_dropped[:-1]),
    "one head less": lambda state: replace(state, tiles=state.tiles[:, :1]),
    "dropped too many": _put("num_dropped", (1, 1), 10**6),
    "dropped too few": _put("num_dropped", (1, 1), 1),
    "dropped less than none": _put("num_dropped", (1, 1), -1),
    "a tile that is not there": _put("tiles", (0, 0, 0), 10**6),
    "a tile before the first": _put("tiles", (0, 0, 0), -1),
    "a tile twice": _wrong_tiles(lambda state: state.tiles.__setitem__((0, 0, 0), state.tiles[1, 1, 0])),
    "no slots": lambda state: replace(state, raw_pages=state.raw_pages[:0]),
    "too many slots": lambda state: replace(state, raw_pages=np.append(state.raw_pages, 99)),
    "an idle page": lambda state: replace(state, tile_pages=np.append(state.tile_pages, state.tile_pages[-1] + 1)),
    "a page missing": lambda state: replace(state, tile_pages=state.tile_pages[:-1]),
    "a page twice": _wrong_tiles(lambda state: state.tile_pages.__setitem__(0, state.tile_pages[1])),
    "a page for two purposes": _wrong_tiles(lambda state: state.tile_pages.__setitem__(0, state.raw_pages[0])),
    "a page beyond": _wrong_tiles(lambda state: state.tile_pages.__setitem__(0, 10**6)),
    "a page before": _wrong_tiles(lambda state: state.raw_pages.__setitem__(0, -1)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_can_not_be_is_refused(wrong: Callable[[CompressedState], CompressedState]) -> None:
    """A table is followed by compiled code that checks no address."""
    layout, footprint = terms("pyramid+gear")
    state = make_state(layout, footprint, 700)
    states = {0: wrong(state)}
    for num_pages in {number_pages({0: state}), number_pages(states)}:
        with pytest.raises(BadInputError):
            check(states, layout, footprint, num_pages)


@pytest.mark.parametrize("num_pages", [0, -1, 1])
def test_all_pages_are_somebodys(num_pages: int) -> None:
    """Memory is taken for as many as are announced."""
    layout, footprint = terms("pyramid+gear")
    states = {0: make_state(layout, footprint, 700)}
    with pytest.raises(BadInputError):
        check(states, layout, footprint, number_pages(states) + num_pages if num_pages else 0)


def test_two_sequences_use_a_page_alike() -> None:
    """Slots of one would be tiles of the other, or other tokens' slots."""
    layout, footprint = terms("pyramid+gear")
    state = make_state(layout, footprint, 700)
    num_pages = number_pages({0: state})
    moved = replace(state, raw_pages=state.raw_pages[::-1].copy())
    exchanged = replace(
        state,
        raw_pages=np.concatenate((state.tile_pages[:1], state.raw_pages[1:])),
        tile_pages=np.concatenate((state.raw_pages[:1], state.tile_pages[1:])),
    )
    for other in (moved, exchanged):
        with pytest.raises(BadInputError, match="two purposes"):
            check({0: state, 1: other}, layout, footprint, num_pages)


def test_a_window_holds_what_it_must() -> None:
    """Events count on all heads of such a layer holding the same positions."""
    layout, footprint = terms("pyramid+gear", WINDOWS)
    state = make_state(layout, footprint, 700)
    num_tiles = state.num_tiles.copy()
    num_tiles[1, 1] -= 1
    with pytest.raises(BadInputError, match="window"):
        check({0: replace(state, num_tiles=num_tiles)}, layout, footprint, number_pages({0: state}))


def test_a_policy_that_drops_nothing_holds_everything() -> None:
    """Else answers would silently forget."""
    layout, footprint = terms("gear")
    state = make_state(layout, footprint, 700)
    num_tiles = state.num_tiles.copy()
    num_tiles[2, 1] -= 1
    with pytest.raises(BadInputError, match="drops none"):
        check({0: replace(state, num_tiles=num_tiles)}, layout, footprint, number_pages({0: state}))


@pytest.mark.parametrize(
    "steps", [[5], [36], [37], [30, 1, 1, 1, 1, 1, 1, 1, 1], [300, 1, 16, 20, 1], [2048, 7, 2000, 3]]
)
def test_tails_that_inputs_lead_to_are_accepted(steps: list[int]) -> None:
    """The check follows the streaming rule, not a guess at it."""
    policy = find_policy("pyramid+gear")
    tail, length = new_tail(policy), 0
    for count in steps:
        tail = advance(policy, tail, length, count, is_unfinished=False)
        length += count
        check_tail(policy, length, tail)


def test_idle_pages_are_left_out() -> None:
    """Room that nothing is in need not travel, and a receiver takes no memory for it."""
    layout, footprint = terms("pyramid+gear")
    state = make_state(layout, footprint, 700)
    per_page = layout.tiles_per_page
    # As after tiles were given back in the middle: two pages more, one before all others and one between.
    moved = state.tiles + per_page * (1 + (state.tiles >= 2 * per_page))
    pages = np.insert(state.tile_pages, [0, 2], [97, 98])
    tiles = np.where(np.arange(state.tiles.shape[2]) < state.num_tiles[..., None], moved, 0).astype(np.int32)
    made = drop_idle_pages(replace(state, tiles=tiles, tile_pages=pages), layout)
    assert (made.tile_pages == state.tile_pages).all()
    assert (made.tiles == state.tiles).all()
    assert drop_idle_pages(state, layout) is state
