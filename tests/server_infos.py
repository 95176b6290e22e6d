"""Servers as they announce themselves, for tests of discovery, routing and status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swarm.datatypes import ModelHash, PeerId, ServerInfo, ServerState, Span

__all__ = ["MODEL_HASH", "make_server"]

MODEL_HASH = ModelHash("ab" * 16)


def make_server(
    peer_id: str,
    start: int,
    end: int,
    *,
    num_blocks: int = 12,
    state: ServerState = ServerState.ONLINE,
    addresses: Sequence[str] = ("127.0.0.1:4000",),
    **others: Any,
) -> ServerInfo:
    """A plausible server of blocks [start, end); `others` are further fields of ServerInfo."""
    fields: dict[str, Any] = {
        "model_hash": MODEL_HASH,
        "model_name": "tiny",
        "weights": "fp32",
        "kv_policy": "none",
        "kv_tokens_free": 500,
        "kv_tokens_total": 1000,
        "num_sessions": 2,
        "tokens_per_s": 12.5,
        "version": "0.1.0",
    }
    return ServerInfo(
        peer_id=PeerId(peer_id),
        num_blocks=num_blocks,
        span=Span(start=start, end=end),
        state=state,
        addresses=addresses,
        **(fields | others),
    )
