"""One session on a server, as the event loop sees it."""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swarm.datatypes import AdapterHash, PeerId, Span
from swarm.models.adapters.rows import NO_ADAPTER
from swarm.pb import session_pb2 as pb
from swarm.server.engine.work import SessionKey, StepWork
from swarm.server.rpc.push import PushStream
from swarm.server.session_mirror import MirrorState, SessionMirror
from swarm.wire.frames import Frame

if TYPE_CHECKING:
    import torch

__all__ = ["LastStep", "SendToClient", "ServerSession"]

SendToClient = Callable[[bytes], Awaitable[None]]


@dataclass
class LastStep:
    """The step accepted last, kept to answer a retry from memory."""

    header: pb.Step
    output: torch.Tensor | None = None
    """[T, H]; None while the engine works on it."""
    relay: bool = False
    compute_s: float = 0.0
    num_repeats: int = 0


@dataclass(eq=False, kw_only=True)
class ServerSession:
    """One session at one epoch."""

    session_id: bytes
    span: Span
    key: SessionKey
    """Its name in the engine: id and the epoch at which what it holds was begun, which may be an earlier one."""
    mirror: SessionMirror
    adapter: AdapterHash = NO_ADAPTER
    push: PushStream | None
    send: SendToClient | None = None
    """The client's stream; None while the client is away."""
    expected_tokens: int
    """What its client expects to use."""
    grace_s: float
    """How long it outlives a client that is away."""
    away_since_s: float = field(default_factory=time.monotonic)
    """Since when, while `send` is None."""
    last: LastStep | None = None
    works: dict[int, StepWork] = field(default_factory=dict)
    """What the engine has not finished, by step."""
    num_under_way: int = 0
    """Steps accepted and not yet delivered; each holds tensors."""
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever nothing is under way."""
    held_back: deque[tuple[pb.Step, Frame]] | None = None
    """Steps that came while the session is being handed over; None while it is not."""
    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever the session is not being handed over."""
    delivery: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Outputs leave in the order of their steps."""
    is_unclaimed: bool = False
    """Another server handed it over, and its client has not come for it."""
    successor: PeerId | None = None
    """Who holds it now, after it was handed over; it is closed here then, and answers nothing else."""
    is_replaced: bool = False
    """A later epoch has gone on with what this one held, so that nothing of it is this one's any more."""

    def __post_init__(self) -> None:
        self.settled.set()
        self.let_go.set()

    @property
    def name(self) -> str:
        """What it is called in logs: its id gives the right to push to it."""
        return self.session_id.hex()[:8]

    @property
    def is_over(self) -> bool:
        """Whether it takes no more steps."""
        return self.mirror.state is not MirrorState.OPEN

    def away_s(self) -> float | None:
        """For how long its client has been away; None while it is there."""
        return None if self.send is not None else time.monotonic() - self.away_since_s

    @property
    def compresses(self) -> bool:
        """Whether it is kept by the server's policy, instead of exactly."""
        return self.mirror.policy.compresses

    def __repr__(self) -> str:
        return (
            f"<ServerSession {self.name} blocks {self.span} epoch {self.mirror.epoch} "
            f"step {self.mirror.last_step} positions {self.mirror.positions[:8]} {self.mirror.state.value}>"
        )
