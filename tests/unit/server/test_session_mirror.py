"""The server accepts exactly the steps that fit what it holds, and says what it holds otherwise."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from swarm.errors import BadInputError, LengthLimitError, SessionClosedError, SessionStateError
from swarm.server.session_mirror import (
    MAX_CHECKPOINTS,
    Checkpoint,
    MirrorState,
    SequenceStep,
    SessionMirror,
    Verdict,
)


def make_mirror() -> SessionMirror:
    return SessionMirror(epoch=1, max_length=16, max_sequences=4)


def judge(mirror: SessionMirror, step: int, *items: tuple[int, int, int, int], epoch: int = 1) -> Verdict:
    sequences = [SequenceStep(*item) for item in items]
    return mirror.judge(epoch=epoch, step=step, sequences=sequences, num_rows=sum(item[3] for item in items))


def test_appending_moves_the_position() -> None:
    """The plain life of a session: a prompt, then one token at a time."""
    mirror = make_mirror()
    assert judge(mirror, 1, (0, 0, 0, 5)) is Verdict.RUN
    assert judge(mirror, 2, (0, 0, 5, 1)) is Verdict.RUN
    assert mirror.positions == (6,) and mirror.num_positions == 6


def test_a_repeated_step_is_recognised_and_changes_nothing() -> None:
    """A client that did not hear the answer asks again; the step must not run twice."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 5))
    assert judge(mirror, 1, (0, 0, 0, 5)) is Verdict.REPEAT
    assert mirror.positions == (5,)


def test_a_lower_start_is_a_rewind() -> None:
    """Rejected drafts and edited conversations go back without a message of their own."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 8))
    judge(mirror, 2, (0, 0, 3, 1))
    assert mirror.positions == (4,)


def test_forks_read_all_parents_before_anything_changes() -> None:
    """Beam search permutes sequences within one step."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 3), (1, 1, 0, 7))
    assert judge(mirror, 2, (0, 1, 7, 1), (1, 0, 3, 1)) is Verdict.RUN
    assert mirror.positions == (8, 4)


def test_an_empty_step_is_accepted() -> None:
    """Zero tokens anywhere change nothing."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 3))
    assert judge(mirror, 2, (0, 0, 3, 0)) is Verdict.RUN
    assert mirror.positions == (3,)


@pytest.mark.parametrize(
    ("step", "items", "epoch", "error"),
    [
        (3, [(0, 0, 3, 1)], 1, SessionStateError),
        (2, [(0, 0, 4, 1)], 1, SessionStateError),
        (2, [(0, 0, 3, 1)], 2, SessionStateError),
        (2, [(0, 2, 1, 1)], 1, SessionStateError),
        (2, [(0, 0, 3, 14)], 1, LengthLimitError),
        (2, [(4, 4, 0, 1)], 1, LengthLimitError),
        (2, [(0, 9, 0, 1)], 1, LengthLimitError),
        (2, [(0, 0, 3, 1), (0, 0, 3, 1)], 1, BadInputError),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    step: int, items: list[tuple[int, int, int, int]], epoch: int, error: type[Exception]
) -> None:
    """After a refusal the session stands where it stood, so the client can mend and go on."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 3))
    with pytest.raises(error):
        judge(mirror, step, *items, epoch=epoch)
    assert mirror.positions == (3,) and mirror.last_step == 1
    assert judge(mirror, 2, (0, 0, 3, 1)) is Verdict.RUN


def test_a_refusal_says_where_the_server_stands() -> None:
    """The client replays from what the server has, so it must be told."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 3), (1, 1, 0, 2))
    with pytest.raises(SessionStateError) as caught:
        judge(mirror, 2, (0, 0, 9, 1))
    assert caught.value.epoch == 1 and caught.value.positions == (3, 2)


def test_rows_must_match_the_tokens_named() -> None:
    """A header and a tensor that disagree are refused before anything runs."""
    mirror = make_mirror()
    with pytest.raises(BadInputError, match="names 2 tokens but carries 3 rows"):
        mirror.judge(epoch=1, step=1, sequences=[SequenceStep(0, 0, 0, 2)], num_rows=3)


def test_a_failed_session_is_dead_for_good() -> None:
    """After a failure half-way positions can not be trusted; only closing is left."""
    mirror = make_mirror()
    mirror.fail()
    with pytest.raises(SessionClosedError):
        judge(mirror, 1, (0, 0, 0, 1))
    mirror.close()
    mirror.close()
    assert mirror.state is MirrorState.CLOSED
    with pytest.raises(RuntimeError):
        mirror.fail()


def keep(mirror: SessionMirror, epoch: int, kept_epoch: int, kept_step: int) -> SessionMirror:
    kept = mirror.kept(epoch=epoch, kept_epoch=kept_epoch, kept_step=kept_step)
    assert kept is not None
    mirror.close()
    return kept


def test_the_first_step_of_an_epoch_may_have_any_number() -> None:
    """A hop that kept its state takes no part in the replay to others, so its first step comes late."""
    mirror = make_mirror()
    assert judge(mirror, 7, (0, 0, 0, 2)) is Verdict.RUN
    assert judge(mirror, 7, (0, 0, 0, 2)) is Verdict.REPEAT
    with pytest.raises(SessionStateError):
        judge(mirror, 9, (0, 0, 2, 1))
    assert judge(mirror, 8, (0, 0, 2, 1)) is Verdict.RUN
    with pytest.raises(SessionStateError):
        judge(make_mirror(), 0, (0, 0, 0, 1))


def test_a_state_is_kept_into_a_higher_epoch() -> None:
    """Losing one hop must not cost the others what they hold: later steps are undone, the rest goes on."""
    mirror = make_mirror()
    for step, start in enumerate((0, 4, 8), start=1):
        judge(mirror, step, (0, 0, start, 4))
    kept = keep(mirror, 2, 1, 2)
    assert kept.positions == (8,) and kept.epoch == 2 and kept.last_step == 0
    assert judge(kept, 3, (0, 0, 8, 1), epoch=2) is Verdict.RUN
    assert kept.positions == (9,)


def test_the_same_state_can_be_kept_again() -> None:
    """The answer to an open may get lost: the client then asks for the same state at the next epoch."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 4))
    kept = keep(keep(mirror, 2, 1, 1), 3, 1, 1)
    judge(kept, 2, (0, 0, 4, 1), epoch=3)
    assert keep(kept, 4, 1, 1).positions == (4,)
    assert keep(keep(make_kept(), 3, 2, 2), 4, 2, 2).positions == (5,)


def make_kept() -> SessionMirror:
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 4))
    kept = keep(mirror, 2, 1, 1)
    judge(kept, 2, (0, 0, 4, 1), epoch=2)
    return kept


@pytest.mark.parametrize(("epoch", "kept_epoch", "kept_step"), [(2, 1, 9), (2, 1, 0), (3, 2, 1), (1, 1, 1)])
def test_a_state_that_never_was_can_not_be_kept(epoch: int, kept_epoch: int, kept_step: int) -> None:
    """The server then starts empty and says so, rather than guess."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 4))
    assert mirror.kept(epoch=epoch, kept_epoch=kept_epoch, kept_step=kept_step) is None
    assert mirror.state is MirrorState.OPEN and mirror.positions == (4,)


def test_a_dead_session_keeps_nothing() -> None:
    """What it holds can not be trusted."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 4))
    mirror.fail()
    assert mirror.kept(epoch=2, kept_epoch=1, kept_step=1) is None


def test_overwritten_states_are_lost_and_others_are_not() -> None:
    """A rewind or a fork destroys exactly the states that need what it destroyed."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 4))
    judge(mirror, 2, (0, 0, 4, 4))
    judge(mirror, 3, (1, 0, 8, 1))
    judge(mirror, 4, (0, 0, 6, 1))
    assert [checkpoint.step for checkpoint in mirror.checkpoints] == [1, 4]
    judge(mirror, 5, (1, 0, 7, 1))
    assert [checkpoint.step for checkpoint in mirror.checkpoints] == [1, 5]
    judge(mirror, 6, (0, 0, 0, 0))
    assert [checkpoint.step for checkpoint in mirror.checkpoints] == [6]


def test_checkpoints_are_bounded() -> None:
    """A session of a million steps, or of a thousand sequences, must not grow for ever."""
    mirror = SessionMirror(epoch=1, max_length=10_000, max_sequences=1024)
    for step in range(1, 1000):
        judge(mirror, step, (0, 0, step - 1, 1))
    assert len(mirror.checkpoints) == MAX_CHECKPOINTS and mirror.checkpoints[-1].step == 999
    for step in range(1000, 1100):
        judge(mirror, step, (1023, 1023, step - 1000, 1))
    assert len(mirror.checkpoints) <= 5 and mirror.checkpoints[-1].step == 1099


def test_a_mirror_comes_through_a_hand_over_unchanged() -> None:
    """The successor must judge and keep exactly as the server that left would have."""
    mirror = make_mirror()
    judge(mirror, 1, (0, 0, 0, 4), (2, 2, 0, 3))
    judge(mirror, 2, (0, 0, 4, 4))
    twin = restored(mirror.positions, mirror.checkpoints)
    assert twin.positions == mirror.positions and twin.checkpoints == mirror.checkpoints
    assert keep(twin, 2, 1, 1).positions == (4, 0, 3)


def restored(positions: Sequence[int], checkpoints: Sequence[Checkpoint]) -> SessionMirror:
    return SessionMirror.restored(epoch=1, max_length=16, max_sequences=4, positions=positions, checkpoints=checkpoints)


@pytest.mark.parametrize(
    ("positions", "checkpoints"),
    [
        ((17,), []),
        ((1, 1, 1, 1, 1), []),
        ((4,), [Checkpoint(1, 1, (5,))]),
        ((4,), [Checkpoint(1, 1, (4, 1))]),
        ((4,), [Checkpoint(1, 2, (3,)), Checkpoint(1, 1, (4,))]),
        ((4,), [Checkpoint(1, 1, (4,)), Checkpoint(1, 2, (3,))]),
        ((4,), [Checkpoint(2, 1, (4,))]),
        ((4,), [Checkpoint(1, 0, (4,)), Checkpoint(1, 0, (4,))]),
    ],
)
def test_impossible_hand_overs_are_refused(positions: Sequence[int], checkpoints: Sequence[Checkpoint]) -> None:
    """Another server's word is no more than a claim."""
    with pytest.raises(BadInputError):
        restored(positions, checkpoints)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_can_be_kept_is_still_there(seed: int) -> None:
    """Against a model that stores contents: every checkpoint's positions hold what they held after its step."""
    chooser = random.Random(seed)
    mirror = make_mirror()
    held: dict[int, list[int]] = {}
    """What an engine would hold: it forgets only when a step makes it."""
    contents: dict[tuple[int, int], dict[int, list[int]]] = {}
    tokens = iter(range(1_000_000))
    epoch, num_kept = 1, 0
    for step in range(1, 301):
        if chooser.random() < 0.2 and mirror.checkpoints:
            checkpoint = chooser.choice(mirror.checkpoints)
            epoch += 1
            mirror = keep(mirror, epoch, checkpoint.epoch, checkpoint.step)
            num_kept += 1
        items = []
        for sequence in chooser.sample(range(4), chooser.randint(1, 3)):
            parent = sequence if chooser.random() < 0.7 else chooser.randrange(4)
            length = mirror.length(parent)
            start = length if chooser.random() < 0.7 else chooser.randint(0, length)
            items.append((sequence, parent, start, chooser.randint(0, min(3, 16 - start))))
        judge(mirror, step, *items, epoch=epoch)
        before = {sequence: list(content) for sequence, content in held.items()}
        for sequence, parent, start, count in items:
            held[sequence] = before.get(parent, [])[:start] + [next(tokens) for _ in range(count)]
        contents[epoch, step] = {sequence: held.get(sequence, [])[: mirror.length(sequence)] for sequence in range(4)}
        assert mirror.checkpoints[-1] == Checkpoint(epoch, step, mirror.positions)
        for checkpoint in mirror.checkpoints:
            then = contents[checkpoint.epoch, checkpoint.step]
            for sequence in range(4):
                assert held.get(sequence, [])[: checkpoint.length(sequence)] == then[sequence]
    assert num_kept > 20
