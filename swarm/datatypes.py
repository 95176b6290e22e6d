"""The shared vocabulary: spans, servers, hops and routes as plain frozen values."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NewType

from swarm.errors import BadInputError

__all__ = [
    "AdapterHash",
    "AdapterInfo",
    "Hop",
    "ModelHash",
    "PeerId",
    "Route",
    "ServerInfo",
    "ServerState",
    "Span",
    "blocks_without_server",
    "format_blocks",
]

PeerId = NewType("PeerId", str)
"""A peer's network identity: base58 libp2p id of its Ed25519 public key."""

ModelHash = NewType("ModelHash", str)
"""Hex digest over a model's config and weights; servers of different hashes are never mixed."""

AdapterHash = NewType("AdapterHash", str)
"""Hex digest over a LoRA adapter's settings and tensors, 32 digits."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", re.ASCII)
_ADAPTER_HASH = re.compile(r"[0-9a-f]{32}", re.ASCII)


class ServerState(enum.Enum):
    """Life of a server as others see it; only ONLINE servers take new sessions."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


@dataclass(frozen=True, kw_only=True, order=True)
class Span:
    """Consecutive blocks [start, end) of a model."""

    start: int
    """First block."""
    end: int
    """One past the last block."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise BadInputError(f"blocks {self.start}:{self.end} are not a span; give START:END with 0 <= START < END")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def contains_span(self, other: Span) -> bool:
        """Whether every block of `other` is in this span."""
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """A LoRA adapter that a server offers; sessions choose one by name."""

    name: str
    """Chosen by the operator: 1 to 32 letters, digits, dots, dashes and underscores."""
    adapter_hash: AdapterHash
    """Which adapter it is, exactly; the same name may stand for different ones on different servers."""

    def __post_init__(self) -> None:
        if _ADAPTER_NAME.fullmatch(self.name) is None:
            raise BadInputError(
                f"{self.name[:80]!r} can not name an adapter; use 1 to 32 letters, digits, '.', '-' and '_', "
                "the first of them a letter or digit"
            )
        if _ADAPTER_HASH.fullmatch(self.adapter_hash) is None:
            raise BadInputError(f"{self.adapter_hash[:80]!r} is no adapter hash, which has 32 lower-case hex digits")


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server announces about itself."""

    peer_id: PeerId
    """Identity; also the key that signed the announcement."""
    model_hash: ModelHash
    """Which weights it serves, exactly."""
    model_name: str
    """The name its operator gave the model (for people; never compared)."""
    num_blocks: int
    """Blocks of the whole model."""
    span: Span
    """Blocks held by this server."""
    state: ServerState
    """Where it is in its life."""
    weights: str
    """Precision of its weights: fp32, bf16, int8 or nf4."""
    kv_policy: str
    """KV policy: none, pyramid, gear or pyramid+gear."""
    kv_tokens_free: int = 0
    """Tokens (of its whole span) that still fit its KV memory."""
    kv_tokens_total: int = 0
    """Tokens that fit its KV memory when idle."""
    num_sessions: int = 0
    """Sessions open now."""
    tokens_per_s: float = 0.0
    """Measured single-stream decode speed of its span."""
    addresses: Sequence[str] = field(default=())
    """gRPC addresses `host:port` where it can be reached, best first."""
    version: str = ""
    """Software version."""
    moving_to: Span | None = None
    """Blocks it wants to hold instead: a wish while it is ONLINE, under way while it is DRAINING or JOINING."""
    is_choosing: bool = False
    """Whether it may still take other blocks before it loads them; only while it is JOINING."""

    adapters: Sequence[AdapterInfo] = ()
    """LoRA adapters that sessions may choose."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", tuple(self.addresses))
        object.__setattr__(self, "adapters", tuple(self.adapters))


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One server's part of a route: it runs `span`, which may be less than it holds."""

    server: ServerInfo
    span: Span

    def __post_init__(self) -> None:
        if not self.server.span.contains_span(self.span):
            raise ValueError(f"hop {self.span} is outside the server's span {self.server.span}")

    @property
    def peer_id(self) -> PeerId:
        return self.server.peer_id

    @property
    def start(self) -> int:
        return self.span.start

    @property
    def end(self) -> int:
        return self.span.end


@dataclass(frozen=True)
class Route:
    """Hops that cover consecutive blocks, in order, without gap or overlap."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise ValueError("a route needs at least one hop")
        for left, right in zip(self.hops, self.hops[1:], strict=False):
            if left.end != right.start:
                raise ValueError(f"hops {left.span} and {right.span} do not join")

    @property
    def span(self) -> Span:
        return Span(start=self.hops[0].start, end=self.hops[-1].end)

    def __str__(self) -> str:
        return " → ".join(f"{hop.peer_id[-6:]}[{hop.span}]" for hop in self.hops)


def blocks_without_server(servers: Sequence[ServerInfo], num_blocks: int) -> list[int]:
    """Blocks in [0, num_blocks) that no ONLINE server holds, ascending."""
    covered = [False] * num_blocks
    for server in servers:
        if server.state is ServerState.ONLINE:
            for block in range(server.span.start, min(server.span.end, num_blocks)):
                covered[block] = True
    return [block for block, is_covered in enumerate(covered) if not is_covered]


def format_blocks(blocks: Sequence[int]) -> str:
    """`[3, 4, 5, 9]` as `3-5, 9`, for messages to people."""
    parts: list[str] = []
    run_start: int | None = None
    for index, block in enumerate(blocks):
        if run_start is None:
            run_start = block
        if index + 1 == len(blocks) or blocks[index + 1] != block + 1:
            parts.append(str(block) if run_start == block else f"{run_start}-{block}")
            run_start = None
    return ", ".join(parts)
