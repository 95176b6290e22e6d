"""Server records: what an honest peer says arrives unchanged, everything else is refused with a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.datatypes import ModelHash, ServerInfo, ServerState, Span
from swarm.discovery.record_checks import MAX_BLOCKS, MAX_RECORD_BYTES, RecordRejectedError, RejectReason
from swarm.discovery.records import has_valid_envelope, open_record, seal_record, select_newest, to_record
from swarm.errors import BadInputError
from swarm.identity import Identity
from swarm.pb import discovery_pb2
from tests.server_infos import MODEL_HASH, make_server

NOW = 1_800_000_000.0
IDENTITY = Identity.generate()
INFO = make_server(IDENTITY.peer_id, 2, 5)


def _sign(record: discovery_pb2.ServerRecord, *, identity: Identity = IDENTITY, peer_id: str | None = None) -> bytes:
    """Sign anything, as a hostile peer with a key of its own can."""
    payload = record.SerializeToString()
    signature = identity.sign(b"swarm server record 1\n" + payload)
    return discovery_pb2.SignedRecord(
        payload=payload, signature=signature, peer_id=peer_id or identity.peer_id
    ).SerializeToString()


def _open(data: bytes, *, now: float = NOW) -> ServerInfo:
    return open_record(data, now=now, expected_model_hash=MODEL_HASH)


def _reason(data: bytes, *, now: float = NOW) -> RejectReason:
    with pytest.raises(RecordRejectedError) as refusal:
        _open(data, now=now)
    return refusal.value.reason


_names = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=64)


@given(
    blocks=st.integers(1, MAX_BLOCKS).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n - 1)).flatmap(
            lambda t: st.tuples(st.just(t[0]), st.just(t[1]), st.integers(t[1] + 1, t[0]))
        )
    ),
    state=st.sampled_from(ServerState),
    name=_names,
    version=_names,
    tokens=st.integers(0, 2**50).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total))),
    num_sessions=st.integers(0, 10**6),
    tokens_per_s=st.floats(0, 1e9),
    addresses=st.lists(st.sampled_from(["10.0.0.1:1", "[::1]:65535", "host.example:4000"]), min_size=1, max_size=8),
    ttl_s=st.floats(0.01, 3600),
    moves=st.booleans(),
)
def test_what_is_sealed_opens_unchanged(
    blocks: tuple[int, int, int],
    state: ServerState,
    name: str,
    version: str,
    tokens: tuple[int, int],
    num_sessions: int,
    tokens_per_s: float,
    addresses: list[str],
    ttl_s: float,
    moves: bool,
) -> None:
    """Routing decides by these numbers; none may be rounded, cut or reordered on the way."""
    info = ServerInfo(
        peer_id=IDENTITY.peer_id,
        model_hash=MODEL_HASH,
        model_name=name,
        num_blocks=blocks[0],
        span=Span(start=blocks[1], end=blocks[2]),
        state=state,
        weights="nf4",
        kv_policy="pyramid+gear",
        kv_tokens_free=tokens[1],
        kv_tokens_total=tokens[0],
        num_sessions=num_sessions,
        tokens_per_s=tokens_per_s,
        addresses=addresses,
        version=version,
        moving_to=Span(start=0, end=blocks[2]) if moves else None,
        is_choosing=not moves,
    )
    assert _open(seal_record(info, IDENTITY, expires_at=NOW + ttl_s)) == info


def test_records_of_newer_software_are_read() -> None:
    """Fields added later must not cut the swarm in two."""
    record = to_record(INFO, expires_at=NOW + 10)
    future = discovery_pb2.ServerRecord.FromString(record.SerializeToString() + b"\xfa\x3e\x03new")  # field 1007
    assert _open(_sign(future)) == INFO


@given(st.data())
def test_no_byte_can_be_changed(data: st.DataObject) -> None:
    """The DHT is kept by strangers: one flipped bit anywhere must be noticed."""
    sealed = seal_record(INFO, IDENTITY, expires_at=NOW + 10)
    index = data.draw(st.integers(0, len(sealed) - 1))
    changed = bytearray(sealed)
    changed[index] ^= data.draw(st.integers(1, 255))
    try:
        opened = _open(bytes(changed))
    except RecordRejectedError:
        return
    # Only an encoding of the very same content may pass.
    assert opened == INFO


@given(st.binary(max_size=300))
def test_garbage_is_refused_with_a_reason(garbage: bytes) -> None:
    """Anybody can store bytes in the DHT."""
    assert _reason(garbage) in (RejectReason.MALFORMED, RejectReason.SIGNATURE)
    assert not has_valid_envelope(garbage, peer_id=IDENTITY.peer_id, expires_at=NOW + 10, now=NOW)


def test_a_record_signed_by_another_peer_is_refused() -> None:
    """Else anybody could announce in the name of a trusted server."""
    thief = Identity.generate()
    record = to_record(INFO, expires_at=NOW + 10)
    assert _reason(_sign(record, identity=thief, peer_id=IDENTITY.peer_id)) is RejectReason.SIGNATURE
    assert _reason(_sign(record, identity=thief)) is RejectReason.SIGNATURE


def test_a_signature_made_for_something_else_is_refused() -> None:
    """A peer's key also signs other things; none of them may be replayed as a record."""
    payload = to_record(INFO, expires_at=NOW + 10).SerializeToString()
    signed = discovery_pb2.SignedRecord(payload=payload, signature=IDENTITY.sign(payload), peer_id=IDENTITY.peer_id)
    assert _reason(signed.SerializeToString()) is RejectReason.SIGNATURE


def test_life_and_death_of_a_record() -> None:
    """A dead server must vanish by itself, and nobody may announce for ever."""
    sealed = seal_record(INFO, IDENTITY, expires_at=NOW + 10)
    assert _open(sealed, now=NOW + 9.99) == INFO
    assert _reason(sealed, now=NOW + 10) is RejectReason.EXPIRED
    assert _reason(sealed, now=NOW - 3660) is RejectReason.EXPIRY_TOO_FAR
    for expires_at in (float("inf"), float("nan")):
        assert _reason(_sign(to_record(INFO, expires_at=expires_at))) is RejectReason.IMPOSSIBLE_VALUE


def test_another_model_or_version_is_refused() -> None:
    """Spans of different weights must never meet in one route."""
    sealed = seal_record(INFO, IDENTITY, expires_at=NOW + 10)
    with pytest.raises(RecordRejectedError) as refusal:
        open_record(sealed, now=NOW, expected_model_hash=ModelHash("cd" * 16))
    assert refusal.value.reason is RejectReason.OTHER_MODEL
    record = to_record(INFO, expires_at=NOW + 10)
    record.protocol_version = 2
    assert _reason(_sign(record)) is RejectReason.VERSION


def test_an_oversized_record_is_refused() -> None:
    """Records are multiplied by blocks and servers; a large one would be a cheap flood."""
    record = to_record(INFO, expires_at=NOW + 10)
    record.model_name = "x" * MAX_RECORD_BYTES
    assert _reason(_sign(record)) is RejectReason.OVERSIZE
    assert not has_valid_envelope(_sign(record), peer_id=IDENTITY.peer_id, expires_at=NOW + 10, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"start": 5},
        {"start": 7},
        {"end": 13},
        {"num_blocks": 0},
        {"num_blocks": MAX_BLOCKS + 1},
        {"state": 0},
        {"state": 99},
        {"weights": ""},
        {"weights": "FP32; rm -rf"},
        {"kv_policy": "x" * 33},
        {"kv_tokens_free": 1001},
        {"kv_tokens_total": 2**63},
        {"num_sessions": 10**6 + 1},
        {"tokens_per_s": float("nan")},
        {"tokens_per_s": float("inf")},
        {"tokens_per_s": -1.0},
        {"model_name": "red \x1b[31m"},
        {"model_name": "x" * 257},
        {"version": "two\nlines"},
        {"addresses": ["10.0.0.1:1"] * 9},
        {"addresses": ["10.0.0.1"]},
        {"addresses": ["unix:/etc/passwd"]},
        {"addresses": []},
        {"moving_to_start": 3},
        {"moving_to_start": 5, "moving_to_end": 5},
        {"moving_to_end": 13},
    ],
)
def test_impossible_values_are_refused_although_signed(change: dict[str, Any]) -> None:
    """A valid signature says who, not that it is true; each of these would hurt somewhere later."""
    record = to_record(INFO, expires_at=NOW + 10)
    for field, value in change.items():
        if field == "addresses":
            del record.addresses[:]
            record.addresses.extend(value)
        else:
            setattr(record, field, value)
    assert _reason(_sign(record)) is RejectReason.IMPOSSIBLE_VALUE


def test_a_server_learns_at_once_that_nobody_would_believe_it() -> None:
    """Without this it would announce in vain, and its operator would see an empty swarm."""
    with pytest.raises(BadInputError, match="model_name"):
        seal_record(dataclasses.replace(INFO, model_name="two\nlines"), IDENTITY, expires_at=NOW + 10)
    with pytest.raises(BadInputError, match="announces itself"):
        seal_record(INFO, Identity.generate(), expires_at=NOW + 10)
    loading = dataclasses.replace(INFO, state=ServerState.JOINING, addresses=())
    assert _open(seal_record(loading, IDENTITY, expires_at=NOW + 10)) == loading


def test_the_newest_record_of_each_peer_counts() -> None:
    """A server that moved to other blocks leaves its old record under the old keys until it expires."""
    other = Identity.generate()
    moved = dataclasses.replace(INFO, span=Span(start=6, end=9))
    beside = make_server(other.peer_id, 0, 2)
    received = [
        seal_record(moved, IDENTITY, expires_at=NOW + 11),
        seal_record(INFO, IDENTITY, expires_at=NOW + 10),
        seal_record(beside, other, expires_at=NOW + 5),
        seal_record(beside, other, expires_at=NOW - 5),
        b"garbage",
    ]
    for order in (received, received[::-1], received * 3):
        selection = select_newest(order, now=NOW, model_hash=MODEL_HASH, num_blocks=12)
        assert [record.info for record in selection.records] == [beside, moved]
        assert selection.num_rejected == {RejectReason.EXPIRED: 1, RejectReason.MALFORMED: 1}


def test_another_depth_of_the_same_model_is_refused() -> None:
    """A route is planned over num_blocks blocks; a peer must not change that number."""
    sealed = seal_record(INFO, IDENTITY, expires_at=NOW + 10)
    selection = select_newest([sealed], now=NOW, model_hash=MODEL_HASH, num_blocks=24)
    assert not selection.records
    assert selection.num_rejected == {RejectReason.IMPOSSIBLE_VALUE: 1}


def test_a_flood_costs_bounded_work() -> None:
    """Checking a signature takes time; a DHT peer can answer with any number of records."""
    flood = [seal_record(INFO, IDENTITY, expires_at=NOW + 10 + index) for index in range(20)]
    selection = select_newest(flood, now=NOW, model_hash=MODEL_HASH, num_blocks=12, max_records=5)
    assert len(selection.records) == 1
    assert selection.num_rejected == {RejectReason.OVERSIZE: 15}


def test_a_dht_node_checks_owner_and_life_but_not_contents() -> None:
    """A record whose life another peer prolonged, or moved into its own name, must not replace the true one;
    contents of newer software must survive on older nodes.
    """
    sealed = seal_record(INFO, IDENTITY, expires_at=NOW + 10)

    def accepts(data: bytes, *, peer_id: object = IDENTITY.peer_id, expires_at: float = NOW + 10) -> bool:
        return has_valid_envelope(data, peer_id=peer_id, expires_at=expires_at, now=NOW)

    assert accepts(sealed)
    assert not accepts(sealed, expires_at=NOW + 10.001)
    assert not accepts(sealed, peer_id=Identity.generate().peer_id)
    assert not accepts(sealed, peer_id=7)
    record = to_record(INFO, expires_at=NOW + 10)
    record.protocol_version = 9
    assert accepts(_sign(record))
    assert accepts(seal_record(INFO, IDENTITY, expires_at=NOW - 1), expires_at=NOW - 1), "dropped later, not distrusted"
    assert not accepts(seal_record(INFO, IDENTITY, expires_at=NOW + 9999), expires_at=NOW + 9999)
