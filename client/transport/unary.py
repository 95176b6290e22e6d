"""Unary calls to a server: health, and stateless forward and backward runs."""

# Letters: T tokens of all sequences, H hidden size.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from swarm.client.transport.channels import lost_when_closed
from swarm.errors import BadInputError, PeerFaultError
from swarm.pb import node_pb2
from swarm.wire.failures import error_from_failure, error_from_rpc
from swarm.wire.frames import decode_frame, encode_frame
from swarm.wire.limits import HIDDEN_DTYPES
from swarm.wire.methods import BACKWARD, FORWARD, HEALTH

if TYPE_CHECKING:
    import torch

    from swarm.datatypes import AdapterHash, Hop, ModelHash, PeerId

__all__ = ["check_health", "run_blocks"]


async def check_health(channel: grpc.aio.Channel, peer: PeerId, *, timeout_s: float) -> node_pb2.HealthReply:
    """What the server says of its own health, without waiting for its engine.

    Raises PeerLostError when it does not answer in time, PeerFaultError for nonsense.
    """
    try:
        with lost_when_closed(peer):
            body: bytes = await channel.unary_unary(HEALTH)(
                node_pb2.HealthRequest().SerializeToString(), timeout=timeout_s
            )
    except grpc.RpcError as error:
        raise error_from_rpc(error, peer=peer) from error
    try:
        return node_pb2.HealthReply.FromString(body)
    except DecodeError as error:
        raise PeerFaultError(f"server {peer} answered a health call with nonsense") from error


async def run_blocks(
    channel: grpc.aio.Channel,
    hop: Hop,
    model_hash: ModelHash,
    counts: Sequence[int],
    hidden: torch.Tensor,
    gradient: torch.Tensor | None,
    *,
    adapter: AdapterHash | None = None,
    timeout_s: float,
) -> torch.Tensor:
    """Outputs [T, H] of whole sequences; with `gradient` (of the outputs) the gradient of the inputs instead.

    Raises the server's refusal, PeerLostError, or PeerFaultError for an impossible answer.
    """
    request = node_pb2.RunRequest(model_hash=model_hash, start=hop.start, end=hop.end, counts=counts, adapter=adapter)
    method, tensors = (FORWARD, [hidden]) if gradient is None else (BACKWARD, [hidden, gradient])
    try:
        with lost_when_closed(hop.peer_id):
            body: bytes = await channel.unary_unary(method)(encode_frame(request, tensors), timeout=timeout_s)
    except grpc.RpcError as error:
        raise error_from_rpc(error, peer=hop.peer_id) from error
    try:
        reply, frame = decode_frame(body, node_pb2.RunReply)
    except BadInputError as error:
        raise PeerFaultError(f"server {hop.peer_id} answered a run with nonsense: {error}") from error
    if reply.HasField("failure"):
        raise error_from_failure(reply.failure, peer=hop.peer_id)
    if len(frame.tensors) != 1 or frame.tensors[0].shape != tuple(hidden.shape):
        raise PeerFaultError(f"server {hop.peer_id} answered a run with tensors of another shape")
    if frame.tensors[0].dtype not in HIDDEN_DTYPES:
        raise PeerFaultError(f"server {hop.peer_id} answered a run with {frame.tensors[0].dtype}")
    result = frame.tensor(0)
    # What was not finite when it was sent (an overflow in the caller's loss) can not come back finite.
    if not result.isfinite().all() and all(tensor.isfinite().all() for tensor in tensors):
        raise PeerFaultError(f"server {hop.peer_id} answered a run with values that are no numbers")
    return result
