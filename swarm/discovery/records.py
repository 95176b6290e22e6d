"""Server records as bytes: sealed with a peer's signature, opened with every check (proto/discovery.proto)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from swarm.datatypes import AdapterHash, AdapterInfo, ModelHash, PeerId, ServerInfo, ServerState, Span
from swarm.discovery.record_checks import (
    MAX_RECORD_BYTES,
    RecordRejectedError,
    RejectReason,
    check_expiry,
    check_info,
)
from swarm.errors import BadInputError
from swarm.identity import Identity, verify
from swarm.pb import discovery_pb2

__all__ = [
    "RECORD_VERSION",
    "Selection",
    "VerifiedRecord",
    "has_valid_envelope",
    "open_record",
    "seal_record",
    "select_newest",
    "to_record",
]

RECORD_VERSION = 1
"""Version of the record's meaning, part of its DHT key; unknown fields alone do not raise it."""

# Keeps a signature made for a record from being passed off as one made for anything else.
_SIGNED_CONTEXT = b"swarm server record 1\n"
_NUM_SIGNATURE_BYTES = 64

_STATES = {
    discovery_pb2.ServerRecord.STATE_JOINING: ServerState.JOINING,
    discovery_pb2.ServerRecord.STATE_ONLINE: ServerState.ONLINE,
    discovery_pb2.ServerRecord.STATE_DRAINING: ServerState.DRAINING,
    discovery_pb2.ServerRecord.STATE_OFFLINE: ServerState.OFFLINE,
}
_STATE_NUMBERS = {state: number for number, state in _STATES.items()}


@dataclass(frozen=True, kw_only=True)
class VerifiedRecord:
    """A record that passed every check."""

    info: ServerInfo
    expires_at: float
    """Unix seconds."""
    data: bytes
    """The SignedRecord as received; others can check it for themselves."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is left of many received records."""

    records: tuple[VerifiedRecord, ...]
    """The newest of each peer, by first block, last block and peer id."""
    num_rejected: Counter[RejectReason]
    """How many of the distinct records were dropped, and why."""


def to_record(info: ServerInfo, *, expires_at: float) -> discovery_pb2.ServerRecord:
    """The unsigned message of what a server says about itself; `expires_at` in unix seconds."""
    return discovery_pb2.ServerRecord(
        protocol_version=RECORD_VERSION,
        peer_id=info.peer_id,
        model_hash=info.model_hash,
        model_name=info.model_name,
        num_blocks=info.num_blocks,
        start=info.span.start,
        end=info.span.end,
        state=_STATE_NUMBERS[info.state],
        weights=info.weights,
        kv_policy=info.kv_policy,
        kv_tokens_free=info.kv_tokens_free,
        kv_tokens_total=info.kv_tokens_total,
        num_sessions=info.num_sessions,
        tokens_per_s=info.tokens_per_s,
        addresses=info.addresses,
        version=info.version,
        expires_at_unix_s=expires_at,
        moving_to_start=info.moving_to.start if info.moving_to is not None else None,
        moving_to_end=info.moving_to.end if info.moving_to is not None else None,
        is_choosing=info.is_choosing,
        adapters=[
            discovery_pb2.Adapter(name=adapter.name, hash=bytes.fromhex(adapter.adapter_hash))
            for adapter in info.adapters
        ],
    )


def seal_record(info: ServerInfo, identity: Identity, *, expires_at: float) -> bytes:
    """A SignedRecord as bytes, good until `expires_at` (unix seconds).

    Raises BadInputError for what every reader would refuse: an impossible value, or another peer's info.
    """
    if info.peer_id != identity.peer_id:
        raise BadInputError(f"{identity.peer_id} can not announce for {info.peer_id}; each server announces itself")
    try:
        check_info(info)
    except RecordRejectedError as error:
        raise BadInputError(f"this server can not be announced: {error}") from error
    payload = to_record(info, expires_at=expires_at).SerializeToString()
    data = discovery_pb2.SignedRecord(
        payload=payload, signature=identity.sign(_SIGNED_CONTEXT + payload), peer_id=info.peer_id
    ).SerializeToString()
    if len(data) > MAX_RECORD_BYTES:
        raise BadInputError(f"this server's record has {len(data)} bytes, and {MAX_RECORD_BYTES} are the most")
    return data


def open_record(data: bytes, *, now: float, expected_model_hash: ModelHash) -> ServerInfo:
    """What a SignedRecord says, once all of it is checked; `now` in unix seconds.

    Raises RecordRejectedError with the kind of reason. Unknown fields are accepted.
    """
    return _open(data, now=now, expected_model_hash=expected_model_hash).info


def select_newest(
    received: Iterable[bytes], *, now: float, model_hash: ModelHash, num_blocks: int, max_records: int = 4096
) -> Selection:
    """Check records from the network and keep the newest of each peer; never raises for what they contain.

    `max_records` bounds the work that a flood of distinct records can cause; the rest counts as oversize.
    """
    newest: dict[PeerId, VerifiedRecord] = {}
    num_rejected: Counter[RejectReason] = Counter()
    # One server's record comes back once for each of its blocks.
    for index, data in enumerate(dict.fromkeys(received)):
        try:
            if index >= max_records:
                raise RecordRejectedError(RejectReason.OVERSIZE, f"more than {max_records} records")
            record = _open(data, now=now, expected_model_hash=model_hash)
            if record.info.num_blocks != num_blocks:
                raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"the model has {num_blocks} blocks")
        except RecordRejectedError as error:
            num_rejected[error.reason] += 1
            continue
        known = newest.get(record.info.peer_id)
        if known is None or known.expires_at < record.expires_at:
            newest[record.info.peer_id] = record
    records = sorted(newest.values(), key=lambda record: (record.info.span, record.info.peer_id))
    return Selection(records=tuple(records), num_rejected=num_rejected)


def has_valid_envelope(data: bytes, *, peer_id: object, expires_at: float, now: float) -> bool:
    """What a DHT node checks before it keeps or passes on a record: size, signature, owner and life, no more.

    The contents are the reader's business, so that records of newer software survive on older nodes.
    """
    try:
        envelope = _open_envelope(data)
    except RecordRejectedError:
        return False
    # An expired record is harmless and will be dropped; refusing it would make a node distrust the honest
    # ones that came with it (hivemind drops the whole answer).
    if expires_at > now:
        try:
            check_expiry(expires_at, now=now)
        except RecordRejectedError:
            return False
    return envelope.peer_id == peer_id and envelope.record.expires_at_unix_s == expires_at


@dataclass(frozen=True)
class _Envelope:
    peer_id: str
    record: discovery_pb2.ServerRecord


def _open(data: bytes, *, now: float, expected_model_hash: ModelHash) -> VerifiedRecord:
    record = _open_envelope(data).record
    check_expiry(record.expires_at_unix_s, now=now)
    if record.protocol_version != RECORD_VERSION:
        raise RecordRejectedError(
            RejectReason.VERSION, f"it has version {record.protocol_version}, and this software reads {RECORD_VERSION}"
        )
    if record.model_hash != expected_model_hash:
        raise RecordRejectedError(RejectReason.OTHER_MODEL, "it is about another model")
    info = _to_info(record)
    check_info(info)
    return VerifiedRecord(info=info, expires_at=record.expires_at_unix_s, data=data)


def _open_envelope(data: bytes) -> _Envelope:
    """The signed message. Raises RecordRejectedError for a wrong size, form or signature."""
    if len(data) > MAX_RECORD_BYTES:  # outside the memory below, which must not fill with large values
        raise RecordRejectedError(
            RejectReason.OVERSIZE, f"it has {len(data)} bytes, and {MAX_RECORD_BYTES} are the most"
        )
    result = _check_signature(data)
    if isinstance(result, RejectReason):
        raise RecordRejectedError(result, f"{result.value}: its bytes are not what a peer signed")
    return result


# The same record arrives once per block, look-up and replica, and checking a signature takes about 0.1 ms.
@functools.lru_cache(maxsize=2048)
def _check_signature(data: bytes) -> _Envelope | RejectReason:
    try:
        signed = discovery_pb2.SignedRecord.FromString(data)
        record = discovery_pb2.ServerRecord.FromString(signed.payload)
    except (DecodeError, ValueError):
        return RejectReason.MALFORMED
    if len(signed.signature) != _NUM_SIGNATURE_BYTES or record.peer_id != signed.peer_id:
        return RejectReason.SIGNATURE
    if not verify(signed.peer_id, _SIGNED_CONTEXT + signed.payload, signed.signature):
        return RejectReason.SIGNATURE
    return _Envelope(peer_id=signed.peer_id, record=record)


def _to_info(record: discovery_pb2.ServerRecord) -> ServerInfo:
    state = _STATES.get(record.state)
    if state is None:
        raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"state can not be {record.state}")
    if not record.start < record.end:
        raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"span can not be {record.start}:{record.end}")
    moving_to: Span | None = None
    if record.moving_to_end or record.moving_to_start:
        if not record.moving_to_start < record.moving_to_end:
            wish = f"{record.moving_to_start}:{record.moving_to_end}"
            raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"moving_to can not be {wish}")
        moving_to = Span(start=record.moving_to_start, end=record.moving_to_end)
    return ServerInfo(
        peer_id=PeerId(record.peer_id),
        model_hash=ModelHash(record.model_hash),
        model_name=record.model_name,
        num_blocks=record.num_blocks,
        span=Span(start=record.start, end=record.end),
        state=state,
        weights=record.weights,
        kv_policy=record.kv_policy,
        kv_tokens_free=record.kv_tokens_free,
        kv_tokens_total=record.kv_tokens_total,
        num_sessions=record.num_sessions,
        tokens_per_s=record.tokens_per_s,
        addresses=tuple(record.addresses),
        version=record.version,
        moving_to=moving_to,
        is_choosing=record.is_choosing,
        adapters=_to_adapters(record),
    )


def _to_adapters(record: discovery_pb2.ServerRecord) -> list[AdapterInfo]:
    try:
        return [
            AdapterInfo(name=adapter.name, adapter_hash=AdapterHash(adapter.hash.hex())) for adapter in record.adapters
        ]
    except BadInputError as error:
        raise RecordRejectedError(RejectReason.IMPOSSIBLE_VALUE, f"adapters: {error}") from error
