from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DecideRequest(_message.Message):
    __slots__ = ("model", "prompt", "prompt_tokens", "max_output_tokens", "latency_per_token_ms", "time_to_first_token_ms")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_PER_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: str
    prompt_tokens: int
    max_output_tokens: int
    latency_per_token_ms: float
    time_to_first_token_ms: float
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_output_tokens: _Optional[int] = ..., latency_per_token_ms: _Optional[float] = ..., time_to_first_token_ms: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("policy", "snapshot_version", "algorithm", "rejected", "expert", "endpoint", "served_model", "retry_on", "why", "fallback_reason")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_FIELD_NUMBER: _ClassVar[int]
    RETRY_ON_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_REASON_FIELD_NUMBER: _ClassVar[int]
    policy: str
    snapshot_version: str
    algorithm: str
    rejected: bool
    expert: str
    endpoint: str
    served_model: str
    retry_on: _containers.RepeatedScalarFieldContainer[str]
    why: str
    fallback_reason: str
    def __init__(self, policy: _Optional[str] = ..., snapshot_version: _Optional[str] = ..., algorithm: _Optional[str] = ..., rejected: _Optional[bool] = ..., expert: _Optional[str] = ..., endpoint: _Optional[str] = ..., served_model: _Optional[str] = ..., retry_on: _Optional[_Iterable[str]] = ..., why: _Optional[str] = ..., fallback_reason: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request", "request_id")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request: DecideRequest
    request_id: str
    def __init__(self, request: _Optional[_Union[DecideRequest, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("decision", "candidates")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateExplanation]
    def __init__(self, decision: _Optional[_Union[Decision, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[CandidateExplanation, _Mapping]]] = ...) -> None: ...

class CandidateExplanation(_message.Message):
    __slots__ = ("expert", "endpoint", "eligible", "score", "expected_quality", "in_time", "predicted_latency_per_token_ms", "predicted_time_to_first_token_ms", "in_flight")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_QUALITY_FIELD_NUMBER: _ClassVar[int]
    IN_TIME_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_LATENCY_PER_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    expert: str
    endpoint: str
    eligible: bool
    score: float
    expected_quality: float
    in_time: bool
    predicted_latency_per_token_ms: float
    predicted_time_to_first_token_ms: float
    in_flight: int
    def __init__(self, expert: _Optional[str] = ..., endpoint: _Optional[str] = ..., eligible: _Optional[bool] = ..., score: _Optional[float] = ..., expected_quality: _Optional[float] = ..., in_time: _Optional[bool] = ..., predicted_latency_per_token_ms: _Optional[float] = ..., predicted_time_to_first_token_ms: _Optional[float] = ..., in_flight: _Optional[int] = ...) -> None: ...
