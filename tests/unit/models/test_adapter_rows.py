"""Which rows of a batch belong to which adapter."""

from __future__ import annotations

import pytest

from swarm.datatypes import AdapterHash
from swarm.models.adapters.rows import (
    NO_ADAPTER,
    AdapterRows,
    adapters_for_rows,
    current_adapter_plan,
    plan_adapters,
)

RED, BLUE = AdapterHash("r" * 32), AdapterHash("b" * 32)


def test_neighbours_share_one_part() -> None:
    """Sessions of the same adapter that stand side by side take one product, not one each."""
    plan = plan_adapters([(NO_ADAPTER, 2), (RED, 1), (RED, 3), (BLUE, 1), (RED, 1), (BLUE, 0), (RED, 2)])
    assert plan.num_rows == 10
    assert plan.parts == (AdapterRows(2, 6, RED), AdapterRows(6, 7, BLUE), AdapterRows(7, 10, RED))


def test_a_plan_ends_with_its_batch() -> None:
    """A step that fails must not leave its adapters to the next one."""

    def fail() -> None:
        with adapters_for_rows([(RED, 2)]):
            assert current_adapter_plan.get() == plan_adapters([(RED, 2)])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert current_adapter_plan.get() is None


def test_batches_without_adapters_cost_nothing() -> None:
    """The common case: hooks see no plan at all."""
    with adapters_for_rows([(NO_ADAPTER, 5)]):
        assert current_adapter_plan.get() is None


def test_one_adapter_for_all_rows() -> None:
    """Layers that see other rows than the batch's need to know whether it matters."""
    assert plan_adapters([(RED, 2), (RED, 1)]).for_all == RED
    assert plan_adapters([(RED, 2), (NO_ADAPTER, 1)]).for_all is None
    assert plan_adapters([(RED, 2), (BLUE, 1)]).for_all is None
    assert plan_adapters([(NO_ADAPTER, 2)]).for_all is None
