"""The client's session log: what it holds is always what an undisturbed server would hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.client.session.machine import SessionMachine, SessionState
from swarm.client.session.parts import SequenceRequest, plan_parts
from swarm.errors import BadInputError, LengthLimitError, SessionClosedError
from swarm.server.session_mirror import SequenceStep, SessionMirror, Verdict

Request = SequenceRequest[str]


def concatenate(chunks: Sequence[str]) -> str:
    return "".join(chunks)


def make_machine(max_length: int = 100) -> SessionMachine[str]:
    return SessionMachine(max_length=max_length, max_sequences=4)


def run(machine: SessionMachine[str], *requests: Request) -> None:
    machine.begin_step(requests)
    machine.finish_step()


def log_of(machine: SessionMachine[str]) -> dict[int, str]:
    return {item.sequence: item.rows for item in machine.log(concatenate)}


def test_the_log_is_what_was_sent() -> None:
    """Replay after a loss sends exactly this."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "hello"))
    run(machine, Request(0, 0, 5, "!"))
    assert log_of(machine) == {0: "hello!"}
    assert machine.lengths == (6,)


def test_a_rewind_forgets_what_followed() -> None:
    """Speculative tokens that were rejected must not come back in a replay."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "hello"))
    run(machine, Request(0, 0, 2, "y"))
    assert log_of(machine) == {0: "hey"}


def test_beams_can_swap() -> None:
    """All parents are read as they were before the step."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "aa"), Request(1, 1, 0, "bbb"))
    run(machine, Request(0, 1, 3, "x"), Request(1, 0, 2, "y"), Request(2, 0, 1, "z"))
    assert log_of(machine) == {0: "bbbx", 1: "aay", 2: "az"}


def test_a_parent_that_goes_on_is_read_before_it_changes() -> None:
    """Forking from a sequence that also appends in the same step."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "ab"))
    run(machine, Request(0, 0, 2, "c"), Request(1, 0, 2, "d"))
    assert log_of(machine) == {0: "abc", 1: "abd"}


def test_an_abandoned_step_leaves_history_alone() -> None:
    """A step that failed for good can be followed by another one."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "ab"))
    machine.begin_step([Request(0, 0, 2, "c")])
    machine.abandon_step()
    assert machine.state is SessionState.NEW and log_of(machine) == {0: "ab"}
    run(machine, Request(0, 0, 2, "d"))
    assert log_of(machine) == {0: "abd"}


def test_parts_of_a_step_are_history_one_by_one() -> None:
    """A loss near the end of a long step must not cost its beginning."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "ab"))
    requests = [Request(0, 0, 1, "cdef"), Request(1, 0, 2, "xyz")]
    machine.begin_step(requests)
    *first, last = plan_parts(requests, max_tokens=2)
    for part in first:
        machine.finish_part(part)
    assert log_of(machine) == {0: "acdef", 1: "abxy"}
    machine.lose_route()
    machine.recover_route()
    machine.finish_step(last)
    assert log_of(machine) == {0: "acdef", 1: "abxyz"}
    assert machine.state is SessionState.OPEN


def test_a_step_given_up_takes_its_parts_with_it() -> None:
    """Who catches the error finds the session where it stood before."""
    machine = make_machine()
    run(machine, Request(0, 0, 0, "ab"))
    machine.begin_step([Request(0, 0, 1, "cdef")])
    machine.finish_part(plan_parts(machine.pending, max_tokens=2)[0])
    assert log_of(machine) == {0: "acd"}
    assert machine.abandon_step(), "what servers hold now is ahead of the log"
    assert log_of(machine) == {0: "ab"}
    machine.begin_step([Request(0, 0, 2, "c")])
    assert not machine.abandon_step()


def test_epochs_rise() -> None:
    """A server must be able to tell a message of an old route from one of the new."""
    machine = make_machine()
    assert (machine.start_epoch(), machine.start_epoch(), machine.epoch) == (1, 2, 2)


def test_limits_are_checked_before_anything_is_sent() -> None:
    """Too long, unknown sequence, beyond the end: refused, and nothing has changed."""
    machine = make_machine(max_length=3)
    with pytest.raises(LengthLimitError, match="max_length is 3"):
        machine.begin_step([Request(0, 0, 0, "abcd")])
    with pytest.raises(BadInputError):
        machine.begin_step([Request(0, 0, 1, "a")])
    with pytest.raises(BadInputError):
        machine.begin_step([Request(4, 4, 0, "a")])
    with pytest.raises(BadInputError):
        machine.begin_step([Request(0, 0, 0, "a"), Request(0, 0, 0, "b")])
    assert machine.state is SessionState.NEW and machine.lengths == ()


def test_a_closed_session_says_so() -> None:
    """Use after close is the caller's mistake and named as such."""
    machine = make_machine()
    machine.close()
    machine.close()
    with pytest.raises(SessionClosedError):
        machine.begin_step([Request(0, 0, 0, "a")])


def test_two_steps_at_once_are_refused() -> None:
    """One session is one stream of steps."""
    machine = make_machine()
    machine.begin_step([Request(0, 0, 0, "a")])
    with pytest.raises(BadInputError, match="under way"):
        machine.begin_step([Request(0, 0, 0, "a")])


def test_illegal_moves_are_bugs() -> None:
    """The table of moves is the truth; anything else is refused loudly."""
    machine = make_machine()
    with pytest.raises(RuntimeError, match="can not go"):
        machine.lose_route()


steps = st.lists(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 1), st.text("abc", max_size=6)),
        min_size=1,
        max_size=4,
        unique_by=lambda item: item[0],
    ),
    max_size=8,
)


@given(steps, st.integers(1, 5))
def test_any_history_cut_into_parts_leaves_a_server_where_the_client_stands(
    drawn: list[list[tuple[int, int, float, str]]], max_tokens: int
) -> None:
    """Forks, rewinds and chunks in any mix: the mirror follows the machine, and a replay ends in the same place."""
    machine = make_machine()
    mirror = SessionMirror(epoch=1, max_length=100, max_sequences=4)
    machine.start_epoch()
    texts: dict[int, str] = {}
    served: dict[int, str] = {}

    def serve(target: SessionMirror, held: dict[int, str], requests: Sequence[Request], step: int) -> int:
        for part in plan_parts(requests, max_tokens=max_tokens):
            assert part.num_tokens <= max_tokens
            step += 1
            items = [SequenceStep(item.sequence, item.parent, item.start, len(item.rows)) for item in part.sequences]
            verdict = target.judge(epoch=1, step=step, sequences=items, num_rows=part.num_tokens)
            assert verdict is Verdict.RUN
            before = dict(held)
            for item in part.sequences:
                held[item.sequence] = before.get(item.parent, "")[: item.start] + item.rows
        return step

    step = 0
    for drawn_step in drawn:
        before = dict(texts)
        requests = []
        for sequence, parent, share, rows in drawn_step:
            start = round(share * len(before.get(parent, "")))
            requests.append(Request(sequence, parent, start, rows))
            texts[sequence] = before.get(parent, "")[:start] + rows
        step = serve(mirror, served, requests, step)
        run(machine, *requests)
    assert log_of(machine) == {sequence: text for sequence, text in texts.items() if text}
    assert served == texts
    assert all(mirror.length(sequence) == len(text) for sequence, text in texts.items())
    replayed: dict[int, str] = {}
    serve(SessionMirror(epoch=1, max_length=100, max_sequences=4), replayed, machine.log(concatenate), 0)
    assert replayed == {sequence: text for sequence, text in texts.items() if text}
