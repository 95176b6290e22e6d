"""What runs an engine's blocks: the form that every backend has."""

# Letters: T tokens of a step, H hidden size.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from swarm.server.engine.kv_usage import KVUsage
from swarm.server.engine.work import BackwardWork, ForwardWork, SessionKey, StepWork

if TYPE_CHECKING:
    import torch

    from swarm.server.engine.session_memory import SessionMemory

__all__ = ["NotNow", "SpanBackend", "StatelessWork"]

StatelessWork = ForwardWork | BackwardWork


@dataclass(frozen=True, slots=True)
class NotNow:
    """A backend's answer to work that must wait until others have given memory back."""

    reason: str


class SpanBackend(Protocol):
    """Runs blocks; lives on the engine thread, so it needs no locks."""

    @property
    def num_tokens_total(self) -> int:
        """Positions that fit the KV memory when idle."""

    @property
    def num_tokens_free(self) -> int:
        """Positions that still fit; may be read from other threads."""

    @property
    def kv_usage(self) -> KVUsage:
        """Use of the KV memory; may be read from other threads."""

    @property
    def num_tokens_run(self) -> int:
        """Tokens that were computed since start; those answered from memory took no time."""

    @property
    def compressing_s(self) -> float:
        """Seconds spent since start on compressing what sessions hold, which comes now and then and not by tokens."""

    @property
    def memory(self) -> SessionMemory | None:
        """Who holds the sessions' pages, to be used on the engine thread; None when sessions can not be moved."""

    def run_steps(self, works: list[StepWork]) -> list[torch.Tensor | NotNow | BaseException]:
        """Run one step of each of several sessions, oldest first; an error is that session's own."""

    def run_stateless(self, work: StatelessWork) -> torch.Tensor:
        """Forward outputs or input gradients [T, H]."""

    def forget(self, session: SessionKey) -> None:
        """Free a session's memory; harmless when there is none."""

    def drop_step(self, session: SessionKey) -> None:
        """The session's step that was last tried, or ran in part, is not gone on with; harmless when there is none."""

    def set_away(self, session: SessionKey, is_away: bool) -> None:
        """Whether a session's client is away: such a session makes room before all others."""

    def has_lost(self, session: SessionKey) -> bool:
        """Whether a session was closed to make room, since it last ran; may be asked from other threads."""
