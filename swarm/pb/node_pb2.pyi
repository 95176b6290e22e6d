from swarm.pb import discovery_pb2 as _discovery_pb2
from swarm.pb import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("state", "peer_id")
    STATE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    state: str
    peer_id: str
    def __init__(self, state: _Optional[str] = ..., peer_id: _Optional[str] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("server", "uptime_s", "num_steps", "num_tokens", "num_failed_steps", "join_addresses", "num_batches", "kv")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_STEPS_FIELD_NUMBER: _ClassVar[int]
    JOIN_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    server: _discovery_pb2.ServerRecord
    uptime_s: int
    num_steps: int
    num_tokens: int
    num_failed_steps: int
    join_addresses: _containers.RepeatedScalarFieldContainer[str]
    num_batches: int
    kv: KVUsage
    def __init__(self, server: _Optional[_Union[_discovery_pb2.ServerRecord, _Mapping]] = ..., uptime_s: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_failed_steps: _Optional[int] = ..., join_addresses: _Optional[_Iterable[str]] = ..., num_batches: _Optional[int] = ..., kv: _Optional[_Union[KVUsage, _Mapping]] = ...) -> None: ...

class KVUsage(_message.Message):
    __slots__ = ("total_bytes", "used_bytes", "wasted_bytes", "shared_bytes", "num_tokens_shared", "num_spills")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WASTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_SHARED_FIELD_NUMBER: _ClassVar[int]
    NUM_SPILLS_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    used_bytes: int
    wasted_bytes: int
    shared_bytes: int
    num_tokens_shared: int
    num_spills: int
    def __init__(self, total_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., wasted_bytes: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., num_tokens_shared: _Optional[int] = ..., num_spills: _Optional[int] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("model_hash", "start", "end", "counts")
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    model_hash: str
    start: int
    end: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model_hash: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ...) -> None: ...

class RunReply(_message.Message):
    __slots__ = ("failure", "compute_us")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    failure: _session_pb2.Failure
    compute_us: int
    def __init__(self, failure: _Optional[_Union[_session_pb2.Failure, _Mapping]] = ..., compute_us: _Optional[int] = ...) -> None: ...
