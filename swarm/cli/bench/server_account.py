"""What servers say of their own use of memory and of batches, asked over gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from swarm.errors import FinalError

__all__ = ["ServerAccount", "ask_servers"]

_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class ServerAccount:
    """Sums over servers; the last three are totals since start."""

    kv_total_bytes: int = 0
    kv_used_bytes: int = 0
    """Of pages that sessions hold."""
    kv_wasted_bytes: int = 0
    """Of these, what holds no token."""
    kv_shared_bytes: int = 0
    """What sessions would need on top if no page were shared."""
    num_spills: int = 0
    num_tokens: int = 0
    num_batches: int = 0

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def ask_servers(grpc_addresses: Sequence[str]) -> ServerAccount:
    """The sums over the servers at grpc://host:port. Raises FinalError when one does not answer."""
    import grpc

    from swarm.pb import node_pb2
    from swarm.wire.methods import INFO

    total = ServerAccount()
    for address in grpc_addresses:
        with grpc.insecure_channel(address.removeprefix("grpc://"), options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                body = channel.unary_unary(INFO)(node_pb2.InfoRequest().SerializeToString(), timeout=_TIMEOUT_S)
            except grpc.RpcError as error:
                raise FinalError(f"the server at {address} does not answer any more ({error.code().name})") from error
        reply = node_pb2.InfoReply.FromString(body)
        total += ServerAccount(
            kv_total_bytes=reply.kv.total_bytes,
            kv_used_bytes=reply.kv.used_bytes,
            kv_wasted_bytes=reply.kv.wasted_bytes,
            kv_shared_bytes=reply.kv.shared_bytes,
            num_spills=reply.kv.num_spills,
            num_tokens=reply.num_tokens,
            num_batches=reply.num_batches,
        )
    return total
