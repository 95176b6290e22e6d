"""What may be asked of a server: every claim of a request is checked here, before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from swarm.datatypes import AdapterHash, AdapterInfo, PeerId, Span
from swarm.discovery.addresses import parse_host_port
from swarm.errors import BadInputError, LengthLimitError, NoRouteError
from swarm.kvpolicy.settings import FULL_CACHE, KVPolicy, find_policy
from swarm.pb import node_pb2
from swarm.pb import session_pb2 as pb
from swarm.server.rpc.push import NextHop
from swarm.wire.frames import Frame
from swarm.wire.limits import HIDDEN_DTYPES, MAX_SEQUENCES, PROTOCOL_VERSION

__all__ = [
    "SESSION_ID_BYTES",
    "HostedModel",
    "check_adapter",
    "check_open",
    "check_run",
    "check_served",
    "check_step_tensor",
    "choose_policy",
    "read_next_hop",
]

SESSION_ID_BYTES: Final = 16
MAX_ADDRESSES: Final = 8


@dataclass(frozen=True, kw_only=True)
class HostedModel:
    """What this server serves."""

    model_hash: str
    span: Span
    hidden_size: int
    max_positions: int
    """Context length of the model."""
    kv_policy: str
    """Preset by which sessions that ask for none in particular are kept; all may be kept exactly instead."""
    weights: str
    """Precision of the weights, as announced."""
    rules_hash: str = ""
    """Of all that decides what the policy keeps of a cache and how; empty where it keeps everything."""
    peer_id: PeerId
    adapters: Sequence[AdapterInfo] = ()
    """What sessions and runs may choose."""

    @property
    def policy(self) -> KVPolicy:
        """What `kv_policy` names."""
        return find_policy(self.kv_policy)


def check_open(request: pb.Open, model: HostedModel) -> None:
    """Raises NoRouteError (not served here), BadInputError or LengthLimitError."""
    if request.protocol != PROTOCOL_VERSION:
        raise BadInputError(f"protocol {request.protocol} is not spoken here, only {PROTOCOL_VERSION}; upgrade")
    if len(request.session_id) != SESSION_ID_BYTES:
        raise BadInputError(f"a session id has {SESSION_ID_BYTES} bytes, not {len(request.session_id)}")
    check_served(request.model_hash, request.start, request.end, model)
    check_adapter(request.adapter, model)
    if not 1 <= request.max_length <= model.max_positions:
        raise LengthLimitError(
            f"max_length {request.max_length} is outside 1..{model.max_positions}, the model's context"
        )
    if request.max_sequences > MAX_SEQUENCES:
        raise LengthLimitError(f"{request.max_sequences} sequences were asked for, {MAX_SEQUENCES} are allowed")
    choose_policy(request, model)


def choose_policy(request: pb.Open, model: HostedModel) -> KVPolicy:
    """What a session is to be kept by. Raises NoRouteError for a policy that this server does not have."""
    if request.kv_policy in ("", model.kv_policy):
        return model.policy
    if request.kv_policy == FULL_CACHE.preset:
        return FULL_CACHE
    offered = " and ".join(repr(name) for name in dict.fromkeys((model.kv_policy, FULL_CACHE.preset)))
    raise NoRouteError(f"KV policy {request.kv_policy[:32]!r} is not offered here, only {offered}")


def check_adapter(adapter: str, model: HostedModel) -> AdapterHash:
    """The adapter that a request names by its hash; none for the empty one. Raises NoRouteError."""
    if adapter and not any(info.adapter_hash == adapter for info in model.adapters):
        offered = ", ".join(f"{info.name} ({info.adapter_hash})" for info in model.adapters) or "none"
        raise NoRouteError(f"the adapter {adapter[:32]!r} is not offered here; offered: {offered}")
    return AdapterHash(adapter)


def read_next_hop(request: pb.Open) -> NextHop | None:
    """Where a session's outputs go; None to the client. Raises BadInputError for addresses that are none."""
    if not request.HasField("next"):
        return None
    addresses = [str(parse_host_port(text)) for text in request.next.addresses[:MAX_ADDRESSES]]
    return NextHop(PeerId(request.next.peer_id), addresses)


def check_step_tensor(frame: Frame, model: HostedModel) -> int:
    """How many rows a step carries. Raises BadInputError when its tensor can not be hidden states of the model."""
    if len(frame.tensors) != 1:
        raise BadInputError(f"a step carries one tensor, not {len(frame.tensors)}")
    header = frame.tensors[0]
    _check_dtypes(frame)
    if len(header.shape) != 2 or header.shape[1] != model.hidden_size:
        raise BadInputError(f"hidden states have shape [tokens, {model.hidden_size}], not {header.shape}")
    return header.shape[0]


def check_run(
    request: node_pb2.RunRequest, frame: Frame, model: HostedModel, *, num_tensors: int
) -> tuple[Span, Sequence[int]]:
    """Blocks and tokens per sequence of a stateless run. Raises NoRouteError or BadInputError."""
    check_served(request.model_hash, request.start, request.end, model)
    counts = list(request.counts)
    if not counts or min(counts) < 1 or max(counts) > model.max_positions:
        raise BadInputError(f"sequences must have 1 to {model.max_positions} tokens")
    shape = (sum(counts), model.hidden_size)
    if len(frame.tensors) != num_tensors or any(tensor.shape != shape for tensor in frame.tensors):
        shapes = [tensor.shape for tensor in frame.tensors]
        raise BadInputError(f"expected {num_tensors} tensors of shape {shape}, not {shapes}")
    _check_dtypes(frame)
    return Span(start=request.start, end=request.end), counts


def check_served(model_hash: str, start: int, end: int, model: HostedModel) -> None:
    """Raises NoRouteError unless this server holds these blocks of this model."""
    if model_hash != model.model_hash:
        raise NoRouteError(f"model {model_hash[:12]} is not served here, only {model.model_hash[:12]}")
    if not (model.span.start <= start < end <= model.span.end):
        raise NoRouteError(f"blocks {start}:{end} are not served here, only {model.span}")


def _check_dtypes(frame: Frame) -> None:
    for tensor in frame.tensors:
        if tensor.dtype not in HIDDEN_DTYPES:
            raise BadInputError(f"hidden states are float32, bfloat16 or float16, not {tensor.dtype}")
