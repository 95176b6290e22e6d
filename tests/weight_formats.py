"""Every way of storing weights that runs on a CPU, for tests."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from swarm.weights.formats import WeightFormat
from swarm.weights.packed_int4 import PackedInt4, packed_int4_format
from swarm.weights.packed_int8 import PackedInt8, packed_int8_format

__all__ = ["ERRORS", "cpu_formats"]

ERRORS = {"nf4": 0.0925, "int8": 0.0095}
"""Largest relative error of normally distributed weights; NF4's own is 0.092."""


def cpu_formats() -> list[Any]:
    """Parameters: makers of formats, with a name each; bitsandbytes' are skipped where it is not installed."""
    lacks = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
    return [
        pytest.param(packed_int4_format, id="int4"),
        pytest.param(lambda: PackedInt4(tile_size=64, has_kernel=False), id="int4-without-kernel"),
        pytest.param(lambda: PackedInt4(tile_size=32, has_kernel=False, group_length=32), id="int4-fine-tile32"),
        pytest.param(packed_int8_format, id="int8"),
        pytest.param(lambda: PackedInt8(has_kernel=False), id="int8-without-kernel"),
        pytest.param(_nf4, id="bnb-nf4", marks=lacks),
        pytest.param(_nf4_double, id="bnb-nf4-double", marks=lacks),
        pytest.param(_bnb_int8, id="bnb-int8", marks=lacks),
    ]


def _nf4() -> WeightFormat:
    from swarm.weights.bitsandbytes_formats import BitsAndBytesNf4

    return BitsAndBytesNf4()


def _nf4_double() -> WeightFormat:
    from swarm.weights.bitsandbytes_formats import BitsAndBytesNf4

    return BitsAndBytesNf4(double_quantised=True)


def _bnb_int8() -> WeightFormat:
    from swarm.weights.bitsandbytes_formats import BitsAndBytesInt8

    return BitsAndBytesInt8()
