"""Tables hold exactly their positions, and writing never touches what another sequence sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvcache.page_pool import OutOfPagesError, PagePool
from swarm.kvcache.page_table import PageCopy, PageTable, pages_for

NUM_LAYERS = 2


class Contents:
    """A slab of labels: what the pages of a real store would hold."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.slots = np.full(num_pages * page_tokens, -1, dtype=np.int64)
        self.page_tokens = page_tokens

    def copy(self, copies: Sequence[PageCopy]) -> None:
        pages = self.slots.reshape(-1, self.page_tokens)
        pages[[copy.target for copy in copies]] = pages[[copy.source for copy in copies]]

    def write(self, table: PageTable, start: int, labels: list[int]) -> None:
        for layer, slots in enumerate(table.slots(start, start + len(labels))):
            self.slots[slots] = [label * NUM_LAYERS + layer for label in labels]

    def read(self, table: PageTable) -> list[list[int]]:
        return [self.slots[slots].tolist() for slots in table.slots(0, table.length)]


def expected_contents(labels: list[int]) -> list[list[int]]:
    return [[label * NUM_LAYERS + layer for label in labels] for layer in range(NUM_LAYERS)]


@given(st.data())
def test_random_growth_rewinds_and_forks_leave_every_sequence_its_own_content(data: st.DataObject) -> None:
    """Beams and forks share pages; a write that reaches a sibling would be a wrong answer for it."""
    page_tokens = data.draw(st.sampled_from([1, 2, 4]), label="page_tokens")
    pool = PagePool(40)
    contents = Contents(40, page_tokens)
    tables: list[tuple[PageTable, list[int]]] = []
    next_label = 0
    for _ in range(data.draw(st.integers(1, 25), label="num_operations")):
        operation = data.draw(st.sampled_from(["new", "grow", "grow", "rewind", "fork", "free"]))
        if operation == "new" or not tables:
            tables.append((PageTable(pool, num_layers=NUM_LAYERS, page_tokens=page_tokens), []))
            continue
        table, labels = tables[data.draw(st.integers(0, len(tables) - 1))]
        if operation == "grow":
            new = list(range(next_label, next_label + data.draw(st.integers(0, 7))))
            next_label += len(new)
            length = table.length + len(new)
            wanted, free = table.pages_wanted(length), pool.num_free
            if wanted > free:
                with pytest.raises(OutOfPagesError):
                    table.grow(length)
                assert pool.num_free == free and table.length == len(labels)
            else:
                contents.copy(table.grow(length))
                assert free - pool.num_free == wanted
                contents.write(table, len(labels), new)
                labels += new
        elif operation == "rewind":
            length = data.draw(st.integers(0, table.length))
            table.rewind(length)
            del labels[length:]
        elif operation == "fork":
            length = data.draw(st.integers(0, table.length))
            tables.append((table.fork(length), labels[:length]))
        else:
            table.free()
            labels.clear()
        pool.check_integrity([held.owned_pages() for held, _ in tables])
        for held, held_labels in tables:
            assert contents.read(held) == expected_contents(held_labels)
            assert held.num_pages == pages_for(held.length, page_tokens)
            for layer, first_break in enumerate(held.first_breaks):
                run = held.pages[layer, :first_break]
                assert (np.diff(run) == 1).all()
                assert first_break == held.num_pages or held.pages[layer, first_break] != run[-1] + 1
    for table, _ in tables:
        table.free()
    assert pool.num_free == pool.num_pages


def test_only_the_writer_of_a_shared_page_copies_it() -> None:
    """Of two beams on one page the first to write moves away; the second then owns the page alone."""
    pool = PagePool(8)
    table = PageTable(pool, num_layers=1, page_tokens=4)
    table.grow(2)
    twin = table.fork(2)
    copies = twin.grow(3)
    assert [copy.source for copy in copies] == table.owned_pages().tolist()
    assert table.grow(3) == []


def test_growth_at_a_page_boundary_copies_nothing() -> None:
    """A full shared page is never written again, so prefixes cost no copy."""
    pool = PagePool(8)
    table = PageTable(pool, num_layers=1, page_tokens=4)
    table.grow(4)
    assert table.fork(4).grow(5) == []


def test_adopted_pages_continue_a_sequence() -> None:
    """Shared prefixes come in as whole pages."""
    pool = PagePool(16)
    owner = PageTable(pool, num_layers=2, page_tokens=4)
    owner.grow(8)
    table = PageTable(pool, num_layers=2, page_tokens=4)
    table.adopt(owner.pages, 8)
    assert table.length == 8 and (table.pages == owner.pages).all()
    table.grow(9)
    with pytest.raises(ValueError, match="within another page"):
        table.adopt(owner.pages[:, :1], 13)
    pool.check_integrity([owner.owned_pages(), table.owned_pages()])


def test_impossible_lengths_are_refused() -> None:
    """Growing backwards or rewinding forwards is a mistake of ours that must not go unnoticed."""
    table = PageTable(PagePool(8), num_layers=1, page_tokens=4)
    table.grow(5)
    for impossible in (lambda: table.grow(4), lambda: table.rewind(6), lambda: table.fork(6)):
        with pytest.raises(ValueError, match="can not"):
            impossible()


@given(st.integers(1000, 8192))
def test_less_than_four_percent_is_wasted_from_a_thousand_tokens_on(length: int) -> None:
    """The project's promise about page waste, with the page size that servers use by default."""
    pool = PagePool(600)
    table = PageTable(pool, num_layers=1, page_tokens=16)
    table.grow(length)
    used = (pool.num_pages - pool.num_free) * 16
    assert (used - length) / used < 0.04
