"""What the network layer asks of the engine, as plain values."""

# Letters: T tokens of all sequences in a step, H hidden size.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.models.adapters.rows import NO_ADAPTER

if TYPE_CHECKING:
    import torch

    from swarm.datatypes import AdapterHash, Span
    from swarm.server.session_mirror import SequenceStep

__all__ = ["BackwardWork", "ForwardWork", "SessionKey", "StepWork", "WorkDone"]

SessionKey = tuple[bytes, int]
"""Session id and epoch: another epoch has its own caches."""

WorkDone = Callable[["torch.Tensor | None", "BaseException | None"], None]
"""Called on the engine thread with a result or an error, once."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """New tokens for some sequences of a session."""

    session: SessionKey
    span: Span
    """Blocks to run, within the server's span."""
    sequences: Sequence[SequenceStep]
    hidden: torch.Tensor
    """[T, H], rows in the order of `sequences`."""
    on_done: WorkDone
    adapter: AdapterHash = NO_ADAPTER
    """The same in every step of a session."""
    compresses: bool = False
    """Whether the session keeps its cache under the server's policy, instead of exactly; the same in all its steps."""


@dataclass(frozen=True, slots=True)
class ForwardWork:
    """Whole sequences without state."""

    span: Span
    counts: Sequence[int]
    """Tokens of each sequence."""
    hidden: torch.Tensor
    """[T, H]"""
    on_done: WorkDone
    adapter: AdapterHash = NO_ADAPTER


@dataclass(frozen=True, slots=True)
class BackwardWork:
    """The gradient of the inputs of whole sequences, by recomputing the blocks."""

    span: Span
    counts: Sequence[int]
    hidden: torch.Tensor
    """[T, H] inputs."""
    gradient: torch.Tensor
    """[T, H] gradient of the outputs."""
    on_done: WorkDone
    adapter: AdapterHash = NO_ADAPTER
