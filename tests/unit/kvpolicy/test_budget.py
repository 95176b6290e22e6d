"""Budgets and compression events come from positions and absolute layers alone, so all servers agree about them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadInputError
from swarm.kvpolicy.budget import BudgetCurve, count_kept, default_curve, pyramidinfer_curve
from swarm.kvpolicy.settings import PRESETS, KVPolicy, PruningSettings, QuantisationSettings, find_policy
from swarm.kvpolicy.streaming import cut_step, event_after, tail_start

POLICY = PRESETS["pyramid+gear"]


@given(num_blocks=st.integers(0, 600), layer=st.integers(0, 29), head=st.integers(0, 2))
def test_what_is_kept_fills_whole_blocks_and_never_needs_a_token_back(num_blocks: int, layer: int, head: int) -> None:
    """Pages are full, and what one more block allows is there: what was kept before, and the block."""
    curve = default_curve(30, 3)
    size = POLICY.block_tokens
    kept = count_kept(POLICY, curve, layer, head, num_blocks * size)
    more = count_kept(POLICY, curve, layer, head, (num_blocks + 1) * size)
    assert kept % size == 0
    assert 0 <= kept <= num_blocks * size
    assert more <= kept + size


def test_the_default_curve_falls_with_depth_and_keeps_its_mean() -> None:
    """A model that nobody measured gets the paper's idea, gently, and the memory that was promised."""
    curve = default_curve(24, 2)
    for ratio in (0.1, 0.37, 0.9):
        shares = [curve.share(layer, 0, ratio) for layer in range(24)]
        assert all(above >= below for above, below in itertools.pairwise(shares))
        assert sum(shares) / 24 == pytest.approx(ratio, abs=1e-6)


def test_the_published_schedule_saves_what_its_formula_gives() -> None:
    """Quoted figures must be those of the released settings (7B file: 0.757 kept), not of the abstract."""
    curve = pyramidinfer_curve(32, 1, floor=0.9, recent_share=0.2)
    assert curve.ratios[0] == pytest.approx(0.757, abs=0.01)


def test_a_curve_of_nonsense_is_refused() -> None:
    """Curves are files that people hand around."""
    with pytest.raises(BadInputError, match="rise"):
        BudgetCurve(ratios=(0.5, 0.2), shares=(((0.5, 0.2),),))
    with pytest.raises(BadInputError, match="from 0 to 1"):
        BudgetCurve(ratios=(0.5,), shares=(((1.5,),),))


@given(start=st.integers(0, 3000), count=st.integers(1, 5000), split=st.integers(0, 5000))
def test_a_prompt_in_two_steps_is_cut_where_it_would_be_in_one(start: int, count: int, split: int) -> None:
    """Cuts are absolute positions, so a client that sends a prompt in pieces adds a cut, and moves none."""

    def cuts(first: int, length: int) -> set[int]:
        positions, position = set(), first
        for part in cut_step(POLICY, first, length):
            position += part
            positions.add(position)
        assert position == first + length
        return positions

    split = min(split, count)
    whole = cuts(start, count)
    pieces = cuts(start, split) | cuts(start + split, count - split)
    assert pieces - whole <= {start + split}
    assert whole <= pieces


def test_the_tail_stays_within_a_block_of_what_was_asked() -> None:
    """The 16-bit tail is what short contexts pay most for."""
    stored_end = POLICY.num_sinks
    for length in range(1, 400):
        event = event_after(POLICY, stored_end, length)
        if event is not None:
            assert event.first == stored_end
            assert (event.end - event.first) % POLICY.block_tokens == 0
            stored_end = event.end
        assert stored_end == max(tail_start(POLICY, length), POLICY.num_sinks)
        if length > POLICY.num_sinks + POLICY.tail_tokens:
            assert POLICY.tail_tokens <= length - stored_end < POLICY.tail_tokens + POLICY.block_tokens


def test_the_full_cache_has_no_events() -> None:
    """`--kv none` must cost nothing."""
    assert cut_step(PRESETS["none"], 0, 5000) == [5000]
    assert event_after(PRESETS["none"], PRESETS["none"].num_sinks, 5000) is None


@pytest.mark.parametrize("name", ["none", "pyramid", "gear", "pyramid+gear", "pyramidinfer", "smallest"])
def test_policies_and_presets_are_found_by_name(name: str) -> None:
    """`--kv` takes either."""
    assert name in (find_policy(name).name, find_policy(name).preset)


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    """A typo on the command line is mended without a manual."""
    with pytest.raises(BadInputError, match=r"pyramide.*smallest"):
        find_policy("pyramide")


def test_settings_that_make_no_sense_say_which() -> None:
    """A policy file with a slip names its field."""
    with pytest.raises(ValueError, match="keep_ratio"):
        PruningSettings(keep_ratio=0)
    with pytest.raises(ValueError, match="key_bits"):
        QuantisationSettings(key_bits=0.5)
    with pytest.raises(ValueError, match="chunk_tokens"):
        KVPolicy(name="gear", preset="x", quantisation=QuantisationSettings(), chunk_tokens=100)


@pytest.mark.parametrize("name", ["squeeze", "", [], {}, 4, None])
def test_a_policy_that_does_not_exist_is_refused_in_a_sentence(name: Any) -> None:
    """Whatever a program passes: the names that exist help, a TypeError about hashing does not."""
    with pytest.raises(BadInputError, match="known are none, pyramid, gear, pyramid\\+gear, smallest") as raised:
        find_policy(name)
    assert f"no KV policy {name!r}" in str(raised.value)
