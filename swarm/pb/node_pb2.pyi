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
    __slots__ = ("state", "peer_id", "engine_silent_ms")
    STATE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SILENT_MS_FIELD_NUMBER: _ClassVar[int]
    state: str
    peer_id: str
    engine_silent_ms: int
    def __init__(self, state: _Optional[str] = ..., peer_id: _Optional[str] = ..., engine_silent_ms: _Optional[int] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("server", "uptime_s", "num_steps", "num_tokens", "num_failed_steps", "join_addresses", "num_batches", "kv", "num_tokens_run", "num_sessions_taken_over", "num_sessions_handed_over")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_STEPS_FIELD_NUMBER: _ClassVar[int]
    JOIN_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_RUN_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_TAKEN_OVER_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    server: _discovery_pb2.ServerRecord
    uptime_s: int
    num_steps: int
    num_tokens: int
    num_failed_steps: int
    join_addresses: _containers.RepeatedScalarFieldContainer[str]
    num_batches: int
    kv: KVUsage
    num_tokens_run: int
    num_sessions_taken_over: int
    num_sessions_handed_over: int
    def __init__(self, server: _Optional[_Union[_discovery_pb2.ServerRecord, _Mapping]] = ..., uptime_s: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_failed_steps: _Optional[int] = ..., join_addresses: _Optional[_Iterable[str]] = ..., num_batches: _Optional[int] = ..., kv: _Optional[_Union[KVUsage, _Mapping]] = ..., num_tokens_run: _Optional[int] = ..., num_sessions_taken_over: _Optional[int] = ..., num_sessions_handed_over: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("model_hash", "start", "end", "counts", "adapter")
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    model_hash: str
    start: int
    end: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    adapter: str
    def __init__(self, model_hash: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ..., adapter: _Optional[str] = ...) -> None: ...

class RunReply(_message.Message):
    __slots__ = ("failure", "compute_us")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    failure: _session_pb2.Failure
    compute_us: int
    def __init__(self, failure: _Optional[_Union[_session_pb2.Failure, _Mapping]] = ..., compute_us: _Optional[int] = ...) -> None: ...

class HandoverRequest(_message.Message):
    __slots__ = ("offer", "pages", "end")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    offer: HandoverOffer
    pages: HandoverPages
    end: HandoverEnd
    def __init__(self, offer: _Optional[_Union[HandoverOffer, _Mapping]] = ..., pages: _Optional[_Union[HandoverPages, _Mapping]] = ..., end: _Optional[_Union[HandoverEnd, _Mapping]] = ...) -> None: ...

class HandoverOffer(_message.Message):
    __slots__ = ("session_id", "epoch", "model_hash", "start", "end", "max_length", "max_sequences", "expected_tokens", "weights", "kv_policy", "page_tokens", "num_pages", "sequences", "checkpoints", "page_values", "dtype", "adapter", "is_client_away", "compressed")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    KV_POLICY_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    PAGE_VALUES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    IS_CLIENT_AWAY_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    model_hash: str
    start: int
    end: int
    max_length: int
    max_sequences: int
    expected_tokens: int
    weights: str
    kv_policy: str
    page_tokens: int
    num_pages: int
    sequences: _containers.RepeatedCompositeFieldContainer[HandoverSequence]
    checkpoints: _containers.RepeatedCompositeFieldContainer[HandoverCheckpoint]
    page_values: int
    dtype: str
    adapter: str
    is_client_away: bool
    compressed: CompressedPages
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., model_hash: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., max_length: _Optional[int] = ..., max_sequences: _Optional[int] = ..., expected_tokens: _Optional[int] = ..., weights: _Optional[str] = ..., kv_policy: _Optional[str] = ..., page_tokens: _Optional[int] = ..., num_pages: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[HandoverSequence, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[HandoverCheckpoint, _Mapping]]] = ..., page_values: _Optional[int] = ..., dtype: _Optional[str] = ..., adapter: _Optional[str] = ..., is_client_away: bool = ..., compressed: _Optional[_Union[CompressedPages, _Mapping]] = ...) -> None: ...

class CompressedPages(_message.Message):
    __slots__ = ("rules_hash", "page_bytes", "num_kv_heads", "tile_rows", "tiles_per_page", "row_bytes", "position_bytes", "has_scores", "slots_per_page", "num_sinks", "tail_slots", "raw_dtype")
    RULES_HASH_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    TILE_ROWS_FIELD_NUMBER: _ClassVar[int]
    TILES_PER_PAGE_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    POSITION_BYTES_FIELD_NUMBER: _ClassVar[int]
    HAS_SCORES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_PER_PAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_SINKS_FIELD_NUMBER: _ClassVar[int]
    TAIL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RAW_DTYPE_FIELD_NUMBER: _ClassVar[int]
    rules_hash: str
    page_bytes: int
    num_kv_heads: int
    tile_rows: int
    tiles_per_page: int
    row_bytes: int
    position_bytes: int
    has_scores: bool
    slots_per_page: int
    num_sinks: int
    tail_slots: int
    raw_dtype: str
    def __init__(self, rules_hash: _Optional[str] = ..., page_bytes: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., tile_rows: _Optional[int] = ..., tiles_per_page: _Optional[int] = ..., row_bytes: _Optional[int] = ..., position_bytes: _Optional[int] = ..., has_scores: bool = ..., slots_per_page: _Optional[int] = ..., num_sinks: _Optional[int] = ..., tail_slots: _Optional[int] = ..., raw_dtype: _Optional[str] = ...) -> None: ...

class HandoverSequence(_message.Message):
    __slots__ = ("sequence", "length", "pages", "tail", "raw_pages", "tile_pages")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    RAW_PAGES_FIELD_NUMBER: _ClassVar[int]
    TILE_PAGES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    length: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    tail: CompressedTail
    raw_pages: _containers.RepeatedScalarFieldContainer[int]
    tile_pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[int] = ..., length: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., tail: _Optional[_Union[CompressedTail, _Mapping]] = ..., raw_pages: _Optional[_Iterable[int]] = ..., tile_pages: _Optional[_Iterable[int]] = ...) -> None: ...

class CompressedTail(_message.Message):
    __slots__ = ("stored_end", "compressed_at")
    STORED_END_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_AT_FIELD_NUMBER: _ClassVar[int]
    stored_end: int
    compressed_at: int
    def __init__(self, stored_end: _Optional[int] = ..., compressed_at: _Optional[int] = ...) -> None: ...

class HandoverCheckpoint(_message.Message):
    __slots__ = ("epoch", "step", "positions", "tails")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    TAILS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    tails: _containers.RepeatedCompositeFieldContainer[CompressedTail]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., tails: _Optional[_Iterable[_Union[CompressedTail, _Mapping]]] = ...) -> None: ...

class HandoverPages(_message.Message):
    __slots__ = ("first",)
    FIRST_FIELD_NUMBER: _ClassVar[int]
    first: int
    def __init__(self, first: _Optional[int] = ...) -> None: ...

class HandoverEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HandoverReply(_message.Message):
    __slots__ = ("accepted", "failure")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    failure: _session_pb2.Failure
    def __init__(self, accepted: bool = ..., failure: _Optional[_Union[_session_pb2.Failure, _Mapping]] = ...) -> None: ...
