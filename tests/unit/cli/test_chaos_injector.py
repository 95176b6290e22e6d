"""The injector on servers that only pretend: it keeps to the plan, except where the plan would go too far."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from swarm.cli.chaos.faults import Fault, FaultKind
from swarm.cli.chaos.injector import Injector
from swarm.cli.chaos.swarm_under_test import ServersUnderTest
from swarm.datatypes import Span

TIMEOUT_S = 20.0
LEFT, RIGHT = Span(start=0, end=3), Span(start=3, end=6)


class FakeServer:
    """Notes what is done to it; starts at once unless told otherwise."""

    def __init__(self, name: str, span: Span, *, num_sessions: int = 0) -> None:
        self.name = name
        self.span = span
        self.num_sessions = num_sessions
        self.is_running = True
        self.is_frozen = False
        self.can_start = True
        self.deeds: list[str] = []

    @property
    def is_serving(self) -> bool:
        return self.is_running and not self.is_frozen

    @property
    def has_ended(self) -> bool:
        return not self.is_running

    def count_sessions(self) -> int:
        return self.num_sessions

    def note_baseline(self) -> None: ...

    def wait_until_online(self, *, timeout_s: float) -> None: ...

    def start(self) -> None:
        self.deeds.append("start")
        self.is_running = self.can_start

    def recover(self) -> None:
        self.is_frozen = False

    def kill(self) -> None:
        self.deeds.append("kill")
        self.is_running = False

    def begin_leave(self) -> None:
        self.deeds.append("leave")
        self.is_running = False

    def freeze(self) -> None:
        self.deeds.append("freeze")
        self.is_frozen = True

    def thaw(self) -> None:
        self.deeds.append("thaw")
        self.is_frozen = False

    def __getattr__(self, name: str) -> Any:
        if name in ("cut", "silence", "mend", "begin_slowness", "end_slowness", "delay"):
            return lambda *_: self.deeds.append(name)
        raise AttributeError(name)


class FakeServers:
    def __init__(self, servers: list[FakeServer]) -> None:
        self.servers = servers

    def add(self, span: Span) -> FakeServer:
        self.servers.append(FakeServer(f"guest of {span}", span))
        return self.servers[-1]


def run(servers: list[FakeServer], faults: list[Fault], *, until_over: int) -> Injector:
    """Inject until so many faults are over, then stop."""
    injector = Injector(cast(ServersUnderTest, FakeServers(servers)), faults, restart_s=5.0)
    injector.start()
    deadline_s = time.monotonic() + TIMEOUT_S
    while sum(one.ended_s is not None or bool(one.why_left_out) for one in injector.records) < until_over:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    injector.stop()
    assert injector.problems == []
    return injector


def four() -> list[FakeServer]:
    return [FakeServer(f"s{index}", span) for index, span in enumerate((LEFT, RIGHT, LEFT, RIGHT))]


@pytest.mark.parametrize(
    ("kind", "deeds"),
    [
        (FaultKind.KILL, ["kill", "start"]),
        (FaultKind.LEAVE, ["leave", "start"]),
        (FaultKind.STOP, ["freeze", "thaw"]),
        (FaultKind.CUT, ["cut", "mend"]),
        (FaultKind.SILENCE, ["silence", "mend"]),
        (FaultKind.SLOW, ["begin_slowness", "end_slowness"]),
        (FaultKind.DELAY, ["delay", "mend"]),
    ],
)
def test_what_is_begun_is_ended(kind: FaultKind, deeds: list[str]) -> None:
    """A server that stays harmed would make a long run a run without servers."""
    servers = four()
    run(servers, [Fault(at_s=0.0, kind=kind, server=0, duration_s=0.1)], until_over=1)
    assert servers[0].deeds == deeds
    assert all(not server.deeds for server in servers[1:])


def test_the_server_in_use_is_hit() -> None:
    """Of two servers with the same blocks one may have all the sessions; harming the other one tests nothing."""
    servers = four()
    servers[2].num_sessions = 3
    injector = run(servers, [Fault(at_s=0.0, kind=FaultKind.KILL, server=0, duration_s=0.1)], until_over=1)
    assert injector.records[0].server == 2
    assert servers[0].deeds == []
    assert servers[2].deeds == ["kill", "start"]


def test_the_last_server_of_a_block_is_spared() -> None:
    """Servers may take longer to come back than the plan thought."""
    servers = four()
    servers[2].is_frozen = True  # by nobody's plan
    injector = run(servers, [Fault(at_s=0.0, kind=FaultKind.KILL, server=0, duration_s=0.1)], until_over=1)
    assert injector.records[0].began_s is None
    assert "block 0" in injector.records[0].why_left_out
    assert servers[0].deeds == []


def test_a_gap_takes_all_holders_and_brings_them_back() -> None:
    """First the one that is to fill the gap, then the others."""
    servers = four()
    run(servers, [Fault(at_s=0.0, kind=FaultKind.GAP, server=1, duration_s=0.1)], until_over=1)
    assert servers[1].deeds == servers[3].deeds == ["kill", "start"]
    assert servers[0].deeds == servers[2].deeds == []


def test_a_guest_comes_and_goes() -> None:
    """Joining and leaving must disturb nobody."""
    servers = four()
    run(servers, [Fault(at_s=0.0, kind=FaultKind.JOIN, server=1, duration_s=0.1)], until_over=1)
    assert servers[4].span == RIGHT
    assert servers[4].deeds == ["leave"]


def test_stopping_undoes_what_still_lasts() -> None:
    """After a run everybody serves again, so that leaks can be looked for."""
    servers = four()
    faults = [
        Fault(at_s=0.0, kind=FaultKind.KILL, server=0, duration_s=1000.0),
        Fault(at_s=0.0, kind=FaultKind.STOP, server=1, duration_s=1000.0),
        Fault(at_s=0.0, kind=FaultKind.KILL, server=3, duration_s=0.0),
    ]
    injector = run(servers, faults, until_over=1)
    assert all(server.is_serving for server in servers)
    assert all(record.ended_s is not None for record in injector.records[:2])
    assert "block 3" in injector.records[2].why_left_out
