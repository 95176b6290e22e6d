"""One mapping between our errors, Failure messages and gRPC status codes, in both directions."""

from __future__ import annotations

from typing import Final

import grpc

from swarm.errors import (
    BadInputError,
    LengthLimitError,
    NoRouteError,
    PeerBusyError,
    PeerFaultError,
    PeerLeavingError,
    PeerLostError,
    SessionStateError,
    SwarmError,
)
from swarm.pb import session_pb2 as pb

__all__ = ["error_from_failure", "error_from_rpc", "failure_from_error"]

_MAX_MESSAGE_CHARS: Final = 500
_MAX_PEER_ID_CHARS: Final = 128


def failure_from_error(error: BaseException, *, epoch: int = 0, step: int = 0) -> pb.Failure:
    """What to tell a peer about `error`. Foreign errors become INTERNAL and keep only their type and text."""
    failure = pb.Failure(message=str(error)[:_MAX_MESSAGE_CHARS], epoch=epoch, step=step)
    match error:
        case SessionStateError():
            failure.code = pb.FAILURE_STATE
            failure.epoch = error.epoch or 0
            failure.positions.extend(error.positions)
        case PeerBusyError():
            failure.code = pb.FAILURE_BUSY
            failure.retry_after_ms = int(error.retry_after_s * 1000)
            failure.queue_position = error.queue_position or 0
        case PeerLeavingError():
            failure.code = pb.FAILURE_DRAINING
            failure.successor = error.successor or ""
        case LengthLimitError():
            failure.code = pb.FAILURE_LENGTH
        case NoRouteError():
            failure.code = pb.FAILURE_NOT_SERVED
        case BadInputError():
            failure.code = pb.FAILURE_BAD_INPUT
        case PeerLostError():
            failure.code = pb.FAILURE_UNREACHABLE
        case SwarmError():
            failure.code = pb.FAILURE_INTERNAL
        case _:
            failure.code = pb.FAILURE_INTERNAL
            failure.message = f"{type(error).__name__}: {error}"[:_MAX_MESSAGE_CHARS]
    return failure


def error_from_failure(failure: pb.Failure, *, peer: str) -> SwarmError:
    """The error a client raises for a peer's Failure; the text is cut, because peers are not trusted."""
    said = _printable(failure.message) or pb.FailureCode.Name(failure.code)
    message = f"server {peer}: {said}"
    match failure.code:
        case pb.FAILURE_BAD_INPUT:
            return BadInputError(message)
        case pb.FAILURE_LENGTH:
            return LengthLimitError(message)
        case pb.FAILURE_STATE:
            return SessionStateError(message, epoch=failure.epoch or None, positions=failure.positions)
        case pb.FAILURE_BUSY:
            return PeerBusyError(
                message,
                retry_after_s=failure.retry_after_ms / 1000 or 1.0,
                queue_position=failure.queue_position or None,
            )
        case pb.FAILURE_DRAINING:
            return PeerLeavingError(message, successor=_printable(failure.successor)[:_MAX_PEER_ID_CHARS] or None)
        case pb.FAILURE_UNREACHABLE:
            return PeerLostError(message)
        case _:
            return PeerFaultError(message)


def _printable(text: str) -> str:
    """A peer's text, cut, and without what could steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text[:_MAX_MESSAGE_CHARS])


def error_from_rpc(error: grpc.RpcError, *, peer: str) -> SwarmError:
    """A gRPC status as one of our errors: what broke, and whether another server can help."""
    code = error.code() if callable(getattr(error, "code", None)) else None
    details = (error.details() if callable(getattr(error, "details", None)) else None) or str(error)
    short = _printable(details.partition("\n")[0]) or "no details"
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED | grpc.StatusCode.ABORTED:
            return PeerLostError(f"server {peer} can not be reached: {short}")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return PeerLostError(f"server {peer} did not answer in time")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return PeerBusyError(f"server {peer} has no room: {short}")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return BadInputError(f"server {peer} refused the request: {short}")
        case _:
            return PeerFaultError(f"server {peer} failed ({code.name if code else 'unknown'}): {short}")
