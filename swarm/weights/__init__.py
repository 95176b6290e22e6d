"""Weights in few bits: what each precision promises, how matrices are stored and multiplied, and a cache on disk.

Importing this package loads no torch; using most names from it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from swarm.weights.precision import AUTO, Precision, at_least, parse_precision

if TYPE_CHECKING:
    from swarm.weights.automatic import AutomaticChoice, choose_automatically
    from swarm.weights.blocks import quantise_block
    from swarm.weights.choice import format_for, hidden_dtype_for
    from swarm.weights.disk_cache import WeightCache
    from swarm.weights.formats import WeightFormat

__all__ = [
    "AUTO",
    "AutomaticChoice",
    "Precision",
    "WeightCache",
    "WeightFormat",
    "at_least",
    "choose_automatically",
    "format_for",
    "hidden_dtype_for",
    "parse_precision",
    "quantise_block",
]

_MODULES_OF_NAMES = {
    "AutomaticChoice": "automatic",
    "WeightCache": "disk_cache",
    "WeightFormat": "formats",
    "choose_automatically": "automatic",
    "format_for": "choice",
    "hidden_dtype_for": "choice",
    "quantise_block": "blocks",
}


def __getattr__(name: str) -> Any:
    module_name = _MODULES_OF_NAMES.get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"swarm.weights.{module_name}"), name)
    globals()[name] = value  # the next access is an ordinary look-up
    return value
