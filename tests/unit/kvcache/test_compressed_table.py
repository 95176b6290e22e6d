"""Compressed tables own exactly the pages and tiles they say, and writing never touches what a fork sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.kvcache.compressed_layout import CompressedLayout, fit_page_bytes, plan_layout, slot_bytes, tile_bytes
from swarm.kvcache.compressed_table import CompressedTable
from swarm.kvcache.page_pool import OutOfPagesError, PagePool
from swarm.kvcache.page_table import PageCopy
from swarm.kvcache.staged_notes import NO_NOTES, StagedNotes
from swarm.kvpolicy.settings import KVPolicy, PruningSettings
from swarm.kvpolicy.streaming import next_cut, settle, tail_capacity

POLICY = KVPolicy(
    name="pyramid",
    preset="test",
    pruning=PruningSettings(keep_ratio=0.5, recent_tokens=8),
    num_sinks=2,
    block_tokens=4,
    tail_tokens=4,
    chunk_tokens=32,
)
PAGE_TOKENS = 4
LAYOUT = CompressedLayout(
    num_layers=2,
    num_kv_heads=2,
    tile_rows=4,
    tiles_per_page=3,
    slots_per_page=7,
    num_sinks=POLICY.num_sinks,
    tail_slots=tail_capacity(POLICY),
)
NOTES = StagedNotes(page_bytes=100, score_bytes=3, query_bytes=20, max_queries=8)


class Pages:
    """Labels in place of contents: each tile and slot holds the number of who wrote it last."""

    def __init__(self, num_pages: int) -> None:
        self.cells = np.zeros((num_pages, 16), dtype=np.int64)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        self.cells[[copy.target for copy in copies]] = self.cells[[copy.source for copy in copies]]

    def tile_cells(self, table: CompressedTable) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return table.tile_places(table.state().tiles)


class Owner:
    """A table, and what its cells must hold."""

    def __init__(self, table: CompressedTable) -> None:
        self.table = table
        self.label = 0
        self.tile_label = 0


def write_ring(pages: Pages, owner: Owner, label: int) -> None:
    pages.cells[owner.table.raw_pages] = owner.label = label


def compress(pages: Pages, owner: Owner, length: int, label: int) -> None:
    """An event that brings every head to a tile for every second block, as a server's would."""
    table = owner.table
    tail = settle(POLICY, replace(table.tail, is_staging=False), length)
    if tail.stored_end == table.tail.stored_end:
        return
    pages.copy(table.own_raw_pages())
    write_ring(pages, owner, label)
    wanted = num_tiles_at(tail.stored_end)
    pages.copy(table.own_tile_pages())
    table.add_tiles((wanted - table.num_tiles).astype(np.int32))
    pages.cells[pages.tile_cells(table)] = owner.tile_label = label
    table.num_dropped += 1
    table.tail = replace(tail, is_staging=table.tail.is_staging)


def num_tiles_at(stored_end: int) -> npt.NDArray[np.int32]:
    half = (stored_end - POLICY.num_sinks) // POLICY.block_tokens // 2 + 1
    return np.array([[half, half + 1], [1, half]], dtype=np.int32)


def most_new_tiles(table: CompressedTable, length: int) -> int:
    tail = settle(POLICY, replace(table.tail, is_staging=False), length)
    return int((num_tiles_at(tail.stored_end) - table.num_tiles).sum()) if tail != table.tail else 0


def run_part(pages: Pages, pool: PagePool, owner: Owner, count: int, *, is_unfinished: bool, label: int) -> bool:
    """One part as an engine runs it; False, with nothing lost, when there is no room."""
    table = owner.table
    start = table.length
    if not table.tail.is_staging and start:
        due = most_new_tiles(table, start)
        wanted = table.event_pages_wanted(due) if due else 0
        if wanted > pool.num_free:
            return False
        table.reserve(wanted)
        compress(pages, owner, start, label)
        table.release_spare()
    plan = table.plan(start, count, is_unfinished=is_unfinished)
    wanted = table.pages_wanted(plan, most_new_tiles(table, plan.end) if plan.ends_staging else 0)
    if wanted > pool.num_free:
        return False
    table.reserve(wanted)
    num_free = pool.num_free
    pages.copy(table.grow(plan))
    if plan.is_staged and plan.ends_staging:
        pages.copy(table.own_raw_pages())
        compress(pages, owner, plan.end, label)
        write_ring(pages, owner, label)
        table.leave_staging(plan.after)
    elif not plan.is_staged:
        write_ring(pages, owner, label)
    assert pool.num_free >= num_free, "a part took more than was reserved for it"
    table.trim()
    table.release_spare()
    assert table.tail == plan.after
    return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_steps_rewinds_forks_and_moves_leave_every_sequence_its_own_content(data: st.DataObject) -> None:
    """Beams share pages under a policy too; a wrong count of pages would be another session's wrong answer."""
    num_pages = data.draw(st.sampled_from([30, 80]))
    pool = PagePool(num_pages)
    pages = Pages(num_pages)
    owners: list[Owner] = []
    for label in range(1, data.draw(st.integers(1, 25), label="num_operations")):
        operation = data.draw(st.sampled_from(["new", "step", "step", "step", "rewind", "fork", "move", "free"]))
        if operation == "new" or not owners:
            notes = data.draw(st.sampled_from([NO_NOTES, NOTES]))
            owners.append(Owner(CompressedTable(pool, LAYOUT, policy=POLICY, page_tokens=PAGE_TOKENS, notes=notes)))
            continue
        owner = owners[data.draw(st.integers(0, len(owners) - 1))]
        table = owner.table
        if operation == "step":
            most = next_cut(POLICY, table.length) - table.length
            count = min(data.draw(st.sampled_from([1, 1, 3, 9, 20])), most)
            run_part(pages, pool, owner, count, is_unfinished=data.draw(st.booleans()), label=label)
        elif operation == "rewind":
            length = data.draw(st.integers(0, table.length))
            if table.can_rewind(length):
                table.rewind(length)
                assert table.length == length
            else:
                with pytest.raises(ValueError, match="can not rewind"):
                    table.rewind(length)
        elif operation == "fork":
            if table.fork_pages_wanted(table.length) > pool.num_free:
                with pytest.raises(OutOfPagesError):
                    table.fork(table.length)
            elif table.can_rewind(table.length):
                twin = Owner(table.fork(table.length))
                twin.label, twin.tile_label = owner.label, owner.tile_label
                owners.append(twin)
        elif operation == "move":
            state = table.state()
            before = table.filled_pages()
            pool.share(before)  # as if the contents were elsewhere meanwhile
            table.free()
            table.adopt(state)
            pool.release(before)
        else:
            table.free()
        pool.check_integrity([held.table.owned_pages() for held in owners])
        for held in owners:
            held.table.check_integrity()
            if len(held.table.raw_pages):
                assert (pages.cells[held.table.raw_pages] == held.label).all()
            used = held.table.state()
            for layer, head in np.ndindex(2, 2):
                where = held.table.tile_places(used.tiles[layer, head, : used.num_tiles[layer, head]])
                assert (pages.cells[where] == held.tile_label).all()
    for held in owners:
        held.table.free()
    assert pool.num_free == num_pages


def grown(pool: PagePool, *counts: int) -> Owner:
    owner = Owner(CompressedTable(pool, LAYOUT, policy=POLICY, page_tokens=PAGE_TOKENS))
    pages = Pages(pool.num_pages)
    for count in counts:
        assert run_part(pages, pool, owner, count, is_unfinished=False, label=1)
    return owner


def test_a_short_sequence_owns_its_slots_and_nothing_else() -> None:
    """What a session of a few tokens costs: the fixed area of slots."""
    pool = PagePool(40)
    table = grown(pool, 5).table
    assert pool.num_pages - pool.num_free == LAYOUT.num_raw_pages
    assert not len(table.tile_pages) and not table.staged.num_pages


def test_going_back_is_possible_to_the_last_event_and_no_further() -> None:
    """What an event dropped is gone; a client that wants it back must send it again."""
    table = grown(PagePool(40), 20, 1).table
    assert table.tail.compressed_at == 20
    assert table.can_rewind(20) and table.can_rewind(0) and not table.can_rewind(19)
    table.rewind(0)
    assert table.num_pages == 0 and table.length == 0


def test_an_input_is_taken_back_as_a_whole() -> None:
    """A client whose prompt failed half-way returns to before it."""
    pool = PagePool(60)
    owner = grown(pool, 20)
    pages = Pages(60)
    assert run_part(pages, pool, owner, 3, is_unfinished=True, label=2)
    assert run_part(pages, pool, owner, 3, is_unfinished=True, label=3)
    table = owner.table
    assert table.staged.length == 6 and not table.can_rewind(23) and table.can_rewind(20)
    table.rewind(20)
    assert not table.staged.num_pages and not table.tail.is_staging
    table.check_integrity()


def test_what_is_noted_of_a_begun_input_is_counted_in_pages() -> None:
    """Scores and queries stand outside the pool: a client that forks begun inputs must not get that memory free."""
    assert [NOTES.pages_for(count) for count in (0, 1, 4, 8, 32)] == [0, 1, 1, 2, 3]
    pool, pages = PagePool(60), Pages(60)
    owner = Owner(CompressedTable(pool, LAYOUT, policy=POLICY, page_tokens=PAGE_TOKENS, notes=NOTES))
    assert run_part(pages, pool, owner, 8, is_unfinished=True, label=1)
    table = owner.table
    assert len(table.note_pages) == 2 and table.num_pages == table.staged.pages.size + 2
    num_free = pool.num_free
    twins = [table.fork(8) for _ in range(5)]
    assert num_free - pool.num_free == 10 and table.fork(0).num_pages == 0
    for twin in twins:
        twin.check_integrity()
        twin.free()
    assert pool.num_free == num_free
    assert run_part(pages, pool, owner, 1, is_unfinished=False, label=2)
    assert not len(table.note_pages)
    assert run_part(pages, pool, owner, 5, is_unfinished=True, label=3) and len(table.note_pages) == 2
    table.rewind(9)
    table.check_integrity()
    assert not len(table.note_pages) and table.fork_pages_wanted(9) == 0


def test_tiles_are_freed_and_used_again() -> None:
    """Window layers drop tiles for ever; a sequence must not grow by it."""
    pool = PagePool(10)
    table = CompressedTable(pool, LAYOUT, policy=POLICY, page_tokens=PAGE_TOKENS)
    tiles = table.take_tiles(0, 1, 4)
    assert tiles.tolist() == [0, 1, 2, 3]
    table.give_back_tiles(0, 1, tiles[:2])
    assert table.tiles_of(0, 1).tolist() == [2, 3]
    assert table.take_tiles(1, 0, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="does not hold"):
        table.give_back_tiles(1, 0, np.array([2], dtype=np.int32))
    table.give_back_tiles(0, 1, table.tiles_of(0, 1).copy())
    table.trim()
    assert len(table.tile_pages) == 1
    before = table.state()
    with pytest.raises(OutOfPagesError):
        table.take_tiles(0, 0, 100)
    assert (table.state().tiles == before.tiles).all() and len(table.tile_pages) == 1


def test_pages_are_padded_where_whole_tiles_would_leave_much_over() -> None:
    """16-bit rows with positions just miss filling a page; a third of it would be lost."""
    policy = POLICY
    slot = slot_bytes(num_kv_heads=1, key_dim=64, value_dim=64, has_scores=True)
    tile = tile_bytes(tile_rows=16, row_bytes=256, position_bytes=2, has_scores=True)
    assert tile == 4160 and slot == 258
    page = fit_page_bytes(4096, step_bytes=32, tile=tile, slot=slot)
    assert page == 4160
    assert fit_page_bytes(24576, step_bytes=64, tile=1024, slot=768) == 24576
    layout = plan_layout(
        replace(policy, block_tokens=16, tail_tokens=8, chunk_tokens=64),
        page_bytes=page,
        num_layers=3,
        num_kv_heads=1,
        key_dim=64,
        value_dim=64,
        row_bytes=256,
        position_bytes=2,
        has_scores=True,
    )
    assert layout.tiles_per_page == 1 and layout.slots_per_page == 16
    assert layout.num_raw_pages == -(-3 * layout.slots_per_layer // 16)
    with pytest.raises(ValueError, match="hold no tile"):
        plan_layout(
            replace(policy, block_tokens=16, chunk_tokens=64),
            page_bytes=4096,
            num_layers=3,
            num_kv_heads=1,
            key_dim=64,
            value_dim=64,
            row_bytes=256,
            position_bytes=2,
            has_scores=True,
        )


@given(st.integers(2, 30))
def test_ring_slots_of_a_tail_never_meet(first: int) -> None:
    """Two tokens in one slot would be one token."""
    positions = np.arange(first, first + LAYOUT.tail_slots)
    slots = LAYOUT.slots_of(positions)
    assert len(set(slots.tolist())) == LAYOUT.tail_slots
    assert slots.min() > POLICY.num_sinks and slots.max() < LAYOUT.slots_per_layer
    assert LAYOUT.slots_of(np.arange(2)).tolist() == [1, 2]
