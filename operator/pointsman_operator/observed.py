"""What the operator sees, as frozen inputs of `reconcile`.

Objects come from the API as plain dicts. They are read leniently: one that cannot be
understood is told of in its own status, if it has one, and never stops the others. Only
what is needed is kept, so that ten thousand pods cost little memory.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from pydantic import ValidationError

from pointsman_core.manifests import explain, format_path
from pointsman_core.resources import LLMExpert, RoutingPolicy
from pointsman_core.snapshot import Snapshot, read_snapshot

JsonObject = Mapping[str, Any]

SNAPSHOT_LABEL: Final = "pointsman.dev/snapshot"
POLICY_LABEL: Final = "pointsman.dev/policy"
SNAPSHOT_KEY: Final = "snapshot.json"
CONFIG_MAP_PREFIX: Final = "pointsman-snapshot-"
_SERVICE_NAME_LABEL: Final = "kubernetes.io/service-name"


class Kind(StrEnum):
    """The kinds that are read."""

    EXPERT = "LLMExpert"
    POLICY = "RoutingPolicy"
    SERVICE = "Service"
    SLICE = "EndpointSlice"
    POD = "Pod"
    POOL = "InferencePool"
    CONFIG_MAP = "ConfigMap"


class Key(NamedTuple):
    """Name of an object among those of its kind."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Meta:
    """What is needed of an object's metadata."""

    key: Key
    uid: str = ""
    generation: int = 1
    created: str = ""
    """RFC 3339 in UTC, as the API server writes it, so that text order is time order."""
    labels: Mapping[str, str] = field(default_factory=dict)
    deleting: bool = False


_R = TypeVar("_R", LLMExpert, RoutingPolicy)


@dataclass(frozen=True, slots=True)
class Declared(Generic[_R]):
    """An LLMExpert or a RoutingPolicy."""

    meta: Meta
    resource: _R | None
    """``None`` when it is not valid."""
    problems: tuple[str, ...] = ()
    """Why it is not valid."""
    ignored: tuple[str, ...] = ()
    """Fields that this version does not know, passed over."""
    unknown_algorithm: bool = False
    status: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One TCP port of a Service."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Service:
    """A Service."""

    meta: Meta
    ports: tuple[ServicePort, ...]
    external: bool = False
    family: str = ""
    """``IPv4`` or ``IPv6``: the primary one, so that dual-stack pods do not count twice."""


@dataclass(frozen=True, slots=True)
class SliceEndpoint:
    """One endpoint of an EndpointSlice."""

    ip: str
    ready: bool
    terminating: bool


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """An EndpointSlice."""

    meta: Meta
    service: Key
    family: str
    ports: Mapping[str, int]
    endpoints: tuple[SliceEndpoint, ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that could serve."""

    meta: Meta
    ip: str
    ready: bool
    gone: bool
    """On its way out, or finished."""


@dataclass(frozen=True, slots=True)
class Pool:
    """An InferencePool of ``inference.networking.k8s.io/v1``."""

    meta: Meta
    match_labels: Mapping[str, str]
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SnapshotMap:
    """A ConfigMap with a snapshot, as it stands in the API."""

    meta: Meta
    policy: Key
    snapshot: Snapshot | None
    """``None`` when its content is not what was once written."""
    owner_uid: str = ""


AnyObject = (
    Declared[LLMExpert]
    | Declared[RoutingPolicy]
    | Service
    | EndpointSlice
    | Pod
    | Pool
    | SnapshotMap
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What the last look at one endpoint found."""

    answers: bool
    error: str = ""
    models: tuple[str, ...] | None = None
    """As ``/v1/models`` lists them; ``None`` when there is no readable list."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """One policy server, as the publisher knows it."""

    counted: bool = True
    """It is ready, so that policies wait for its acknowledgement."""
    applied: Mapping[Key, tuple[int, str]] = field(default_factory=dict)
    """Generation and version in force, by policy."""
    error: str = ""
    """Why the last exchange failed; empty when it did not."""
    refused: bool = False
    """The error is the server's verdict on the set."""
    models: Mapping[Key, tuple[str, str]] = field(default_factory=dict)
    """SHA-256 of the model a policy decides by, and why the one it names is not in force."""


@dataclass(frozen=True, slots=True)
class Performance:
    """How a policy did lately, rounded so that noise writes no status."""

    average_qos: float | None = None
    violation_rate: float | None = None


_K = TypeVar("_K")
_V = TypeVar("_V")
_Table = Mapping[_K, _V]


def _empty() -> dict[Any, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """All inputs of one `reconcile`."""

    experts: _Table[Key, Declared[LLMExpert]] = field(default_factory=_empty)
    policies: _Table[Key, Declared[RoutingPolicy]] = field(default_factory=_empty)
    services: _Table[Key, Service] = field(default_factory=_empty)
    slices: _Table[Key, EndpointSlice] = field(default_factory=_empty)
    pods: _Table[Key, Pod] = field(default_factory=_empty)
    pools: _Table[Key, Pool] = field(default_factory=_empty)
    pools_installed: bool = True
    unreadable: frozenset[tuple[Kind, str]] = frozenset()
    """What the operator may not list, by kind and namespace; an empty one means all."""
    unstored: _Table[Key, str] = field(default_factory=_empty)
    """Why the API server refuses a policy's ConfigMap."""
    servers: _Table[str, ServerState] = field(default_factory=_empty)
    serverless: str = ""
    """Why there is no policy server, if there is none."""
    probes: _Table[str, Probe] = field(default_factory=_empty)
    performance: _Table[Key, Performance] = field(default_factory=_empty)

    def may_read(self, kind: Kind, namespace: str) -> bool:
        """Whether the operator may list a kind in a namespace."""
        return not self.unreadable & {(kind, ""), (kind, namespace)}


# --- reading ---------------------------------------------------------------------------


def read_object(kind: Kind, body: object) -> AnyObject | None:
    """One object from its JSON; ``None`` if it says nothing that could be used."""
    mapping = _mapping(body)
    meta = read_meta(mapping)
    return None if meta is None else _READERS[kind](meta, mapping)


def read_meta(body: JsonObject) -> Meta | None:
    """Metadata; ``None`` without a name."""
    raw = _mapping(body.get("metadata"))
    name = raw.get("name")
    if not isinstance(name, str) or not name:
        return None
    generation = raw.get("generation")
    return Meta(
        key=Key(_text(raw.get("namespace")) or "default", name),
        uid=_text(raw.get("uid")),
        generation=generation if isinstance(generation, int) else 1,
        created=_text(raw.get("creationTimestamp")),
        labels=_labels(raw.get("labels")),
        deleting=raw.get("deletionTimestamp") is not None,
    )


def _declared(model: type[_R]) -> Callable[[Meta, JsonObject], Declared[_R]]:
    def read(meta: Meta, body: JsonObject) -> Declared[_R]:
        status = body.get("status")
        content: dict[str, Any] = {
            "metadata": {
                "name": meta.key.name,
                "namespace": meta.key.namespace,
                "labels": dict(meta.labels),
                "generation": meta.generation,
            },
            "spec": body.get("spec"),
        }
        resource, errors, ignored = _validate(model, content)
        return Declared(
            meta=meta,
            resource=resource,
            problems=tuple(f"{format_path(loc)}: {text}" for loc, _, text in errors),
            ignored=tuple(format_path(loc) for loc in ignored),
            unknown_algorithm=any(
                loc in (("spec", "algorithm"), ("spec", "fallback")) and kind == "enum"
                for loc, kind, _ in errors
            ),
            status=status if isinstance(status, Mapping) else None,
        )

    return read


_Location = tuple[str | int, ...]
_Errors = list[tuple[_Location, str, str]]


def _validate(
    model: type[_R], content: dict[str, Any]
) -> tuple[_R | None, _Errors, list[_Location]]:
    """The model, errors, and unknown fields passed over.

    A newer CRD may know fields that an older operator does not; the API server has
    checked them, and refusing the object would take a working expert away.
    """
    ignored: list[_Location] = []
    try:
        return model.model_validate(content), [], ignored
    except ValidationError as invalid:
        errors = _errors(invalid, model)
    ignored = [loc for loc, kind, _ in errors if kind == "extra_forbidden"]
    if not ignored:
        return None, errors, ignored
    content = copy.deepcopy(content)
    for location in ignored:
        _remove(content, location)
    try:
        return model.model_validate(content), [], ignored
    except ValidationError as invalid:
        return None, _errors(invalid, model), ignored


def _errors(invalid: ValidationError, model: type[_R]) -> _Errors:
    return [
        (one["loc"], one["type"], "" if one["type"] == "extra_forbidden" else explain(one, model))
        for one in invalid.errors(include_url=False)
    ]


def _remove(content: dict[str, Any], location: _Location) -> None:
    *parents, name = location
    at: Any = content
    for part in parents:
        at = at[part]
    del at[name]


def _service(meta: Meta, body: JsonObject) -> Service:
    spec = _mapping(body.get("spec"))
    families = _sequence(spec.get("ipFamilies"))
    return Service(
        meta=meta,
        ports=tuple(
            ServicePort(port["port"], _text(port.get("name")))
            for port in map(_mapping, _sequence(spec.get("ports")))
            if _is_port(port.get("port")) and port.get("protocol", "TCP") == "TCP"
        ),
        external=spec.get("type") == "ExternalName",
        family=_text(families[0]) if families else "",
    )


def _slice(meta: Meta, body: JsonObject) -> EndpointSlice:
    return EndpointSlice(
        meta=meta,
        service=Key(meta.key.namespace, meta.labels.get(_SERVICE_NAME_LABEL, "")),
        family=_text(body.get("addressType")),
        ports={
            _text(port.get("name")): port["port"]
            for port in map(_mapping, _sequence(body.get("ports")))
            if _is_port(port.get("port")) and (port.get("protocol") or "TCP") == "TCP"
        },
        endpoints=tuple(
            endpoint
            for raw in map(_mapping, _sequence(body.get("endpoints")))
            if (endpoint := _slice_endpoint(raw)) is not None
        ),
    )


def _slice_endpoint(raw: JsonObject) -> SliceEndpoint | None:
    addresses = [one for one in _sequence(raw.get("addresses")) if isinstance(one, str)]
    if not addresses:
        return None
    conditions = _mapping(raw.get("conditions"))
    return SliceEndpoint(
        ip=addresses[0],  # the API says of the others: "undefined behaviour"
        ready=conditions.get("ready") is not False,  # absent means ready
        terminating=conditions.get("terminating") is True,
    )


def _pod(meta: Meta, body: JsonObject) -> Pod:
    status = _mapping(body.get("status"))
    conditions = map(_mapping, _sequence(status.get("conditions")))
    return Pod(
        meta=meta,
        ip=_text(status.get("podIP")),
        ready=any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions),
        gone=meta.deleting or status.get("phase") in ("Succeeded", "Failed"),
    )


def _pool(meta: Meta, body: JsonObject) -> Pool:
    spec = _mapping(body.get("spec"))
    ports: list[Any] = [_mapping(port).get("number") for port in _sequence(spec.get("targetPorts"))]
    return Pool(
        meta=meta,
        match_labels=_labels(_mapping(spec.get("selector")).get("matchLabels")),
        ports=tuple(port for port in ports if _is_port(port)),
    )


def _snapshot_map(meta: Meta, body: JsonObject) -> SnapshotMap | None:
    policy = meta.labels.get(POLICY_LABEL, "")
    if meta.key.name != CONFIG_MAP_PREFIX + policy:
        return None  # somebody else's, whatever its labels say
    owners = [
        _mapping(owner)
        for owner in _sequence(_mapping(body.get("metadata")).get("ownerReferences"))
    ]
    key = Key(meta.key.namespace, policy)
    return SnapshotMap(
        meta=meta,
        policy=key,
        snapshot=_snapshot(key, _text(_mapping(body.get("data")).get(SNAPSHOT_KEY))),
        owner_uid=_text(owners[0].get("uid")) if owners else "",
    )


def _snapshot(policy: Key, content: str) -> Snapshot | None:
    try:
        snapshot = read_snapshot(content)
    except ValueError:
        return None
    return snapshot if Key(snapshot.namespace, snapshot.policy) == policy else None


_READERS: Final[Mapping[Kind, Callable[[Meta, JsonObject], AnyObject | None]]] = {
    Kind.EXPERT: _declared(LLMExpert),
    Kind.POLICY: _declared(RoutingPolicy),
    Kind.SERVICE: _service,
    Kind.SLICE: _slice,
    Kind.POD: _pod,
    Kind.POOL: _pool,
    Kind.CONFIG_MAP: _snapshot_map,
}


def _mapping(value: object) -> JsonObject:
    return cast("JsonObject", value) if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[object]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _labels(value: object) -> dict[str, str]:
    items: Iterable[tuple[object, object]] = _mapping(value).items()
    return {k: v for k, v in items if isinstance(k, str) and isinstance(v, str)}


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535
