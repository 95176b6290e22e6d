"""Which rows of a packed batch each adapter is for; the linear layers learn it by context variable.

As with the attention's step plan, the model's own code lies between whoever knows the sessions and whoever
needs to know, and passes no arguments of ours on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from swarm.datatypes import AdapterHash

__all__ = ["NO_ADAPTER", "AdapterPlan", "AdapterRows", "adapters_for_rows", "current_adapter_plan", "plan_adapters"]

NO_ADAPTER: Final = AdapterHash("")
"""The choice of sessions that use the model as it is."""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows [first_row, end_row) of a batch use one adapter."""

    first_row: int
    end_row: int
    adapter: AdapterHash


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """One batch's adapters; rows in no part use none."""

    num_rows: int
    parts: Sequence[AdapterRows]

    @property
    def for_all(self) -> AdapterHash | None:
        """The adapter of all rows; None when they differ."""
        whole = self.parts[0] if len(self.parts) == 1 else None
        return whole.adapter if whole is not None and whole.end_row - whole.first_row == self.num_rows else None


current_adapter_plan: ContextVar[AdapterPlan | None] = ContextVar("swarm_adapter_plan", default=None)


def plan_adapters(counts: Iterable[tuple[AdapterHash, int]]) -> AdapterPlan:
    """The plan of a batch that consists of so many rows for each adapter, in this order.

    Neighbours of equal adapter become one part, so a batch sorted by adapter takes one product for each.
    """
    parts: list[AdapterRows] = []
    row = 0
    for adapter, count in counts:
        if count and adapter != NO_ADAPTER:
            first_row = row
            if parts and parts[-1].end_row == row and parts[-1].adapter == adapter:
                first_row = parts.pop().first_row
            parts.append(AdapterRows(first_row, row + count, adapter))
        row += count
    return AdapterPlan(row, tuple(parts))


@contextmanager
def adapters_for_rows(counts: Iterable[tuple[AdapterHash, int]]) -> Iterator[None]:
    """Whatever a span runs inside uses these adapters, as `plan_adapters`."""
    plan = plan_adapters(counts)
    token = current_adapter_plan.set(plan if plan.parts else None)
    try:
        yield
    finally:
        current_adapter_plan.reset(token)
