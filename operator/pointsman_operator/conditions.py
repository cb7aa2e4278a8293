"""Status conditions: their reasons, and how they change over time. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from pointsman_core.resources import ConditionStatus
from pointsman_operator.observed import JsonObject

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN

MAX_MESSAGE: Final = 1024
"""Characters of a condition's message; an Event takes no more either."""

EXPERT: Final = "LLMExpert"
POLICY: Final = "RoutingPolicy"


class Type(StrEnum):
    """The conditions."""

    READY = "Ready"
    REACHABLE = "Reachable"
    MODEL_SERVED = "ModelServed"
    ACCEPTED = "Accepted"
    RESOLVED_REFS = "ResolvedRefs"
    MODEL_LOADED = "ModelLoaded"
    PROGRAMMED = "Programmed"


class Reason(StrEnum):
    """Why a condition has its status; part of the API, like the conditions' names."""

    INVALID_SPEC = "InvalidSpec"
    NOT_PERMITTED = "NotPermitted"
    # LLMExpert
    ENDPOINTS_READY = "EndpointsReady"
    NO_ENDPOINTS = "NoEndpoints"
    NO_READY_ENDPOINTS = "NoReadyEndpoints"
    SERVICE_NOT_FOUND = "ServiceNotFound"
    SERVICE_NOT_SUPPORTED = "ServiceNotSupported"
    PORT_NOT_FOUND = "PortNotFound"
    POOL_NOT_FOUND = "InferencePoolNotFound"
    POOL_NOT_INSTALLED = "InferencePoolNotInstalled"
    ALL_ANSWER = "AllAnswer"
    SOME_ANSWER = "SomeAnswer"
    NONE_ANSWERS = "NoneAnswers"
    NOT_PROBED = "NotProbed"
    MODEL_LISTED = "ModelListed"
    MODEL_NOT_LISTED = "ModelNotListed"
    LIST_UNAVAILABLE = "ListUnavailable"
    # RoutingPolicy
    ACCEPTED = "Accepted"
    NOT_ACCEPTED = "NotAccepted"
    UNKNOWN_ALGORITHM = "UnknownAlgorithm"
    MODEL_NAME_CONFLICT = "ModelNameConflict"
    ALL_RESOLVED = "AllResolved"
    NO_EXPERTS = "NoExperts"
    EXPERT_NOT_RESOLVED = "ExpertNotResolved"
    NO_MODEL_NEEDED = "NoModelNeeded"
    LOADED = "Loaded"
    LOAD_FAILED = "LoadFailed"
    ACKNOWLEDGED = "Acknowledged"
    PENDING = "Pending"
    REFUSED = "Refused"
    SERVER_UNREACHABLE = "ServerUnreachable"
    NO_POLICY_SERVERS = "NoPolicyServers"
    SERVING = "Serving"
    DEGRADED = "Degraded"
    SNAPSHOT_TOO_LARGE = "SnapshotTooLarge"
    SNAPSHOT_NOT_STORED = "SnapshotNotStored"


@dataclass(frozen=True, slots=True)
class Meaning:
    """One combination that can occur, for the reference."""

    kind: str
    type: Type
    status: ConditionStatus
    reason: Reason
    text: str


def _meanings(
    kind: str, type_: Type, *rows: tuple[ConditionStatus, Reason, str]
) -> tuple[Meaning, ...]:
    return tuple(Meaning(kind, type_, *row) for row in rows)


_UNRESOLVED: Final = (
    (FALSE, Reason.INVALID_SPEC, "the spec is not valid for this version of the operator"),
    (FALSE, Reason.NOT_PERMITTED, "the operator's role does not let it read the backend"),
    (FALSE, Reason.SERVICE_NOT_FOUND, "`backend.service.name` does not exist"),
    (FALSE, Reason.SERVICE_NOT_SUPPORTED, "the Service is an ExternalName: write `addresses`"),
    (FALSE, Reason.PORT_NOT_FOUND, "the Service has no TCP port `backend.service.port`"),
    (FALSE, Reason.POOL_NOT_FOUND, "`backend.inferencePool.name` does not exist"),
    (FALSE, Reason.POOL_NOT_INSTALLED, "the cluster has no InferencePool v1 CRD"),
)

_LEADS_NOWHERE: Final = frozenset(
    {reason for _, reason, _ in _UNRESOLVED} | {Reason.NONE_ANSWERS, Reason.MODEL_NOT_LISTED}
)

_HELD: Final = "not accepted; the last good snapshot, if there is one, stays in force"

MEANINGS: Final = (
    *_meanings(
        EXPERT,
        Type.READY,
        (TRUE, Reason.ENDPOINTS_READY, "at least one endpoint is ready"),
        (FALSE, Reason.NO_ENDPOINTS, "the backend was found but has no endpoints"),
        (FALSE, Reason.NO_READY_ENDPOINTS, "none of the endpoints is ready"),
        (FALSE, Reason.NONE_ANSWERS, "endpoints are ready, but none answers the operator"),
        (FALSE, Reason.MODEL_NOT_LISTED, "all ready endpoints serve other models"),
        *_UNRESOLVED,
    ),
    *_meanings(
        EXPERT,
        Type.REACHABLE,
        (TRUE, Reason.ALL_ANSWER, "every ready endpoint answers `GET /v1/models`"),
        (TRUE, Reason.SOME_ANSWER, "some do"),
        (FALSE, Reason.NONE_ANSWERS, "none does"),
        (UNKNOWN, Reason.NOT_PROBED, "none was asked yet, or none is ready"),
    ),
    *_meanings(
        EXPERT,
        Type.MODEL_SERVED,
        (TRUE, Reason.MODEL_LISTED, "`/v1/models` lists `spec.model`"),
        (FALSE, Reason.MODEL_NOT_LISTED, "it lists others; the message says which"),
        (UNKNOWN, Reason.LIST_UNAVAILABLE, "there is no readable list, such as without API key"),
        (UNKNOWN, Reason.NOT_PROBED, "no endpoint has answered yet"),
    ),
    *_meanings(
        POLICY,
        Type.READY,
        (TRUE, Reason.SERVING, "requests are routed"),
        (
            TRUE,
            Reason.DEGRADED,
            "requests are routed, but not all experts or the model could be had",
        ),
        (
            TRUE,
            Reason.SNAPSHOT_TOO_LARGE,
            "requests are routed, but the snapshot does not fit a ConfigMap",
        ),
        (
            TRUE,
            Reason.SNAPSHOT_NOT_STORED,
            "requests are routed, but the API server refuses the ConfigMap; the message says why",
        ),
        (FALSE, Reason.INVALID_SPEC, _HELD),
        (FALSE, Reason.UNKNOWN_ALGORITHM, _HELD),
        (FALSE, Reason.MODEL_NAME_CONFLICT, _HELD),
        (FALSE, Reason.NO_EXPERTS, "the selector finds no expert"),
        (FALSE, Reason.NO_READY_ENDPOINTS, "no expert has a ready endpoint with its model"),
        (FALSE, Reason.NONE_ANSWERS, "endpoints are ready, but none answers the operator"),
        (UNKNOWN, Reason.PENDING, "it is being sent to the policy servers"),
        (FALSE, Reason.REFUSED, "as in Programmed"),
        (FALSE, Reason.SERVER_UNREACHABLE, "as in Programmed"),
        (FALSE, Reason.NO_POLICY_SERVERS, "as in Programmed"),
    ),
    *_meanings(
        POLICY,
        Type.ACCEPTED,
        (TRUE, Reason.ACCEPTED, "the spec is valid and its model names are free"),
        (FALSE, Reason.INVALID_SPEC, "the spec is not valid for this version of the operator"),
        (FALSE, Reason.UNKNOWN_ALGORITHM, "this version of the operator lacks the algorithm"),
        (FALSE, Reason.MODEL_NAME_CONFLICT, "another policy answers one of the model names"),
    ),
    *_meanings(
        POLICY,
        Type.RESOLVED_REFS,
        (TRUE, Reason.ALL_RESOLVED, "the selector finds experts, and their backends exist"),
        (FALSE, Reason.NO_EXPERTS, "the selector finds no expert"),
        (FALSE, Reason.EXPERT_NOT_RESOLVED, "some experts are invalid or lack their backend"),
        (UNKNOWN, Reason.NOT_ACCEPTED, "the spec was not accepted"),
    ),
    *_meanings(
        POLICY,
        Type.MODEL_LOADED,
        (TRUE, Reason.NO_MODEL_NEEDED, "the algorithm needs no learned model"),
        (TRUE, Reason.LOADED, "every ready policy server decides by the model"),
        (
            FALSE,
            Reason.LOAD_FAILED,
            "a policy server refused it; the one before or fallback goes on",
        ),
        (UNKNOWN, Reason.PENDING, "policy servers have not said yet"),
        (UNKNOWN, Reason.NOT_ACCEPTED, "the spec was not accepted"),
    ),
    *_meanings(
        POLICY,
        Type.PROGRAMMED,
        (TRUE, Reason.ACKNOWLEDGED, "every ready policy server has this generation in force"),
        (UNKNOWN, Reason.PENDING, "it is being sent"),
        (FALSE, Reason.REFUSED, "a policy server refused it; the message says why"),
        (FALSE, Reason.SERVER_UNREACHABLE, "a policy server does not answer"),
        (FALSE, Reason.NO_POLICY_SERVERS, "no policy server is ready"),
        (FALSE, Reason.NOT_ACCEPTED, "the spec was not accepted"),
    ),
)
"""All that can be seen in ``kubectl describe``."""


def reference() -> str:
    """`MEANINGS` as Markdown."""
    lines = ["| kind | condition | status | reason | meaning |", "|---|---|---|---|---|"]
    lines += [f"| {m.kind} | {m.type} | {m.status} | `{m.reason}` | {m.text} |" for m in MEANINGS]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Finding:
    """One condition as found now, without history."""

    type: Type
    status: ConditionStatus
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Transition:
    """A condition that changed in a way that deserves an Event."""

    warning: bool
    reason: str
    message: str


def timestamp(moment: datetime) -> str:
    """As Kubernetes writes times: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def conditions_of(status: JsonObject | None) -> dict[str, JsonObject]:
    """The readable conditions of a status, by type."""
    listed = (status or {}).get("conditions")
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return {}
    return {
        str(one["type"]): one
        for one in listed
        if isinstance(one, Mapping) and "type" in one and "status" in one
    }


def render_conditions(
    findings: Iterable[Finding],
    *,
    before: Mapping[str, JsonObject],
    generation: int,
    now: datetime,
) -> list[dict[str, Any]]:
    """Conditions as the API spells them; the time moves only when the status does."""
    return [_render(one, before.get(one.type), generation, now) for one in findings]


def _render(
    finding: Finding, old: JsonObject | None, generation: int, now: datetime
) -> dict[str, Any]:
    since = timestamp(now)
    if old is not None and old["status"] == finding.status:
        since = str(old.get("lastTransitionTime") or since)
    return {
        "type": str(finding.type),
        "status": str(finding.status),
        "observedGeneration": generation,
        "lastTransitionTime": since,
        "reason": str(finding.reason),
        "message": shorten(finding.message),
    }


def shorten(text: str) -> str:
    """At most `MAX_MESSAGE` characters."""
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


def last_known(
    known: Mapping[str, JsonObject], conditions: Mapping[str, JsonObject]
) -> dict[str, JsonObject]:
    """Conditions by type; those that are Unknown as they were before, if that is known."""
    return {
        type_: known.get(type_, one) if one["status"] == UNKNOWN else one
        for type_, one in conditions.items()
    }


_ALARMING: Final = frozenset(
    {Reason.SNAPSHOT_TOO_LARGE, Reason.SNAPSHOT_NOT_STORED, Reason.DEGRADED}
)
"""Worth a warning though the condition stays true, and its end worth an Event."""


def transitions(
    before: Mapping[str, JsonObject], after: Iterable[JsonObject]
) -> tuple[Transition, ...]:
    """What to tell as Events; ``before`` is as of `last_known`.

    A change to Unknown is no news, and at first sight only refusals, readiness and
    references that lead nowhere are.
    `Ready` is silent where another condition says the same.
    """
    found: dict[tuple[str, str], Transition] = {}
    for condition in sorted(after, key=lambda one: one["type"] == Type.READY):
        kind, status = condition["type"], condition["status"]
        old = before.get(kind)
        alarming = condition["reason"] in _ALARMING
        known = old is not None and old["status"] == status
        if old is not None and (alarming or old.get("reason") in _ALARMING):
            known = known and old.get("reason") == condition["reason"]
        if status == UNKNOWN or known:
            continue
        if old is None and not _news_at_first_sight(condition):
            continue
        message = f"{kind}: {condition['message']}"
        event = Transition(status == FALSE or alarming, condition["reason"], shorten(message))
        found.setdefault((status, condition["reason"]), event)
    return tuple(found.values())


def _news_at_first_sight(condition: JsonObject) -> bool:
    kind, status = condition["type"], condition["status"]
    if kind == Type.READY:
        # An expert that only starts is no news, one that leads nowhere is.
        return status == TRUE or condition["reason"] in _LEADS_NOWHERE
    return status == FALSE and kind in (Type.ACCEPTED, Type.RESOLVED_REFS)
