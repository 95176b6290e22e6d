"""Finds models by name and builds any span of their blocks, and the client's part, without per-model code.

Importing this package loads neither torch nor transformers; using a name from it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.models.client_model import load_client_parts
    from swarm.models.progress import ProgressReporter, SilentProgress
    from swarm.models.selftest import SelfTestReport, check_span
    from swarm.models.source import DEMO_MODEL, ModelSource, load_tokenizer, resolve_model
    from swarm.models.span import SpanModel, default_weight_cache, load_span
    from swarm.models.span_cache import SpanCache
    from swarm.models.support import unsupported_reason

__all__ = [
    "DEMO_MODEL",
    "ModelSource",
    "ProgressReporter",
    "SelfTestReport",
    "SilentProgress",
    "SpanCache",
    "SpanModel",
    "check_span",
    "default_weight_cache",
    "load_client_parts",
    "load_span",
    "load_tokenizer",
    "resolve_model",
    "unsupported_reason",
]

_MODULES_OF_NAMES = {
    "DEMO_MODEL": "source",
    "ModelSource": "source",
    "ProgressReporter": "progress",
    "SelfTestReport": "selftest",
    "SilentProgress": "progress",
    "SpanCache": "span_cache",
    "SpanModel": "span",
    "check_span": "selftest",
    "default_weight_cache": "span",
    "load_client_parts": "client_model",
    "load_span": "span",
    "load_tokenizer": "source",
    "resolve_model": "source",
    "unsupported_reason": "support",
}


def __getattr__(name: str) -> Any:
    module_name = _MODULES_OF_NAMES.get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"swarm.models.{module_name}"), name)
    globals()[name] = value  # the next access is an ordinary look-up
    return value
