from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerRecord(_message.Message):
    __slots__ = ("protocol_version", "peer_id", "model_hash", "model_name", "num_blocks", "start", "end", "state", "weights", "kv_policy", "kv_tokens_free", "kv_tokens_total", "num_sessions", "tokens_per_s", "addresses", "version", "expires_at_unix_s", "moving_to_start", "moving_to_end", "is_choosing", "adapters")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[ServerRecord.State]
        STATE_JOINING: _ClassVar[ServerRecord.State]
        STATE_ONLINE: _ClassVar[ServerRecord.State]
        STATE_DRAINING: _ClassVar[ServerRecord.State]
        STATE_OFFLINE: _ClassVar[ServerRecord.State]
    STATE_UNSPECIFIED: ServerRecord.State
    STATE_JOINING: ServerRecord.State
    STATE_ONLINE: ServerRecord.State
    STATE_DRAINING: ServerRecord.State
    STATE_OFFLINE: ServerRecord.State
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KV_POLICY_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    MOVING_TO_START_FIELD_NUMBER: _ClassVar[int]
    MOVING_TO_END_FIELD_NUMBER: _ClassVar[int]
    IS_CHOOSING_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    peer_id: str
    model_hash: str
    model_name: str
    num_blocks: int
    start: int
    end: int
    state: ServerRecord.State
    weights: str
    kv_policy: str
    kv_tokens_free: int
    kv_tokens_total: int
    num_sessions: int
    tokens_per_s: float
    addresses: _containers.RepeatedScalarFieldContainer[str]
    version: str
    expires_at_unix_s: float
    moving_to_start: int
    moving_to_end: int
    is_choosing: bool
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, protocol_version: _Optional[int] = ..., peer_id: _Optional[str] = ..., model_hash: _Optional[str] = ..., model_name: _Optional[str] = ..., num_blocks: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., state: _Optional[_Union[ServerRecord.State, str]] = ..., weights: _Optional[str] = ..., kv_policy: _Optional[str] = ..., kv_tokens_free: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., num_sessions: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., addresses: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., expires_at_unix_s: _Optional[float] = ..., moving_to_start: _Optional[int] = ..., moving_to_end: _Optional[int] = ..., is_choosing: bool = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "hash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    hash: bytes
    def __init__(self, name: _Optional[str] = ..., hash: _Optional[bytes] = ...) -> None: ...

class SignedRecord(_message.Message):
    __slots__ = ("payload", "signature", "peer_id")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    peer_id: str
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., peer_id: _Optional[str] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("model_hash", "num_blocks")
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    model_hash: str
    num_blocks: int
    def __init__(self, model_hash: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("records", "dht_addresses", "answered_at_unix_s")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    DHT_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[SignedRecord]
    dht_addresses: _containers.RepeatedScalarFieldContainer[str]
    answered_at_unix_s: float
    def __init__(self, records: _Optional[_Iterable[_Union[SignedRecord, _Mapping]]] = ..., dht_addresses: _Optional[_Iterable[str]] = ..., answered_at_unix_s: _Optional[float] = ...) -> None: ...
