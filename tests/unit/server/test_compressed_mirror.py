"""A session that is compressed can go back only to where its servers can go back to."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadInputError, SessionStateError
from swarm.kvpolicy.settings import FULL_CACHE, find_policy
from swarm.kvpolicy.streaming import TailState, advance, new_tail
from swarm.server.session_mirror import Checkpoint, SequenceStep, SessionMirror, Verdict

POLICY = dataclasses.replace(find_policy("pyramid+gear"), chunk_tokens=128)
"""With chunks so short that random prompts reach their ends."""


def make_mirror(epoch: int = 1) -> SessionMirror:
    return SessionMirror(epoch=epoch, max_length=1000, max_sequences=3, policy=POLICY)


def judge(mirror: SessionMirror, *items: SequenceStep) -> Verdict:
    return mirror.judge(
        epoch=mirror.epoch,
        step=mirror.last_step + 1,
        sequences=items,
        num_rows=sum(item.count for item in items),
    )


def decode(mirror: SessionMirror, count: int) -> None:
    for _ in range(count):
        judge(mirror, SequenceStep(0, 0, mirror.length(0), 1))


def draw_step(data: st.DataObject, mirror: SessionMirror) -> list[SequenceStep]:
    """Mostly what clients do: single tokens, drafts, prompts in parts, forks, now and then a rewind."""
    numbers = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True))
    items = []
    for sequence in numbers:
        parent = data.draw(st.sampled_from([sequence, sequence, sequence, 0]))
        length = mirror.length(parent)
        start = max(0, length - data.draw(st.sampled_from([0, 0, 0, 0, 1, 5, 40, 1000])))
        count = data.draw(st.sampled_from([1, 1, 1, 0, 5, 16, 33, 70, 150]))
        count = min(count, mirror.max_length - start)
        items.append(SequenceStep(sequence, parent, start, count, data.draw(st.sampled_from([False, False, True]))))
    return items


@given(st.data())
def test_states_follow_the_streaming_rule(data: st.DataObject) -> None:
    """The mirror must know exactly what the engine has compressed, or it would let through what can not be done."""
    mirror = make_mirror()
    lengths = [0, 0, 0]
    tails = [new_tail(POLICY)] * 3
    for _ in range(data.draw(st.integers(1, 25))):
        items = draw_step(data, mirror)
        before = mirror.positions, mirror.tails, mirror.checkpoints
        try:
            judge(mirror, *items)
        except SessionStateError:
            assert (mirror.positions, mirror.tails, mirror.checkpoints) == before
            continue
        old_tails = list(tails)
        for item in items:
            tails[item.sequence] = advance(
                POLICY, old_tails[item.parent], item.start, item.count, is_unfinished=item.is_unfinished
            )
            lengths[item.sequence] = item.start + item.count
        for sequence in range(3):
            assert mirror.length(sequence) == lengths[sequence]
            if lengths[sequence]:
                assert mirror.tail(sequence) == tails[sequence]
        assert all(len(each.positions) == len(each.tails) for each in mirror.checkpoints)


@given(st.data())
def test_a_kept_session_goes_on_as_if_it_had_never_been_further(data: st.DataObject) -> None:
    """Failover keeps what hops hold; from there the same steps must lead to the same events as on a fresh server."""
    mirror = make_mirror()
    history: list[tuple[int, list[SequenceStep]]] = []
    for _ in range(data.draw(st.integers(1, 15))):
        items = draw_step(data, mirror)
        try:
            judge(mirror, *items)
        except SessionStateError:
            continue
        history.append((mirror.last_step, items))
    if not mirror.checkpoints:
        return
    chosen = data.draw(st.sampled_from(mirror.checkpoints))
    kept = mirror.kept(epoch=2, kept_epoch=1, kept_step=chosen.step)
    assert kept is not None and kept.positions == chosen.positions
    undisturbed = make_mirror()
    for step, items in history:
        if step <= chosen.step:
            judge(undisturbed, *items)
    assert undisturbed.positions == kept.positions
    for _ in range(data.draw(st.integers(1, 10))):
        items = draw_step(data, kept)
        try:
            judge(kept, *items)
        except SessionStateError:
            continue  # it may be stricter: what was due at the checkpoint may have been compressed
        judge(undisturbed, *items)
        for item in items:
            if item.count:
                assert kept.tail(item.sequence) == undisturbed.tail(item.sequence)


def test_going_back_is_possible_until_something_was_compressed() -> None:
    """Rejected drafts go back a little, which must not cost a replay; further back there is nothing to stand on."""
    mirror = make_mirror()
    judge(mirror, SequenceStep(0, 0, 0, 100))
    decode(mirror, 8)
    assert judge(mirror, SequenceStep(0, 0, 102, 1)) is Verdict.RUN
    with pytest.raises(SessionStateError, match="can not go back from position 103 to 90: it has been compressed"):
        judge(mirror, SequenceStep(0, 0, 90, 1))
    assert judge(mirror, SequenceStep(0, 0, 0, 90)) is Verdict.RUN, "from the beginning it is always possible"


def test_a_begun_prompt_can_not_be_cut() -> None:
    """What is known of its newest tokens is not kept back, so it is taken back as a whole."""
    mirror = make_mirror()
    judge(mirror, SequenceStep(0, 0, 0, 60, True))
    with pytest.raises(SessionStateError, match="compressed since"):
        judge(mirror, SequenceStep(0, 0, 40, 20))
    assert judge(mirror, SequenceStep(0, 0, 60, 20)) is Verdict.RUN


def test_checkpoints_end_where_something_was_compressed() -> None:
    """A server that says it kept a state which it has compressed since would answer wrongly ever after."""
    mirror = make_mirror()
    judge(mirror, SequenceStep(0, 0, 0, 100))
    decode(mirror, 30)
    steps = [each.step for each in mirror.checkpoints]
    assert mirror.kept(epoch=2, kept_epoch=1, kept_step=1) is None
    assert steps == list(range(steps[0], 32)) and 10 < steps[0] < 31
    for step in steps:
        assert mirror.kept(epoch=2, kept_epoch=1, kept_step=step) is not None


def test_a_session_can_be_kept_inside_a_prompt_only_where_it_stands() -> None:
    """When another hop fails in the middle of a long prompt, those that are well go on with the next part."""
    mirror = make_mirror()
    judge(mirror, SequenceStep(0, 0, 0, 60, True))
    kept = mirror.kept(epoch=2, kept_epoch=1, kept_step=1)
    assert kept is not None and kept.tail(0).is_staging
    judge(mirror, SequenceStep(0, 0, 60, 60, True))
    assert mirror.kept(epoch=3, kept_epoch=1, kept_step=1) is None
    judge(mirror, SequenceStep(0, 0, 120, 1))
    again = mirror.kept(epoch=3, kept_epoch=1, kept_step=3)
    assert again is not None and not again.tail(0).is_staging


def test_exact_sessions_have_no_states() -> None:
    """Their checkpoints and offers stay as they were."""
    mirror = SessionMirror(epoch=1, max_length=1000, max_sequences=3)
    judge(mirror, SequenceStep(0, 0, 0, 100, True))
    judge(mirror, SequenceStep(0, 0, 50, 1))
    assert mirror.tails == () and mirror.checkpoints[-1].tails == ()


@given(st.data())
def test_a_mirror_survives_being_handed_over(data: st.DataObject) -> None:
    """The next server must judge exactly as this one would."""
    mirror = make_mirror()
    for _ in range(data.draw(st.integers(1, 15))):
        try:
            judge(mirror, *draw_step(data, mirror))
        except SessionStateError:
            continue
    if not mirror.checkpoints:
        return
    restored = SessionMirror.restored(
        epoch=1,
        max_length=1000,
        max_sequences=3,
        positions=mirror.positions,
        checkpoints=mirror.checkpoints,
        policy=POLICY,
        tails=mirror.tails,
    )
    assert (restored.positions, restored.tails) == (mirror.positions, mirror.tails)
    found = [each for each in mirror.checkpoints if not any(tail.is_staging for tail in each.tails)]
    assert [each for each in restored.checkpoints if not any(tail.is_staging for tail in each.tails)] == found


@pytest.mark.parametrize(
    "tails",
    [
        (),
        (TailState(4), TailState(4)),
        (TailState(20, compressed_at=90),),
        (TailState(36, compressed_at=0),),
        (TailState(60, compressed_at=50),),
        (TailState(-12, compressed_at=50),),
    ],
)
def test_impossible_states_are_refused(tails: tuple[TailState, ...]) -> None:
    """Hand-overs come from strangers."""
    with pytest.raises(BadInputError):
        SessionMirror.restored(
            epoch=1,
            max_length=1000,
            max_sequences=3,
            positions=[80],
            checkpoints=[],
            policy=POLICY,
            tails=tails,
        )


def test_states_of_an_exact_session_are_refused() -> None:
    """A checkpoint with states in a session without is a lie or a mistake."""
    with pytest.raises(BadInputError, match="states were handed over"):
        SessionMirror.restored(
            epoch=1,
            max_length=1000,
            max_sequences=3,
            positions=[80],
            checkpoints=[Checkpoint(1, 1, (70,), (TailState(4),))],
            policy=FULL_CACHE,
        )
