"""The engine answers everything once, in order, and no session's failure is another's."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import BadInputError, PeerFaultError
from swarm.server.engine.engine import Engine, NotNow
from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.scheduler import SchedulerConfig
from swarm.server.engine.session_memory import SessionMemory
from swarm.server.engine.step_cuts import Stretch
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep

SPAN = Span(start=0, end=2)
A, B, C = ((name, 1) for name in (b"a", b"b", b"c"))

Result = torch.Tensor | NotNow | BaseException


@dataclass
class FakeBackend:
    """Answers x + 1, remembers what it was asked, and does as `react` says where that is not None."""

    react: Callable[[StepWork], Result | None] = lambda work: None
    batches: list[list[StepWork]] = field(default_factory=list)
    memory: SessionMemory | None = None
    forgotten: list[SessionKey] = field(default_factory=list)
    dropped: list[SessionKey] = field(default_factory=list)
    away: dict[SessionKey, bool] = field(default_factory=dict)
    num_tokens_total: int = 100
    num_tokens_free: int = 100
    num_tokens_run: int = 0
    compressing_s: float = 0.0
    kv_usage: KVUsage = field(default_factory=KVUsage)
    gate: threading.Event = field(default_factory=threading.Event)
    """Steps wait for it, so that a test can queue several things first."""

    def run_steps(self, works: list[StepWork]) -> list[Result]:
        assert self.gate.wait(10)
        self.batches.append(works)
        results: list[Result] = []
        for work in works:
            reaction = self.react(work)
            results.append(work.hidden + 1 if reaction is None else reaction)
            self.num_tokens_run += work.hidden.shape[0]
        return results

    def run_stateless(self, work: ForwardWork | BackwardWork) -> torch.Tensor:
        if work.hidden.shape[0] == 13:
            raise RuntimeError("unlucky")
        return work.hidden * 2

    def forget(self, session: SessionKey) -> None:
        self.forgotten.append(session)

    def drop_step(self, session: SessionKey) -> None:
        self.dropped.append(session)

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        self.away[session] = is_away

    def has_lost(self, session: SessionKey) -> bool:
        return False


@dataclass
class Answer:
    """Collects what on_done is given."""

    calls: list[tuple[torch.Tensor | None, BaseException | None]] = field(default_factory=list)
    event: threading.Event = field(default_factory=threading.Event)
    work: StepWork | None = None

    def __call__(self, output: torch.Tensor | None, error: BaseException | None) -> None:
        self.calls.append((output, error))
        self.event.set()

    def wait(self) -> torch.Tensor | BaseException:
        assert self.event.wait(10), "no answer"
        ((output, error),) = self.calls
        result = output if output is not None else error
        assert result is not None
        return result


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def engine(backend: FakeBackend) -> Iterator[Engine]:
    engine = Engine(backend, SchedulerConfig(max_step_tokens=64, gather_share=0.0))
    engine.start()
    yield engine
    backend.gate.set()
    engine.stop()


def submit(engine: Engine, session: SessionKey, *items: tuple[int, int, int, int]) -> Answer:
    """A step with distinct rows; items are (sequence, parent, start, count)."""
    sequences = [SequenceStep(*item) for item in items]
    num_rows = sum(item.count for item in sequences)
    answer = Answer()
    hidden = torch.arange(num_rows, dtype=torch.float32).unsqueeze(1) + session[0][0] * 1000
    answer.work = StepWork(session, SPAN, sequences, hidden, answer)
    engine.submit(answer.work)
    return answer


def expected(session: SessionKey, num_rows: int) -> torch.Tensor:
    return torch.arange(num_rows, dtype=torch.float32).unsqueeze(1) + session[0][0] * 1000 + 1


def check(answer: Answer, session: SessionKey, num_rows: int) -> None:
    result = answer.wait()
    assert isinstance(result, torch.Tensor), result
    assert torch.equal(result, expected(session, num_rows))


def parts_of(backend: FakeBackend, session: SessionKey) -> list[StepWork]:
    return [work for batch in backend.batches for work in batch if work.session == session]


def test_waiting_sessions_share_a_batch_and_a_session_keeps_its_order(engine: Engine, backend: FakeBackend) -> None:
    """Sharing is the gain; two steps of one session in a batch would read positions not yet written."""
    first = submit(engine, A, (0, 0, 0, 1))
    time.sleep(0.05)
    answers = [submit(engine, A, (0, 0, start, 1)) for start in (1, 2)]
    other = submit(engine, B, (0, 0, 0, 2))
    backend.gate.set()
    for answer in (first, *answers):
        check(answer, A, 1)
    check(other, B, 2)
    assert [work.sequences[0].start for work in parts_of(backend, A)] == [0, 1, 2]
    assert {len({work.session for work in batch}) == len(batch) for batch in backend.batches} == {True}
    assert any(len(batch) == 2 for batch in backend.batches)


def test_a_long_input_is_cut_and_put_together_again(engine: Engine, backend: FakeBackend) -> None:
    """The client must not be able to tell that its prompt ran in pieces."""
    backend.gate.set()
    check(submit(engine, A, (0, 0, 0, 300)), A, 300)
    parts = parts_of(backend, A)
    assert len(parts) > 1 and all(work.hidden.shape[0] <= 64 for work in parts)
    assert [item.start for work in parts for item in work.sequences] == [
        sum(work.hidden.shape[0] for work in parts[:index]) for index in range(len(parts))
    ]
    assert engine.counters.num_steps == 1 and engine.counters.num_tokens == 300


def test_a_cut_step_of_several_sequences_forks_before_anything_grows(engine: Engine, backend: FakeBackend) -> None:
    """Later parts come after the parents have changed, so all forks belong to the first."""
    backend.gate.set()
    check(submit(engine, A, (0, 0, 0, 10), (1, 1, 0, 4)), A, 14)
    check(submit(engine, A, (0, 1, 3, 50), (1, 0, 10, 0), (2, 0, 7, 60)), A, 110)
    first, *later = parts_of(backend, A)[1:]
    assert [(item.sequence, item.parent, item.start) for item in first.sequences] == [(0, 1, 3), (1, 0, 10), (2, 0, 7)]
    assert later
    rows = {0: 0, 1: 0, 2: 0}
    for part in (first, *later):
        assert sum(item.count for item in part.sequences) == part.hidden.shape[0]
        for item in part.sequences:
            if part is not first:
                first_start = {0: 3, 1: 10, 2: 7}[item.sequence]
                assert item.parent == item.sequence and item.start == first_start + rows[item.sequence]
            rows[item.sequence] += item.count
    assert rows == {0: 50, 1: 0, 2: 60}


def test_decoders_run_between_the_chunks_of_a_long_input(engine: Engine, backend: FakeBackend) -> None:
    """Somebody reading along must not wait for another's whole prompt."""
    long = submit(engine, A, (0, 0, 0, 600))
    decoding = [submit(engine, B, (0, 0, start, 1)) for start in range(4)]
    backend.gate.set()
    for answer in decoding:
        check(answer, B, 1)
    check(long, A, 600)
    order = [batch[0].session for batch in backend.batches]
    last_decode = max(index for index, session in enumerate(order) if session == B)
    assert last_decode < len(order) - 1
    assert not any(left == right == A for left, right in itertools.pairwise(order[: last_decode + 1]))


@dataclass
class FakeMemory:
    """Says of each session's steps what `stretches` says, or fails."""

    stretches: dict[SessionKey, list[Stretch]]

    def find_stretches(self, work: StepWork) -> list[Stretch]:
        return self.stretches[work.session]


def submit_compressed(engine: Engine, session: SessionKey, num_tokens: int) -> Answer:
    answer = Answer()
    hidden = expected(session, num_tokens) - 1
    items = [SequenceStep(0, 0, 0, num_tokens)]
    engine.submit(StepWork(session, SPAN, items, hidden, answer, compresses=True))
    return answer


def test_a_staged_step_runs_apart_from_decoders_however_short(engine: Engine, backend: FakeBackend) -> None:
    """It takes many times a decoding step, which nobody who reads along should wait for within his own step."""
    stretches = {A: [Stretch(5, False, False)], B: [Stretch(5, True, False)]}
    backend.memory = FakeMemory(stretches)  # type: ignore[assignment]
    first = submit(engine, C, (0, 0, 0, 1))
    time.sleep(0.05)  # the thread is in its first batch, so the rest arrives together
    answers = [submit_compressed(engine, A, 5), submit_compressed(engine, B, 5), submit(engine, C, (0, 0, 1, 1))]
    backend.gate.set()
    for answer, session, count in zip([first, *answers], (C, A, B, C), (1, 5, 5, 1), strict=True):
        check(answer, session, count)
    assert sorted(sorted(work.session for work in batch) for batch in backend.batches) == [[A], [B, C], [C]]


@pytest.mark.parametrize("stretches", [{}, {A: [Stretch(5, True, False)]}], ids=["looking", "cutting"])
def test_a_step_that_can_not_be_looked_at_or_cut_fails_its_session_alone(
    engine: Engine, backend: FakeBackend, stretches: dict[SessionKey, list[Stretch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with one session's state must not end the steps of all."""

    def fail(*_: object) -> int:
        raise RuntimeError("can not be cut")

    monkeypatch.setattr("swarm.server.engine.job.count_allowed", fail)
    backend.memory = FakeMemory(stretches)  # type: ignore[assignment]
    first = submit(engine, C, (0, 0, 0, 1))
    time.sleep(0.05)
    failing, fine = submit_compressed(engine, A, 5), submit(engine, B, (0, 0, 0, 3))
    backend.gate.set()
    assert isinstance(failing.wait(), PeerFaultError)
    check(first, C, 1)
    check(fine, B, 3)
    assert backend.forgotten == [A] and engine.counters.num_failed_steps == 1


def test_work_without_room_is_tried_again_and_holds_nobody_up(engine: Engine, backend: FakeBackend) -> None:
    """A session that waits for memory stays in its place; the one behind it may be what frees some."""
    refusals = 3

    def react(work: StepWork) -> Result | None:
        nonlocal refusals
        if work.session == A and refusals:
            refusals -= 1
            return NotNow("full")
        return None

    backend.react = react
    blocked = submit(engine, A, (0, 0, 0, 100))
    behind = submit(engine, B, (0, 0, 0, 100))
    backend.gate.set()
    check(behind, B, 100)
    check(blocked, A, 100)
    assert refusals == 0


def test_an_error_fails_its_session_with_all_it_has_queued_and_no_other(engine: Engine, backend: FakeBackend) -> None:
    """After a failed step the later ones can not be right; the neighbours' can."""
    backend.react = lambda work: BadInputError("not finite") if work.session == A else None
    submit(engine, C, (0, 0, 0, 1))
    time.sleep(0.05)  # the thread is in its first batch, so the rest arrives together
    failing = [submit(engine, A, (0, 0, start, 1)) for start in range(3)]
    fine = submit(engine, B, (0, 0, 0, 1))
    backend.gate.set()
    assert all(isinstance(answer.wait(), BadInputError) for answer in failing)
    check(fine, B, 1)
    assert A in backend.forgotten and B not in backend.forgotten
    assert engine.counters.num_failed_steps == 1


def test_a_backend_that_raises_is_answered_and_survived(engine: Engine, backend: FakeBackend) -> None:
    """The thread serves everybody; it must outlive whatever a model throws."""

    def react(work: StepWork) -> Result | None:
        if work.session == A:
            raise RuntimeError("boom")
        return None

    backend.react = react
    backend.gate.set()
    error = submit(engine, A, (0, 0, 0, 1)).wait()
    assert isinstance(error, PeerFaultError) and "boom" in str(error)
    check(submit(engine, B, (0, 0, 0, 1)), B, 1)


def test_an_on_done_that_raises_harms_nobody(engine: Engine, backend: FakeBackend) -> None:
    """A connection that broke while its answer was on the way is no reason to stop serving."""

    def on_done(output: torch.Tensor | None, error: BaseException | None) -> None:
        raise ValueError("the loop is gone")

    engine.submit(StepWork(A, SPAN, [SequenceStep(0, 0, 0, 1)], torch.zeros(1, 1), on_done))
    backend.gate.set()
    check(submit(engine, B, (0, 0, 0, 1)), B, 1)


def test_forgetting_answers_what_is_queued_and_frees_the_memory(engine: Engine, backend: FakeBackend) -> None:
    """A client that hangs up leaves nothing behind, also in the middle of a long input."""
    running = submit(engine, B, (0, 0, 0, 1))
    time.sleep(0.05)
    gone = submit(engine, A, (0, 0, 0, 500))
    engine.forget(A)
    backend.gate.set()
    assert isinstance(gone.wait(), PeerFaultError)
    check(running, B, 1)
    check(submit(engine, C, (0, 0, 0, 1)), C, 1)
    assert A in backend.forgotten and not parts_of(backend, A)


def test_stateless_work_runs_also_while_sessions_never_pause(engine: Engine, backend: FakeBackend) -> None:
    """Training comes last but not never."""
    backend.gate.set()
    stop = threading.Event()

    def again(output: torch.Tensor | None, error: BaseException | None) -> None:
        if not stop.is_set():
            engine.submit(StepWork(A, SPAN, [SequenceStep(0, 0, 0, 1)], torch.zeros(1, 1), again))

    again(None, None)
    good, bad = Answer(), Answer()
    engine.submit(ForwardWork(SPAN, [2], torch.ones(2, 1), good))
    engine.submit(ForwardWork(SPAN, [13], torch.ones(13, 1), bad))
    result = good.wait()
    assert isinstance(result, torch.Tensor) and torch.equal(result, torch.full((2, 1), 2.0))
    assert isinstance(bad.wait(), PeerFaultError)
    stop.set()


def test_stopping_answers_everything_once(backend: FakeBackend) -> None:
    """A client that hears nothing waits for its timeout; each must be told."""
    engine = Engine(backend)
    engine.start()
    answers = [submit(engine, session, (0, 0, 0, 40)) for session in (A, A, B)]
    stateless = Answer()
    engine.submit(ForwardWork(SPAN, [1], torch.ones(1, 1), stateless))
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    time.sleep(0.05)
    backend.gate.set()
    stopper.join(10)
    late = submit(engine, C, (0, 0, 0, 1))
    for answer in (*answers, stateless, late):
        answer.wait()
    assert isinstance(late.wait(), PeerFaultError) and isinstance(answers[1].wait(), PeerFaultError)
    engine.stop()


def test_stopping_before_the_start_answers_too(backend: FakeBackend) -> None:
    """A server that fails while it starts up must not hang on its way out."""
    engine = Engine(backend)
    answer = submit(engine, A, (0, 0, 0, 1))
    engine.stop()
    assert isinstance(answer.wait(), PeerFaultError)


def test_many_threads_get_their_own_answers(engine: Engine, backend: FakeBackend) -> None:
    """Submitting is the one thing done from other threads."""
    backend.gate.set()
    problems: list[str] = []

    def client(number: int) -> None:
        session = (bytes([number]), 1)
        for start in range(20):
            result = submit(engine, session, (0, 0, start, 1 + number % 3)).wait()
            if not isinstance(result, torch.Tensor) or not torch.equal(result, expected(session, 1 + number % 3)):
                problems.append(f"{session}: {result}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not problems and engine.counters.num_steps == 160


def test_cancelled_steps_do_not_run_and_earlier_ones_do(engine: Engine, backend: FakeBackend) -> None:
    """A client that goes on from an earlier state wants the steps after it neither run nor waited for."""
    busy = submit(engine, B, (0, 0, 0, 1))
    wait_until_asked(engine)
    answers = [submit(engine, A, (0, 0, start, 1)) for start in range(3)]
    engine.cancel([work_of(answer, A) for answer in answers[1:]])
    later = submit(engine, A, (0, 0, 1, 2))
    backend.gate.set()
    check(busy, B, 1)
    check(answers[0], A, 1)
    check(later, A, 2)
    assert all(isinstance(answer.wait(), PeerFaultError) for answer in answers[1:])
    assert [work.sequences[0].start for work in parts_of(backend, A)] == [0, 1]
    assert not backend.forgotten


def test_a_step_cancelled_half_way_is_dropped_by_the_backend(engine: Engine, backend: FakeBackend) -> None:
    """What a backend prepared for it must not be taken for the next step's."""
    answer = submit(engine, A, (0, 0, 0, 200))
    wait_until_asked(engine)
    engine.cancel([work_of(answer, A)])
    backend.gate.set()
    assert isinstance(answer.wait(), PeerFaultError)
    assert len(parts_of(backend, A)) == 1 and backend.dropped == [A]
    check(submit(engine, A, (0, 0, 0, 2)), A, 2)


def test_an_engine_says_how_long_it_has_been_silent(engine: Engine, backend: FakeBackend) -> None:
    """Others tell a hung engine from an idle one by it."""
    assert engine.silent_s == 0.0
    answer = submit(engine, A, (0, 0, 0, 1))
    wait_until_asked(engine)
    time.sleep(0.05)
    assert engine.silent_s >= 0.05
    backend.gate.set()
    check(answer, A, 1)
    wait_for(lambda: engine.silent_s == 0.0)


def test_time_for_compressing_is_not_taken_for_what_tokens_take(backend: FakeBackend) -> None:
    """Otherwise chunks would shrink after each input's end, though what they take is as before."""
    now_s = 0.0
    engine = Engine(backend, SchedulerConfig(max_step_tokens=64, gather_share=0.0), now_s=lambda: now_s)

    def react(work: StepWork) -> Result | None:
        nonlocal now_s
        now_s += 10.0
        backend.compressing_s += 9.5
        return None

    backend.react = react
    backend.gate.set()
    engine.start()
    check(submit(engine, A, (0, 0, 0, 50)), A, 50)
    engine.stop()
    assert engine.estimate.token_s == pytest.approx(0.5 / 50)


def test_an_estimate_is_known_before_the_first_step() -> None:
    """The first client of a server wants to know, too; measured times replace it."""
    engine = Engine(FakeBackend(), first_step_s=0.25)
    assert engine.estimate.step_s == 0.25 and engine.estimate.token_s == 0.0
    engine.stop()


def work_of(answer: Answer, session: SessionKey) -> StepWork:
    assert answer.work is not None and answer.work.session == session
    return answer.work


def wait_until_asked(engine: Engine) -> None:
    """Until the engine is within a batch."""
    wait_for(lambda: engine.silent_s > 0)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
