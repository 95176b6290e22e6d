"""Settings of a client."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from swarm.datatypes import PeerId
from swarm.kvpolicy.settings import find_policy
from swarm.weights.precision import parse_precision

__all__ = ["ClientConfig"]


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a client uses the swarm."""

    request_timeout_s: float = 120.0
    """How long a step may go without progress, recoveries and waiting for missing servers included."""
    step_timeout_s: float = 30.0
    """When servers answer health calls and yet a step gets no further for this long, it is asked for again, and
    then somebody is left. Servers that answer nothing at all are left within seconds."""
    connect_timeout_s: float = 10.0
    """For opening a session at one server, and for look-ups."""
    queue_timeout_s: float = 600.0
    """How long to wait in the queue of a full server when there is no other."""
    expected_new_tokens: int = 256
    """Tokens that a session is said to need beyond its prompt, unless its max_length is less."""
    no_route_wait_s: float = 30.0
    """How long a new session waits for servers of blocks that nobody serves; one that lost a server waits for
    up to request_timeout_s."""
    max_step_tokens: int = 512
    """Longer inputs travel in chunks of this many tokens, so hops work on different chunks at once."""
    max_steps_in_flight: int = 4
    """Chunks under way at the same time."""
    use_push: bool = True
    """Servers pass outputs on to each other; False sends every output through the client."""
    lookup_ttl_s: float = 5.0
    """How long a list of servers is used before it is fetched anew."""
    ban_s: float = 15.0
    """How long a peer that failed is avoided; doubles with each further failure, up to 8 times."""
    adapter: str | None = None
    """Name of a LoRA adapter that the servers are to add; None: the model as it is."""
    precision: str | None = None
    """Use only servers whose weights are at least this precise: nf4, int8, bf16 or fp32; None: any."""
    kv_policy: str | None = None
    """Keep sessions' caches under this KV policy, and use only servers that do: none (exact; every server does),
    pyramid, gear, pyramid+gear or the name of a preset. None: as each server does by itself."""
    allowed_peers: Collection[PeerId] | None = None
    """Use only these peers; None allows all."""
    blocked_peers: Collection[PeerId] = ()
    """Never use these peers."""

    def __post_init__(self) -> None:
        if self.precision is not None:
            parse_precision(self.precision)
        if self.kv_policy is not None:
            find_policy(self.kv_policy)
        for name in ("request_timeout_s", "step_timeout_s", "connect_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"ClientConfig.{name} is {getattr(self, name)}; give seconds above 0")
        if self.max_step_tokens < 1 or self.max_steps_in_flight < 1:
            raise ValueError("ClientConfig.max_step_tokens and max_steps_in_flight must be at least 1")
