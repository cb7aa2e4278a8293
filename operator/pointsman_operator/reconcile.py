"""From what is observed to what should be: the one place that decides. Pure.

`reconcile` is level-based: it looks at everything and says what should be in force and in
every status. What it needs of the past is in `Previous`: the last good state of what is
broken now, and what was written already, so that nothing is written twice.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from pointsman_core.resources import (
    Algorithm,
    LLMExpert,
    LLMExpertStatus,
    ObjectMeta,
    RoutingPolicy,
    RoutingPolicyStatus,
)
from pointsman_core.snapshot import NO_VERSION, Candidate, Snapshot, compile_snapshot
from pointsman_operator.conditions import (
    FALSE,
    TRUE,
    UNKNOWN,
    Finding,
    Reason,
    Transition,
    Type,
    conditions_of,
    render_conditions,
    transitions,
)
from pointsman_operator.endpoints import Resolution, Resolver
from pointsman_operator.observed import (
    Declared,
    JsonObject,
    Key,
    Kind,
    Meta,
    Observed,
    Performance,
    Probe,
    ServerState,
)

_SHOWN: Final = 3
"""Items that a message lists."""

_R = TypeVar("_R", LLMExpert, RoutingPolicy)


@dataclass(frozen=True, slots=True)
class Accepted(Generic[_R]):
    """The last good spec of an object; another object of the same name has another uid."""

    uid: str
    resource: _R


@dataclass(frozen=True, slots=True)
class Ref:
    """One object with a status."""

    kind: Kind
    key: Key
    uid: str


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A ConfigMap as it stands in the API."""

    version: str
    """Empty when its content is not what was once written."""
    owner_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """What must be known of the past."""

    snapshots: Mapping[Key, Snapshot] = field(default_factory=dict)
    """In force, by policy; after a start those of the ConfigMaps."""
    experts: Mapping[Key, Accepted[LLMExpert]] = field(default_factory=dict)
    policies: Mapping[Key, Accepted[RoutingPolicy]] = field(default_factory=dict)
    statuses: Mapping[Ref, JsonObject] = field(default_factory=dict)
    """As last written; where there is none the observed one counts."""
    stored: Mapping[Key, StoredSnapshot] = field(default_factory=dict)
    """ConfigMaps, by policy."""


@dataclass(frozen=True, slots=True)
class SnapshotWrite:
    """A ConfigMap to be written."""

    policy: Key
    owner_uid: str
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class StatusWrite:
    """A status to be written, and what to tell of it."""

    ref: Ref
    resource_version: str
    status: JsonObject
    events: tuple[Transition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What should be, and what must be written for it."""

    snapshots: tuple[Snapshot, ...]
    """The complete set, ordered by namespace and name."""
    config_maps: tuple[SnapshotWrite, ...]
    stale_config_maps: tuple[Key, ...]
    """Policies whose ConfigMap must go."""
    statuses: tuple[StatusWrite, ...]
    addresses: frozenset[str]
    """Ready endpoints, to be probed."""
    next: Previous
    """What to pass the next time if all writes succeed."""


def reconcile(observed: Observed, previous: Previous, now: datetime) -> Outcome:
    """Decide everything anew; a second call with ``Outcome.next`` finds nothing to write."""
    resolver = Resolver(observed)
    experts = {
        key: _view_expert(found, previous.experts.get(key), resolver)
        for key, found in sorted(observed.experts.items())
        if not found.meta.deleting
    }
    policies = _view_policies(observed, previous, experts)
    snapshots = {p.meta.key: p.snapshot for p in policies if p.snapshot is not None}
    config_maps = tuple(
        SnapshotWrite(p.meta.key, p.meta.uid, p.snapshot)
        for p in policies
        if p.snapshot is not None
        and previous.stored.get(p.meta.key) != StoredSnapshot(p.snapshot.version, p.meta.uid)
    )
    served = {Key(s.namespace, c.expert) for s in snapshots.values() for c in s.candidates}
    statuses = tuple(
        write
        for write in (
            *(
                _expert_status(one, observed.probes, previous, now, in_force=key in served)
                for key, one in experts.items()
            ),
            *(_policy_status(one, observed, previous, now) for one in policies),
        )
        if write is not None
    )
    return Outcome(
        snapshots=tuple(snapshots[key] for key in sorted(snapshots)),
        config_maps=config_maps,
        stale_config_maps=tuple(sorted(previous.stored.keys() - snapshots.keys())),
        statuses=statuses,
        addresses=frozenset(a for one in experts.values() for a in one.resolution.ready),
        next=Previous(
            snapshots=snapshots,
            experts={key: v.accepted for key, v in experts.items() if v.accepted is not None},
            policies={p.meta.key: p.accepted for p in policies if p.accepted is not None},
            statuses=_next_statuses(previous, statuses, experts, policies),
            stored={
                key: StoredSnapshot(snapshots[key].version, p.meta.uid)
                for p in policies
                if (key := p.meta.key) in snapshots
            },
        ),
    )


# --- experts ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert with what is in force of it."""

    found: Declared[LLMExpert]
    accepted: Accepted[LLMExpert] | None
    """The last good spec; ``None`` if none is known."""
    resolution: Resolution
    """Of the last good spec."""
    fault: Reason | None = None
    message: str = ""

    @property
    def meta(self) -> Meta:
        return self.found.meta

    @property
    def frozen(self) -> bool:
        """Nothing good is known but its candidates in the snapshot before."""
        return self.fault is not None and self.accepted is None


def _view_expert(
    found: Declared[LLMExpert], last: Accepted[LLMExpert] | None, resolver: Resolver
) -> _Expert:
    uid = found.meta.uid
    if found.resource is None:
        fault: Reason | None = Reason.INVALID_SPEC
        message = _listed(found.problems)
    else:
        resolution = resolver.resolve(found.resource)
        fault, message = resolution.fault, resolution.message
        if fault is None:
            return _Expert(found, Accepted(uid, found.resource), resolution)
    if last is None or last.uid != uid:
        return _Expert(found, None, Resolution(), fault, message)
    # What it had goes on, looked up anew: pods may have moved, or be gone by now.
    current = last.resource.model_copy(update={"metadata": _object_meta(found.meta)})
    return _Expert(found, Accepted(uid, current), resolver.resolve(current), fault, message)


def _object_meta(meta: Meta) -> ObjectMeta:
    return ObjectMeta.model_construct(
        name=meta.key.name,
        namespace=meta.key.namespace,
        labels=dict(meta.labels),
        generation=meta.generation,
    )


def _expert_status(
    expert: _Expert,
    probes: Mapping[str, Probe],
    previous: Previous,
    now: datetime,
    *,
    in_force: bool,
) -> StatusWrite | None:
    ready = expert.resolution.ready
    probed = {address: probes[address] for address in ready if address in probes}
    reachable = _reachable(ready, probed)
    served = _model_served(expert.found.resource, probed)
    return _status_write(
        Kind.EXPERT,
        expert.found,
        [_expert_ready(expert, reachable, served, in_force=in_force), reachable, served],
        {"endpoints": {"ready": len(ready), "total": expert.resolution.total}},
        previous,
        now,
    )


def _expert_ready(
    expert: _Expert, reachable: Finding, served: Finding, *, in_force: bool
) -> Finding:
    resolution = expert.resolution
    if expert.fault is not None:
        held = "; what was in force before stays" if in_force else ""
        return Finding(Type.READY, FALSE, expert.fault, expert.message + held)
    if not resolution.ready:
        if not resolution.total:
            return Finding(Type.READY, FALSE, Reason.NO_ENDPOINTS, "there are no endpoints")
        text = f"0 of {resolution.total} endpoints are ready"
        return Finding(Type.READY, FALSE, Reason.NO_READY_ENDPOINTS, text)
    for other in (reachable, served):
        if other.status == FALSE:
            return Finding(Type.READY, FALSE, other.reason, other.message)
    text = f"{len(resolution.ready)} of {resolution.total} endpoints are ready"
    if expert.found.ignored:
        text += f"; ignored, as not known here: {_listed(expert.found.ignored)}"
    return Finding(Type.READY, TRUE, Reason.ENDPOINTS_READY, text)


def _reachable(ready: tuple[str, ...], probed: Mapping[str, Probe]) -> Finding:
    if not ready or len(probed) < len(ready):
        text = "not all ready endpoints were asked yet" if ready else "no endpoint is ready"
        return Finding(Type.REACHABLE, UNKNOWN, Reason.NOT_PROBED, text)
    silent = {address: probe.error for address, probe in probed.items() if not probe.answers}
    if not silent:
        text = f"{len(ready)} of {len(ready)} endpoints answer"
        return Finding(Type.REACHABLE, TRUE, Reason.ALL_ANSWER, text)
    count = f"{len(ready) - len(silent)} of {len(ready)} endpoints answer"
    text = f"{count}: {_listed(f'{address} {error}' for address, error in silent.items())}"
    if len(silent) < len(ready):
        return Finding(Type.REACHABLE, TRUE, Reason.SOME_ANSWER, text)
    return Finding(Type.REACHABLE, FALSE, Reason.NONE_ANSWERS, text)


def _model_served(expert: LLMExpert | None, probed: Mapping[str, Probe]) -> Finding:
    answering = {address: probe for address, probe in probed.items() if probe.answers}
    if expert is None or not answering:
        text = "no endpoint has answered"
        return Finding(Type.MODEL_SERVED, UNKNOWN, Reason.NOT_PROBED, text)
    model = expert.spec.model
    for address, probe in answering.items():
        if probe.models is not None and model not in probe.models:
            listed = _listed(probe.models) or "no model"
            text = f"{address} does not serve {model}; it serves {listed}"
            return Finding(Type.MODEL_SERVED, FALSE, Reason.MODEL_NOT_LISTED, text)
    for address, probe in answering.items():
        if probe.models is None:
            text = f"{address}: {probe.error or 'no list of models'}"
            return Finding(Type.MODEL_SERVED, UNKNOWN, Reason.LIST_UNAVAILABLE, text)
    text = f"{model} is listed by /v1/models"
    return Finding(Type.MODEL_SERVED, TRUE, Reason.MODEL_LISTED, text)


# --- policies --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Policy:
    """One policy with what is in force of it."""

    found: Declared[RoutingPolicy]
    verdict: Finding
    """Accepted."""
    accepted: Accepted[RoutingPolicy] | None = None
    snapshot: Snapshot | None = None
    selected: tuple[_Expert, ...] = ()

    @property
    def meta(self) -> Meta:
        return self.found.meta


def _view_policies(
    observed: Observed, previous: Previous, experts: Mapping[Key, _Expert]
) -> list[_Policy]:
    """All policies; of those that answer the same model the oldest gets it, then by name."""
    by_age = sorted(
        (found for found in observed.policies.values() if not found.meta.deleting),
        key=lambda found: (found.meta.created, found.meta.key),
    )
    taken: dict[str, Key] = {}
    views = []
    for found in by_age:
        view = _view_policy(found, previous, experts, taken)
        if view.snapshot is not None:
            taken |= dict.fromkeys(view.snapshot.models, view.meta.key)
        views.append(view)
    return sorted(views, key=lambda view: view.meta.key)


def _view_policy(
    found: Declared[RoutingPolicy],
    previous: Previous,
    experts: Mapping[Key, _Expert],
    taken: Mapping[str, Key],
) -> _Policy:
    key, uid = found.meta.key, found.meta.uid
    last_snapshot = _last_snapshot(key, uid, previous)
    if found.resource is not None:
        accepted: Accepted[RoutingPolicy] | None = Accepted(uid, found.resource)
        verdict = Finding(Type.ACCEPTED, TRUE, Reason.ACCEPTED, _accepted_text(found))
    else:
        last = previous.policies.get(key)
        accepted = last if last is not None and last.uid == uid else None
        reason = Reason.UNKNOWN_ALGORITHM if found.unknown_algorithm else Reason.INVALID_SPEC
        verdict = Finding(Type.ACCEPTED, FALSE, reason, _listed(found.problems))
    if accepted is not None:
        models: Iterable[str] = accepted.resource.spec.models
    else:
        models = () if last_snapshot is None else last_snapshot.models
    conflicts = [f"{model} is answered by {taken[model]}" for model in models if model in taken]
    if conflicts:
        text = f"{_listed(conflicts)}, which is older: use another name in spec.models"
        return _Policy(found, Finding(Type.ACCEPTED, FALSE, Reason.MODEL_NAME_CONFLICT, text))
    if accepted is None:
        return _Policy(found, verdict, None, last_snapshot)
    selected = tuple(one for one in experts.values() if _selects(accepted.resource, one.meta))
    snapshot = _compile(accepted.resource, selected, last_snapshot)
    return _Policy(found, verdict, accepted, snapshot, selected)


def _last_snapshot(key: Key, uid: str, previous: Previous) -> Snapshot | None:
    """What was in force, unless it was another policy's of the same name."""
    stored = previous.stored.get(key)
    if stored is not None and stored.owner_uid not in ("", uid):
        return None
    return previous.snapshots.get(key)


def _accepted_text(found: Declared[RoutingPolicy]) -> str:
    if not found.ignored:
        return "the spec is valid"
    return f"the spec is valid; ignored, as not known here: {_listed(found.ignored)}"


def _selects(policy: RoutingPolicy, expert: Meta) -> bool:
    """As `pointsman_core.snapshot.selects`, for experts that may be invalid."""
    wanted = policy.spec.selector.match_labels.items()
    return policy.metadata.namespace == expert.key.namespace and wanted <= expert.labels.items()


def _compile(
    policy: RoutingPolicy, selected: tuple[_Expert, ...], last: Snapshot | None
) -> Snapshot:
    good = [one for one in selected if one.accepted is not None]
    snapshot = compile_snapshot(
        policy,
        [one.accepted.resource for one in good if one.accepted is not None],
        {one.meta.key.name: one.resolution.ready for one in good},
    )
    frozen = {one.meta.key.name for one in selected if one.frozen}
    kept = [one for one in last.candidates if one.expert in frozen] if last else []
    if kept:
        snapshot = _with_candidates(snapshot, [*snapshot.candidates, *kept])
    unchanged = last is not None and last.version == snapshot.version
    return last if unchanged and last is not None else snapshot


def _with_candidates(snapshot: Snapshot, candidates: Iterable[Candidate]) -> Snapshot:
    ordered = tuple(sorted(candidates, key=lambda one: (one.expert, one.address)))
    draft = snapshot.model_copy(update={"candidates": ordered, "version": NO_VERSION})
    digest = hashlib.sha256(draft.model_dump_json().encode()).hexdigest()
    return draft.model_copy(update={"version": digest[:16]})


def _policy_status(
    policy: _Policy, observed: Observed, previous: Previous, now: datetime
) -> StatusWrite | None:
    refs, model = _resolved_refs(policy), _model_loaded(policy, observed.servers)
    programmed = _programmed(policy, observed.servers)
    ready = _policy_ready(policy, refs, programmed, model)
    performance = observed.performance.get(policy.meta.key, Performance())
    fields: dict[str, Any] = {
        "experts": len(policy.selected),
        "snapshotVersion": None if policy.snapshot is None else policy.snapshot.version,
        "averageQos": performance.average_qos,
        "violationRate": performance.violation_rate,
    }
    findings = [policy.verdict, refs, model, programmed, ready]
    return _status_write(Kind.POLICY, policy.found, findings, fields, previous, now)


def _not_accepted(type_: Type, policy: _Policy) -> Finding | None:
    if policy.verdict.status == TRUE:
        return None
    status = FALSE if type_ is Type.PROGRAMMED else UNKNOWN
    return Finding(
        type_, status, Reason.NOT_ACCEPTED, f"spec not accepted: {policy.verdict.reason}"
    )


def _resolved_refs(policy: _Policy) -> Finding:
    if (refusal := _not_accepted(Type.RESOLVED_REFS, policy)) is not None:
        return refusal
    if not policy.selected:
        resource = policy.found.resource
        labels = {} if resource is None else resource.spec.selector.match_labels
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
        text = f"there is no LLMExpert in namespace {policy.meta.key.namespace}"
        text += f" with {wanted}" if wanted else ""
        return Finding(Type.RESOLVED_REFS, FALSE, Reason.NO_EXPERTS, text)
    faults = [f"{e.meta.key.name} ({e.fault})" for e in policy.selected if e.fault is not None]
    if faults:
        text = f"{len(faults)} of {len(policy.selected)} experts not resolved: {_listed(faults)}"
        return Finding(Type.RESOLVED_REFS, FALSE, Reason.EXPERT_NOT_RESOLVED, text)
    text = f"{len(policy.selected)} experts"
    return Finding(Type.RESOLVED_REFS, TRUE, Reason.ALL_RESOLVED, text)


def _model_loaded(policy: _Policy, servers: Mapping[str, ServerState]) -> Finding:
    if (refusal := _not_accepted(Type.MODEL_LOADED, policy)) is not None:
        return refusal
    algorithm = "" if policy.accepted is None else policy.accepted.resource.spec.algorithm
    if algorithm != Algorithm.HAN_DRL:
        text = f"{algorithm} needs no model"
        return Finding(Type.MODEL_LOADED, TRUE, Reason.NO_MODEL_NEEDED, text)
    counted = {address: server for address, server in sorted(servers.items()) if server.counted}
    said = {
        address: server.models[policy.meta.key]
        for address, server in counted.items()
        if policy.meta.key in server.models
        and server.applied.get(policy.meta.key, (-1, ""))[0] == policy.meta.generation
    }
    for address, (_, error) in said.items():
        if error:
            return Finding(Type.MODEL_LOADED, FALSE, Reason.LOAD_FAILED, f"{address}: {error}")
    count = f"{len(said)}/{len(counted)} policy servers have loaded it"
    if not counted or len(said) < len(counted):
        return Finding(Type.MODEL_LOADED, UNKNOWN, Reason.PENDING, count)
    found = ", ".join(sorted({sha256[:12] for sha256, _ in said.values()}))
    return Finding(Type.MODEL_LOADED, TRUE, Reason.LOADED, f"{count}: {found}")


def _programmed(policy: _Policy, servers: Mapping[str, ServerState]) -> Finding:
    if (refusal := _not_accepted(Type.PROGRAMMED, policy)) is not None:
        return refusal
    counted = {address: server for address, server in servers.items() if server.counted}
    if not counted:
        text = "no policy server is ready"
        return Finding(Type.PROGRAMMED, FALSE, Reason.NO_POLICY_SERVERS, text)
    generation = policy.meta.generation
    behind = {
        address: server
        for address, server in sorted(counted.items())
        if server.error or server.applied.get(policy.meta.key, (-1, ""))[0] != generation
    }
    count = (
        f"{len(counted) - len(behind)}/{len(counted)} policy servers have generation {generation}"
    )
    if not behind:
        return Finding(Type.PROGRAMMED, TRUE, Reason.ACKNOWLEDGED, count)
    for refused, reason in ((True, Reason.REFUSED), (False, Reason.SERVER_UNREACHABLE)):
        for address, server in behind.items():
            if server.error and server.refused is refused:
                text = f"{count}; {address}: {server.error}"
                return Finding(Type.PROGRAMMED, FALSE, reason, text)
    return Finding(Type.PROGRAMMED, UNKNOWN, Reason.PENDING, count)


def _policy_ready(policy: _Policy, refs: Finding, programmed: Finding, model: Finding) -> Finding:
    if policy.verdict.status != TRUE:
        text = policy.verdict.message
        if policy.snapshot is not None:
            text += f"; generation {policy.snapshot.generation} stays in force"
        return Finding(Type.READY, FALSE, policy.verdict.reason, text)
    if refs.reason is Reason.NO_EXPERTS:
        return Finding(Type.READY, FALSE, refs.reason, refs.message)
    candidates = () if policy.snapshot is None else policy.snapshot.candidates
    if not candidates:
        text = f"none of {len(policy.selected)} experts has a ready endpoint"
        return Finding(Type.READY, FALSE, Reason.NO_READY_ENDPOINTS, text)
    if programmed.status != TRUE:
        return Finding(Type.READY, programmed.status, programmed.reason, programmed.message)
    text = f"{len({one.expert for one in candidates})} experts, {len(candidates)} endpoints"
    if refs.status != TRUE:
        return Finding(Type.READY, TRUE, Reason.DEGRADED, f"{text}; {refs.message}")
    if model.status == FALSE:
        return Finding(Type.READY, TRUE, Reason.DEGRADED, f"{text}; {model.message}")
    return Finding(Type.READY, TRUE, Reason.SERVING, text)


# --- statuses --------------------------------------------------------------------------

_STATUS_FIELDS: Final[Mapping[Kind, frozenset[str]]] = {
    kind: frozenset(info.alias or name for name, info in model.model_fields.items())
    for kind, model in ((Kind.EXPERT, LLMExpertStatus), (Kind.POLICY, RoutingPolicyStatus))
}
"""The API server drops what the CRD lacks, and it would look changed for ever."""


def _status_write(
    kind: Kind,
    found: Declared[LLMExpert] | Declared[RoutingPolicy],
    findings: Iterable[Finding],
    fields: Mapping[str, Any],
    previous: Previous,
    now: datetime,
) -> StatusWrite | None:
    meta = found.meta
    ref = Ref(kind, meta.key, meta.uid)
    old = previous.statuses.get(ref, found.status)
    before = conditions_of(old)
    conditions = render_conditions(findings, before=before, generation=meta.generation, now=now)
    status = {
        "observedGeneration": meta.generation,
        "conditions": conditions,
        **{
            name: value
            for name, value in fields.items()
            if value is not None and name in _STATUS_FIELDS[kind]
        },
    }
    if old is not None and dict(old) == status:
        return None
    events = transitions(before, conditions)
    return StatusWrite(ref, meta.resource_version, status, events)


def _next_statuses(
    previous: Previous,
    writes: Iterable[StatusWrite],
    experts: Mapping[Key, _Expert],
    policies: Iterable[_Policy],
) -> dict[Ref, JsonObject]:
    """What was written before and is still there, and what is to be written now."""
    there = {Ref(Kind.EXPERT, e.meta.key, e.meta.uid) for e in experts.values()}
    there |= {Ref(Kind.POLICY, p.meta.key, p.meta.uid) for p in policies}
    kept = {ref: status for ref, status in previous.statuses.items() if ref in there}
    return kept | {write.ref: write.status for write in writes}


def _listed(items: Iterable[object]) -> str:
    """The first few, and how many more there are."""
    texts = [str(item) for item in items]
    shown = ", ".join(texts[:_SHOWN])
    return f"{shown} and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else shown
