"""From what is observed to what should be: the one place that decides. Pure.

`reconcile` is level-based: it looks at everything and says what should be in force and in
every status. What it needs of the past is in `Previous`: the last good state of what is
broken now, and what was written already, so that nothing is written twice.
"""

import hashlib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from pointsman_common.wording import counted, listed, share
from pointsman_core.resources import (
    Algorithm,
    ConditionStatus,
    LLMExpert,
    LLMExpertStatus,
    ObjectMeta,
    RoutingPolicy,
    RoutingPolicyStatus,
)
from pointsman_core.snapshot import (
    NO_VERSION,
    Candidate,
    Snapshot,
    canonical_address,
    compile_snapshot,
    snapshot_json,
)
from pointsman_operator.conditions import (
    FALSE,
    TRUE,
    UNKNOWN,
    Finding,
    Reason,
    Transition,
    Type,
    conditions_of,
    last_known,
    render_conditions,
    transitions,
)
from pointsman_operator.endpoints import Resolution, Resolver
from pointsman_operator.fitness import Unfit, model_served, reachable, unfit
from pointsman_operator.names import Claim, Names, settle
from pointsman_operator.observed import (
    CONFIG_MAP_PREFIX,
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

MAX_STORED_BYTES: Final = 1024 * 1024
"""What the API server lets a ConfigMap hold."""

_R = TypeVar("_R", LLMExpert, RoutingPolicy)
_T = TypeVar("_T")


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
    unfit: Mapping[Key, Unfit] = field(default_factory=dict)
    """Endpoints that serve other models, by expert; none is known after a start."""
    statuses: Mapping[Ref, JsonObject] = field(default_factory=dict)
    """As last written; where there is none the observed one counts."""
    known: Mapping[Ref, Mapping[str, JsonObject]] = field(default_factory=dict)
    """Conditions as they were when last known, by type, of the statuses written."""
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
    status: JsonObject
    events: tuple[Transition, ...] = ()
    known: Mapping[str, JsonObject] = field(default_factory=dict)
    """Its conditions, as in `Previous.known`."""


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
    experts = _view_experts(observed, previous)
    policies = _view_policies(observed, previous, experts)
    unseen = _unseen(observed, previous)
    snapshots = unseen | {p.meta.key: p.snapshot for p in policies if p.snapshot is not None}
    config_maps = tuple(
        SnapshotWrite(p.meta.key, p.meta.uid, p.snapshot)
        for p in policies
        if p.snapshot is not None
        and p.storable
        and previous.stored.get(p.meta.key) != StoredSnapshot(p.snapshot.version, p.meta.uid)
    )
    served = {Key(s.namespace, c.expert) for s in snapshots.values() for c in s.candidates}
    statuses = tuple(
        write
        for write in (
            *(
                _expert_status(one, previous, now, in_force=key in served)
                for key, one in experts.items()
            ),
            *(_policy_status(one, observed, previous, now) for one in policies),
        )
        if write is not None
    )
    there = {Ref(Kind.EXPERT, e.meta.key, e.meta.uid) for e in experts.values()}
    there |= {Ref(Kind.POLICY, p.meta.key, p.meta.uid) for p in policies}
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
            unfit={
                key: Unfit(one.meta.uid, one.meta.generation, one.unfit)
                for key, one in experts.items()
            },
            statuses=_kept(previous.statuses, there) | {one.ref: one.status for one in statuses},
            known=_kept(previous.known, there) | {one.ref: one.known for one in statuses},
            stored={key: one for key, one in previous.stored.items() if key in unseen}
            | {
                key: StoredSnapshot(p.snapshot.version, p.meta.uid)
                if p.storable
                else previous.stored[key]
                for p in policies
                if p.snapshot is not None and ((key := p.meta.key) in previous.stored or p.storable)
            },
        ),
    )


def _unseen(observed: Observed, previous: Previous) -> dict[Key, Snapshot]:
    """In force of policies that cannot be looked at: nobody knows that they are gone."""
    return {
        key: snapshot
        for key, snapshot in previous.snapshots.items()
        if key not in observed.policies and not observed.may_read(Kind.POLICY, key.namespace)
    }


# --- experts ---------------------------------------------------------------------------


_UNASKED: Final = Finding(Type.REACHABLE, UNKNOWN, Reason.NOT_PROBED, "")


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
    reachable: Finding = _UNASKED
    served: Finding = _UNASKED
    unfit: frozenset[str] = frozenset()
    """Ready endpoints that serve other models."""

    @property
    def meta(self) -> Meta:
        return self.found.meta

    @property
    def usable(self) -> tuple[str, ...]:
        """Endpoints that get requests."""
        return tuple(one for one in self.resolution.ready if one not in self.unfit)

    @property
    def obstacle(self) -> Reason | None:
        """Why it is not ready."""
        if self.fault is not None:
            return self.fault
        if not self.resolution.ready:
            return Reason.NO_READY_ENDPOINTS if self.resolution.total else Reason.NO_ENDPOINTS
        if self.reachable.status == FALSE:
            return self.reachable.reason
        return None if self.usable else self.served.reason

    @property
    def frozen(self) -> bool:
        """Nothing good is known but its candidates in the snapshot before."""
        return self.fault is not None and self.accepted is None


def _view_experts(observed: Observed, previous: Previous) -> dict[Key, _Expert]:
    resolver = Resolver(observed)
    in_force = frozenset(
        (Key(snapshot.namespace, one.expert), one.address)
        for snapshot in previous.snapshots.values()
        for one in snapshot.candidates
    )
    return {
        key: _judge(
            _view_expert(found, previous.experts.get(key), resolver),
            observed.probes,
            previous,
            in_force,
        )
        for key, found in sorted(observed.experts.items())
        if not found.meta.deleting
    }


def _view_expert(
    found: Declared[LLMExpert], last: Accepted[LLMExpert] | None, resolver: Resolver
) -> _Expert:
    uid = found.meta.uid
    if found.resource is None:
        fault: Reason | None = Reason.INVALID_SPEC
        message = listed(found.problems)
    else:
        resolution = resolver.resolve(found.resource)
        fault, message = resolution.fault, resolution.message
        if fault is None:
            return _Expert(found, Accepted(uid, found.resource), resolution)
    unknown = _Expert(found, None, Resolution(), fault, message)
    if last is None or last.uid != uid:
        return unknown
    # What it had goes on, looked up anew: pods may have moved, or be gone by now.
    current = last.resource.model_copy(update={"metadata": _object_meta(found.meta)})
    resolution = resolver.resolve(current)
    if resolution.fault is Reason.NOT_PERMITTED:
        return unknown  # what may not be looked up is not gone: its part of the snapshot stays
    return _Expert(found, Accepted(uid, current), resolution, fault, message)


def _object_meta(meta: Meta) -> ObjectMeta:
    return ObjectMeta.model_construct(
        name=meta.key.name,
        namespace=meta.key.namespace,
        labels=dict(meta.labels),
        generation=meta.generation,
    )


def _judge(
    expert: _Expert,
    probes: Mapping[str, Probe],
    previous: Previous,
    in_force: frozenset[tuple[Key, str]],
) -> _Expert:
    """What probes say of it."""
    ready, found = expert.resolution.ready, expert.found
    resource = None if expert.accepted is None else expert.accepted.resource
    probed = {address: probes[address] for address in ready if address in probes}
    answers, served = reachable(ready, probed), model_served(resource, probed)
    if len(probed) < len(ready):
        # Not all were asked since the start, or since one was added: no reason to forget.
        answers = _as_before(answers, found, previous)
        served = _as_before(served, found, previous)
    if resource is None:
        return replace(expert, reachable=answers, served=served)
    out = unfit(resource, ready, probed, _unfit_before(expert, previous, in_force))
    if out and served.status != FALSE:  # they are silent now, or were not asked yet
        text = f"{listed(sorted(out))} did not serve {resource.spec.model} when last asked"
        told = Finding(Type.MODEL_SERVED, FALSE, Reason.MODEL_NOT_LISTED, text)
        before = _before(Type.MODEL_SERVED, found, previous)
        served = before if before is not None and before.status == FALSE else told
    return replace(expert, reachable=answers, served=served, unfit=out)


def _unfit_before(
    expert: _Expert, previous: Previous, in_force: frozenset[tuple[Key, str]]
) -> frozenset[str]:
    """Endpoints that served other models when they last answered."""
    meta = expert.meta
    known = previous.unfit.get(meta.key)
    if known is not None:
        same = (known.uid, known.generation) == (meta.uid, meta.generation)
        return known.addresses if same else frozenset()
    before = _before(Type.MODEL_SERVED, expert.found, previous)
    if before is None or before.status != FALSE:
        return frozenset()
    # After a start: the status says that there are some, the snapshots which are none.
    return frozenset(
        address
        for address in expert.resolution.ready
        if (meta.key, canonical_address(address)) not in in_force
    )


def _expert_status(
    expert: _Expert, previous: Previous, now: datetime, *, in_force: bool
) -> StatusWrite | None:
    findings = [_expert_ready(expert, in_force=in_force), expert.reachable, expert.served]
    count = {"ready": len(expert.usable), "total": expert.resolution.total}
    fields = {"endpoints": count}
    return _status_write(Kind.EXPERT, expert.found, findings, fields, previous, now)


def _as_before(finding: Finding, found: Declared[LLMExpert], previous: Previous) -> Finding:
    """What was found of the same generation, if nothing is known now."""
    if finding.status != UNKNOWN:
        return finding
    return _before(finding.type, found, previous) or finding


def _before(type_: Type, found: Declared[LLMExpert], previous: Previous) -> Finding | None:
    """What the status says of the same generation."""
    ref = Ref(Kind.EXPERT, found.meta.key, found.meta.uid)
    old = conditions_of(previous.statuses.get(ref, found.status)).get(type_)
    if old is None or old.get("observedGeneration") != found.meta.generation:
        return None
    try:
        status, reason = ConditionStatus(old["status"]), Reason(old.get("reason", ""))
    except ValueError:
        return None  # of another version of the operator
    return Finding(type_, status, reason, str(old.get("message", "")))


def _expert_ready(expert: _Expert, *, in_force: bool) -> Finding:
    resolution, obstacle = expert.resolution, expert.obstacle
    count = f"{share(len(expert.usable), resolution.total, 'endpoint')} ready"
    if obstacle is None:
        if expert.served.status == FALSE:
            count += f"; {expert.served.message}"
        if expert.found.ignored:
            count += f"; ignored, as not known here: {listed(expert.found.ignored)}"
        return Finding(Type.READY, TRUE, Reason.ENDPOINTS_READY, count)
    text = {
        Reason.NO_ENDPOINTS: resolution.message,
        Reason.NO_READY_ENDPOINTS: count,
        Reason.NONE_ANSWERS: expert.reachable.message,
        Reason.MODEL_NOT_LISTED: expert.served.message,
    }.get(obstacle, expert.message)
    if expert.fault is not None and in_force:
        text += "; what was in force before stays"
    return Finding(Type.READY, FALSE, obstacle, text)


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
    storable: bool = True
    """A ConfigMap can hold the snapshot."""

    @property
    def meta(self) -> Meta:
        return self.found.meta


def stored_bytes(snapshot: Snapshot) -> int:
    """Size of a snapshot in a ConfigMap."""
    return len(snapshot_json(snapshot).encode())


def _storable(snapshot: Snapshot) -> bool:
    return stored_bytes(snapshot) <= MAX_STORED_BYTES


def _view_policies(
    observed: Observed, previous: Previous, experts: Mapping[Key, _Expert]
) -> list[_Policy]:
    """All policies, by namespace and name."""
    in_force = {
        key: snapshot
        for key, found in observed.policies.items()
        if not found.meta.deleting and (snapshot := _last_snapshot(found, previous)) is not None
    }
    by_age = sorted(
        (found for found in observed.policies.values() if not found.meta.deleting),
        key=lambda found: (not _was_accepted(found, previous), found.meta.created, found.meta.key),
    )
    claims = [_claim(found, in_force.get(found.meta.key)) for found in by_age]
    held = _unseen(observed, previous).items()
    claims += [Claim(key, in_force=one.models, wanted=None) for key, one in held]
    names = settle(claims)
    return [
        _view_policy(found, names, previous.policies.get(key), in_force.get(key), experts)
        if observed.may_read(Kind.EXPERT, key.namespace)
        # What its experts are by now is not known.
        else _Policy(found, _verdict(found, names), None, in_force.get(key))
        for key, found in sorted(((one.meta.key, one) for one in by_age), key=lambda one: one[0])
    ]


def _claim(found: Declared[RoutingPolicy], in_force: Snapshot | None) -> Claim:
    return Claim(
        found.meta.key,
        in_force=() if in_force is None else in_force.models,
        wanted=None if found.resource is None else tuple(found.resource.spec.models),
    )


def _view_policy(
    found: Declared[RoutingPolicy],
    names: Names,
    last: Accepted[RoutingPolicy] | None,
    in_force: Snapshot | None,
    experts: Mapping[Key, _Expert],
) -> _Policy:
    key, verdict = found.meta.key, _verdict(found, names)
    if found.resource is not None and key in names.granted:
        last = Accepted(found.meta.uid, found.resource)
    elif key not in names.kept:
        return _Policy(found, verdict)
    if last is None:
        # All that is known since a restart, and so it came from a ConfigMap.
        return _Policy(found, verdict, None, in_force)
    selected = tuple(one for one in experts.values() if _selects(last.resource, one.meta))
    snapshot = _compile(last.resource, selected, in_force)
    return _Policy(found, verdict, last, snapshot, selected, _storable(snapshot))


def _verdict(found: Declared[RoutingPolicy], names: Names) -> Finding:
    if found.resource is None:
        reason = Reason.UNKNOWN_ALGORITHM if found.unknown_algorithm else Reason.INVALID_SPEC
        return Finding(Type.ACCEPTED, FALSE, reason, listed(found.problems))
    if found.meta.key in names.granted:
        return Finding(Type.ACCEPTED, TRUE, Reason.ACCEPTED, _accepted_text(found))
    conflicts = [
        f"{name} is answered by {owner}"
        for name in found.resource.spec.models
        if (owner := names.owners.get(name, found.meta.key)) != found.meta.key
    ]
    text = f"{listed(conflicts)}: use another name in spec.models"
    return Finding(Type.ACCEPTED, FALSE, Reason.MODEL_NAME_CONFLICT, text)


def _last_snapshot(found: Declared[RoutingPolicy], previous: Previous) -> Snapshot | None:
    """What was in force, unless it was another policy's of the same name."""
    key, uid = found.meta.key, found.meta.uid
    if (known := previous.policies.get(key)) is not None:
        return previous.snapshots.get(key) if known.uid == uid else None
    stored = previous.stored.get(key)
    if stored is not None and stored.owner_uid not in ("", uid):
        return None
    return previous.snapshots.get(key)


def _was_accepted(found: Declared[RoutingPolicy], previous: Previous) -> bool:
    """As its status says: where a ConfigMap was lost nothing else tells who came first."""
    ref = Ref(Kind.POLICY, found.meta.key, found.meta.uid)
    before = conditions_of(previous.statuses.get(ref, found.status))
    return before.get(Type.ACCEPTED, {}).get("status") == TRUE


def _accepted_text(found: Declared[RoutingPolicy]) -> str:
    if not found.ignored:
        return "the spec is valid"
    return f"the spec is valid; ignored, as not known here: {listed(found.ignored)}"


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
        {one.meta.key.name: one.usable for one in good},
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
    having = _having(policy, observed.servers, previous)
    refs, model = _resolved_refs(policy), _model_loaded(policy, observed.servers, having)
    programmed = _programmed(policy, observed, having)
    ready = _policy_ready(
        policy, refs, programmed, model, refusal=observed.unstored.get(policy.meta.key, "")
    )
    # Without a snapshot they are those of a predecessor of the same name.
    known = {} if policy.snapshot is None else observed.performance
    performance = known.get(policy.meta.key, Performance())
    fields: dict[str, Any] = {
        "experts": _selected_experts(policy, previous),
        "snapshotVersion": None if policy.snapshot is None else policy.snapshot.version,
        "averageQos": performance.average_qos,
        "violationRate": performance.violation_rate,
    }
    findings = [ready, policy.verdict, refs, model, programmed]
    return _status_write(Kind.POLICY, policy.found, findings, fields, previous, now)


def _selected_experts(policy: _Policy, previous: Previous) -> Any:  # noqa: ANN401 - as it was read
    if policy.accepted is not None or policy.snapshot is None:
        return len(policy.selected)
    ref = Ref(Kind.POLICY, policy.meta.key, policy.meta.uid)
    before = previous.statuses.get(ref, policy.found.status)
    return (before or {}).get("experts")  # the selector in force is not known any more


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
        count = f"{len(faults)} of {counted(len(policy.selected), 'expert')}"
        text = f"{count} not resolved: {listed(faults)}"
        return Finding(Type.RESOLVED_REFS, FALSE, Reason.EXPERT_NOT_RESOLVED, text)
    text = counted(len(policy.selected), "expert")
    return Finding(Type.RESOLVED_REFS, TRUE, Reason.ALL_RESOLVED, text)


def _having(
    policy: _Policy, servers: Mapping[str, ServerState], previous: Previous
) -> AbstractSet[str]:
    """Servers that have the policy's generation in force.

    Before all of them had it once, only the very version counts: a predecessor of the same
    name has had the same generations.
    """
    generation, snapshot = policy.meta.generation, policy.snapshot
    ref = Ref(Kind.POLICY, policy.meta.key, policy.meta.uid)
    before = conditions_of(previous.statuses.get(ref, policy.found.status)).get(Type.PROGRAMMED, {})
    had = (before.get("status"), before.get("observedGeneration")) == (TRUE, generation)
    in_force = {address: one.applied.get(policy.meta.key) for address, one in servers.items()}
    return {
        address
        for address, applied in in_force.items()
        if applied is not None
        and applied[0] == generation
        and (had or snapshot is None or applied[1] == snapshot.version)
    }


def _model_loaded(
    policy: _Policy, servers: Mapping[str, ServerState], having: AbstractSet[str]
) -> Finding:
    if (refusal := _not_accepted(Type.MODEL_LOADED, policy)) is not None:
        return refusal
    algorithm = "" if policy.accepted is None else policy.accepted.resource.spec.algorithm
    if algorithm != Algorithm.HAN_DRL:
        text = f"{algorithm} needs no model"
        return Finding(Type.MODEL_LOADED, TRUE, Reason.NO_MODEL_NEEDED, text)
    ready = {address: server for address, server in sorted(servers.items()) if server.counted}
    said = {
        address: server.models[policy.meta.key]
        for address, server in ready.items()
        if policy.meta.key in server.models and address in having
    }
    for address, (_, error) in said.items():
        if error:
            return Finding(Type.MODEL_LOADED, FALSE, Reason.LOAD_FAILED, f"{address}: {error}")
    verb = "has" if 1 in (len(said), len(ready)) else "have"
    count = f"{len(said)}/{counted(len(ready), 'policy server')} {verb} loaded it"
    if not ready or len(said) < len(ready):
        return Finding(Type.MODEL_LOADED, UNKNOWN, Reason.PENDING, count)
    found = ", ".join(sorted({sha256[:12] for sha256, _ in said.values()}))
    return Finding(Type.MODEL_LOADED, TRUE, Reason.LOADED, f"{count}: {found}")


def _programmed(policy: _Policy, observed: Observed, having: AbstractSet[str]) -> Finding:
    if (refusal := _not_accepted(Type.PROGRAMMED, policy)) is not None:
        return refusal
    ready = {address: server for address, server in observed.servers.items() if server.counted}
    if not ready:
        text = ": ".join(filter(None, ("no policy server is ready", observed.serverless)))
        return Finding(Type.PROGRAMMED, FALSE, Reason.NO_POLICY_SERVERS, text)
    generation = policy.meta.generation
    behind = {
        address: server
        for address, server in sorted(ready.items())
        if server.error or address not in having
    }
    acknowledged = len(ready) - len(behind)
    verb = "has" if 1 in (acknowledged, len(ready)) else "have"
    count = f"{acknowledged}/{counted(len(ready), 'policy server')} {verb} generation {generation}"
    if not behind:
        return Finding(Type.PROGRAMMED, TRUE, Reason.ACKNOWLEDGED, count)
    for refused, reason in ((True, Reason.REFUSED), (False, Reason.SERVER_UNREACHABLE)):
        for address, server in behind.items():
            if server.error and server.refused is refused:
                text = f"{count}; {address}: {server.error}"
                return Finding(Type.PROGRAMMED, FALSE, reason, text)
    return Finding(Type.PROGRAMMED, UNKNOWN, Reason.PENDING, count)


def _policy_ready(
    policy: _Policy, refs: Finding, programmed: Finding, model: Finding, *, refusal: str
) -> Finding:
    ready = _serving(policy, refs, programmed, model)
    if (missing := _not_stored(policy, refusal)) is None:
        return ready
    # Told in any case; whoever cannot be reached now matters more.
    reason, text = missing
    reason = reason if ready.status == TRUE else ready.reason
    return replace(ready, reason=reason, message=f"{ready.message}; {text}")


def _serving(policy: _Policy, refs: Finding, programmed: Finding, model: Finding) -> Finding:
    if policy.verdict.status != TRUE:
        text = f"{policy.verdict.message}; {_what_stays(policy)}"
        return Finding(Type.READY, FALSE, policy.verdict.reason, text)
    if refs.reason is Reason.NO_EXPERTS:
        return Finding(Type.READY, FALSE, refs.reason, refs.message)
    candidates = () if policy.snapshot is None else policy.snapshot.candidates
    obstacles = [f"{one.meta.key.name} ({one.obstacle})" for one in policy.selected if one.obstacle]
    not_ready = f"{share(len(obstacles), len(policy.selected), 'expert')} not ready"
    not_ready += f": {listed(obstacles)}"
    if not candidates:
        return Finding(Type.READY, FALSE, Reason.NO_READY_ENDPOINTS, not_ready)
    routed = {one.expert for one in candidates}
    silent = {one.meta.key.name for one in policy.selected if one.reachable.status == FALSE}
    if routed <= silent:
        return Finding(Type.READY, FALSE, Reason.NONE_ANSWERS, not_ready)
    if programmed.status != TRUE:
        return Finding(Type.READY, programmed.status, programmed.reason, programmed.message)
    shortcomings = [not_ready] if obstacles else []
    if model.status == FALSE:
        shortcomings.append(model.message)
    text = f"{counted(len(candidates), 'endpoint')} of {counted(len(routed), 'expert')} routed"
    text = "; ".join([text, *shortcomings])
    reason = Reason.DEGRADED if shortcomings else Reason.SERVING
    return Finding(Type.READY, TRUE, reason, text)


def _not_stored(policy: _Policy, refusal: str) -> tuple[Reason, str] | None:
    """Why the snapshot in force is in no ConfigMap; ``refusal`` is the API server's word."""
    if not policy.storable:
        text = f"the snapshot, over {MAX_STORED_BYTES} bytes, is too large for its ConfigMap"
        return Reason.SNAPSHOT_TOO_LARGE, f"{text}: {_LACKS_IT}"
    if not refusal:
        return None
    name = CONFIG_MAP_PREFIX + policy.meta.key.name
    text = f"the snapshot is not in ConfigMap {name}: {_LACKS_IT}; {refusal}"
    return Reason.SNAPSHOT_NOT_STORED, text


_LACKS_IT: Final = "a policy server that starts while the operator is away lacks it"


def _what_stays(policy: _Policy) -> str:
    if policy.snapshot is None:
        return "nothing of it is in force"
    models = listed(policy.snapshot.models)
    return f"generation {policy.snapshot.generation} stays in force, for {models}"


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
    if old is not None and _comparable(old, conditions) == _comparable(status, conditions):
        return None
    known = last_known(previous.known.get(ref, {}), before)
    events = transitions(known, conditions)
    return StatusWrite(ref, status, events, last_known(known, conditions_of(status)))


def _comparable(status: JsonObject, ours: Iterable[JsonObject]) -> dict[str, Any]:
    """Without conditions that somebody else has added, and without order: both stay as they are."""
    types = {one["type"] for one in ours}
    found = {name: one for name, one in conditions_of(status).items() if name in types}
    return {**status, "conditions": found}


def _kept(before: Mapping[Ref, _T], there: AbstractSet[Ref]) -> dict[Ref, _T]:
    """Of objects that are still there."""
    return {ref: one for ref, one in before.items() if ref in there}
