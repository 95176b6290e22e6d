"""What a server answers to /swarm.Node/Lookup: the signed records it finds, for clients that have no DHT."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from swarm.datatypes import ModelHash
from swarm.discovery.addresses import DhtAddress, parse_join_address
from swarm.discovery.registry import Registry, check_model_key
from swarm.errors import BadInputError
from swarm.pb import discovery_pb2

__all__ = ["MAX_LOOKUP_REPLY_BYTES", "answer_lookup"]

logger = logging.getLogger(__name__)

MAX_LOOKUP_REPLY_BYTES = 4 * 1024 * 1024
"""Several thousand servers of one model; gRPC's own limit when nothing else is agreed."""
_MAX_RECORDS_BYTES = MAX_LOOKUP_REPLY_BYTES - 64 * 1024


async def answer_lookup(registry: Registry, request: bytes, *, clock: Callable[[], float] = time.time) -> bytes:
    """A serialised LookupReply to a serialised LookupRequest; `clock` gives unix seconds.

    Give it a CachedRegistry: anybody may ask, as often as they like. Raises BadInputError for a request that
    is none, and what the registry's look-up raises.
    """
    try:
        asked = discovery_pb2.LookupRequest.FromString(request)
    except (DecodeError, ValueError) as error:
        raise BadInputError("this is not a look-up request") from error
    records: list[bytes] = []
    if asked.model_hash:
        check_model_key(asked.model_hash, asked.num_blocks)
        records = await registry.lookup_records(ModelHash(asked.model_hash), asked.num_blocks)
    reply = discovery_pb2.LookupReply(
        dht_addresses=[text for text in registry.join_addresses() if _is_dht_address(text)],
        answered_at_unix_s=clock(),
    )
    num_bytes = 0
    for data in records:
        num_bytes += len(data) + 8  # field number and length
        if num_bytes > _MAX_RECORDS_BYTES:
            logger.warning(
                "a look-up of model %s… was cut off at %d records", asked.model_hash[:12], len(reply.records)
            )
            break
        reply.records.append(discovery_pb2.SignedRecord.FromString(data))
    return reply.SerializeToString()


def _is_dht_address(text: str) -> bool:
    try:
        return isinstance(parse_join_address(text), DhtAddress)
    except BadInputError:
        return False
