"""The custom resources of ``pointsman.dev/v1alpha1``: the one source of truth.

The CRDs in ``crds/`` are generated from these models, the policy server's embedded
mode parses the same YAML with them, and the operator will do so too. Field names are
camelCase in YAML and snake_case in Python.

Constraints over several fields are `Rule` objects: CEL for the API server beside Python
for everyone else. Patterns are valid in RE2, which the API server uses.
"""

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address, ip_address
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

GROUP = "pointsman.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "pointsman.dev/v1alpha1"

VALIDATIONS = "x-kubernetes-validations"

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_PORT = r"(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"

DNS_LABEL_PATTERN = rf"^{_LABEL}$"
DNS_NAME_PATTERN = rf"^{_LABEL}(\.{_LABEL})*$"
MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$"
SERVED_NAME_PATTERN = r"^/?[A-Za-z0-9][A-Za-z0-9._:/@+-]*$"
LABEL_VALUE_PATTERN = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
LABEL_KEY_PATTERN = rf"^({_LABEL}(\.{_LABEL})*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$"
ADDRESS_PATTERN = rf"^({_OCTET}(\.{_OCTET}){{3}}|\[[0-9A-Fa-f:.]{{2,45}}\]):{_PORT}$"
_NOWHERE = r"^(0\.0\.0\.0|\[[0:.]+\]):"
"""An address of nothing but zeros, in any notation of `ADDRESS_PATTERN`."""
URL_PATH_PATTERN = r"^/[^ ?#]*$"
VERSION_PATTERN = r"^[0-9a-f]{16}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
FILE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
CONDITION_TYPE_PATTERN = r"^[A-Z][A-Za-z0-9]*$"
CONDITION_REASON_PATTERN = r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"

PATTERN_MEANINGS: Final = {
    DNS_LABEL_PATTERN: "lower-case letters, digits and '-', starting and ending alphanumeric",
    DNS_NAME_PATTERN: "lower-case letters, digits, '-' and '.', each part alphanumeric at its ends",
    MODEL_NAME_PATTERN: "letters, digits and any of . _ : / @ + -, starting alphanumeric",
    SERVED_NAME_PATTERN: "letters, digits and any of . _ : / @ + -, starting alphanumeric or by /",
    LABEL_VALUE_PATTERN: "letters, digits, '-', '_' and '.', alphanumeric at its ends",
    ADDRESS_PATTERN: "ip:port (a port of 1 to 65535, IPv6 in brackets, no host name)",
    URL_PATH_PATTERN: "an absolute path such as /metrics, without query",
    VERSION_PATTERN: "16 hex digits",
    SHA256_PATTERN: "64 hex digits in lower case",
    FILE_NAME_PATTERN: "a file's name without folder: letters, digits and any of . _ -",
    CONDITION_TYPE_PATTERN: "CamelCase",
    CONDITION_REASON_PATTERN: "CamelCase",
}
"""What each pattern asks for, in words, for messages and the reference."""

DnsLabel = Annotated[str, Field(pattern=DNS_LABEL_PATTERN, max_length=63)]
DnsName = Annotated[str, Field(pattern=DNS_NAME_PATTERN, max_length=253)]
ResourceName = Annotated[str, Field(pattern=DNS_NAME_PATTERN, max_length=63)]
ModelName = Annotated[str, Field(pattern=MODEL_NAME_PATTERN, max_length=253)]
ServedName = Annotated[str, Field(pattern=SERVED_NAME_PATTERN, max_length=253)]
"""Of an engine's choosing: vLLM calls a model by its path, such as ``/models/qwen``."""
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE_PATTERN, max_length=63)]
Keyword = Annotated[str, Field(min_length=1, max_length=64)]
Port = Annotated[int, Field(ge=1, le=65535)]
Score = Annotated[float, Field(ge=0.0, le=1.0)]
Generation = Annotated[int, Field(ge=0)]
Address = Annotated[
    str,
    Field(
        pattern=ADDRESS_PATTERN,
        max_length=64,
        description="ip:port, an IPv6 address in brackets. Host names are not resolved.",
    ),
]

_Item = TypeVar("_Item")


def _refuse_repeats(keys: Iterable[Hashable]) -> None:
    seen: set[Hashable] = set()
    for key in keys:
        if key in seen:
            raise PydanticCustomError("repeated", "must not repeat {key}", {"key": str(key)})
        seen.add(key)


def _unique(items: list[_Item]) -> list[_Item]:
    _refuse_repeats(item for item in items if isinstance(item, Hashable))
    return items


def _unique_by(field: str) -> Callable[[list[_Item]], list[_Item]]:
    def check(items: list[_Item]) -> list[_Item]:
        _refuse_repeats(getattr(item, field) for item in items)
        return items

    return check


def _list_map(key: str) -> dict[str, Any]:
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def _is_ip(address: str) -> bool:
    """Whether the host of an ``ip:port`` is one; the pattern says it for IPv4 only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    # As CEL's isIP(): what is IPv4 in truth must be written so.
    return not (isinstance(ip, IPv6Address) and ip.ipv4_mapped)


UniqueList = Annotated[
    list[_Item],
    AfterValidator(_unique),
    Field(json_schema_extra={"x-kubernetes-list-type": "set"}),
]
"""A list of scalars without repeats."""

NamedList = Annotated[
    list[_Item], AfterValidator(_unique_by("name")), Field(json_schema_extra=_list_map("name"))
]
"""A list of objects told apart by their name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint over several fields, for the API server and for Python."""

    cel: str
    """CEL over ``self``; optional fields without default need ``has()``."""
    message: str
    """What to write instead."""
    holds: Callable[[Any], bool]
    """The same over the parsed model."""

    def as_validation(self) -> dict[str, str]:
        """The rule as an item of ``x-kubernetes-validations``."""
        return {"rule": self.cel, "message": self.message}


class Resource(BaseModel):
    """Base of all models here: immutable, camelCase in YAML, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [rule.message for rule in self.rules if not rule.holds(self)]
        if broken:
            raise PydanticCustomError("rule", "{broken}", {"broken": "; ".join(broken)})
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler, /
    ) -> JsonSchemaValue:
        """The usual schema and the rules."""
        schema = handler(core_schema)
        if cls.rules:
            target = handler.resolve_ref_schema(schema)
            target[VALIDATIONS] = [rule.as_validation() for rule in cls.rules]
        return schema


_LABEL_KEYS = Rule(
    cel="!has(self.matchLabels) || self.matchLabels.all(key, key.size() <= 317 && "
    f"key.matches(r'{LABEL_KEY_PATTERN}'))",
    message="a label key must be up to 63 letters, digits, '-', '_' and '.', alphanumeric at its "
    "ends; before it may stand a DNS name and '/'",
    holds=lambda selector: all(
        len(key) <= 317 and re.fullmatch(LABEL_KEY_PATTERN, key) for key in selector.match_labels
    ),
)

_SHORT_NAME = Rule(
    cel="self.metadata.name.size() <= 63",
    message="metadata.name must be at most 63 characters long: it becomes a label of metrics",
    holds=lambda resource: len(resource.metadata.name) <= 63,
)


class Algorithm(StrEnum):
    """The deciders a policy can name."""

    RANDOM = "Random"
    ROUND_ROBIN = "RoundRobin"
    SHORTEST_QUEUE = "ShortestQueue"
    LEAST_LOAD = "LeastLoad"
    QUALITY_GREEDY = "QualityGreedy"
    BEST_EXPERT = "BestExpert"
    WEIGHTED_SCORE = "WeightedScore"
    LATENCY_QUALITY_GREEDY = "LatencyQualityGreedy"
    IMPACT_GREEDY = "ImpactGreedy"
    HAN_DRL = "HanDrl"


class EngineType(StrEnum):
    """The inference engines whose metrics Pointsman can read."""

    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMACPP = "llamacpp"
    OLLAMA = "ollama"
    OPENAI = "openai"


class Admission(StrEnum):
    """What happens to a request that the chosen endpoint cannot serve within its limit."""

    BEST_EFFORT = "BestEffort"
    REJECT = "Reject"


class ObjectMeta(BaseModel):
    """The part of Kubernetes' ObjectMeta that Pointsman reads; the rest is ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True
    )

    name: ResourceName
    namespace: DnsLabel = "default"
    labels: dict[str, str] = Field(default_factory=dict)
    generation: int = 1


# --- status ----------------------------------------------------------------------------


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Resource):
    """One condition, in the shape of Kubernetes' metav1.Condition."""

    type: Annotated[str, Field(pattern=CONDITION_TYPE_PATTERN, max_length=316)] = Field(
        description="What the condition is about."
    )
    status: ConditionStatus = Field(description="Whether it holds.")
    observed_generation: Generation | None = Field(
        default=None, description="metadata.generation of the spec that was looked at."
    )
    last_transition_time: AwareDatetime = Field(description="When status last changed.")
    reason: Annotated[
        str, Field(pattern=CONDITION_REASON_PATTERN, min_length=1, max_length=1024)
    ] = Field(description="Why, as one CamelCase word.")
    message: Annotated[str, Field(max_length=32768)] = Field(description="Why, for people.")


Conditions = Annotated[
    list[Condition],
    AfterValidator(_unique_by("type")),
    Field(max_length=16, json_schema_extra=_list_map("type")),
]


class Status(Resource):
    """What both kinds report."""

    observed_generation: Generation | None = Field(
        default=None, description="metadata.generation of the spec that this status is about."
    )


class EndpointCount(Resource):
    """How many endpoints an expert has."""

    rules = (
        Rule(
            cel="self.ready <= self.total",
            message="ready must not exceed total",
            holds=lambda count: count.ready <= count.total,
        ),
    )

    ready: int = Field(default=0, ge=0, le=2**31 - 1, description="Endpoints that take requests.")
    total: int = Field(default=0, ge=0, le=2**31 - 1, description="Endpoints that were found.")


class LLMExpertStatus(Status):
    """What the operator found out about the expert."""

    conditions: Conditions = Field(
        default_factory=list, description="Ready, Reachable and ModelServed."
    )
    endpoints: EndpointCount | None = Field(default=None, description="Its endpoints, counted.")


class RoutingPolicyStatus(Status):
    """What the operator found out about the policy."""

    conditions: Conditions = Field(
        default_factory=list,
        description="Ready, Accepted, ResolvedRefs, ModelLoaded and Programmed.",
    )
    snapshot_version: Annotated[str, Field(pattern=VERSION_PATTERN, max_length=16)] | None = Field(
        default=None, description="Version of the snapshot that was last published."
    )
    experts: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="Experts that the policy selects."
    )
    average_qos: Score | None = Field(
        default=None,
        description="Mean predicted quality over the last minutes, 0 for answers too late.",
    )
    violation_rate: Score | None = Field(
        default=None, description="Share of requests over the limit in the last minutes."
    )


# --- LLMExpert -------------------------------------------------------------------------


class ServiceBackend(Resource):
    """A Kubernetes Service whose ready endpoints serve the expert."""

    name: DnsLabel = Field(description="Name of the Service, in the expert's namespace.")
    port: Port = Field(description="Port of the Service on which the engine answers.")


class PodSelectorBackend(Resource):
    """Pods chosen by label; every ready one is an endpoint."""

    rules = (_LABEL_KEYS,)

    match_labels: dict[str, LabelValue] = Field(
        min_length=1, max_length=16, description="Labels that a pod must carry, all of them."
    )
    port: Port = Field(description="Container port on which the engine answers.")


class InferencePoolBackend(Resource):
    """An InferencePool (inference.networking.k8s.io/v1) of the same namespace."""

    name: DnsName = Field(description="Name of the InferencePool.")


class Backend(Resource):
    """Where the expert runs: exactly one of the fields."""

    rules = (
        Rule(
            cel="[has(self.service), has(self.podSelector), has(self.inferencePool), "
            "has(self.addresses)].filter(given, given).size() == 1",
            message="write exactly one of service, podSelector, inferencePool and addresses",
            holds=lambda backend: len(backend.given) == 1,
        ),
        Rule(
            cel="!has(self.addresses) || self.addresses.all(address, !address.startsWith('[') || "
            "isIP(address.substring(1, address.indexOf(']'))))",
            message="what stands between [ and ] in addresses must be an IPv6 address",
            holds=lambda backend: all(map(_is_ip, backend.addresses or ())),
        ),
        Rule(
            cel="!has(self.addresses) || !self.addresses.exists(address, "
            f"address.matches(r'{_NOWHERE}'))",
            message="0.0.0.0 and [::] are where an engine listens, not where it is: write the "
            "address of its machine in addresses, such as 10.0.0.7:8000, or 127.0.0.1:8000",
            holds=lambda backend: not any(re.match(_NOWHERE, a) for a in backend.addresses or ()),
        ),
    )

    service: ServiceBackend | None = Field(
        default=None, description="Endpoints of a Kubernetes Service."
    )
    pod_selector: PodSelectorBackend | None = Field(
        default=None, description="Endpoints of the pods that carry these labels."
    )
    inference_pool: InferencePoolBackend | None = Field(
        default=None, description="Endpoints of an InferencePool."
    )
    addresses: UniqueList[Address] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Fixed addresses, for machines outside the cluster.",
    )

    @property
    def given(self) -> tuple[str, ...]:
        """The fields that are set, as YAML spells them."""
        fields = type(self).model_fields
        return tuple(
            field.alias or name for name, field in fields.items() if getattr(self, name) is not None
        )


class EngineMetrics(Resource):
    """How the engine's Prometheus page is read."""

    enabled: bool = Field(
        default=True, description="Scrape the engine. Off: only Pointsman's own counts are used."
    )
    path: Annotated[str, Field(pattern=URL_PATH_PATTERN, max_length=253)] = Field(
        default="/metrics", description="HTTP path of the Prometheus page."
    )
    interval_ms: int = Field(
        default=250, ge=50, le=60_000, description="Time between two scrapes, in milliseconds."
    )


class Engine(Resource):
    """The software that serves the expert."""

    type: EngineType = Field(
        default=EngineType.OPENAI,
        description="Which engine it is; decides whose metric names are read.",
    )
    metrics: EngineMetrics = Field(
        default_factory=EngineMetrics, description="How its metrics are read."
    )


class ExpertLimits(Resource):
    """Hard limits of one endpoint."""

    context_tokens: int = Field(
        default=8192, ge=1, le=10_000_000, description="Prompt and answer together, in tokens."
    )
    concurrency: int = Field(
        default=32, ge=1, le=65_536, description="Requests the engine serves in one batch."
    )


class MeasuredTimes(Resource):
    """Times of one engine iteration as measured by `pointsman calibrate`.

    An iteration takes the overhead and the longer of its arithmetic (perTokenUs for each
    prompt token and each decoding sequence) and its memory traffic (weightsMs, and
    perContextTokenUs for each token in the KV cache).
    """

    rules = (
        Rule(
            cel="self.overheadMs + self.weightsMs > 0.0",
            message="overheadMs and weightsMs must not both be 0: no iteration takes no time",
            holds=lambda times: times.overhead_ms + times.weights_ms > 0,
        ),
    )

    overhead_ms: float = Field(ge=0, le=10_000, description="Fixed time, in ms.")
    per_token_us: float = Field(ge=0, le=1e7, description="Arithmetic of a token, in microseconds.")
    weights_ms: float = Field(ge=0, le=10_000, description="Reading the weights, in ms.")
    per_context_token_us: float = Field(
        ge=0, le=1e6, description="Reading a token of the KV cache, in microseconds."
    )


class PerformanceProfile(Resource):
    """Roofline numbers of one endpoint, from data sheets or from `pointsman calibrate`.

    The defaults describe a 7-billion-parameter model in 16 bit on a 24 GiB consumer card.
    """

    peak_tflops: float = Field(
        default=80.0, gt=0, le=1e5, description="Dense compute at serving precision, in TFLOP/s."
    )
    memory_bandwidth_gbps: float = Field(
        default=900.0,
        gt=0,
        le=1e6,
        alias="memoryBandwidthGBps",
        description="Memory bandwidth, in GB/s.",
    )
    parameters_billions: float = Field(
        default=7.0, gt=0, le=1e5, description="Active parameters of the model, in billions."
    )
    bytes_per_parameter: float = Field(
        default=2.0, gt=0, le=8, description="2 for 16 bit, 1 for 8 bit, about 0.55 for 4 bit."
    )
    kv_bytes_per_token: int = Field(
        default=131_072,
        ge=1,
        le=2**31,
        description="KV cache of one token: 2 x layers x KV heads x head size x bytes.",
    )
    kv_cache_gib: float = Field(
        default=6.0,
        gt=0,
        le=1e5,
        alias="kvCacheGiB",
        description="Memory left for the KV cache, in GiB.",
    )
    compute_efficiency: float = Field(
        default=0.5, gt=0, le=1, description="Share of the peak compute that is reached."
    )
    bandwidth_efficiency: float = Field(
        default=0.7, gt=0, le=1, description="Share of the peak bandwidth that is reached."
    )
    iteration_overhead_ms: float = Field(
        default=2.0, ge=0, le=10_000, description="Fixed time of an engine iteration, in ms."
    )
    max_batched_tokens: int = Field(
        default=512, ge=1, le=2**20, description="Token budget of one iteration (chunked prefill)."
    )
    measured: MeasuredTimes | None = Field(
        default=None,
        description="Times of an iteration as measured. Where given, they count instead of "
        "peakTflops, memoryBandwidthGBps, parametersBillions, bytesPerParameter, the two "
        "efficiencies and iterationOverheadMs.",
    )


class DomainScore(Resource):
    """Declared quality in one domain of prompts."""

    name: DnsLabel = Field(description="Name of the domain, as RoutingPolicy spells it.")
    score: Score = Field(description="Expected quality of an answer, 0 to 1.")


class QualityPriors(Resource):
    """Declared quality, used until a learned predictor knows the expert."""

    default: Score = Field(
        default=0.5, description="Expected quality outside the listed domains, 0 to 1."
    )
    domains: NamedList[DomainScore] = Field(
        default_factory=list, max_length=64, description="Expected quality by domain."
    )


class Cost(Resource):
    """Price of the expert, in any currency that all experts of a site share."""

    per_million_input_tokens: float = Field(
        default=0.0, ge=0, le=1e9, description="Price of a million prompt tokens."
    )
    per_million_output_tokens: float = Field(
        default=0.0, ge=0, le=1e9, description="Price of a million generated tokens."
    )


class LLMExpertSpec(Resource):
    """One LLM as deployed on the site."""

    rules = (
        Rule(
            cel="!has(self.aliases) || !(self.model in self.aliases)",
            message="aliases must not repeat model: list further names only",
            holds=lambda spec: spec.model not in spec.aliases,
        ),
        Rule(
            cel="self.profile.kvCacheGiB * 1073741824.0 >= "
            "double(self.limits.contextTokens) * double(self.profile.kvBytesPerToken)",
            message="the KV cache cannot hold one request of limits.contextTokens: lower that, "
            "or correct profile.kvCacheGiB or profile.kvBytesPerToken",
            holds=lambda spec: (
                spec.profile.kv_cache_gib * 2**30
                >= spec.limits.context_tokens * spec.profile.kv_bytes_per_token
            ),
        ),
    )

    model: ServedName = Field(
        description="Name under which the engine serves the model; written into each request.",
        json_schema_extra={
            # A transition rule: only the API server, which knows the old object, can check it.
            VALIDATIONS: [
                {
                    "rule": "self == oldSelf",
                    "message": "model cannot be changed: create another LLMExpert instead",
                }
            ]
        },
    )
    aliases: UniqueList[ServedName] = Field(
        default_factory=list,
        max_length=16,
        description="Further names that the engine answers to.",
    )
    backend: Backend = Field(description="Where the expert runs: exactly one of the fields.")
    engine: Engine = Field(default_factory=Engine, description="The software that serves it.")
    limits: ExpertLimits = Field(
        default_factory=ExpertLimits, description="Hard limits of one endpoint."
    )
    profile: PerformanceProfile = Field(
        default_factory=PerformanceProfile, description="How fast one endpoint is."
    )
    quality: QualityPriors = Field(
        default_factory=QualityPriors, description="How well it answers, as declared."
    )
    expected_output_tokens: int = Field(
        default=256, ge=1, le=1_000_000, description="Mean length of its answers, in tokens."
    )
    cost: Cost = Field(default_factory=Cost, description="What its tokens cost.")


class LLMExpert(Resource):
    """An LLM on the site that requests can be routed to."""

    rules = (_SHORT_NAME,)

    api_version: Literal["pointsman.dev/v1alpha1"] = API_VERSION
    kind: Literal["LLMExpert"] = "LLMExpert"
    metadata: ObjectMeta
    spec: LLMExpertSpec
    status: LLMExpertStatus | None = None


# --- RoutingPolicy ---------------------------------------------------------------------


class LabelSelector(Resource):
    """Which experts of the namespace take part; empty selects all."""

    rules = (_LABEL_KEYS,)

    match_labels: dict[str, LabelValue] = Field(
        default_factory=dict, max_length=16, description="Labels that an expert must carry."
    )


class QoS(Resource):
    """What in time means."""

    rules = (
        Rule(
            cel="!has(self.timeToFirstTokenMs) || "
            "self.timeToFirstTokenMs >= self.latencyPerTokenMs",
            message="timeToFirstTokenMs must not be below latencyPerTokenMs, which counts from "
            "the request's arrival too; both are milliseconds",
            holds=lambda qos: (
                qos.time_to_first_token_ms is None
                or qos.time_to_first_token_ms >= qos.latency_per_token_ms
            ),
        ),
    )

    latency_per_token_ms: float = Field(
        default=60.0,
        gt=0,
        le=600_000,
        description="Limit on (last token - arrival) / output tokens, in milliseconds.",
    )
    time_to_first_token_ms: float | None = Field(
        default=None, gt=0, le=600_000, description="Limit on the first token, in milliseconds."
    )
    allow_override: bool = Field(
        default=True,
        description="Let a request set its own limits by x-slo-tpot-ms and x-slo-ttft-ms.",
    )


class DomainRule(Resource):
    """A domain of prompts, told by words in the prompt."""

    name: DnsLabel = Field(description="Name of the domain.")
    keywords: UniqueList[Keyword] = Field(
        min_length=1,
        max_length=64,
        description="A prompt belongs to the domain most of whose keywords it contains.",
    )


class ModelReference(Resource):
    """A trained model of HanDrl, as `pointsman train` writes it."""

    file: Annotated[str, Field(pattern=FILE_NAME_PATTERN, max_length=128)] = Field(
        description="Name of the file in the policy server's folder of models."
    )
    sha256: Annotated[str, Field(pattern=SHA256_PATTERN, max_length=64)] = Field(
        description="SHA-256 that the file must have: another file is refused."
    )


class RoutingPolicySpec(Resource):
    """How requests for some model names are routed."""

    rules = (
        Rule(
            cel="!has(self.model) || self.algorithm == 'HanDrl'",
            message="model is for algorithm: HanDrl only",
            holds=lambda spec: spec.model is None or spec.algorithm is Algorithm.HAN_DRL,
        ),
        Rule(
            cel="self.fallback != 'HanDrl'",
            message="fallback must not be HanDrl: it has to work when no model does",
            holds=lambda spec: spec.fallback is not Algorithm.HAN_DRL,
        ),
    )

    models: UniqueList[ModelName] = Field(
        min_length=1, max_length=16, description="Model names that this policy answers."
    )
    selector: LabelSelector = Field(
        default_factory=LabelSelector, description="Which experts take part; empty selects all."
    )
    qos: QoS = Field(default_factory=QoS, description="What in time means.")
    algorithm: Algorithm = Field(
        default=Algorithm.LATENCY_QUALITY_GREEDY, description="How the endpoint is chosen."
    )
    model: ModelReference | None = Field(
        default=None,
        description="Which model HanDrl decides by; the one shipped with Pointsman when absent.",
    )
    fallback: Algorithm = Field(
        default=Algorithm.LEAST_LOAD, description="How it is chosen when the algorithm fails."
    )
    admission: Admission = Field(
        default=Admission.BEST_EFFORT,
        description="What happens to a request whose chosen endpoint cannot serve it in time.",
    )
    domains: NamedList[DomainRule] = Field(
        default_factory=list, max_length=32, description="How the domain of a prompt is told."
    )
    explain_headers: bool = Field(
        default=False, description="Add x-pointsman-* headers that explain each decision."
    )


class RoutingPolicy(Resource):
    """Which expert answers requests for some model names, and how fast it must be."""

    rules = (_SHORT_NAME,)

    api_version: Literal["pointsman.dev/v1alpha1"] = API_VERSION
    kind: Literal["RoutingPolicy"] = "RoutingPolicy"
    metadata: ObjectMeta
    spec: RoutingPolicySpec
    status: RoutingPolicyStatus | None = None
