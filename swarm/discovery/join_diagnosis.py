"""Why nobody could be joined: a look at each address from the outside, for one sentence people can act on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from swarm.discovery.addresses import DhtAddress
from swarm.errors import JoinError

__all__ = ["explain_failed_join"]

_PROBE_TIMEOUT_S = 2.0


async def explain_failed_join(addresses: Sequence[DhtAddress]) -> JoinError:
    """The error to raise when none of `addresses` (at least one) could be joined; takes at most about 2 s."""
    reasons = await asyncio.gather(*(_probe(address) for address in addresses))
    if len(addresses) == 1:
        what = f"nobody answers at {addresses[0]}: {reasons[0]}"
    else:
        listed = "; ".join(f"{address}: {reason}" for address, reason in zip(addresses, reasons, strict=True))
        what = f"nobody answers at any of the {len(addresses)} addresses given ({listed})"
    return JoinError(f"{what}; check that it is running and that this is the address it prints now")


async def _probe(address: DhtAddress) -> str:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except TimeoutError:
        return "no reply (is it switched on, and does a firewall let the port through?)"
    except ConnectionRefusedError:
        return "the machine is there, but nothing listens on that port"
    except socket.gaierror:
        return f"the name {address.host} is unknown"
    except OSError as error:
        return f"{(error.strerror or str(error)).lower()}"
    writer.transport.abort()
    return f"something listens there, but it is not the peer …{address.peer_id[-6:]} (was it started with another key?)"
