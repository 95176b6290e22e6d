"""What two servers must agree on before one can go on with the compressed caches of the other, as one hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from swarm.kvpolicy.calibration_file import TENSOR_NAMES

if TYPE_CHECKING:
    import torch

    from swarm.kvpolicy.calibration_file import Calibration
    from swarm.kvpolicy.settings import KVPolicy

__all__ = ["RULES_HASH_CHARS", "hash_rules"]

RULES_HASH_CHARS: Final = 32
_ROWS_FORMAT: Final = 1
"""Raised when the same rules would write other bytes than before."""


def hash_rules(policy: KVPolicy, calibration: Calibration | None) -> str:
    """RULES_HASH_CHARS hex digits that depend on every setting of a policy and on all that was measured of the model.

    A preset's name is not enough: its settings may differ between releases, and somebody may have calibrated the model
    anew, after which codes mean other numbers.
    """
    digest = hashlib.sha256(f"swarm kv rows {_ROWS_FORMAT}\n".encode())
    digest.update(json.dumps(asdict(policy), sort_keys=True).encode())
    if calibration is not None:
        numbers = {
            "ratios": calibration.curve.ratios,
            "shares": calibration.curve.shares,
            "recent": calibration.curve.recent,
            "key_sizes": list(calibration.key_sizes),
            "value_sizes": list(calibration.value_sizes),
        }
        digest.update(json.dumps(numbers, sort_keys=True).encode())
        for name in TENSOR_NAMES:
            _update(digest, name, getattr(calibration, name))
    return digest.hexdigest()[:RULES_HASH_CHARS]


def _update(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    import torch

    digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
