"""The plan of a test under faults: the same for the same seed, and never more than a swarm is promised to survive."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.cli.chaos.faults import Fault, FaultKind, FaultSettings, parse_kinds, plan_faults, uncovered_blocks
from swarm.datatypes import Span
from swarm.errors import BadInputError

TWICE = [Span(start=a, end=b) for a, b in ((0, 10), (10, 20), (20, 30))] * 2
AWAY = (FaultKind.KILL, FaultKind.STOP, FaultKind.CUT, FaultKind.SILENCE, FaultKind.LEAVE)
RESTARTED = (FaultKind.KILL, FaultKind.LEAVE)


def away_until_s(fault: Fault, wanted: FaultSettings) -> float:
    return fault.at_s + fault.duration_s + (wanted.restart_s if fault.kind in RESTARTED else 0.0)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_the_same_seed_gives_the_same_plan(seed: int) -> None:
    """A failure that was found once must be found again."""
    wanted = FaultSettings(duration_s=150.0)
    assert plan_faults(seed, TWICE, wanted) == plan_faults(seed, TWICE, wanted)


def test_other_seeds_give_other_plans_with_all_kinds() -> None:
    """A long run meets everything that can happen."""
    wanted = FaultSettings(duration_s=1800.0)
    first, second = plan_faults(1, TWICE, wanted), plan_faults(2, TWICE, wanted)
    assert first != second
    assert {fault.kind for fault in first} | {fault.kind for fault in second} == set(FaultKind)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), pause_s=st.floats(0.5, 20.0))
def test_every_block_keeps_a_server(seed: int, pause_s: float) -> None:
    """Otherwise a session's clear error would say nothing about failover."""
    kinds = tuple(kind for kind in FaultKind if kind is not FaultKind.GAP)
    wanted = FaultSettings(duration_s=150.0, mean_pause_s=pause_s, kinds=kinds)
    plan = plan_faults(seed, TWICE, wanted)
    for fault in plan:
        away = {
            other.server
            for other in plan
            if other.kind in AWAY and other.at_s <= fault.at_s < away_until_s(other, wanted)
        }
        assert not uncovered_blocks(TWICE, without=away)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_a_server_suffers_one_thing_at_a_time(seed: int) -> None:
    """A frozen server can not be asked to leave, and a killed one can not be frozen."""
    wanted = FaultSettings(duration_s=150.0, mean_pause_s=1.0)
    plan = plan_faults(seed, TWICE, wanted)
    assert [fault.at_s for fault in plan] == sorted(fault.at_s for fault in plan)
    for earlier, later in itertools.combinations(plan, 2):
        if earlier.server == later.server:
            assert later.at_s >= away_until_s(earlier, wanted)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_a_gap_comes_alone(seed: int) -> None:
    """It is filled within the deadline only if nothing else takes servers away meanwhile."""
    wanted = FaultSettings(duration_s=300.0, mean_pause_s=3.0, kinds=(FaultKind.GAP, FaultKind.KILL))
    plan = plan_faults(seed, TWICE, wanted)
    for earlier, later in itertools.pairwise(plan):
        if FaultKind.GAP in (earlier.kind, later.kind):
            assert later.at_s >= earlier.at_s + earlier.duration_s + wanted.restart_s


def test_a_swarm_that_can_spare_nobody_is_refused() -> None:
    """It would run for an hour and show nothing."""
    wanted = FaultSettings(duration_s=60.0, kinds=(FaultKind.KILL,))
    with pytest.raises(BadInputError, match="give each block two servers"):
        plan_faults(0, TWICE[:3], wanted)


def test_kinds_are_named() -> None:
    """A typo is told with the names that exist."""
    assert parse_kinds("kill, stop,kill") == (FaultKind.KILL, FaultKind.STOP)
    with pytest.raises(BadInputError, match=r"no fault 'explode'; choose from kill, stop, cut"):
        parse_kinds("kill,explode")
