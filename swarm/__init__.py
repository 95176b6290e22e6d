"""Run one large language model together, each machine holding some of its blocks.

Everything a program may import is listed in `__all__`; nothing else is promised. The models and
the tokenizer load torch and transformers on first use, so `import swarm` itself stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from swarm.errors import (
    AddressInUseError,
    BadInputError,
    DeadlineError,
    DownloadError,
    FinalError,
    JoinError,
    LengthLimitError,
    MissingDependencyError,
    ModelFilesError,
    ModelNotFoundError,
    NoRouteError,
    PeerBusyError,
    PeerFaultError,
    PeerLeavingError,
    PeerLostError,
    RetryElsewhereError,
    SessionClosedError,
    SessionStateError,
    SwarmError,
    UnsupportedModelError,
)
from swarm.version import __version__

if TYPE_CHECKING:
    from swarm.client.remote_model import SwarmModelForCausalLM, SwarmModelForSequenceClassification
    from swarm.models import load_tokenizer

__all__ = [
    "AddressInUseError",
    "BadInputError",
    "DeadlineError",
    "DownloadError",
    "FinalError",
    "JoinError",
    "LengthLimitError",
    "MissingDependencyError",
    "ModelFilesError",
    "ModelNotFoundError",
    "NoRouteError",
    "PeerBusyError",
    "PeerFaultError",
    "PeerLeavingError",
    "PeerLostError",
    "RetryElsewhereError",
    "SessionClosedError",
    "SessionStateError",
    "SwarmError",
    "SwarmModelForCausalLM",
    "SwarmModelForSequenceClassification",
    "UnsupportedModelError",
    "__version__",
    "load_tokenizer",
]

_MODULES_OF_LAZY_NAMES = {
    "SwarmModelForCausalLM": "swarm.client.remote_model",
    "SwarmModelForSequenceClassification": "swarm.client.remote_model",
    "load_tokenizer": "swarm.models",
}


if not TYPE_CHECKING:  # a type checker must go on seeing that other names do not exist

    def __getattr__(name: str) -> Any:
        module_name = _MODULES_OF_LAZY_NAMES.get(name)
        if module_name is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module_name), name)
        globals()[name] = value  # the next access is an ordinary look-up
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
