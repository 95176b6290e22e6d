"""Look-ups through any server's gRPC address, so that a client needs neither the DHT nor hivemind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from swarm.datatypes import ModelHash, ServerInfo, ServerState
from swarm.discovery.addresses import DhtAddress, HostPort, parse_host_port, parse_join_address
from swarm.discovery.lookup_service import MAX_LOOKUP_REPLY_BYTES
from swarm.discovery.records import VerifiedRecord
from swarm.discovery.registry import FetchedRecords, RecordRegistry
from swarm.errors import BadInputError, JoinError, PeerLostError
from swarm.pb import discovery_pb2
from swarm.wire.methods import LOOKUP

__all__ = ["GrpcRegistry", "find_dht_addresses"]

logger = logging.getLogger(__name__)

_MAX_LEARNT_ADDRESSES = 16
_MAX_DHT_ADDRESSES = 16
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_LOOKUP_REPLY_BYTES),
    ("grpc.enable_http_proxy", 0),  # a proxy for the web knows no way to a machine next door
)


class GrpcRegistry(RecordRegistry):
    """Read-only: asks servers in turn and checks the records itself, so it need not trust who answers.

    Servers found by earlier look-ups are asked when those given are gone.
    """

    def __init__(
        self, addresses: Sequence[str], *, timeout_s: float = 5.0, clock: Callable[[], float] = time.time
    ) -> None:
        """`addresses`: grpc://host:port, at least one. `timeout_s`: for each of them. `clock`: unix seconds.

        Raises BadInputError for an address of another form.
        """
        super().__init__(None, clock=clock)
        self._given = [_parse_grpc_address(text) for text in addresses]
        if not self._given:
            raise BadInputError("a look-up over gRPC needs the address of a server: grpc://host:port")
        self._learnt: list[HostPort] = []
        self._last_good: HostPort | None = None
        self._timeout_s = timeout_s

    @classmethod
    async def connect(
        cls, addresses: Sequence[str], *, timeout_s: float = 5.0, clock: Callable[[], float] = time.time
    ) -> GrpcRegistry:
        """As the constructor, and make sure that somebody answers. Raises JoinError when nobody does."""
        registry = cls(addresses, timeout_s=timeout_s, clock=clock)
        await registry.fetch_dht_addresses()
        return registry

    async def fetch_dht_addresses(self) -> list[str]:
        """The DHT addresses at which a server can join the swarm of the server that answers, checked for form."""
        reply = await self._ask(discovery_pb2.LookupRequest())
        found: list[str] = []
        for text in reply.dht_addresses[:_MAX_DHT_ADDRESSES]:
            try:
                address = parse_join_address(text)
            except BadInputError as error:
                logger.debug("skipped a DHT address: %s", error)
                continue
            if isinstance(address, DhtAddress):
                found.append(str(address))
        return found

    async def lookup_verified(self, model_hash: ModelHash, num_blocks: int) -> list[VerifiedRecord]:
        """See Registry."""
        records = await super().lookup_verified(model_hash, num_blocks)
        online = [record.info for record in records if record.info.state is ServerState.ONLINE]
        self._learnt = [parse_host_port(info.addresses[0]) for info in online[:_MAX_LEARNT_ADDRESSES]]
        return records

    def join_addresses(self) -> list[str]:
        """The grpc:// addresses given."""
        return [address.join_text for address in self._given]

    async def close(self) -> None:
        """Nothing to stop: each look-up closes its own channel."""

    async def _publish(self, info: ServerInfo, data: bytes, *, expires_at: float) -> None:
        raise AssertionError("announce refuses a registry without an identity")

    async def _fetch(self, model_hash: ModelHash, num_blocks: int) -> FetchedRecords:
        reply = await self._ask(discovery_pb2.LookupRequest(model_hash=model_hash, num_blocks=num_blocks))
        # Expiry is judged by the clock of the one who answers: ours may be wrong, and DHT peers' are not.
        now = reply.answered_at_unix_s if reply.answered_at_unix_s > 0 else self._clock()
        return FetchedRecords(records=[signed.SerializeToString() for signed in reply.records], now=now)

    async def _ask(self, request: discovery_pb2.LookupRequest) -> discovery_pb2.LookupReply:
        """The first answer. Raises JoinError when nobody ever answered, PeerLostError when nobody does any more."""
        preferred = [self._last_good] if self._last_good is not None else []
        reasons: list[str] = []
        for address in dict.fromkeys([*preferred, *self._given, *self._learnt]):
            try:
                reply = await _lookup(address, request, timeout_s=self._timeout_s)
            except PeerLostError as error:
                reasons.append(f"{address.join_text}: {error}")
                continue
            self._last_good = address
            return reply
        listed = "; ".join(reasons)
        if self._last_good is None:
            raise JoinError(
                f"nobody answers at {listed}; check that it is running and that this is the address it prints now"
            )
        raise PeerLostError(f"no server answers look-ups any more ({listed})")


async def find_dht_addresses(join: Sequence[str], *, timeout_s: float = 5.0) -> list[str]:
    """The DHT addresses that --join addresses stand for: themselves, or what the server at grpc://… tells.

    Raises BadInputError for an address of no known form, JoinError when there are grpc:// addresses only and
    none of them leads to a DHT.
    """
    parsed = [parse_join_address(text) for text in join]
    found = [str(address) for address in parsed if isinstance(address, DhtAddress)]
    asked = [address for address in parsed if isinstance(address, HostPort)]
    if found or not asked:
        return found
    registry = GrpcRegistry([address.join_text for address in asked], timeout_s=timeout_s)
    found = await registry.fetch_dht_addresses()
    if not found:
        raise JoinError(
            f"{asked[0].join_text} answers, but is in no DHT that a server could join; "
            f"give an address that `swarm bootstrap` or `swarm serve` prints"
        )
    return found


async def _lookup(
    address: HostPort, request: discovery_pb2.LookupRequest, *, timeout_s: float
) -> discovery_pb2.LookupReply:
    """Ask one server. Raises PeerLostError whose text is a reason without a subject."""
    import grpc
    import grpc.aio

    try:
        # gRPC's own deadline does not cover what it does before the call, such as looking up the name.
        async with (
            asyncio.timeout(timeout_s + 1.0),
            grpc.aio.insecure_channel(str(address), _CHANNEL_OPTIONS) as channel,
        ):
            body: bytes = await channel.unary_unary(LOOKUP)(request.SerializeToString(), timeout=timeout_s)
        return discovery_pb2.LookupReply.FromString(body)
    except TimeoutError as error:
        raise PeerLostError(f"no reply within {timeout_s:.0f} s") from error
    except grpc.RpcError as error:
        logger.debug("look-up at %s failed: %s", address, error)
        raise PeerLostError(_reason(error, timeout_s)) from error
    except (DecodeError, ValueError) as error:
        raise PeerLostError("it answered with something that is no look-up reply") from error


def _reason(error: object, timeout_s: float) -> str:
    import grpc

    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no reply within {timeout_s:.0f} s"
    if code is grpc.StatusCode.UNAVAILABLE:
        return "no connection"
    if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN):
        return "what answers there is no swarm server"
    return f"it refused the look-up ({code.name.lower().replace('_', ' ')})" if code is not None else "no connection"


def _parse_grpc_address(text: str) -> HostPort:
    address = parse_join_address(text)
    if not isinstance(address, HostPort):
        raise BadInputError(f"{text} is no gRPC address; give one of the form grpc://host:port")
    return address
