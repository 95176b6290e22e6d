"""Bounds that keep one client from harming others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from swarm.kvcache.admission import AdmissionConfig

__all__ = ["SessionLimits"]


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What sessions and stateless runs may use of a server."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    """Who may start a session, and who waits."""
    default_expected_tokens: int = 256
    """What a session is expected to use when it does not say."""
    detach_grace_s: float = 60.0
    """How long a session outlives a lost connection to its client, if nobody else wants its place."""
    yield_after_s: float = 3.0
    """A session whose client has been away for this long gives way when somebody else wants its place."""
    takeover_grace_s: float = 600.0
    """How long a session that another server handed over waits for its client, if nobody else wants its memory."""
    max_takeovers: int = 4
    """Sessions that other servers are handing over at one time."""
    handover_timeout_s: float = 120.0
    """Longest time one session's hand-over may take."""
    handover_message_timeout_s: float = 10.0
    """Longest wait for each message of a hand-over."""
    push_timeout_s: float = 5.0
    """After this long without progress a push has failed and the client relays."""
    max_steps_under_way: int = 64
    """Steps of one session that are neither refused nor delivered; a client sends a few at a time."""
    first_message_timeout_s: float = 10.0
    """How long a stream may stay silent before it says what it is for."""
    max_runs_under_way: int = 64
    """Stateless runs of all clients together; one more is answered with BUSY."""

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"SessionLimits.{limit.name} is {value}; it must be above 0")
