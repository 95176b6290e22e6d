from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FailureCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_UNSPECIFIED: _ClassVar[FailureCode]
    FAILURE_BAD_INPUT: _ClassVar[FailureCode]
    FAILURE_LENGTH: _ClassVar[FailureCode]
    FAILURE_STATE: _ClassVar[FailureCode]
    FAILURE_BUSY: _ClassVar[FailureCode]
    FAILURE_DRAINING: _ClassVar[FailureCode]
    FAILURE_INTERNAL: _ClassVar[FailureCode]
    FAILURE_NOT_SERVED: _ClassVar[FailureCode]
    FAILURE_UNREACHABLE: _ClassVar[FailureCode]
FAILURE_UNSPECIFIED: FailureCode
FAILURE_BAD_INPUT: FailureCode
FAILURE_LENGTH: FailureCode
FAILURE_STATE: FailureCode
FAILURE_BUSY: FailureCode
FAILURE_DRAINING: FailureCode
FAILURE_INTERNAL: FailureCode
FAILURE_NOT_SERVED: FailureCode
FAILURE_UNREACHABLE: FailureCode

class SessionRequest(_message.Message):
    __slots__ = ("open", "step", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    step: Step
    close: Close
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class SessionReply(_message.Message):
    __slots__ = ("opened", "result", "failure", "queued")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    result: StepResult
    failure: Failure
    queued: Queued
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., queued: _Optional[_Union[Queued, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session_id", "epoch", "model_hash", "start", "end", "next", "max_length", "max_sequences", "kv_policy", "protocol", "expected_tokens", "may_wait", "adapter", "keep")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    KV_POLICY_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAY_WAIT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    model_hash: str
    start: int
    end: int
    next: NextHop
    max_length: int
    max_sequences: int
    kv_policy: str
    protocol: int
    expected_tokens: int
    may_wait: bool
    adapter: str
    keep: Keep
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., model_hash: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., next: _Optional[_Union[NextHop, _Mapping]] = ..., max_length: _Optional[int] = ..., max_sequences: _Optional[int] = ..., kv_policy: _Optional[str] = ..., protocol: _Optional[int] = ..., expected_tokens: _Optional[int] = ..., may_wait: bool = ..., adapter: _Optional[str] = ..., keep: _Optional[_Union[Keep, _Mapping]] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class NextHop(_message.Message):
    __slots__ = ("peer_id", "addresses")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer_id: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("protocol", "kept", "positions", "kv_tokens_free", "peer_id", "kv_policy", "step_us", "token_us")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_POLICY_FIELD_NUMBER: _ClassVar[int]
    STEP_US_FIELD_NUMBER: _ClassVar[int]
    TOKEN_US_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    kept: bool
    positions: _containers.RepeatedScalarFieldContainer[int]
    kv_tokens_free: int
    peer_id: str
    kv_policy: str
    step_us: int
    token_us: int
    def __init__(self, protocol: _Optional[int] = ..., kept: bool = ..., positions: _Optional[_Iterable[int]] = ..., kv_tokens_free: _Optional[int] = ..., peer_id: _Optional[str] = ..., kv_policy: _Optional[str] = ..., step_us: _Optional[int] = ..., token_us: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("session_id", "epoch", "step", "sequences", "last_only", "relay", "replay_end")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LAST_ONLY_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    REPLAY_END_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    epoch: int
    step: int
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceStep]
    last_only: bool
    relay: bool
    replay_end: int
    def __init__(self, session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., sequences: _Optional[_Iterable[_Union[SequenceStep, _Mapping]]] = ..., last_only: bool = ..., relay: bool = ..., replay_end: _Optional[int] = ...) -> None: ...

class SequenceStep(_message.Message):
    __slots__ = ("sequence", "parent", "start", "count", "unfinished")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    parent: int
    start: int
    count: int
    unfinished: bool
    def __init__(self, sequence: _Optional[int] = ..., parent: _Optional[int] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., unfinished: bool = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step", "relay", "push_problem", "compute_us")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RELAY_FIELD_NUMBER: _ClassVar[int]
    PUSH_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    relay: bool
    push_problem: str
    compute_us: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., relay: bool = ..., push_problem: _Optional[str] = ..., compute_us: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "epoch", "step", "positions", "retry_after_ms", "queue_position", "successor")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    code: FailureCode
    message: str
    epoch: int
    step: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    retry_after_ms: int
    queue_position: int
    successor: str
    def __init__(self, code: _Optional[_Union[FailureCode, str]] = ..., message: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., retry_after_ms: _Optional[int] = ..., queue_position: _Optional[int] = ..., successor: _Optional[str] = ...) -> None: ...
