"""Adapters in server records."""

from __future__ import annotations

import time

import pytest

from swarm.datatypes import AdapterHash, AdapterInfo
from swarm.discovery.record_checks import MAX_ADAPTERS, RecordRejectedError
from swarm.discovery.records import open_record, seal_record, to_record
from swarm.errors import BadInputError
from swarm.identity import Identity
from swarm.pb import discovery_pb2
from tests.server_infos import MODEL_HASH, make_server

IDENTITY = Identity.generate()


def adapters(count: int) -> list[AdapterInfo]:
    return [
        AdapterInfo(name=f"{'n' * 29}-{number:02}", adapter_hash=AdapterHash(f"{number:032x}"))
        for number in range(count)
    ]


def test_adapters_arrive_unchanged() -> None:
    """Sessions choose by name and hash; as many as are allowed fit a record beside everything else."""
    addresses = [f"{'h' * 60}{number}.example.org:65535" for number in range(8)]
    info = make_server(
        IDENTITY.peer_id, 0, 12, adapters=adapters(MAX_ADAPTERS), addresses=addresses, model_name="m" * 256
    )
    now = time.time()
    data = seal_record(info, IDENTITY, expires_at=now + 9)
    assert open_record(data, now=now, expected_model_hash=MODEL_HASH) == info


def test_too_many_and_equal_names() -> None:
    """A record stays small, and a name means one thing on one server."""
    for wrong in (adapters(MAX_ADAPTERS + 1), adapters(1) * 2):
        with pytest.raises(BadInputError, match="adapters"):
            seal_record(make_server(IDENTITY.peer_id, 0, 12, adapters=wrong), IDENTITY, expires_at=time.time() + 9)


@pytest.mark.parametrize(
    "adapter", [{"name": "", "hash": b"0" * 16}, {"name": "a\x1b[2J", "hash": b"0" * 16}, {"name": "a", "hash": b"0"}]
)
def test_impossible_adapters(adapter: dict[str, object]) -> None:
    """Names are shown on terminals and pages, so a hostile one is refused with its record."""
    now = time.time()
    record = to_record(make_server(IDENTITY.peer_id, 0, 12), expires_at=now + 9)
    record.adapters.append(discovery_pb2.Adapter(**adapter))  # type: ignore[arg-type]
    payload = record.SerializeToString()
    signature = IDENTITY.sign(b"swarm server record 1\n" + payload)
    signed = discovery_pb2.SignedRecord(payload=payload, signature=signature, peer_id=IDENTITY.peer_id)
    with pytest.raises(RecordRejectedError, match="adapters"):
        open_record(signed.SerializeToString(), now=now, expected_model_hash=MODEL_HASH)
