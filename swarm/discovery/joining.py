"""Choosing how to find servers from the addresses given to --join."""

from __future__ import annotations

from collections.abc import Sequence

from swarm.discovery.addresses import DhtAddress, HostPort, parse_join_address
from swarm.discovery.dht import DhtRegistry
from swarm.discovery.lookup_client import GrpcRegistry
from swarm.discovery.registry import Registry
from swarm.errors import BadInputError, JoinError, MissingDependencyError, SwarmError
from swarm.identity import Identity

__all__ = ["open_registry"]


async def open_registry(join: Sequence[str], *, identity: Identity | None = None, timeout_s: float = 15.0) -> Registry:
    """A client's registry, with somebody at the other end who has answered.

    gRPC addresses are tried first, since they need no daemon; DHT addresses are joined in client mode, as
    `identity` (a fresh one when None). `timeout_s` bounds each attempt. A server starts its DhtRegistry itself.

    Raises BadInputError when there is no address or one of no known form, JoinError when nobody answers,
    MissingDependencyError when only DHT addresses are given and hivemind is not installed.
    """
    addresses = [parse_join_address(text) for text in join]
    if not addresses:
        raise BadInputError("no address to join at; give --join the address that `swarm serve` or `bootstrap` prints")
    errors: list[SwarmError] = []
    if grpc_addresses := [address.join_text for address in addresses if isinstance(address, HostPort)]:
        try:
            return await GrpcRegistry.connect(grpc_addresses, timeout_s=timeout_s)
        except JoinError as error:
            errors.append(error)
    if dht_addresses := [str(address) for address in addresses if isinstance(address, DhtAddress)]:
        try:
            return await DhtRegistry.start(
                identity if identity is not None else Identity.generate(),
                initial_peers=dht_addresses,
                client_mode=True,
                startup_timeout_s=timeout_s,
            )
        except (JoinError, MissingDependencyError) as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise JoinError("; also, ".join(str(error) for error in errors)) from errors[0]
