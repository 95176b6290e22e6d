"""Decoding and long inputs take turns, within bounds, and something always runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.server.engine.scheduler import Candidate, ChunkSizer, SchedulerConfig, Share, StepEstimate, plan_step

CANDIDATES = st.lists(
    st.one_of(
        st.builds(Candidate, st.integers(0, 32), st.just(True)),
        st.builds(Candidate, st.integers(1, 3000), st.just(False)),
    ),
    min_size=1,
    max_size=12,
)


@given(CANDIDATES, st.integers(1, 600), st.integers(1, 512), st.booleans(), st.sampled_from([1, 4, 16]))
def test_a_step_has_one_kind_of_work_within_its_room(
    candidates: list[Candidate], chunk_tokens: int, max_step_tokens: int, is_prefill_turn: bool, multiple: int
) -> None:
    """The bounds of a step are the bounds of everybody's delay."""
    shares = plan_step(
        candidates,
        chunk_tokens=chunk_tokens,
        max_step_tokens=max_step_tokens,
        is_prefill_turn=is_prefill_turn,
        chunk_multiple=multiple,
    )
    assert shares
    assert [share.index for share in shares] == sorted({share.index for share in shares})
    kinds = {candidates[share.index].is_decode for share in shares}
    assert len(kinds) == 1
    room = max_step_tokens if kinds == {True} else min(chunk_tokens, max_step_tokens)
    assert sum(share.num_tokens for share in shares) <= room
    for share in shares:
        wanted = candidates[share.index].num_tokens
        assert share.num_tokens <= wanted and (share.num_tokens > 0 or wanted == 0)
        if kinds == {False} and share.num_tokens < wanted and share.num_tokens >= multiple:
            assert share.num_tokens % multiple == 0
    if all(candidate.is_decode for candidate in candidates):
        assert kinds == {True}


@pytest.mark.parametrize("is_prefill_turn", [True, False])
def test_where_both_kinds_wait_the_turn_decides(is_prefill_turn: bool) -> None:
    """Neither kind may starve the other."""
    shares = plan_step(
        [Candidate(1000, False), Candidate(1, True), Candidate(1, True)],
        chunk_tokens=64,
        max_step_tokens=512,
        is_prefill_turn=is_prefill_turn,
    )
    assert shares == ([Share(0, 64)] if is_prefill_turn else [Share(1, 1), Share(2, 1)])


def test_several_short_inputs_share_a_chunk_and_the_next_gets_whole_pages_of_the_rest() -> None:
    """An input cut within a page can not share its later pages with others."""
    shares = plan_step(
        [Candidate(40, False), Candidate(50, False), Candidate(300, False), Candidate(5, False)],
        chunk_tokens=128,
        max_step_tokens=512,
        is_prefill_turn=True,
        chunk_multiple=16,
    )
    assert shares == [Share(0, 40), Share(1, 50), Share(2, 32), Share(3, 5)]


def test_parts_with_a_cost_of_their_own_are_worth_it() -> None:
    """Eight tokens at a time, a question about a long compressed context would decode all of it again and again."""

    def plan(*candidates: Candidate, max_step_tokens: int = 512) -> list[Share]:
        return plan_step(
            candidates, chunk_tokens=8, max_step_tokens=max_step_tokens, is_prefill_turn=True, chunk_multiple=16
        )

    decoder = Candidate(1, True)
    costly = Candidate(300, False, least_tokens=64)
    assert plan(decoder, costly, costly) == [Share(1, 64)]
    assert plan(decoder, Candidate(40, False, least_tokens=64)) == [Share(1, 40)]
    assert plan(decoder, Candidate(3, False), costly, Candidate(2, False)) == [Share(1, 3), Share(3, 2)]
    assert plan(decoder, costly, max_step_tokens=32) == [Share(1, 32)]


def test_a_pure_rewind_needs_no_room() -> None:
    """A step without tokens must not wait for those that have some."""
    shares = plan_step(
        [Candidate(8, True), Candidate(0, True)], chunk_tokens=8, max_step_tokens=8, is_prefill_turn=False
    )
    assert shares == [Share(0, 8), Share(1, 0)]


def test_chunks_are_as_large_as_decoders_can_bear() -> None:
    """The decoder's gap is its own step and one chunk."""
    sizer = ChunkSizer(SchedulerConfig(chunk_share=2.0))
    for _ in range(30):
        sizer.record(num_tokens=100, is_prefill=True, seconds=0.1, now_s=0.0)
        sizer.record(num_tokens=4, is_prefill=False, seconds=0.05, now_s=0.0)
    assert sizer.chunk_tokens(now_s=0.0) == pytest.approx(100, abs=1)


def test_without_decoders_a_long_input_gets_the_whole_step() -> None:
    """Nobody is disturbed, so throughput counts."""
    sizer = ChunkSizer(SchedulerConfig(max_step_tokens=256, decoder_memory_s=1.0))
    assert sizer.chunk_tokens(now_s=0.0) == 256
    sizer.record(num_tokens=1, is_prefill=False, seconds=0.01, now_s=5.0)
    assert sizer.chunk_tokens(now_s=5.5) < 256
    assert sizer.chunk_tokens(now_s=6.5) == 256


def test_chunks_stay_within_their_bounds_however_odd_the_times() -> None:
    """A pause of the machine must neither stop long inputs nor flood decoders."""
    config = SchedulerConfig(min_chunk_tokens=8, max_step_tokens=64)
    sizer = ChunkSizer(config)
    sizer.record(num_tokens=1, is_prefill=False, seconds=1e-6, now_s=0.0)
    sizer.record(num_tokens=8, is_prefill=True, seconds=1000.0, now_s=0.0)
    assert sizer.chunk_tokens(now_s=0.0) == 8
    for _ in range(200):
        sizer.record(num_tokens=1, is_prefill=False, seconds=1e6, now_s=0.0)
        sizer.record(num_tokens=8, is_prefill=True, seconds=0.0, now_s=0.0)
    assert sizer.chunk_tokens(now_s=0.0) == 64


@pytest.mark.parametrize(
    "settings", [{"min_chunk_tokens": 0}, {"min_chunk_tokens": 1000}, {"chunk_share": 0}, {"chunk_multiple": 0}]
)
def test_senseless_settings_are_refused(settings: dict[str, int]) -> None:
    """A scheduler that never picks anything would hang every client."""
    with pytest.raises(ValueError, match="SchedulerConfig"):
        SchedulerConfig(**settings)


def test_estimates_follow_the_load() -> None:
    """Clients judge by them whether a server hangs, so they must grow with what stands in line."""
    sizer = ChunkSizer(SchedulerConfig())
    first = StepEstimate(0.5, 0.0)
    assert sizer.estimate(num_prefilling=0, num_decoding=0, first=first) == first
    sizer.record(num_tokens=1, is_prefill=False, seconds=0.1, now_s=0.0)
    sizer.record(num_tokens=100, is_prefill=True, seconds=1.0, now_s=0.0)
    idle = sizer.estimate(num_prefilling=0, num_decoding=0, first=first)
    assert (idle.step_s, idle.token_s) == (0.1, 0.01)
    loaded = sizer.estimate(num_prefilling=1, num_decoding=3, first=first)
    assert loaded.step_s > 2 * idle.step_s and loaded.token_s == 4 * idle.token_s
