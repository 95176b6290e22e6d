"""Whatever the server does besides, every token equals the same request run alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from swarm.datatypes import Span
from swarm.errors import BadInputError, LengthLimitError, PeerBusyError, SessionStateError
from swarm.models import SpanModel, load_span, resolve_model
from swarm.server.engine.choosing import choose_backend
from swarm.server.engine.engine import Engine, NotNow
from swarm.server.engine.ragged import RaggedBackend
from swarm.server.engine.scheduler import SchedulerConfig
from swarm.server.engine.sequential import SequentialBackend
from swarm.server.engine.session_memory import MemoryConfig, SessionMemory
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.session_mirror import SequenceStep
from tests.tiny_models import save_tiny_model

SPAN = Span(start=1, end=5)
INNER = Span(start=2, end=4)
FAMILIES = ["llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "cohere2"]
TOLERANCE = 1e-4

MakeModel = Callable[[str], SpanModel]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Loads a fresh copy of a family's blocks; the weights on disk are written once."""
    folders: dict[str, Path] = {}

    def make(family: str) -> SpanModel:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            save_tiny_model(family, folders[family])
        return load_span(resolve_model(str(folders[family])), SPAN)

    return make


class Clock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_backend(model: SpanModel, *, num_tokens: int, clock: Clock | None = None, **config: float) -> RaggedBackend:
    """A backend with room for `num_tokens` positions of the whole span."""
    settings = MemoryConfig(**config)  # type: ignore[arg-type]
    backend = RaggedBackend(model, memory_bytes=2**22, config=settings)
    page_bytes = backend.store.page_bytes
    num_pages = -(-num_tokens // settings.page_tokens) * backend.store.num_layers
    backend = RaggedBackend(model, memory_bytes=num_pages * page_bytes, config=settings)
    if clock is not None:
        backend.memory = SessionMemory(backend.store, settings, now_s=clock)
    return backend


def ignore(output: torch.Tensor | None, error: BaseException | None) -> None:
    """Backends do not call on_done; the engine does."""


def step(session: int, hidden: torch.Tensor, *items: tuple[int, int, int, int], span: Span = SPAN) -> StepWork:
    sequences = [SequenceStep(*item) for item in items]
    assert sum(item.count for item in sequences) == hidden.shape[0]
    return StepWork((bytes([session]), 1), span, sequences, hidden, ignore)


def key(session: int) -> SessionKey:
    return (bytes([session]), 1)


def run_one(backend: RaggedBackend | SequentialBackend, work: StepWork) -> torch.Tensor:
    (result,) = backend.run_steps([work])
    backend_memory = getattr(backend, "memory", None)
    if backend_memory is not None:
        backend_memory.check_integrity()
    assert isinstance(result, torch.Tensor), result
    return result


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def assert_all_free(backend: RaggedBackend) -> None:
    """Nothing of any session is left, and even the shared pages can all be had."""
    backend.memory.check_integrity()
    assert backend.num_tokens_free == backend.num_tokens_total
    pool = backend.store.pool
    assert pool.num_free + pool.num_reclaimable == pool.num_pages
    pool.release(pool.allocate(pool.num_free))
    backend.memory._prefixes.reclaim(pool.num_pages)
    assert pool.num_free == pool.num_pages


class RandomSessions:
    """Sessions that do anything a client may, against the same sessions run one sequence at a time."""

    def __init__(self, backend: RaggedBackend, reference: SequentialBackend, *, seed: int, hidden_size: int) -> None:
        self.backend = backend
        self.reference = reference
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden_size = hidden_size
        self.common = torch.randn(64, hidden_size, generator=self.generator)
        """What many sequences begin with."""
        self.lengths: dict[int, dict[int, int]] = {}

    def _rows(self, start: int, count: int) -> torch.Tensor:
        if start + count <= len(self.common) and self.random.random() < 0.6:
            return self.common[start : start + count]
        return torch.randn(count, self.hidden_size, generator=self.generator)

    def next_step(self, session: int, max_tokens: int) -> StepWork:
        before = self.lengths.setdefault(session, {})
        after, items, rows = dict(before), [], []
        for sequence in self.random.sample(range(3), self.random.choice([1, 1, 1, 2, 3])):
            parent = self.random.choice([sequence, sequence, self.random.randrange(3)])
            held = before.get(parent, 0)
            start = held if self.random.random() < 0.7 else self.random.randint(0, held)
            count = min(self.random.choice([0, 1, 1, 1, 4, 7, 21]), max_tokens - start)
            items.append((sequence, parent, start, count))
            rows.append(self._rows(start, count))
            after[sequence] = start + count
        self.lengths[session] = after
        return step(session, torch.cat(rows), *items, span=INNER if session % 4 == 3 else SPAN)

    def forget(self, session: int) -> None:
        self.lengths.pop(session, None)
        self.backend.forget(key(session))
        self.reference.forget(key(session))

    def run(self, works: Sequence[StepWork]) -> None:
        """Run a batch until nothing of it must wait, and compare."""
        waiting = list(works)
        for _ in range(20 * len(works) + 1):
            if not waiting:
                return
            refused = []
            for work, result in zip(waiting, self.backend.run_steps(waiting), strict=True):
                if isinstance(result, NotNow):
                    refused.append(work)
                    continue
                assert isinstance(result, torch.Tensor), result
                assert_close(result, run_one(self.reference, work))
            self.backend.memory.check_integrity()
            if len(refused) == len(waiting):  # older sessions that are not in this batch make room once idle
                assert isinstance(self.backend.memory._now_s, Clock)
                self.backend.memory._now_s.now_s += 10
            waiting = refused
        raise AssertionError("nobody gets room any more")


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_sessions_in_tight_memory_equal_sessions_run_alone(
    family: str, page_tokens: int, make_model: MakeModel
) -> None:
    """The promise of the engine: sharing, forks, rewinds, spills and cancellations are invisible."""
    model = make_model(family)
    backend = make_backend(model, num_tokens=160, clock=Clock(), page_tokens=page_tokens)
    reference = SequentialBackend(make_model(family), memory_bytes=2**26)
    sessions = RandomSessions(backend, reference, seed=page_tokens, hidden_size=model.hidden_size)
    for _ in range(40):
        chosen = [session for session in range(6) if sessions.random.random() < 0.6]
        sessions.run([sessions.next_step(session, max_tokens=48) for session in chosen])
        if sessions.random.random() < 0.15:
            sessions.forget(sessions.random.randrange(6))
    assert backend.memory.num_spills > 0
    assert backend.memory.num_tokens_shared > 0 or page_tokens == 16  # few of these inputs fill a whole page
    for session in range(6):
        sessions.forget(session)
    assert backend.memory.spilled_bytes == 0
    assert_all_free(backend)


@pytest.fixture
def llama(make_model: MakeModel) -> SpanModel:
    return make_model("llama")


@pytest.fixture
def reference(make_model: MakeModel) -> SequentialBackend:
    return SequentialBackend(make_model("llama"), memory_bytes=2**26)


@pytest.fixture
def rows() -> torch.Tensor:
    """[200, H] of random tokens."""
    return torch.randn(200, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "cohere2"])
def test_a_window_far_shorter_than_the_context(family: str, make_model: MakeModel) -> None:
    """Layers with a window of 8 must see 8 positions at position 150, and the others all of them."""
    model = make_model(family)
    backend = make_backend(model, num_tokens=400)
    reference = SequentialBackend(make_model(family), memory_bytes=2**26)
    rows = torch.randn(150, model.hidden_size, generator=torch.Generator().manual_seed(3))
    for start, end in ((0, 130), (130, 145), *((position, position + 1) for position in range(145, 150))):
        work = step(0, rows[start:end], (0, 0, start, end - start))
        assert_close(run_one(backend, work), run_one(reference, work))


def test_scattered_pages_give_the_same_as_neighbours(
    llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor
) -> None:
    """After days of service no run is long; the gathering read must be as right as the one in place."""
    backend = make_backend(llama, num_tokens=320, page_tokens=4, prefix_memory_bytes=0)
    pages = backend.store.pool.allocate(backend.store.pool.num_pages)
    backend.store.pool.release(pages[::2])
    for start, end in ((0, 60), (60, 61), (61, 75), (75, 76)):
        work = step(0, rows[start:end], (0, 0, start, end - start))
        (result,) = backend.run_steps([work])
        assert isinstance(result, torch.Tensor)
        assert_close(result, run_one(reference, work))
    (table,) = backend.memory._sessions[key(0)].tables.values()
    assert (table.first_breaks == 1).all()


def test_the_same_beginning_shares_pages_and_answers(llama: SpanModel, rows: torch.Tensor) -> None:
    """A system prompt used by everybody is kept and computed once."""
    backend = make_backend(llama, num_tokens=640)
    total = backend.num_tokens_total
    first = run_one(backend, step(0, rows[:100], (0, 0, 0, 100)))
    assert total - backend.num_tokens_free == 112
    num_run = backend.num_tokens_run
    second = run_one(backend, step(1, rows[:100], (0, 0, 0, 100)))
    assert backend.memory.num_tokens_shared == 96
    assert backend.num_tokens_run - num_run == 4
    assert total - backend.num_tokens_free == 128
    assert torch.equal(first[:96], second[:96])
    assert_close(second, first)
    assert backend.kv_usage.shared_bytes == 96 // 16 * 4 * backend.store.page_bytes
    backend.forget(key(0))
    assert total - backend.num_tokens_free == 112
    backend.forget(key(1))
    assert_all_free(backend)


def test_a_prompt_in_chunks_shares_as_much_as_in_one_piece(llama: SpanModel, rows: torch.Tensor) -> None:
    """Servers cut long prompts; that must not cost the sharing."""
    backend = make_backend(llama, num_tokens=640)
    engine = Engine(backend, SchedulerConfig(max_step_tokens=40, decode_tokens=1))
    engine.start()
    try:
        for session in range(2):
            done = threading.Event()
            engine.submit(
                StepWork(key(session), SPAN, [SequenceStep(0, 0, 0, 192)], rows[:192], lambda *_, done=done: done.set())
            )
            assert done.wait(20)
        assert backend.memory.num_tokens_shared == 192
    finally:
        engine.stop()


def test_other_content_and_other_blocks_share_nothing(llama: SpanModel, rows: torch.Tensor) -> None:
    """One bit of difference is another sequence; so are the same states in other blocks."""
    backend = make_backend(llama, num_tokens=640)
    run_one(backend, step(0, rows[:32], (0, 0, 0, 32)))
    changed = rows[:32].clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(10.0))
    run_one(backend, step(1, changed, (0, 0, 0, 32)))
    run_one(backend, step(2, rows[:32], (0, 0, 0, 32), span=INNER))
    run_one(backend, step(3, rows[16:48], (0, 0, 0, 32)))
    assert backend.memory.num_tokens_shared == 0


def test_equal_bytes_of_another_precision_share_nothing(llama: SpanModel) -> None:
    """The same bytes mean other numbers in float16 and in bfloat16; mixing them would poison the index."""
    backend = make_backend(llama, num_tokens=320)
    half = torch.randn(16, 32, generator=torch.Generator().manual_seed(5)).half()
    run_one(backend, step(0, half, (0, 0, 0, 16)))
    run_one(backend, step(1, half.view(torch.bfloat16), (0, 0, 0, 16)))
    assert backend.memory.num_tokens_shared == 0
    run_one(backend, step(2, half.float(), (0, 0, 0, 16)))
    assert backend.memory.num_tokens_shared == 16


def test_a_rewind_into_a_shared_page_leaves_it_intact_for_others(
    llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor
) -> None:
    """Somebody else's edit must not change my conversation."""
    backend = make_backend(llama, num_tokens=640)
    for session in range(2):
        run_one(backend, step(session, rows[:64], (0, 0, 0, 64)))
        run_one(reference, step(session, rows[:64], (0, 0, 0, 64)))
    edit = step(0, rows[100:110], (0, 0, 40, 10))
    assert_close(run_one(backend, edit), run_one(reference, edit))
    follow = step(1, rows[64:70], (0, 0, 64, 6))
    assert_close(run_one(backend, follow), run_one(reference, follow))
    third = run_one(backend, step(2, rows[:64], (0, 0, 0, 64)))
    assert_close(third, run_one(reference, step(2, rows[:64], (0, 0, 0, 64))))


def test_one_session_of_nonsense_disturbs_no_other(llama: SpanModel, rows: torch.Tensor) -> None:
    """NaN stays with who sent it, in the answers and in the memory others get later."""
    backend, undisturbed = make_backend(llama, num_tokens=640), make_backend(llama, num_tokens=640)
    bad = rows[:20].clone()
    bad[7, 3] = float("nan")
    good = [step(session, rows[20 * session : 20 * session + 20], (0, 0, 0, 20)) for session in (1, 2)]
    results = backend.run_steps([good[0], step(0, bad, (0, 0, 0, 20)), good[1]])
    assert isinstance(results[1], BadInputError)
    expected = undisturbed.run_steps([good[0], step(0, rows[:20], (0, 0, 0, 20)), good[1]])
    for index in (0, 2):
        found, wanted = results[index], expected[index]
        assert isinstance(found, torch.Tensor) and isinstance(wanted, torch.Tensor)
        assert torch.equal(found, wanted)
    backend.forget(key(0))
    backend.memory.check_integrity()
    run_one(backend, step(3, rows[:50], (0, 0, 0, 50)))
    run_one(backend, step(4, bad[:7], (0, 0, 0, 7)))


def test_a_batch_that_raises_is_run_one_by_one(
    llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory for eight is not out of memory for one, and one's crash is not everybody's."""
    backend = make_backend(llama, num_tokens=640)
    real = backend._run_packed

    def run_packed(span: Span, batch: Sequence[object], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(batch) > 1 or len(rows[0]) == 13:
            raise RuntimeError("too much")
        return real(span, batch, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "_run_packed", run_packed)
    works = [step(session, rows[:count], (0, 0, 0, count)) for session, count in enumerate((5, 13, 9))]
    results = backend.run_steps(works)
    assert isinstance(results[1], RuntimeError)
    for index in (0, 2):
        found = results[index]
        assert isinstance(found, torch.Tensor)
        assert_close(found, run_one(reference, works[index]))
    backend.memory.check_integrity()


def test_a_step_that_asks_for_what_is_not_held_leaks_nothing(llama: SpanModel, rows: torch.Tensor) -> None:
    """A refused step may name valid forks beside the impossible one; none of them may keep pages."""
    backend = make_backend(llama, num_tokens=320)
    run_one(backend, step(0, rows[:20], (0, 0, 0, 20)))
    (error,) = backend.run_steps([step(0, rows[:2], (1, 0, 20, 1), (2, 0, 21, 1))])
    assert isinstance(error, SessionStateError)
    backend.memory.check_integrity()
    (error,) = backend.run_steps([step(1, rows[:1], (0, 0, 5, 1))])
    assert isinstance(error, SessionStateError)
    for session in range(2):
        backend.forget(key(session))
    assert_all_free(backend)


def test_idle_sessions_make_room_first_and_come_back_unchanged(
    llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor
) -> None:
    """Somebody who is thinking must not block somebody who is reading, and loses nothing by it."""
    clock = Clock()
    backend = make_backend(llama, num_tokens=160, clock=clock, prefix_memory_bytes=0)
    for session in range(3):
        work = step(session, rows[session * 50 : session * 50 + 48], (0, 0, 0, 48))
        assert_close(run_one(backend, work), run_one(reference, work))
        clock.now_s += 10 if session == 1 else 1
    work = step(2, rows[:30], (0, 0, 48, 30))
    assert_close(run_one(backend, work), run_one(reference, work))
    assert [backend.memory._sessions[key(session)].spilled is not None for session in range(3)] == [True, False, False]
    clock.now_s += 10
    back = step(0, rows[150:151], (0, 0, 48, 1))
    assert_close(run_one(backend, back), run_one(reference, back))
    assert backend.memory.num_spills == 2


def test_host_memory_is_bounded_and_the_oldest_goes_on(
    llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor
) -> None:
    """With nowhere to move others to, the first still finishes, and who is closed is told to replay."""
    clock = Clock()
    backend = make_backend(llama, num_tokens=96, clock=clock, spill_memory_bytes=0, prefix_memory_bytes=0)
    for session in range(2):
        work = step(session, rows[:48], (0, 0, 0, 48))
        assert_close(run_one(backend, work), run_one(reference, work))
    (waits,) = backend.run_steps([step(1, rows[:20], (0, 0, 48, 20))])
    assert isinstance(waits, NotNow)
    oldest = step(0, rows[60:80], (0, 0, 48, 20))
    assert_close(run_one(backend, oldest), run_one(reference, oldest))
    assert backend.memory.spilled_bytes == 0 and backend.memory.num_closed == 1
    (error,) = backend.run_steps([step(1, rows[:20], (0, 0, 48, 20))])
    assert isinstance(error, SessionStateError)


def test_sessions_idle_for_long_are_closed_when_host_memory_is_full(llama: SpanModel, rows: torch.Tensor) -> None:
    """An abandoned tab must not hold host memory for ever; a shorter absence costs nothing."""
    clock = Clock()
    backend = make_backend(llama, num_tokens=64, clock=clock, prefix_memory_bytes=0)
    spill_bytes = 64 // 16 * 4 * backend.store.page_bytes
    backend = make_backend(
        llama, num_tokens=64, clock=clock, prefix_memory_bytes=0, spill_memory_bytes=spill_bytes, close_after_s=600
    )
    for session in range(3):
        run_one(backend, step(session, rows[:32], (0, 0, 0, 32)))
        clock.now_s += 300
    run_one(backend, step(3, rows[:64], (0, 0, 0, 64)))  # 0 and 1 are out, 2 had to go too: 0 is closed for it
    assert backend.memory.num_closed == 1 and backend.memory.spilled_bytes <= spill_bytes
    (error,) = backend.run_steps([step(0, rows[:1], (0, 0, 32, 1))])
    assert isinstance(error, SessionStateError)
    backend.forget(key(3))
    run_one(backend, step(1, rows[:1], (0, 0, 32, 1)))


def test_beams_in_host_memory_still_share_their_pages(
    llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor
) -> None:
    """Eight copies of a long prompt would not fit back in."""
    clock = Clock()
    backend = make_backend(llama, num_tokens=160, clock=clock, prefix_memory_bytes=0)
    beams = [(beam, 0, 90, 1) for beam in range(4)]
    for work in (step(0, rows[:90], (0, 0, 0, 90)), step(0, rows[90:94], *beams)):
        assert_close(run_one(backend, work), run_one(reference, work))
    num_pages = backend.store.pool.num_pages - backend.store.pool.num_free
    clock.now_s += 10
    run_one(backend, step(1, rows[:100], (0, 0, 0, 100)))
    assert backend.memory.spilled_bytes == num_pages * backend.store.page_bytes
    clock.now_s += 10
    work = step(0, rows[94:98], *[(beam, 3 - beam, 91, 1) for beam in range(4)])
    assert_close(run_one(backend, work), run_one(reference, work))


def test_a_session_that_outgrows_the_server_is_told_so(llama: SpanModel, rows: torch.Tensor) -> None:
    """Waiting for room that nobody can make would be silence for ever, and a replay here ends in the same way."""
    backend = make_backend(llama, num_tokens=64)
    run_one(backend, step(0, rows[:64], (0, 0, 0, 64)))
    (error,) = backend.run_steps([step(0, rows[:1], (0, 0, 64, 1))])
    assert isinstance(error, LengthLimitError) and "KV memory, which holds 64 tokens in all;" in str(error)


def test_nobody_makes_room_for_a_session_that_never_fits(llama: SpanModel, rows: torch.Tensor) -> None:
    """Moving others out would cost them time and help no one; what fits once they are gone is another matter."""
    backend = make_backend(llama, num_tokens=64, prefix_memory_bytes=0, spill_memory_bytes=0)
    run_one(backend, step(0, rows[:32], (0, 0, 0, 32)))
    never, later = backend.run_steps([step(1, rows[:65], (0, 0, 0, 65)), step(2, rows[:64], (0, 0, 0, 64))])
    assert isinstance(never, LengthLimitError) and isinstance(later, NotNow)
    assert backend.memory.num_spills == backend.memory.num_closed == 0
    backend.forget(key(0))
    run_one(backend, step(3, rows[:128], (0, 0, 0, 128), span=INNER))  # half the blocks take half of each token
    (error,) = backend.run_steps([step(3, rows[:1], (0, 0, 128, 1), span=INNER)])
    assert isinstance(error, LengthLimitError) and "holds 128 tokens in all;" in str(error)


def test_a_sequential_server_tells_full_from_too_small(llama: SpanModel, rows: torch.Tensor) -> None:
    """Only the first passes."""
    backend = SequentialBackend(llama, memory_bytes=64 * SequentialBackend(llama, memory_bytes=2**20)._bytes_per_token)
    run_one(backend, step(0, rows[:40], (0, 0, 0, 40)))
    full, never, outgrown = backend.run_steps(
        [
            step(1, rows[:64], (0, 0, 0, 64)),
            step(1, rows[:65], (0, 0, 0, 65)),
            step(0, rows[:25], (1, 0, 0, 25)),
        ]
    )
    assert isinstance(full, PeerBusyError)
    for error in (never, outgrown):
        assert isinstance(error, LengthLimitError) and "holds 64 tokens in all;" in str(error)


@pytest.mark.parametrize("spill_memory_bytes", [2**24, 0])
def test_six_clients_finish_in_memory_for_two(
    spill_memory_bytes: int, llama: SpanModel, reference: SequentialBackend, rows: torch.Tensor
) -> None:
    """More users than memory means waiting, and no user waits for ever; closed sessions replay."""
    backend = make_backend(
        llama, num_tokens=128, page_tokens=4, spill_memory_bytes=spill_memory_bytes, idle_after_s=0.2
    )
    engine = Engine(backend, SchedulerConfig(max_step_tokens=32))
    engine.start()
    finished: dict[int, torch.Tensor] = {}
    problems: list[BaseException] = []

    def ask(session: SessionKey, start: int, hidden: torch.Tensor) -> torch.Tensor | BaseException:
        answers: list[torch.Tensor | BaseException] = []
        done = threading.Event()

        def on_done(output: torch.Tensor | None, error: BaseException | None) -> None:
            result = output if output is not None else error
            assert result is not None
            answers.append(result)
            done.set()

        engine.submit(StepWork(session, SPAN, [SequenceStep(0, 0, start, len(hidden))], hidden, on_done))
        assert done.wait(40), "no answer"
        return answers[0]

    def client(number: int) -> None:
        hidden = rows[number * 20 : number * 20 + 60]
        outputs: list[torch.Tensor] = []
        epoch, position = 1, 0
        while position < 60:
            new = hidden[position : position + (24 if position == 0 else 1)]
            result = ask((bytes([number]), epoch), position, new)
            while isinstance(result, SessionStateError):
                epoch += 1
                result = ask((bytes([number]), epoch), 0, hidden[: position + len(new)])
                if isinstance(result, torch.Tensor):
                    result = result[position:]
            if isinstance(result, BaseException):
                problems.append(result)
                return
            outputs.append(result)
            position += len(new)
        finished[number] = torch.cat(outputs)
        engine.forget((bytes([number]), epoch))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.stop()
    assert not problems
    assert sorted(finished) == list(range(6))
    for number, outputs in finished.items():
        wanted = run_one(reference, step(number, rows[number * 20 : number * 20 + 60], (0, 0, 0, 60)))
        assert_close(outputs, wanted)
    assert_all_free(backend)


def test_less_than_four_percent_is_wasted_at_a_thousand_tokens(llama: SpanModel) -> None:
    """Measured from real tables of real sessions, as the server reports it."""
    backend = make_backend(llama, num_tokens=8192)
    generator = torch.Generator().manual_seed(7)
    for session, length in enumerate((1001, 1185, 1340, 1009)):
        run_one(backend, step(session, torch.randn(length, 32, generator=generator), (0, 0, 0, length)))
    usage = backend.kv_usage
    assert usage.used_bytes == 4 * (63 + 75 + 84 + 64) * backend.store.page_bytes
    assert 0 < usage.wasted_bytes / usage.used_bytes < 0.04
    assert backend.num_tokens_total - backend.num_tokens_free == 16 * (63 + 75 + 84 + 64)


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_families_with_their_own_attention_run_one_at_a_time_and_right(family: str, make_model: MakeModel) -> None:
    """What can not be batched is still served, and its operator is told why."""
    chosen = choose_backend(make_model(family), memory_bytes=2**22)
    assert not chosen.is_batching and "attention" in chosen.reason
    model = make_model(family)
    rows = torch.randn(12, model.hidden_size, generator=torch.Generator().manual_seed(2))
    whole = model(rows[None], torch.arange(12)[None])[0]
    results = [chosen.backend.run_steps([step(0, rows[start : start + 4], (0, 0, start, 4))])[0] for start in (0, 4, 8)]
    assert_close(torch.cat([result for result in results if isinstance(result, torch.Tensor)]), whole)


@pytest.fixture
def hostile_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose window is in its mask only, so that our attention function is not told of it."""
    from swarm.server.engine import attention_kind, ragged_attention

    real = attention_kind.AttentionKind
    monkeypatch.setattr(ragged_attention, "AttentionKind", lambda **settings: real(**(settings | {"window": 0})))


@pytest.mark.usefixtures("hostile_window")
def test_a_window_our_attention_is_not_told_of_is_noticed(make_model: MakeModel) -> None:
    """Short self-tests never reach the window of a real model; wrong answers would begin at token 4097."""
    chosen = choose_backend(make_model("gemma2"), memory_bytes=2**22)
    assert not chosen.is_batching and "window" in chosen.reason
