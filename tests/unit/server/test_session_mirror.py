"""The server accepts exactly the steps that fit what it holds, and says what it holds otherwise."""

from __future__ import annotations

import pytest

from swarm.errors import BadInputError, LengthLimitError, SessionClosedError, SessionStateError
from swarm.server.session_mirror import MirrorState, SequenceStep, SessionMirror, Verdict


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
