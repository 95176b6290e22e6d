"""When sequences are compressed: all servers of a route, and every replay, must come to the same events."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy, QuantisationSettings
from swarm.kvpolicy.streaming import (
    TailState,
    advance,
    can_return,
    can_rewind,
    cut_step,
    event_after,
    fits_tail,
    is_staged,
    new_tail,
    next_cut,
    settle,
    stop_staging,
    tail_capacity,
    tail_start,
)


def _policy(chunk_tokens: int = 128, tail_tokens: int = 16, num_sinks: int = 4) -> KVPolicy:
    return KVPolicy(
        name="gear",
        preset="gear",
        quantisation=QuantisationSettings(),
        chunk_tokens=chunk_tokens,
        tail_tokens=tail_tokens,
        num_sinks=num_sinks,
    )


_policies = st.builds(
    _policy,
    chunk_tokens=st.sampled_from([32, 64, 128, 2048]),
    tail_tokens=st.sampled_from([0, 8, 16, 40]),
    num_sinks=st.sampled_from([0, 1, 4]),
)


@dataclass
class _Sequence:
    """What a server holds, token by token: the plainest reading of the rule, told with lists."""

    policy: KVPolicy
    ring: list[int] = field(default_factory=list)
    """Positions in 16 bit, sinks included, that a later step may still drop from the end."""
    staged: list[int] = field(default_factory=list)
    events: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(first, end, length, staged tokens that judge) of every event of the present content."""
    is_inside: bool = False

    def step(self, start: int, count: int, *, is_unfinished: bool) -> None:
        if start == 0:
            self.ring, self.staged, self.events, self.is_inside = [], [], [], False
        if count == 0:
            return
        if not self.is_inside:
            self.ring = [position for position in self.ring if position < start]
            self._compress(start, num_judges=0)
        room = self.policy.num_sinks + tail_capacity(self.policy) - len(self.ring)
        if self.is_inside or is_unfinished or count > room:
            for position in range(start, start + count):
                self.staged.append(position)
                if (position + 1) % self.policy.chunk_tokens == 0:
                    self._compress(position + 1, num_judges=len(self.staged))
            if not is_unfinished:
                self._compress(start + count, num_judges=len(self.staged))
                self.ring += self.staged
                self.staged = []
            self.is_inside = is_unfinished
        else:
            self.ring += range(start, start + count)

    def _compress(self, length: int, *, num_judges: int) -> None:
        """Blocks leave the oldest end while at least a tail is left."""
        policy = self.policy
        tokens = self.ring + self.staged
        first = tokens[policy.num_sinks] if len(tokens) > policy.num_sinks else policy.num_sinks
        end = first
        while length - end >= policy.tail_tokens + policy.block_tokens:
            end += policy.block_tokens
        if end > first:
            self.events.append((first, end, length, num_judges))
            self.ring = tokens[: policy.num_sinks] + [position for position in tokens if position >= end]
            self.staged = []


_steps = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, 40), st.integers(0, 300)),
        st.booleans(),
        st.one_of(st.just(0), st.just(0), st.integers(0, 50)),
    ),
    max_size=25,
)


@given(_policies, _steps)
def test_states_are_those_of_a_token_by_token_simulation(policy: KVPolicy, steps: list[tuple[int, bool, int]]) -> None:
    """The formulas stand for a simple rule; client, mirror and engine all trust that they do."""
    tail, sequence, length = new_tail(policy), _Sequence(policy), 0
    for count, is_unfinished, back in steps:
        start = length - back
        if start < 0 or (back and not can_rewind(policy, tail, start)):
            start = length
        was_staged = is_staged(policy, tail, start, count, is_unfinished=is_unfinished)
        tail = advance(policy, tail, start, count, is_unfinished=is_unfinished)
        num_events = len(sequence.events)
        sequence.step(start, count, is_unfinished=is_unfinished)
        length = start + count
        stored = sequence.events[-1] if sequence.events else (0, policy.num_sinks, 0, 0)
        assert tail == TailState(stored[1], sequence.is_inside, stored[2])
        if not tail.is_staging and length >= policy.num_sinks:
            assert length - tail.stored_end <= tail_capacity(policy)
        if start and not was_staged and len(sequence.events) > num_events:
            assert sequence.events[-1][2] == start


@given(_policies, st.integers(0, 200), st.integers(1, 400), st.data())
def test_an_input_ends_in_one_state_however_it_is_cut(
    policy: KVPolicy, before: int, count: int, data: st.DataObject
) -> None:
    """Wire steps of 512 tokens and the engine's parts must not change what is kept."""
    tail = advance(policy, new_tail(policy), 0, before, is_unfinished=False)
    whole = advance(policy, tail, before, count, is_unfinished=False)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=6)) - {count})
    parts, position = tail, 0
    for cut in cuts:
        parts = advance(policy, parts, before + position, cut - position, is_unfinished=True)
        assert parts.is_staging
        position = cut
    parts = advance(policy, parts, before + position, count - position, is_unfinished=False)
    if fits_tail(policy, tail, before, count):
        # An engine does not cut these; a client that did would only get the event one step earlier.
        assert settle(policy, parts, before + count) == settle(policy, whole, before + count)
    else:
        assert parts == whole


@given(_policies, _steps, st.data())
def test_what_can_be_rewound_is_what_a_fresh_run_would_hold(
    policy: KVPolicy, steps: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    """A rewind is exact when the history cut at that place leads to the same events, and to nothing lost."""
    tail, length, history = new_tail(policy), 0, list[tuple[int, int, bool]]()
    for count, is_unfinished, _ in steps:
        tail = advance(policy, tail, length, count, is_unfinished=is_unfinished)
        if count:
            history.append((length, count, is_unfinished))
        length += count
    start = data.draw(st.integers(0, length))
    if start == length:
        return
    fresh = _Sequence(policy)
    for first, count, is_unfinished in history:
        if first < start:
            # What is left of an input that was cut off is the end of it.
            kept = min(count, start - first)
            fresh.step(first, kept, is_unfinished=is_unfinished and kept == count)
    full = _Sequence(policy)
    for first, count, is_unfinished in history:
        full.step(first, count, is_unfinished=is_unfinished)
    if can_rewind(policy, tail, start) and start:
        # Both go on with the same step: all events, and who judged at them, are the same.
        fresh.step(start, 1, is_unfinished=False)
        full.step(start, 1, is_unfinished=False)
        assert full.events == fresh.events
        assert full.ring == fresh.ring
        assert [position for position in range(tail_start(policy, start), start) if position not in full.ring] == []
    elif start and not tail.is_staging:
        # Refused with reason: something has been done to the sequence beyond that place.
        assert any(event[2] > start for event in full.events)


@given(_policies, _steps, st.data())
def test_a_checkpoint_can_be_returned_to_if_nothing_but_its_own_event_came_after(
    policy: KVPolicy, steps: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    """After a failover the servers that stayed go back to a common step; wrongly allowed, answers would differ."""
    tail, length, sequence = new_tail(policy), 0, _Sequence(policy)
    states: list[tuple[TailState, int, list[tuple[int, int, int, int]]]] = [(tail, 0, [])]
    for count, is_unfinished, _ in steps:
        tail = advance(policy, tail, length, count, is_unfinished=is_unfinished)
        sequence.step(length, count, is_unfinished=is_unfinished)
        length += count
        states.append((tail, length, list(sequence.events)))
    then, length_then, events_then = data.draw(st.sampled_from(states))
    since = sequence.events[len(events_then) :]
    was_due = event_after(policy, then.stored_end, length_then)
    own = [] if was_due is None or then.is_staging else [(was_due.first, was_due.end, was_due.length, 0)]
    expected = length_then == 0 or (not then.is_staging and (since == [] or since == own))
    assert can_return(policy, then, length_then, tail) == expected
    if expected and length_then:
        # Going on from there is going on from the checkpoint.
        returned = stop_staging(tail)
        assert settle(policy, returned, length_then) == settle(policy, then, length_then)


def test_short_steps_go_back_one_token() -> None:
    """Assisted generation and stop sequences take the last token back all the time: that must not cost a replay."""
    policy = _policy()
    tail = advance(policy, new_tail(policy), 0, 100, is_unfinished=False)
    for length in range(101, 400):
        tail = advance(policy, tail, length - 1, 1, is_unfinished=False)
        assert can_rewind(policy, tail, length - 1)


def test_a_prompt_in_wire_steps_is_compressed_once() -> None:
    """Judging a token by the middle of the prompt it stands in would lose what its end asks for."""
    policy = _policy(chunk_tokens=2048)
    tail = new_tail(policy)
    for start in (0, 512, 1024):
        tail = advance(policy, tail, start, 512, is_unfinished=True)
        assert tail == TailState(policy.num_sinks, True)
    tail = advance(policy, tail, 1536, 100, is_unfinished=False)
    assert tail == TailState(tail_start(policy, 1636), False, 1636)


def test_parts_never_cross_a_multiple_of_the_chunk() -> None:
    """Events inside a long input are at the same places for everybody."""
    policy = _policy(chunk_tokens=128)
    assert cut_step(policy, 100, 200) == [28, 128, 44]
    assert next_cut(policy, 127) == 128 and next_cut(policy, 128) == 256
    assert cut_step(FULL_CACHE, 100, 200) == [200]


@pytest.mark.parametrize("start", [0, 1, 700])
def test_an_exact_cache_knows_no_events(start: int) -> None:
    """Sessions of both kinds go through the same code."""
    tail = new_tail(FULL_CACHE)
    assert settle(FULL_CACHE, tail, start) == tail
    assert advance(FULL_CACHE, tail, start, 5000, is_unfinished=True) == tail
    assert not is_staged(FULL_CACHE, tail, start, 5000, is_unfinished=True)
    assert can_rewind(FULL_CACHE, tail, start)
    assert can_return(FULL_CACHE, tail, start, tail)
