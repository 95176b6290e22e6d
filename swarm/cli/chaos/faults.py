"""What is done to which server and when: a plan made from a seed, before anything runs. Pure."""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from swarm.datatypes import Span
from swarm.errors import BadInputError

__all__ = ["Fault", "FaultKind", "FaultSettings", "parse_kinds", "plan_faults", "uncovered_blocks"]


class FaultKind(enum.Enum):
    """What can happen to a server of a home."""

    KILL = "kill"
    """SIGKILL; the same server, with its key, comes back after the fault's duration."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT after the duration: connections stay open, nobody answers."""
    CUT = "cut"
    """Its connections break, and none can be made for the duration."""
    SILENCE = "silence"
    """Its connections stay open, and nothing comes through for the duration."""
    DELAY = "delay"
    """Whatever it sends or receives takes DELAY_S longer."""
    SLOW = "slow"
    """It gets the processor for SLOW_SHARE of the time only."""
    LEAVE = "leave"
    """SIGTERM; it comes back when it has been gone for the duration."""
    JOIN = "join"
    """One more server of the same blocks comes, and leaves by SIGTERM after the duration."""
    GAP = "gap"
    """SIGKILL for this server and all others of its blocks; it alone is started again after the duration, the
    others when it serves."""


DELAY_S: Final = 0.15
SLOW_SHARE: Final = 0.25
_TAKES_AWAY: Final = (FaultKind.KILL, FaultKind.STOP, FaultKind.CUT, FaultKind.SILENCE, FaultKind.LEAVE)
"""While these last the server does nothing for anybody."""
_RESTARTS: Final = (FaultKind.KILL, FaultKind.LEAVE, FaultKind.GAP)

_WEIGHTS: Final = {
    FaultKind.KILL: 5,
    FaultKind.STOP: 3,
    FaultKind.CUT: 3,
    FaultKind.SILENCE: 2,
    FaultKind.DELAY: 2,
    FaultKind.SLOW: 2,
    FaultKind.LEAVE: 3,
    FaultKind.JOIN: 1,
    FaultKind.GAP: 1,
}
_DURATIONS_S: Final = {
    FaultKind.KILL: (0.5, 10.0),
    FaultKind.STOP: (4.0, 20.0),
    FaultKind.CUT: (0.0, 3.0),
    FaultKind.SILENCE: (4.0, 20.0),
    FaultKind.DELAY: (5.0, 20.0),
    FaultKind.SLOW: (5.0, 20.0),
    FaultKind.LEAVE: (0.5, 10.0),
    FaultKind.JOIN: (10.0, 40.0),
    FaultKind.GAP: (0.0, 10.0),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault; times are seconds since the beginning of the run."""

    at_s: float
    kind: FaultKind
    server: int
    """Which of the servers, from 0; for JOIN whose blocks the newcomer serves."""
    duration_s: float

    def __str__(self) -> str:
        return f"{self.at_s:7.2f} s: {self.kind.value} server {self.server} for {self.duration_s:.1f} s"


@dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """How much is to happen."""

    duration_s: float
    """Faults begin before this."""
    mean_pause_s: float = 8.0
    """Between the beginnings of two faults; pauses are exponentially distributed."""
    restart_s: float = 30.0
    """How long a server that starts is not counted on."""
    kinds: Collection[FaultKind] = tuple(FaultKind)


def parse_kinds(text: str) -> tuple[FaultKind, ...]:
    """`kill,stop` as kinds. Raises BadInputError, naming those that exist, for anything else."""
    kinds: list[FaultKind] = []
    for name in text.split(","):
        try:
            kinds.append(FaultKind(name.strip()))
        except ValueError:
            known = ", ".join(kind.value for kind in FaultKind)
            raise BadInputError(f"there is no fault {name.strip()!r}; choose from {known}") from None
    return tuple(dict.fromkeys(kinds))


def plan_faults(seed: int, spans: Sequence[Span], settings: FaultSettings) -> list[Fault]:
    """The faults of a run, ascending in time; the same for the same arguments.

    At every time each block has a server that is neither away nor just starting, except where GAP is among the kinds:
    such a fault waits until nothing else is going on, and nothing else begins before it is over.

    Args:
        seed: any number.
        spans: blocks of each server.
        settings: how much is to happen.

    Raises:
        BadInputError: no server can ever be spared, and no kind that was asked for spares them all.
    """
    rng = random.Random(f"faults {seed}")
    kinds = [kind for kind in FaultKind if kind in settings.kinds]
    weights = [_WEIGHTS[kind] for kind in kinds]
    spared = [index for index in range(len(spans)) if not uncovered_blocks(spans, without=[index])]
    if not spared and all(kind in _TAKES_AWAY for kind in kinds):
        raise BadInputError(
            "every server is the only one of some block, so none can be harmed; give each block two servers"
        )
    faults: list[Fault] = []
    at_s = rng.expovariate(1 / settings.mean_pause_s)
    while at_s < settings.duration_s:
        kind = rng.choices(kinds, weights)[0]
        duration_s = round(rng.uniform(*_DURATIONS_S[kind]), 2)
        order = rng.sample(range(len(spans)), len(spans))
        candidates = (Fault(at_s=round(at_s, 2), kind=kind, server=server, duration_s=duration_s) for server in order)
        chosen = next((fault for fault in candidates if _is_allowed(fault, faults, spans, settings)), None)
        if chosen is not None:
            faults.append(chosen)
        at_s += rng.expovariate(1 / settings.mean_pause_s)
    return faults


def uncovered_blocks(spans: Sequence[Span], *, without: Collection[int]) -> list[int]:
    """Blocks that some server holds, but none outside `without`; ascending."""
    held = {block for span in spans for block in range(span.start, span.end)}
    left = {block for index, span in enumerate(spans) if index not in without for block in range(span.start, span.end)}
    return sorted(held - left)


def _is_allowed(fault: Fault, earlier: Sequence[Fault], spans: Sequence[Span], settings: FaultSettings) -> bool:
    """Whether a fault fits to those that began before it."""
    going_on = [one for one in earlier if _over_s(one, settings) > fault.at_s]
    if any(one.kind is FaultKind.GAP for one in going_on):
        return False
    if fault.kind is FaultKind.GAP:
        return not going_on
    if any(one.server == fault.server for one in going_on):
        return False  # one thing at a time for each server
    if fault.kind not in _TAKES_AWAY:
        return True
    away = [one.server for one in going_on if one.kind in _TAKES_AWAY]
    return not uncovered_blocks(spans, without=[*away, fault.server])


def _over_s(fault: Fault, settings: FaultSettings) -> float:
    """When everything is as it was before the fault."""
    extra_s = settings.restart_s if fault.kind in _RESTARTS else 0.0
    return fault.at_s + fault.duration_s + extra_s * (2 if fault.kind is FaultKind.GAP else 1)
