"""The compiled routing table of one RoutingPolicy.

A snapshot is immutable and carries everything a decision needs, so that the request
path never looks at custom resources. It is plain data: the operator publishes the same
JSON that the embedded mode compiles for itself.
"""

import hashlib
from collections.abc import Iterable, Mapping
from ipaddress import IPv6Address, ip_address
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pointsman_core.resources import (
    Admission,
    Algorithm,
    DomainRule,
    Engine,
    ExpertLimits,
    LLMExpert,
    ModelReference,
    PerformanceProfile,
    QoS,
    QualityPriors,
    RoutingPolicy,
)

NO_VERSION = "0" * 16
"""Stands in the place of the version while the content is hashed."""


class SnapshotModel(BaseModel):
    """Base of the snapshot's parts: immutable plain data."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Candidate(SnapshotModel):
    """One endpoint of one expert."""

    expert: str
    address: str
    """``ip:port``, see `canonical_address`."""
    model: str
    aliases: tuple[str, ...] = ()
    engine: Engine
    limits: ExpertLimits
    profile: PerformanceProfile
    quality: QualityPriors
    expected_output_tokens: int

    @property
    def served_models(self) -> tuple[str, ...]:
        """All names the endpoint answers to, the preferred one first."""
        return (self.model, *self.aliases)


class Snapshot(SnapshotModel):
    """The routing table of one policy; order of candidates is fixed by their names."""

    namespace: str
    policy: str
    generation: int
    models: tuple[str, ...]
    qos: QoS
    algorithm: Algorithm
    model: ModelReference | None = None
    """Of HanDrl; None: the shipped one."""
    fallback: Algorithm
    admission: Admission
    domains: tuple[DomainRule, ...]
    explain_headers: bool
    candidates: tuple[Candidate, ...]
    version: Annotated[str, Field(min_length=16, max_length=16)] = NO_VERSION
    """First 16 hex digits of the content's SHA-256: equal content, equal version."""

    @property
    def full_name(self) -> str:
        """``namespace/name`` of the policy, as metrics and logs spell it."""
        return f"{self.namespace}/{self.policy}"


def compile_snapshot(
    policy: RoutingPolicy,
    experts: Iterable[LLMExpert],
    endpoints: Mapping[str, tuple[str, ...]],
) -> Snapshot:
    """Join a policy with the experts it selects and their ready endpoints.

    ``endpoints`` maps an expert's name to its ``ip:port`` addresses; experts of other
    namespaces are left out, as are those that the selector does not match.
    """
    chosen = sorted(
        (expert for expert in experts if selects(policy, expert)),
        key=lambda expert: expert.metadata.name,
    )
    spec = policy.spec
    draft = Snapshot(
        namespace=policy.metadata.namespace,
        policy=policy.metadata.name,
        generation=policy.metadata.generation,
        models=tuple(spec.models),
        qos=spec.qos,
        algorithm=spec.algorithm,
        model=spec.model,
        fallback=spec.fallback,
        admission=spec.admission,
        domains=tuple(spec.domains),
        explain_headers=spec.explain_headers,
        candidates=tuple(
            _candidate(expert, address)
            for expert in chosen
            for address in sorted(
                {canonical_address(a) for a in endpoints.get(expert.metadata.name, ())}
            )
        ),
    )
    return draft.model_copy(update={"version": _digest(draft.model_dump_json())})


def snapshot_json(snapshot: Snapshot) -> str:
    """As it is published and stored: content and version agree.

    One that an older release wrote lacks what that release did not know, also when it is
    passed on.
    """
    unversioned = snapshot.model_copy(update={"version": NO_VERSION})
    complete = _digest(unversioned.model_dump_json()) == snapshot.version
    return snapshot.model_dump_json(exclude_unset=not complete)


def read_snapshot(content: bytes | str) -> Snapshot:
    """The snapshot that `snapshot_json` wrote, its version checked against its content.

    Raises:
        ValueError: it is no snapshot, or not the one that its version names.

    """
    try:
        snapshot = Snapshot.model_validate_json(content, strict=True)
    except ValidationError as invalid:
        raise ValueError(_explain(invalid)) from None
    # Unset fields are those that the writer, an older release, did not know.
    unversioned = snapshot.model_copy(update={"version": NO_VERSION})
    version = _digest(unversioned.model_dump_json(exclude_unset=True))
    if version != snapshot.version:
        raise ValueError(f"says version {snapshot.version}, but its content has {version}")
    return snapshot


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _explain(invalid: ValidationError) -> str:
    """The first error in one line, and how many more there are."""
    errors = invalid.errors(include_url=False, include_input=False)
    where = ".".join(map(str, errors[0]["loc"]))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"is no snapshot: {where + ': ' if where else ''}{errors[0]['msg']}{more}"


def canonical_address(address: str) -> str:
    """The one spelling of an ``ip:port``: that of Envoy, which compares them as text.

    What is not an IP address is returned as it is.
    """
    host, _, port = address.rpartition(":")
    try:
        ip = ip_address(host.strip("[]"))
    except ValueError:
        return address
    return f"[{ip}]:{int(port)}" if isinstance(ip, IPv6Address) else f"{ip}:{int(port)}"


def selects(policy: RoutingPolicy, expert: LLMExpert) -> bool:
    """Whether the policy's selector matches the expert (same namespace, all labels)."""
    wanted = policy.spec.selector.match_labels.items()
    labels = expert.metadata.labels
    same_namespace = policy.metadata.namespace == expert.metadata.namespace
    return same_namespace and all(labels.get(key) == value for key, value in wanted)


def _candidate(expert: LLMExpert, address: str) -> Candidate:
    spec = expert.spec
    return Candidate(
        expert=expert.metadata.name,
        address=address,
        model=spec.model,
        aliases=tuple(spec.aliases),
        engine=spec.engine,
        limits=spec.limits,
        profile=spec.profile,
        quality=spec.quality,
        expected_output_tokens=spec.expected_output_tokens,
    )
