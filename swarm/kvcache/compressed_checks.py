"""Whether what somebody says of a compressed sequence can be true, and makes sense here. Pure; numpy only."""

# Letters: L layers of the sequence, Hk KV heads.

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from swarm.errors import BadInputError
from swarm.kvcache.compressed_state import CompressedState
from swarm.kvpolicy.budget import count_kept
from swarm.kvpolicy.streaming import TailState, tail_capacity, tail_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from swarm.kvcache.compressed_layout import CompressedLayout
    from swarm.kvcache.footprint import Footprint
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["check_states", "check_tail", "drop_idle_pages"]


def check_tail(policy: KVPolicy, length: int, tail: TailState) -> None:
    """Raises BadInputError unless a sequence of `length` tokens that stands in no input can be in this state."""
    sinks = policy.num_sinks
    is_new = tail.stored_end == sinks and not tail.compressed_at
    is_compressed = tail.compressed_at > 0 and sinks < tail.stored_end == tail_start(policy, tail.compressed_at)
    if tail.is_staging or not (is_new or is_compressed) or tail.compressed_at > length:
        raise BadInputError(
            f"a sequence of {length} positions can not have been compressed up to {tail.stored_end} when it had "
            f"{tail.compressed_at}"
        )
    if length - tail.stored_end > tail_capacity(policy):
        raise BadInputError(
            f"{length - tail.stored_end} newest positions do not fit the {tail_capacity(policy)} that stay uncompressed"
        )


def check_states(
    states: Iterable[CompressedState],
    layout: CompressedLayout,
    footprint: Footprint,
    *,
    first_layer: int,
    num_pages: int,
) -> None:
    """Raises BadInputError unless sequences of one session can be in these states, and no page is wasted.

    Nothing may be staged. Together they use all pages from 0 to `num_pages` - 1, each for one purpose; sequences may
    share. Of every page of tiles each sequence that has it uses at least one.

    Args:
        states: every number in them is the other side's.
        layout: of sequences in the layers of the states.
        footprint: of these layers at least.
        first_layer: absolute, of the states' layer 0.
    """
    budgets = _Budgets(footprint, range(first_layer, first_layer + layout.num_layers))
    states = list(states)
    for state in states:
        _check_state(state, layout, budgets)
    _check_pages(states, num_pages)


def _check_state(state: CompressedState, layout: CompressedLayout, budgets: _Budgets) -> None:
    if state.length < 1 or state.staged_pages.size or not state.staged_start == state.input_start == state.length:
        raise BadInputError("a sequence that stands inside an input, or holds nothing, can not be taken over")
    check_tail(budgets.policy, state.length, state.tail)
    heads = (layout.num_layers, layout.num_kv_heads)
    if state.num_tiles.shape != heads or state.num_dropped.shape != heads or state.tiles.shape[:2] != heads:
        raise BadInputError(f"the tables of a sequence in {heads[0]} layers of {heads[1]} KV heads have other sizes")
    budgets.check(state)
    if len(state.raw_pages) != layout.num_raw_pages:
        raise BadInputError(
            f"a sequence in {heads[0]} layers takes {layout.num_raw_pages} pages of 16-bit tokens, not "
            f"{len(state.raw_pages)}"
        )
    _check_tiles(state, layout)
    pages = np.concatenate((state.raw_pages, state.tile_pages))
    if len(np.unique(pages)) != len(pages):
        raise BadInputError("a sequence uses a page twice")


class _Budgets:
    """What heads of some layers store of the tokens that have left the tail."""

    def __init__(self, footprint: Footprint, layers: Sequence[int]) -> None:
        self.policy = footprint.policy
        self._footprint = footprint
        self._layers = layers
        self._windows = np.array([footprint.windows.get(layer, 0) for layer in layers], dtype=np.int64)[:, None]
        """[L, 1] positions; 0 for none."""
        self._most_rows: dict[int, npt.NDArray[np.int64]] = {}
        """[L, Hk] by how many tokens have left."""

    def check(self, state: CompressedState) -> None:
        """Raises BadInputError unless each head stores what it may, and with what it has dropped that is all."""
        policy, block = self.policy, self.policy.block_tokens
        num_leaving = state.tail.stored_end - policy.num_sinks
        num_rows = state.num_tiles.astype(np.int64) * block
        most = self._most(num_leaving)
        if (num_rows < 0).any() or (num_rows > most).any():
            raise BadInputError(f"a KV head stores more of {num_leaving} positions than its budget, or less than none")
        # Nothing is chosen in a window: what a later query sees is there.
        num_gone = np.maximum(state.tail.compressed_at - self._windows + 1 - policy.num_sinks, 0) // block * block
        in_window = np.maximum(num_leaving - num_gone, 0)
        if ((self._windows > 0) & (num_rows != in_window)).any():
            raise BadInputError(f"a KV head does not store the positions of its window, of {num_leaving}")
        if policy.pruning is None and ((self._windows == 0) & (num_rows != num_leaving)).any():
            raise BadInputError(f"a KV head lacks some of {num_leaving} positions, though its policy drops none")
        has_summary = (self._windows == 0) & (policy.pruning is not None and policy.pruning.has_summary)
        if (state.num_dropped != np.where(has_summary, num_leaving - num_rows, 0)).any():
            raise BadInputError(f"what a KV head stores and what it has dropped are not the {num_leaving} there were")

    def _most(self, num_leaving: int) -> npt.NDArray[np.int64]:
        if num_leaving not in self._most_rows:
            self._most_rows[num_leaving] = np.array(
                [
                    [self._count(layer, head, num_leaving) for head in range(self._footprint.num_kv_heads)]
                    for layer in self._layers
                ],
                dtype=np.int64,
            )
        return self._most_rows[num_leaving]

    def _count(self, layer: int, head: int, num_leaving: int) -> int:
        if self._footprint.windows.get(layer):
            return num_leaving
        return count_kept(self.policy, self._footprint.curve, layer, head, num_leaving)


def _check_tiles(state: CompressedState, layout: CompressedLayout) -> None:
    """Every tile is one of those in the pages and used once, and no page is there for nothing."""
    used = state.used_tiles()
    num_tiles = len(state.tile_pages) * layout.tiles_per_page
    if len(used) and not 0 <= int(used.min()) <= int(used.max()) < num_tiles:
        raise BadInputError(f"a tile is named that is none of the {num_tiles} there are")
    if len(np.unique(used)) != len(used):
        raise BadInputError("a tile is used twice")
    if len(np.unique(used // layout.tiles_per_page)) != len(state.tile_pages):
        raise BadInputError("a page is offered of which no tile is used")


def _check_pages(states: Sequence[CompressedState], num_pages: int) -> None:
    # A page of slots stands at the same place in all forks; one of tiles may have moved up when an idle one went.
    pages = [part for state in states for part in (state.raw_pages, state.tile_pages)]
    places = [
        part
        for state in states
        for part in (np.arange(len(state.raw_pages)), np.full(len(state.tile_pages), -1, dtype=np.int64))
    ]
    held = np.stack((np.concatenate(pages), np.concatenate(places))) if pages else np.zeros((2, 0), dtype=np.int64)
    numbers = np.unique(held[0])
    if len(numbers) != num_pages or (num_pages and not 0 == numbers[0] <= numbers[-1] == num_pages - 1):
        raise BadInputError(f"{num_pages} pages are offered, of which sequences hold {len(numbers)}, or others")
    if len(np.unique(held, axis=1).T) != num_pages:
        raise BadInputError("a page is used for two purposes")


def drop_idle_pages(state: CompressedState, layout: CompressedLayout) -> CompressedState:
    """The same sequence without the pages of which it uses no tile; its tiles have other numbers then."""
    used = state.used_tiles()
    kept = np.unique(used // layout.tiles_per_page)
    if len(kept) == len(state.tile_pages):
        return state
    moved = np.zeros(len(state.tile_pages), dtype=np.int32)
    moved[kept] = np.arange(len(kept), dtype=np.int32)
    columns = np.arange(state.tiles.shape[2])
    index, within = np.divmod(state.tiles, layout.tiles_per_page)
    tiles = np.where(columns < state.num_tiles[..., None], moved[index] * layout.tiles_per_page + within, 0)
    return replace(state, tiles=tiles.astype(np.int32), tile_pages=state.tile_pages[kept].copy())
