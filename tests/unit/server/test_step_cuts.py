"""Steps of compressed sessions are cut into parts only where the parts mean the same as the whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import Span
from swarm.kvpolicy.settings import PRESETS
from swarm.kvpolicy.streaming import TailState, advance, is_staged, new_tail, settle
from swarm.server.engine.job import StepJob
from swarm.server.engine.step_cuts import Stretch, count_allowed, find_stretches, least_part_tokens
from swarm.server.engine.work import StepWork
from swarm.server.session_mirror import SequenceStep

POLICY = replace(PRESETS["pyramid+gear"], chunk_tokens=64)


def cut(items: list[SequenceStep], tails: dict[int, TailState], wishes: list[int]) -> list[list[SequenceStep]]:
    """The items of each part when the scheduler asks for parts of these sizes, again and again."""
    num_tokens = sum(item.count for item in items)
    work = StepWork((b"a", 1), Span(start=0, end=1), items, torch.zeros(num_tokens, 2), lambda *_: None)
    job = StepJob(work, False, 0.0)
    job.stretches = find_stretches(POLICY, items, lambda sequence, start: tails[sequence].is_staging)
    parts: list[list[SequenceStep]] = []
    while job.num_left:
        part = job.part(wishes[len(parts) % len(wishes)])
        assert part.hidden.shape[0] == sum(item.count for item in part.sequences) > 0
        parts.append(list(part.sequences))
        job.has_begun = True
        job.num_done += part.hidden.shape[0]
    return parts


@given(
    first=st.integers(1, 150),
    steps=st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=6),
    wishes=st.lists(st.integers(1, 100), min_size=1, max_size=4),
)
def test_parts_lead_to_the_same_state_as_whole_steps(
    first: int, steps: list[tuple[int, bool]], wishes: list[int]
) -> None:
    """Otherwise an engine under load would keep other tokens than an idle one, and than its session's mirror says."""
    tail, start = new_tail(POLICY), 0
    for count, is_unfinished in [(first, False), *steps]:
        item = SequenceStep(0, 0, start, count, is_unfinished)
        whole = advance(POLICY, tail, start, count, is_unfinished=is_unfinished)
        staged = is_staged(POLICY, tail, start, count, is_unfinished=is_unfinished)
        for parts in cut([item], {0: tail}, wishes):
            (part,) = parts
            end = part.start + part.count
            assert is_staged(POLICY, tail, part.start, part.count, is_unfinished=part.is_unfinished) == staged
            if staged:
                assert part.start // POLICY.chunk_tokens == (end - 1) // POLICY.chunk_tokens
            assert part.is_unfinished == (is_unfinished or end < start + count)
            tail = advance(POLICY, tail, part.start, part.count, is_unfinished=part.is_unfinished)
        assert settle(POLICY, tail, start + count) == settle(POLICY, whole, start + count)
        assert tail.is_staging == whole.is_staging
        start += count


def test_short_steps_of_several_sequences_are_taken_whole() -> None:
    """A beam's token is no input of its own that could be staged."""
    stretches = [Stretch(20, True, False), Stretch(20, True, False)]
    assert count_allowed(stretches, 0, 10) == 20
    assert count_allowed(stretches, 0, 39) == 20
    assert count_allowed(stretches, 0, 40) == 40
    assert count_allowed(stretches, 20, 5) == 20


def test_a_part_ends_where_an_input_is_compressed() -> None:
    """What comes after an event must see what the event left."""
    stretches = [Stretch(30, False, True), Stretch(10, False, False), Stretch(1, True, False)]
    assert count_allowed(stretches, 0, 100) == 30
    assert count_allowed(stretches, 25, 100) == 5
    assert count_allowed(stretches, 30, 100) == 11


def test_parts_over_stored_rows_are_not_tiny_and_others_may_be() -> None:
    """Each such part decodes all of the rows; a first prompt has none, and shall leave decoders small gaps."""

    def least(*items: SequenceStep, staging: bool = False, done: int = 0) -> int:
        return least_part_tokens(find_stretches(POLICY, items, lambda *_: staging), done)

    prompt, question = SequenceStep(0, 0, 0, 100), SequenceStep(0, 0, 300, 100)
    assert least(prompt) == least(prompt, done=63) == 1
    assert least(prompt, done=64) > 8 and least(question) > 8
    assert least(SequenceStep(0, 0, 30, 60)) == 1  # what is held all fits the tail
    assert least(SequenceStep(0, 0, 40, 20, True), staging=True) == 1
    assert least(SequenceStep(0, 0, 70, 20, True), staging=True) > 8
    assert least(SequenceStep(0, 0, 300, 1)) == least(prompt, done=100) == 1
