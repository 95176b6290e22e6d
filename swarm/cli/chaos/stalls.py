"""How long sessions stood still while they recovered, and from what. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from swarm.cli.bench.prefill_measure import quantile

__all__ = ["FaultWindow", "Stall", "StallFigures", "TokenGap", "find_stalls", "summarise_stalls"]

_LONG_GAP_S: Final = 1.0
"""A gap of this length counts as a stall even where no route was changed, if it is also far above the usual."""
_LONG_GAP_RATIO: Final = 5.0
_AFTERMATH_S: Final = 10.0
"""How long after its end a fault may still be the cause of something: avoided peers, rewarmed servers."""
_UNKNOWN: Final = "none"


@dataclass(frozen=True, kw_only=True)
class TokenGap:
    """The time before a token, since the one before it or since its turn began."""

    started_s: float
    """On time.monotonic's clock."""
    ended_s: float
    num_failovers: int
    """Routes that were changed meanwhile; 0 for beams, whose sessions are not to be seen."""
    is_first: bool
    """Before the first token of a turn: the prompt's time is in it."""

    @property
    def length_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(frozen=True, kw_only=True)
class FaultWindow:
    """While a fault lasted; same clock as the gaps."""

    kind: str
    began_s: float
    ended_s: float


@dataclass(frozen=True, kw_only=True)
class Stall:
    """A gap in which a session recovered from something."""

    length_s: float
    kind: str
    """Of the fault that most likely caused it; "none" when there was none near."""


@dataclass(frozen=True, kw_only=True)
class StallFigures:
    """Over some stalls."""

    num_stalls: int
    stall_median_s: float | None
    stall_p95_s: float | None
    stall_max_s: float | None


def find_stalls(gaps: Sequence[TokenGap], faults: Sequence[FaultWindow]) -> list[Stall]:
    """Gaps in which a route was changed, and gaps that are long in themselves and against the median."""
    if not gaps:
        return []
    median_s = statistics.median(gap.length_s for gap in gaps)
    long_s = max(_LONG_GAP_S, _LONG_GAP_RATIO * median_s)
    return [
        Stall(length_s=gap.length_s, kind=_cause(gap, faults))
        for gap in gaps
        if gap.num_failovers or (gap.length_s >= long_s and not gap.is_first)
    ]


def summarise_stalls(stalls: Iterable[Stall]) -> StallFigures:
    """None where there is no stall to take a figure of."""
    lengths_s = [stall.length_s for stall in stalls]
    if not lengths_s:
        return StallFigures(num_stalls=0, stall_median_s=None, stall_p95_s=None, stall_max_s=None)
    return StallFigures(
        num_stalls=len(lengths_s),
        stall_median_s=statistics.median(lengths_s),
        stall_p95_s=quantile(lengths_s, 0.95),
        stall_max_s=max(lengths_s),
    )


def _cause(gap: TokenGap, faults: Sequence[FaultWindow]) -> str:
    """The fault that began last before the gap's end and was not long over when the gap began."""
    near = [fault for fault in faults if fault.began_s <= gap.ended_s and gap.started_s <= fault.ended_s + _AFTERMATH_S]
    began_within = [fault for fault in near if fault.began_s >= gap.started_s]
    # Who stood still since before a later fault was stopped by the earlier one.
    if began_within:
        return min(began_within, key=lambda fault: fault.began_s).kind
    return max(near, key=lambda fault: fault.began_s).kind if near else _UNKNOWN
