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
    __slots__ = ("expert", "endpoint", "eligible", "score", "expected_quality", "in_time", "predicted_latency_per_token_ms", "predicted_time_to_first_token_ms", "in_flight", "policy_probability", "chance_in_time", "impact_on_others")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_QUALITY_FIELD_NUMBER: _ClassVar[int]
    IN_TIME_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_LATENCY_PER_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    POLICY_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    CHANCE_IN_TIME_FIELD_NUMBER: _ClassVar[int]
    IMPACT_ON_OTHERS_FIELD_NUMBER: _ClassVar[int]
    expert: str
    endpoint: str
    eligible: bool
    score: float
    expected_quality: float
    in_time: bool
    predicted_latency_per_token_ms: float
    predicted_time_to_first_token_ms: float
    in_flight: int
    policy_probability: float
    chance_in_time: float
    impact_on_others: float
    def __init__(self, expert: _Optional[str] = ..., endpoint: _Optional[str] = ..., eligible: _Optional[bool] = ..., score: _Optional[float] = ..., expected_quality: _Optional[float] = ..., in_time: _Optional[bool] = ..., predicted_latency_per_token_ms: _Optional[float] = ..., predicted_time_to_first_token_ms: _Optional[float] = ..., in_flight: _Optional[int] = ..., policy_probability: _Optional[float] = ..., chance_in_time: _Optional[float] = ..., impact_on_others: _Optional[float] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("publisher", "sequence", "snapshots", "allow_empty")
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_EMPTY_FIELD_NUMBER: _ClassVar[int]
    publisher: str
    sequence: int
    snapshots: _containers.RepeatedCompositeFieldContainer[PublishedSnapshot]
    allow_empty: bool
    def __init__(self, publisher: _Optional[str] = ..., sequence: _Optional[int] = ..., snapshots: _Optional[_Iterable[_Union[PublishedSnapshot, _Mapping]]] = ..., allow_empty: _Optional[bool] = ...) -> None: ...

class PublishedSnapshot(_message.Message):
    __slots__ = ("namespace", "policy", "generation", "version", "snapshot_json")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_JSON_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    policy: str
    generation: int
    version: str
    snapshot_json: bytes
    def __init__(self, namespace: _Optional[str] = ..., policy: _Optional[str] = ..., generation: _Optional[int] = ..., version: _Optional[str] = ..., snapshot_json: _Optional[bytes] = ...) -> None: ...

class AppliedSnapshot(_message.Message):
    __slots__ = ("namespace", "policy", "generation", "version", "model_sha256", "model_error")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_ERROR_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    policy: str
    generation: int
    version: str
    model_sha256: str
    model_error: str
    def __init__(self, namespace: _Optional[str] = ..., policy: _Optional[str] = ..., generation: _Optional[int] = ..., version: _Optional[str] = ..., model_sha256: _Optional[str] = ..., model_error: _Optional[str] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("applied", "instance_id")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    applied: _containers.RepeatedCompositeFieldContainer[AppliedSnapshot]
    instance_id: str
    def __init__(self, applied: _Optional[_Iterable[_Union[AppliedSnapshot, _Mapping]]] = ..., instance_id: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("instance_id", "applied", "policies", "endpoints")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    applied: _containers.RepeatedCompositeFieldContainer[AppliedSnapshot]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyStats]
    endpoints: _containers.RepeatedCompositeFieldContainer[EndpointStats]
    def __init__(self, instance_id: _Optional[str] = ..., applied: _Optional[_Iterable[_Union[AppliedSnapshot, _Mapping]]] = ..., policies: _Optional[_Iterable[_Union[PolicyStats, _Mapping]]] = ..., endpoints: _Optional[_Iterable[_Union[EndpointStats, _Mapping]]] = ...) -> None: ...

class PolicyStats(_message.Message):
    __slots__ = ("namespace", "policy", "requests", "violations", "rejected", "failed", "predicted_qos_sum", "window_seconds")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_QOS_SUM_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SECONDS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    policy: str
    requests: int
    violations: int
    rejected: int
    failed: int
    predicted_qos_sum: float
    window_seconds: float
    def __init__(self, namespace: _Optional[str] = ..., policy: _Optional[str] = ..., requests: _Optional[int] = ..., violations: _Optional[int] = ..., rejected: _Optional[int] = ..., failed: _Optional[int] = ..., predicted_qos_sum: _Optional[float] = ..., window_seconds: _Optional[float] = ...) -> None: ...

class EndpointStats(_message.Message):
    __slots__ = ("address", "ready", "in_flight")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    address: str
    ready: bool
    in_flight: int
    def __init__(self, address: _Optional[str] = ..., ready: _Optional[bool] = ..., in_flight: _Optional[int] = ...) -> None: ...
