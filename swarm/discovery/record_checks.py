"""What a server record may say: every limit in one place, checked before signing and after receiving."""

from __future__ import annotations

import enum
import math
import re

from swarm.datatypes import ServerInfo, ServerState
from swarm.discovery.addresses import parse_host_port
from swarm.errors import BadInputError, PeerFaultError

__all__ = [
    "MAX_ADAPTERS",
    "MAX_BLOCKS",
    "MAX_RECORD_BYTES",
    "MAX_TTL_S",
    "RecordRejectedError",
    "RejectReason",
    "check_expiry",
    "check_info",
    "is_model_hash",
]

MAX_RECORD_BYTES = 4096
"""A record of a server with eight long addresses takes about 1.5 KiB."""
MAX_BLOCKS = 4096
"""The deepest published models have a few hundred; one look-up asks the DHT for a key per block."""
MAX_TTL_S = 3600.0
"""Longest life of a record: a dead server must not be believed in for longer."""
MAX_CLOCK_SKEW_S = 60.0
"""How much further ahead a record may expire because its maker's clock is fast."""
MAX_ADDRESSES = 8
MAX_ADAPTERS = 16
MAX_NAME_CHARS = 256
MAX_VERSION_CHARS = 64
MAX_TOKENS = 2**50
MAX_SESSIONS = 10**6
MAX_TOKENS_PER_S = 1e9

_MODEL_HASH = re.compile(r"[0-9a-f]{8,128}", re.ASCII)
_WORD = re.compile(r"[a-z0-9][a-z0-9+_.-]{0,31}", re.ASCII)


class RejectReason(enum.Enum):
    """Why a record was dropped; the keys of a registry's counters."""

    MALFORMED = "malformed"
    OVERSIZE = "oversize"
    SIGNATURE = "signature"
    VERSION = "version"
    EXPIRED = "expired"
    EXPIRY_TOO_FAR = "expiry too far"
    OTHER_MODEL = "other model"
    IMPOSSIBLE_VALUE = "impossible value"


class RecordRejectedError(PeerFaultError):
    """A server record that must not be used; carries the kind of reason."""

    def __init__(self, reason: RejectReason, message: str) -> None:
        super().__init__(f"server record refused: {message}")
        self.reason = reason
        """The kind of reason, for counting."""


def is_model_hash(text: str) -> bool:
    """Whether `text` has the form of a model hash: 8 to 128 lower-case hex digits."""
    return _MODEL_HASH.fullmatch(text) is not None


def check_info(info: ServerInfo) -> None:
    """Whether a server may say this about itself. Raises RecordRejectedError that names the field."""
    _require(is_model_hash(info.model_hash), "model_hash", info.model_hash)
    _require(len(info.model_name) <= MAX_NAME_CHARS and info.model_name.isprintable(), "model_name", info.model_name)
    _require(len(info.version) <= MAX_VERSION_CHARS and info.version.isprintable(), "version", info.version)
    _require(1 <= info.num_blocks <= MAX_BLOCKS, "num_blocks", info.num_blocks)
    _require(info.span.end <= info.num_blocks, "span", f"{info.span} of {info.num_blocks} blocks")
    if info.moving_to is not None:
        _require(info.moving_to.end <= info.num_blocks, "moving_to", f"{info.moving_to} of {info.num_blocks} blocks")
    _require(_WORD.fullmatch(info.weights) is not None, "weights", info.weights)
    _require(_WORD.fullmatch(info.kv_policy) is not None, "kv_policy", info.kv_policy)
    _require(0 <= info.kv_tokens_total <= MAX_TOKENS, "kv_tokens_total", info.kv_tokens_total)
    _require(0 <= info.kv_tokens_free <= info.kv_tokens_total, "kv_tokens_free", info.kv_tokens_free)
    _require(0 <= info.num_sessions <= MAX_SESSIONS, "num_sessions", info.num_sessions)
    _require(
        math.isfinite(info.tokens_per_s) and 0 <= info.tokens_per_s <= MAX_TOKENS_PER_S,
        "tokens_per_s",
        info.tokens_per_s,
    )
    names = [adapter.name for adapter in info.adapters]
    _require(len(names) <= MAX_ADAPTERS and len(set(names)) == len(names), "adapters", names)
    _check_addresses(info)


def check_expiry(expires_at: float, *, now: float) -> None:
    """Whether a record that expires at `expires_at` counts at `now` (unix seconds). Raises RecordRejectedError."""
    if not math.isfinite(expires_at):
        raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"it expires at {expires_at}")
    if expires_at <= now:
        raise RecordRejectedError(RejectReason.EXPIRED, f"it expired {now - expires_at:.1f} s ago")
    if expires_at > now + MAX_TTL_S + MAX_CLOCK_SKEW_S:
        raise RecordRejectedError(
            RejectReason.EXPIRY_TOO_FAR,
            f"it expires {expires_at - now:.0f} s ahead, and {MAX_TTL_S + MAX_CLOCK_SKEW_S:.0f} s is the most",
        )


def _check_addresses(info: ServerInfo) -> None:
    _require(len(info.addresses) <= MAX_ADDRESSES, "addresses", f"{len(info.addresses)} of them")
    _require(bool(info.addresses) or info.state is not ServerState.ONLINE, "addresses", "none of an online server")
    for address in info.addresses:
        try:
            parse_host_port(address)
        except BadInputError as error:
            raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"addresses: {error}") from error


def _require(is_fine: bool, field: str, value: object) -> None:
    if not is_fine:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:70]}…"
        raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"{field} can not be {shown}")
