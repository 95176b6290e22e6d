"""Every error a user of swarm can meet, in one tree.

The first split is the one callers act on: can trying another server help?

    SwarmError
    ├── RetryElsewhereError          another server (or the same one later) may do it
    │   ├── PeerLostError            connection refused, lost, or silent past its deadline
    │   ├── PeerBusyError            alive, but has no room now; carries retry_after_s
    │   ├── PeerLeavingError         takes no new work, or has handed a session over; carries successor
    │   ├── PeerFaultError           answered with something impossible, or failed inside
    │   └── SessionStateError        the peer is at another epoch or position; replay mends it
    └── FinalError                   no other server would do better
        ├── BadInputError            what was asked can not be done as asked (also a ValueError)
        │   ├── ModelNotFoundError   no such model name, folder or file
        │   ├── ModelFilesError      the files are there but are not a usable model
        │   ├── UnsupportedModelError  a model we would serve wrongly, refused by name
        │   └── LengthLimitError     longer than the model, the session or all servers' memory allows
        ├── DownloadError            files could not be fetched
        ├── JoinError                nobody answers at a join address
        ├── AddressInUseError        a port that is already taken
        ├── NoRouteError             blocks that nobody serves; carries missing_blocks
        ├── MissingDependencyError   an optional package is needed; says which extra
        ├── DeadlineError            the overall deadline of a request passed
        └── SessionClosedError       the session has ended and can not be used again

Messages are one sentence that says what was seen and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AddressInUseError",
    "BadInputError",
    "DeadlineError",
    "DownloadError",
    "FinalError",
    "JoinError",
    "LengthLimitError",
    "MissingDependencyError",
    "ModelFilesError",
    "ModelNotFoundError",
    "NoRouteError",
    "PeerBusyError",
    "PeerFaultError",
    "PeerLeavingError",
    "PeerLostError",
    "RetryElsewhereError",
    "SessionClosedError",
    "SessionStateError",
    "SwarmError",
    "UnsupportedModelError",
]


class SwarmError(Exception):
    """Root of all errors raised by swarm on purpose."""


class RetryElsewhereError(SwarmError):
    """The same request may succeed on another server, or on this one later."""


class PeerLostError(RetryElsewhereError):
    """The peer can not be reached, hung up, or stayed silent past its deadline."""


class PeerBusyError(RetryElsewhereError):
    """The peer is alive but has no room for this request now."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, queue_position: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which the peer expects to have room."""
        self.queue_position = queue_position
        """How many requests wait before this one; None when the queue itself is full."""


class PeerLeavingError(RetryElsewhereError):
    """The peer is leaving the swarm in good order: it takes no new sessions, or has handed this one over."""

    def __init__(self, message: str, *, successor: str | None = None) -> None:
        super().__init__(message)
        self.successor = successor
        """Peer id of the server that holds the session now; None when nobody does."""


class PeerFaultError(RetryElsewhereError):
    """The peer answered with something impossible, or failed for a reason of its own."""


class SessionStateError(RetryElsewhereError):
    """The peer's copy of a session is at another epoch or position than the request assumes."""

    def __init__(self, message: str, *, epoch: int | None = None, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.epoch = epoch
        """The epoch the peer is at; None when it does not know the session at all."""
        self.positions = tuple(positions)
        """Number of positions the peer holds, per sequence."""


class FinalError(SwarmError):
    """No other server would do better."""


class BadInputError(FinalError, ValueError):
    """What was asked can not be done as asked."""


class ModelNotFoundError(BadInputError):
    """No model of this name: not built in, not a folder, not on the hub."""


class ModelFilesError(BadInputError):
    """The files of a model are incomplete, damaged, or of a kind that is refused (pickle)."""


class UnsupportedModelError(BadInputError):
    """The model's architecture would be served wrongly, so it is not served."""


class LengthLimitError(BadInputError):
    """More positions than the model's context, the session's max_length, or a server's whole KV memory."""


class DownloadError(FinalError):
    """Files could not be fetched."""


class JoinError(FinalError):
    """Nobody answers at a join address."""


class AddressInUseError(FinalError):
    """The port is already taken by another program."""


class NoRouteError(FinalError):
    """Some blocks of the model are served by nobody."""

    def __init__(self, message: str, *, missing_blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing_blocks = tuple(missing_blocks)
        """Indices of the blocks without a server, ascending."""


class MissingDependencyError(FinalError):
    """An optional package is needed for what was asked."""


class DeadlineError(FinalError):
    """The overall deadline of a request passed before it could be finished."""


class SessionClosedError(FinalError):
    """The session has been closed, or failed for good, and can not be used again."""
