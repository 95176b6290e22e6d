"""What a test under faults makes of what it saw: sessions, stalls, moments of loss."""

from __future__ import annotations

import itertools

import pytest

from swarm.cli.bench.chaos import parse_servers
from swarm.cli.chaos.losses import chosen_tokens
from swarm.cli.chaos.scripts import SCRIPTS, check_script_names, choose_scripts
from swarm.cli.chaos.stalls import FaultWindow, TokenGap, find_stalls, summarise_stalls
from swarm.errors import BadInputError


def gaps(*lengths_s: float, failovers: dict[int, int] | None = None) -> list[TokenGap]:
    """Gaps one after the other from second 100 on."""
    found: list[TokenGap] = []
    now_s = 100.0
    for index, length_s in enumerate(lengths_s):
        changed = (failovers or {}).get(index, 0)
        found.append(TokenGap(started_s=now_s, ended_s=now_s + length_s, num_failovers=changed, is_first=not index))
        now_s += length_s
    return found


def test_a_recovery_is_a_stall_of_the_fault_before_it() -> None:
    """Figures for each kind of fault are what shows where to improve."""
    kill = FaultWindow(kind="kill", began_s=100.25, ended_s=120.0)
    old = FaultWindow(kind="slow", began_s=50.0, ended_s=60.0)
    (stall,) = find_stalls(gaps(0.1, 0.1, 0.8, 0.1, failovers={2: 1}), [old, kill])
    assert stall.kind == "kill"
    assert stall.length_s == pytest.approx(0.8)


def test_a_long_silence_is_a_stall_without_any_change_of_route() -> None:
    """A server that was frozen and came back just in time made somebody wait all the same."""
    (stall,) = find_stalls(gaps(0.1, 0.1, 2.5, 0.1), [])
    assert stall.kind == "none"
    assert stall.length_s == pytest.approx(2.5)


def test_a_long_prompt_is_no_stall() -> None:
    """It takes its time with nobody lost."""
    assert find_stalls(gaps(5.0, 0.1, 0.1), []) == []
    assert find_stalls([], []) == []


def test_who_began_to_wait_first_blames_the_first_fault() -> None:
    """The second one only made the wait longer."""
    faults = [FaultWindow(kind="kill", began_s=100.3, ended_s=110.0), FaultWindow(kind="cut", began_s=101, ended_s=102)]
    (stall,) = find_stalls(gaps(0.1, 0.1, 3.0, failovers={2: 2}), faults)
    assert stall.kind == "kill"


def test_no_stalls_have_no_figures() -> None:
    """Zero would be a claim."""
    figures = summarise_stalls([])
    assert (figures.num_stalls, figures.stall_p95_s) == (0, None)


def test_clients_of_a_seed_play_the_same_scripts() -> None:
    """So that a seed names a whole run; and few clients soon play many scripts."""

    def first(client: int) -> list[str]:
        return [script.name for script in itertools.islice(choose_scripts(7, client), 20)]

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert {first(client)[0] for client in range(len(SCRIPTS))} == {script.name for script in SCRIPTS}
    assert {script.name for script in itertools.islice(choose_scripts(7, 0, ("chat",)), 5)} == {"chat"}


def test_scripts_take_back_only_what_is_there() -> None:
    """A rewind beyond the beginning would be refused, and test nothing."""
    for script in SCRIPTS:
        assert script.turns[0].num_taken_back == 0
        num_at_least = 0
        for turn in script.turns:
            assert turn.num_taken_back <= num_at_least
            num_at_least += turn.num_new_tokens - turn.num_taken_back
        assert script.num_beams == 1 or len(script.turns) == 1
    assert check_script_names("") == ()
    with pytest.raises(BadInputError, match="no script 'opera'; choose from short"):
        check_script_names("opera")


def test_losses_come_where_they_hurt() -> None:
    """First, last, and where a page of the cache ends: positions 15, 16, 17, then 31, 32, 33."""
    tokens = chosen_tokens(12, 40)
    assert len(tokens) == 12
    assert tokens[:3] == [0, 1, 2]
    assert tokens[-2:] == [38, 39]
    assert {position - 12 for position in (15, 16, 17, 31, 32, 33)} <= set(tokens)
    assert chosen_tokens(100, 3) == [0, 1, 2]


def test_servers_are_a_number_or_blocks() -> None:
    """Each block needs two servers, unless somebody says exactly what they want."""
    assert [str(span) for span in parse_servers("4", 30)] == ["0:15", "15:30", "0:15", "15:30"]
    assert [str(span) for span in parse_servers("0:10,5:30", 30)] == ["0:10", "5:30"]
    for wrong in ("5", "0", "six"):
        with pytest.raises(BadInputError, match="even number"):
            parse_servers(wrong, 30)
