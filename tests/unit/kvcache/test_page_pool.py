"""Every page has exactly the owners it was given, whatever the order of operations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvcache.page_pool import OutOfPagesError, PagePool


@given(st.data())
def test_random_operations_keep_every_page_accounted_for(data: st.DataObject) -> None:
    """A lost page is memory gone until restart; a page given twice is one user reading another's state."""
    pool = PagePool(data.draw(st.integers(1, 24), label="num_pages"))
    held: list[list[int]] = []
    kept: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30), label="num_operations")):
        operation = data.draw(st.sampled_from(["allocate", "share", "release", "keep", "drop"]))
        if operation == "allocate":
            count = data.draw(st.integers(0, 8))
            after = data.draw(st.none() | st.integers(0, pool.num_pages - 1))
            free_before = pool.num_free
            if count > free_before:
                with pytest.raises(OutOfPagesError):
                    pool.allocate(count, after=after)
                assert pool.num_free == free_before
            else:
                held.append(pool.allocate(count, after=after))
        elif operation == "drop" and kept:
            pool.drop(kept.pop(data.draw(st.integers(0, len(kept) - 1))))
        elif held and operation != "drop":
            pages = held[data.draw(st.integers(0, len(held) - 1))]
            if operation == "share":
                pool.share(pages)
                held.append(list(pages))
            elif operation == "release":
                held.remove(pages)
                pool.release(pages)
            elif pages and not {*pages} & {page for entry in kept for page in entry}:
                pool.keep(pages)
                kept.append(list(pages))
        pool.check_integrity(held, kept)
    for pages in held:
        pool.release(pages)
    assert pool.num_free + pool.num_reclaimable == pool.num_pages
    for pages in kept:
        pool.drop(pages)
    assert pool.num_free == pool.num_pages


def test_a_growing_sequence_gets_the_next_page() -> None:
    """Neighbouring pages are read in place, which is the fast path of attention."""
    pool = PagePool(64)
    first = pool.allocate(2)
    assert pool.allocate(3, after=first[-1]) == [first[-1] + 1, first[-1] + 2, first[-1] + 3]


def test_two_sequences_growing_in_turn_both_stay_in_one_run() -> None:
    """A new sequence starts far from the others, or every page of everybody would end up elsewhere."""
    pool = PagePool(256)
    sequences = [pool.allocate(1), pool.allocate(1)]
    for _ in range(40):
        for pages in sequences:
            pages += pool.allocate(1, after=pages[-1])
    for pages in sequences:
        assert pages == list(range(pages[0], pages[0] + 41))


def test_scattered_pages_are_given_when_no_run_is_long_enough() -> None:
    """Fragmentation costs time, never room."""
    pool = PagePool(8)
    pages = pool.allocate(8)
    pool.release(pages[::2])
    assert sorted(pool.allocate(4)) == pages[::2]


@pytest.mark.parametrize("operation", ["share", "release"])
def test_a_free_page_is_refused_and_nothing_changes(operation: str) -> None:
    """Freeing twice would hand one page to two users; the refusal must not do half of it."""
    pool = PagePool(4)
    pages = pool.allocate(2)
    free = next(page for page in range(4) if page not in pages)
    with pytest.raises(ValueError, match=f"page {free} is free"):
        getattr(pool, operation)([*pages, free])
    pool.check_integrity([pages])


def test_kept_pages_count_as_reclaimable_only_while_nobody_else_holds_them() -> None:
    """The free tokens a server announces rest on this number."""
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.keep(pages)
    assert pool.num_reclaimable == 0
    pool.release(pages)
    assert (pool.num_free, pool.num_reclaimable) == (2, 2)
    pool.share(pages[:1])
    assert pool.num_reclaimable == 1
    pool.drop(pages)
    assert (pool.num_free, pool.num_reclaimable) == (3, 0)


def test_integrity_check_finds_a_forgotten_owner() -> None:
    """The check itself must be able to fail."""
    pool = PagePool(4)
    pages = pool.allocate(2)
    with pytest.raises(AssertionError, match="owners"):
        pool.check_integrity([pages[:1]])


def test_an_empty_pool_is_refused() -> None:
    """A server without a page could never serve."""
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)
