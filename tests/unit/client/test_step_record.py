"""Replays that meet every point of compression again: a fresh server comes to hold what the lost one held."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.client.session.machine import SessionMachine
from swarm.client.session.parts import SequenceRequest, StepPart, moves_first, plan_parts
from swarm.client.session.step_record import RecordedStep, StepRecord
from swarm.errors import SessionStateError
from swarm.kvpolicy.settings import FULL_CACHE, PRESETS, KVPolicy
from swarm.kvpolicy.streaming import TailState, advance, can_rewind, cut_step, is_staged, new_tail, settle

Request = SequenceRequest[str]

SMALL = replace(PRESETS["pyramid+gear"], chunk_tokens=64)
"""Cuts long inputs often enough for tests."""
OTHER = replace(PRESETS["gear"], num_sinks=2, block_tokens=8, tail_tokens=24)
"""Another rhythm of events."""
MAX_STEP_TOKENS = 20


@dataclass
class _Sequence:
    tail: TailState
    tokens: str = ""
    events: list[tuple[str, TailState]] = field(default_factory=list)
    """What was stored anew: the tokens it was decided about, judged by the newest where the step was staged."""


class SimulatedServer:
    """Does with positions and events what a server does with keys and values."""

    def __init__(self, policy: KVPolicy) -> None:
        self.policy = policy
        self.sequences: dict[int, _Sequence] = {}

    def run(self, part: StepPart[str]) -> None:
        """Raises SessionStateError where a server would; a refused step changes nothing."""
        after: dict[int, _Sequence] = {}
        for item in part.sequences:
            parent = self.sequences.get(item.parent, _Sequence(new_tail(self.policy)))
            assert item.start <= len(parent.tokens), "a step starts beyond what is held"
            if item.start < len(parent.tokens) and not can_rewind(self.policy, parent.tail, item.start):
                raise SessionStateError("compressed since")
            after[item.sequence] = self._advance(parent, item)
        self.sequences.update(after)

    def _advance(self, parent: _Sequence, item: Request) -> _Sequence:
        policy, count = self.policy, len(item.rows)
        if item.start == 0:
            parent = _Sequence(new_tail(policy))
        now = _Sequence(parent.tail, parent.tokens[: item.start], list(parent.events))
        if not count:
            return now
        staged = is_staged(policy, now.tail, item.start, count, is_unfinished=item.is_unfinished)
        self._move_to(now, settle(policy, now.tail, item.start), judged_by="")
        if not staged:
            now.tokens += item.rows
            if policy.compresses:
                assert len(now.tokens) - now.tail.stored_end <= policy.tail_tokens + policy.block_tokens
            return now
        end = item.start + count
        for length in cut_step(policy, item.start, count):
            position = len(now.tokens)
            now.tokens += item.rows[position - item.start : position - item.start + length]
            is_unfinished = item.is_unfinished or len(now.tokens) < end
            tail = advance(policy, now.tail, position, length, is_unfinished=is_unfinished)
            self._move_to(now, tail, judged_by="the newest")
        return now

    def _move_to(self, now: _Sequence, tail: TailState, *, judged_by: str) -> None:
        if tail.stored_end != now.tail.stored_end:
            now.events.append((f"{now.tokens} {judged_by}", replace(tail, is_staging=False)))
        now.tail = tail

    def holds(self) -> dict[int, _Sequence]:
        """What it holds once what is due is done, as the next step would."""
        held = {}
        for number, sequence in self.sequences.items():
            if sequence.tokens:
                now = _Sequence(sequence.tail, sequence.tokens, list(sequence.events))
                self._move_to(now, settle(self.policy, now.tail, len(now.tokens)), judged_by="")
                held[number] = now
        return held


def concatenate(chunks: Sequence[str]) -> str:
    return "".join(chunks)


class SimulatedClient:
    """Does with the machine what the driver does, and knows no network."""

    def __init__(self, policies: Sequence[KVPolicy]) -> None:
        self.policies = policies
        self.machine: SessionMachine[str] = SessionMachine(max_length=10_000, max_sequences=3)
        self.servers = [SimulatedServer(policy) for policy in policies]
        self.num_replays = 0

    def step(self, requests: Sequence[Request], *, lose_after: int | None = None, abandon: bool = False) -> None:
        """Run a step, losing all servers, or giving up, after so many parts."""
        machine = self.machine
        log_before = machine.log(concatenate)
        machine.begin_step(requests)
        parts = plan_parts(requests, max_tokens=MAX_STEP_TOKENS)
        num_done = 0
        must_go_back = not machine.can_go_back(self.policies)
        while num_done < len(parts):
            if must_go_back:
                planned = moves_first(parts[num_done:], machine.length)
                assert planned is not None, "refused although nothing goes back"
                machine.finish_part(planned[0])
                parts = [*parts[:num_done], planned[0], *planned[1]]
                num_done += 1
                must_go_back = False
                self.replay()
            if num_done == lose_after:
                lose_after = None
                if abandon:
                    machine.abandon_step()
                    assert machine.log(concatenate) == log_before
                    self.replay()
                    return
                self.replay()
            try:
                for server in self.servers:
                    server.run(parts[num_done])
            except SessionStateError:
                must_go_back = True
                continue
            num_done += 1
            if num_done < len(parts):
                machine.finish_part(parts[num_done - 1])
            else:
                machine.finish_step(parts[-1])

    def replay(self) -> None:
        """Fresh servers in the place of all."""
        self.num_replays += 1
        self.servers = self.fresh()

    def fresh(self) -> list[SimulatedServer]:
        servers = [SimulatedServer(policy) for policy in self.policies]
        parts = self.machine.replay(concatenate, policies=self.policies, max_tokens=MAX_STEP_TOKENS)
        for part in parts:
            assert part.num_tokens <= MAX_STEP_TOKENS
            for server in servers:
                server.run(part)
        return servers

    def holds(self) -> list[dict[int, _Sequence]]:
        return [server.holds() for server in self.servers]


def random_requests(rng: random.Random, machine: SessionMachine[str]) -> list[Request]:
    """Answers token by token, prompts of all lengths, candidates, rewinds, forks."""
    requests = []
    for sequence in rng.sample(range(3), rng.choice([1, 1, 1, 2, 3])):
        parent = rng.choice([sequence, sequence, sequence, rng.randrange(3)])
        held = machine.length(parent)
        back = rng.choice([0, 0, 0, 0, 1, 2, 5, rng.randint(0, held)])
        count = rng.choice([0, 1, 1, 1, 1, 1, 2, 7, 17, 33, 90])
        rows = "".join(rng.choices("abcdefgh", k=count))
        requests.append(Request(sequence, parent, max(held - back, 0), rows))
    return requests


POLICIES = [[SMALL], [OTHER], [SMALL, OTHER], [PRESETS["pyramid"], FULL_CACHE]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), policies=st.sampled_from(POLICIES))
def test_servers_that_replace_others_hold_what_those_held(seed: int, policies: list[KVPolicy]) -> None:
    """Whatever was appended, taken back or forked, and whenever servers are lost: one state follows from the log."""
    rng = random.Random(seed)
    calm, troubled = SimulatedClient(policies), SimulatedClient(policies)
    for _ in range(40):
        requests = random_requests(rng, calm.machine)
        calm.step(requests)
        if rng.random() < 0.1:
            before = copy.deepcopy(troubled.machine)
            troubled.step(random_requests(rng, troubled.machine), lose_after=rng.randint(0, 2), abandon=True)
            troubled.machine = before  # also where nothing was lost before the step was done
            troubled.replay()
        troubled.step(requests, lose_after=rng.choice([None, None, 0, 1, 3]))
        assert troubled.machine.lengths == calm.machine.lengths
        assert [server.holds() for server in calm.fresh()] == calm.holds()
        assert troubled.holds() == calm.holds()


@pytest.mark.parametrize("prompt", [0, 3, 40, 700])
def test_an_answer_is_replayed_in_blocks(prompt: int) -> None:
    """Token by token the replay of a long answer would take as long as the answer."""
    record = StepRecord()
    for end in range(0, prompt, 512):
        record.note(min(512, prompt - end), is_unfinished=end + 512 < prompt)
    for _ in range(320):
        record.note(1, is_unfinished=False)
    segments = record.segments([SMALL], max_tokens=512)
    answer = [step for step in segments if step.start >= prompt]
    assert len(answer) <= 320 // 16 + 2
    assert [step.end for step in segments[:-1]] == [step.start for step in segments[1:]]
    assert segments[-1].end == prompt + 320
    if prompt == 700:
        assert segments[:2] == [RecordedStep(0, 512, True), RecordedStep(512, 700, False)]


def test_the_last_step_can_always_be_taken_back() -> None:
    """Rejected candidates cost nothing as long as they were not more than there is room for."""
    rng = random.Random(5)
    record = StepRecord()
    record.note(300, is_unfinished=False)
    for _ in range(200):
        start = record.length
        room = record.room([SMALL, FULL_CACHE, OTHER], start)
        assert room is not None and room >= 1
        record.note(rng.randint(1, room), is_unfinished=False)
        kept = rng.randint(start + 1, record.length)
        assert record.can_rewind([SMALL, OTHER], kept)
        record = record.first(kept)
    assert record.room([FULL_CACHE], record.length) is None
    assert record.room([SMALL], 10) == 0


def test_a_prompt_can_not_be_taken_back_in_part() -> None:
    """What its end decided about the tokens before it can not be undone."""
    record = StepRecord()
    record.note(200, is_unfinished=True)
    record.note(100, is_unfinished=False)
    assert record.can_rewind([FULL_CACHE], 299)
    assert not record.can_rewind([SMALL], 299)
    assert record.can_rewind([SMALL], 0)
    assert record.first(250).steps() == [RecordedStep(0, 200, True), RecordedStep(200, 250, False)]
    assert record.first(200).steps() == [RecordedStep(0, 200, False)]
    assert record.first(300).steps() == record.steps()


def test_moves_go_first() -> None:
    """What goes back is part of the log before anything is sent; the rest only appends."""
    requests = [Request(0, 1, 3, "abc"), Request(1, 1, 5, "x"), Request(2, 2, 0, "")]
    lengths = {0: 9, 1: 6, 2: 4}
    planned = moves_first([StepPart(tuple(requests))], lambda sequence: lengths[sequence])
    assert planned is not None
    moves, appending = planned
    assert moves.sequences == (Request(0, 1, 3, ""), Request(1, 1, 5, ""), Request(2, 2, 0, ""))
    assert [part.sequences for part in appending] == [
        (Request(0, 0, 3, "abc"), Request(1, 1, 5, "x"), Request(2, 2, 0, "")),
    ]
    assert moves_first([StepPart((Request(0, 0, 9, "abc"),))], lambda sequence: 9) is None


def test_a_step_that_only_goes_back_is_still_a_step() -> None:
    """Its end is what tells the caller that it is done."""
    planned = moves_first([StepPart((Request(0, 0, 3, ""),))], lambda sequence: 9)
    assert planned is not None
    assert planned[1] == [StepPart((Request(0, 0, 3, ""),))]


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=3), most=st.integers(1, 30))
def test_inputs_say_that_they_go_on(counts: list[int], most: int) -> None:
    """A server compresses at the end of an input, not wherever a message happens to end."""
    requests = [Request(sequence, sequence, 0, "x" * count) for sequence, count in enumerate(counts)]
    parts = plan_parts(requests, max_tokens=most)
    for sequence, count in enumerate(counts):
        items = [item for part in parts for item in part.sequences if item.sequence == sequence]
        assert [item.is_unfinished for item in items] == [True] * (len(items) - 1) + [False]
        assert sum(len(item.rows) for item in items) == count


def test_short_inputs_are_not_cut_by_what_stands_beside_them() -> None:
    """A batch's second prompt must be kept as it would be alone: in the tail, not staged and judged."""
    requests = [Request(0, 0, 0, "x" * 500), Request(1, 1, 0, "y" * 36), Request(2, 2, 0, "z" * 37)]
    parts = plan_parts(requests, max_tokens=512)
    pieces = [[(item.sequence, len(item.rows), item.is_unfinished) for item in part.sequences] for part in parts]
    assert pieces == [[(0, 500, False)], [(1, 36, False), (2, 37, False)]]
