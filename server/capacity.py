"""How many KV tokens fit a server's memory. Pure."""

from __future__ import annotations

import re

from swarm.errors import BadInputError

__all__ = ["kv_tokens_that_fit", "parse_memory_bytes"]

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_memory_bytes(text: str) -> int:
    """`4GiB`, `512MiB`, `2gb` or plain bytes. Raises BadInputError for anything else, and for zero."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (size_bytes := int(float(match[1]) * unit)) <= 0:
        raise BadInputError(f"{text!r} is not an amount of memory; write it like 4GiB or 512MiB")
    return size_bytes


def kv_tokens_that_fit(memory_bytes: int, bytes_per_token: int) -> int:
    """Positions that fit; at least one, or a server could not serve at all."""
    tokens = memory_bytes // bytes_per_token
    if tokens < 1:
        raise BadInputError(
            f"--kv-memory of {memory_bytes} bytes holds not even one token ({bytes_per_token} bytes); give more"
        )
    return tokens
