"""Pages are found by their whole history and by nothing else, and the oldest leaves go first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvcache.prefix_index import PrefixEntry, PrefixIndex, PrefixTrail


def entry(number: int, size_bytes: int = 1) -> PrefixEntry[str]:
    return PrefixEntry([number], f"outputs {number}", size_bytes)


def index_chain(index: PrefixIndex[str], contents: list[bytes], *, first: int = 0, name: str = "0:4") -> list[bytes]:
    """Insert a sequence's pages as the engine does; returns their digests."""
    digests = [index.root(name)]
    for number, content in enumerate(contents, start=first):
        digests.append(index.extend(digests[-1], content))
        if index.find(digests[-1]) is None:
            index.insert(digests[-1], entry(number))
    index.touch(digests[1:])
    return digests[1:]


@given(st.lists(st.sampled_from([b"a", b"b"]), max_size=6), st.lists(st.sampled_from([b"a", b"b"]), max_size=6))
def test_a_page_is_found_only_after_the_same_history(first: list[bytes], second: list[bytes]) -> None:
    """Equal content after a different beginning has different keys and values."""
    index: PrefixIndex[str] = PrefixIndex(max_bytes=100)
    index_chain(index, first)
    digest, num_found = index.root("0:4"), 0
    for content in second:
        digest = index.extend(digest, content)
        if index.find(digest) is None:
            break
        num_found += 1
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    assert num_found == common


def test_other_blocks_and_other_servers_never_match() -> None:
    """Keys of other blocks are other keys; the digest's secret keeps servers from being probed offline."""
    index: PrefixIndex[str] = PrefixIndex(max_bytes=100)
    (digest,) = index_chain(index, [b"a"])
    assert index.find(index.extend(index.root("1:4"), b"a")) is None
    other: PrefixIndex[str] = PrefixIndex(max_bytes=100)
    assert other.extend(other.root("0:4"), b"a") != digest


def test_trimming_takes_the_oldest_sequence_from_its_end() -> None:
    """A page whose predecessor is gone can not be found, so beginnings must outlive ends."""
    index: PrefixIndex[str] = PrefixIndex(max_bytes=4)
    old = index_chain(index, [b"a", b"b", b"c"])
    new = index_chain(index, [b"x", b"y"], first=10)
    assert [gone.pages for gone in index.trim()] == [[2]]
    assert index.find(old[0]) is not None and index.find(old[2]) is None
    assert all(index.find(digest) is not None for digest in new)
    assert index.size_bytes == 4


def test_eviction_takes_just_enough_of_what_may_go() -> None:
    """Throwing everything away for one page would cost all later sessions their shared prefix."""
    index: PrefixIndex[str] = PrefixIndex(max_bytes=100)
    index_chain(index, [b"a", b"b", b"c", b"d"])
    gone = index.evict(2, lambda candidate: candidate.pages != [3])
    assert [evicted.pages for evicted in gone] == [[2], [1]]
    assert len(index) == 2 and index.evict(0, lambda candidate: True) == []


def test_a_page_is_inserted_once() -> None:
    """Two entries of one name would lose the first one's pages."""
    index: PrefixIndex[str] = PrefixIndex(max_bytes=100)
    (digest,) = index_chain(index, [b"a"])
    with pytest.raises(ValueError, match="already"):
        index.insert(digest, entry(1))


@given(st.data())
def test_a_trail_always_names_its_tokens_or_admits_that_it_does_not_know(data: st.DataObject) -> None:
    """A trail that named other tokens than the sequence holds would share wrong pages with everybody."""
    index: PrefixIndex[str] = PrefixIndex(max_bytes=100)
    trail: PrefixTrail[str] = PrefixTrail(index.root("0:4"), page_tokens=3)
    tokens: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 40))):
        operation = data.draw(st.sampled_from(["append", "append", "append", "rewind", "copy"]))
        if operation == "append":
            token = data.draw(st.sampled_from([b"a", b"b"]))
            tokens.append(token)
            if not trail.is_broken:
                page = trail.append(token, token.decode())
                if page is not None:
                    assert page[0] == b"".join(tokens[-3:])
                    assert "".join(page[1]).encode() == page[0]
                    trail.close_page(index.extend(trail.last, page[0]))
        elif operation == "rewind":
            length = data.draw(st.integers(0, len(tokens)))
            del tokens[length:]
            trail.rewind(length)
        else:
            trail = trail.copy()
        if not trail.is_broken:
            assert trail.length == len(tokens)
        digest, expected = index.root("0:4"), []
        for page_number in range(len(trail.digests)):
            digest = index.extend(digest, b"".join(tokens[page_number * 3 : page_number * 3 + 3]))
            expected.append(digest)
        assert list(trail.digests) == expected


def test_a_trail_is_whole_again_after_going_back_to_a_page_boundary() -> None:
    """A conversation set back to its beginning may share again."""
    trail: PrefixTrail[str] = PrefixTrail(b"root", page_tokens=2)
    for token in (b"a", b"b"):
        page = trail.append(token, "")
    assert page is not None
    trail.close_page(b"digest")
    trail.rewind(1)
    states = [trail.is_broken]
    trail.rewind(0)
    assert [*states, trail.is_broken] == [True, False]
    assert trail.length == 0


def test_a_given_up_trail_is_broken_until_it_is_set_back() -> None:
    """After tokens that were not followed, positions and digests no longer agree."""
    trail: PrefixTrail[str] = PrefixTrail(b"root", page_tokens=2)
    trail.append(b"a", "")
    trail.give_up()
    assert trail.is_broken
    with pytest.raises(ValueError, match="page's start"):
        trail.skip_page(b"digest")
