"""What is in force and what every status says, for one state of the cluster after another."""

from datetime import UTC, datetime, timedelta

import pytest

from pointsman_core.resources import LLMExpertStatus, RoutingPolicyStatus
from pointsman_core.snapshot import read_snapshot
from pointsman_operator import reconcile as module
from pointsman_operator.conditions import MEANINGS
from pointsman_operator.observed import Key, Performance, Probe, ServerState
from pointsman_operator.reconcile import Previous, Ref, StoredSnapshot

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
AUTO, CODER = Key("default", "auto"), Key("default", "coder")


def later(api, observed, previous=None):
    return api.reconcile(observed, previous, LATER)


# --- snapshots -------------------------------------------------------------------------


def test_a_policy_and_its_experts_become_a_snapshot(api):
    outcome = api.reconcile(api.observe(api.policy(meta={"generation": 4}), api.expert()))
    (snapshot,) = outcome.snapshots
    assert (snapshot.namespace, snapshot.policy, snapshot.generation) == ("default", "auto", 4)
    assert [c.model for c in snapshot.candidates] == ["coder-model"]
    assert read_snapshot(snapshot.model_dump_json()) == snapshot
    assert outcome.addresses == {"10.0.0.1:8000"}


def test_a_second_look_writes_nothing(api):
    seen = api.observe(api.policy(), api.expert())
    first = api.reconcile(seen)
    assert first.statuses
    assert first.config_maps
    second = later(api, seen, first.next)
    assert second.snapshots == first.snapshots
    assert not second.statuses
    assert not second.config_maps
    assert not second.stale_config_maps


def test_the_status_in_the_api_counts_after_a_restart(api):
    written = {
        one.ref.key.name: dict(one.status)
        for one in api.reconcile(api.observe(api.policy(), api.expert())).statuses
    }
    seen = api.observe(api.policy(status=written["auto"]), api.expert(status=written["coder"]))
    assert not later(api, seen).statuses


def test_experts_of_other_namespaces_and_labels_are_left_out(api):
    outcome = api.reconcile(
        api.observe(
            api.policy(selector={"matchLabels": {"site": "x"}}),
            api.expert("here", meta={"labels": {"site": "x"}}),
            api.expert("unlabelled", addresses=["10.0.0.2:1"]),
            api.expert(
                "elsewhere",
                meta={"labels": {"site": "x"}, "namespace": "other"},
                addresses=["10.0.0.3:1"],
            ),
        )
    )
    assert api.addresses(outcome) == ["10.0.0.1:8000"]


def test_what_is_being_deleted_is_gone(api):
    deleted = {"deletionTimestamp": "2026-01-02T00:00:00Z"}
    outcome = api.reconcile(api.observe(api.policy(), api.expert(meta=deleted)))
    assert api.addresses(outcome) == []
    assert [one.ref.key for one in outcome.statuses] == [AUTO]
    outcome = api.reconcile(api.observe(api.policy(meta=deleted), api.expert()))
    assert outcome.snapshots == ()
    assert [one.ref.key for one in outcome.statuses] == [CODER]


# --- bad objects -----------------------------------------------------------------------


def test_a_malformed_object_stops_no_other(api):
    outcome = api.reconcile(
        api.observe(
            api.policy(),
            api.policy("broken", models="no list"),
            api.expert(),
            api.expert("torn", spec={"backend": None}),
            api.expert("empty", spec={"profile": {"peakTflops": -1}}),
        )
    )
    assert api.addresses(outcome) == ["10.0.0.1:8000"]
    assert api.conditions(outcome, "torn")["Ready"] == ("False", "InvalidSpec")
    assert api.conditions(outcome, "broken")["Accepted"] == ("False", "InvalidSpec")
    assert "spec.profile.peakTflops" in api.message(outcome, "empty", "Ready")
    assert api.conditions(outcome, "auto")["ResolvedRefs"] == ("False", "ExpertNotResolved")


def test_fields_of_a_newer_crd_are_passed_over_and_told(api):
    outcome = api.reconcile(
        api.observe(
            api.policy(qos={"latencyPerTokenMs": 50, "percentile": 99}),
            api.expert(spec={"speculative": True}),
        )
    )
    assert outcome.snapshots[0].qos.latency_per_token_ms == 50
    assert api.addresses(outcome) == ["10.0.0.1:8000"]
    assert "spec.qos.percentile" in api.message(outcome, "auto", "Accepted")
    assert "spec.speculative" in api.message(outcome, "coder", "Ready")


def test_the_last_good_policy_stays_in_force_with_live_endpoints(api):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    broken = api.policy(meta={"generation": 2}, models=[])
    second = api.reconcile(api.observe(broken, api.expert(addresses=["10.0.0.9:8000"])), first.next)
    assert api.addresses(second) == ["10.0.0.9:8000"]
    assert second.snapshots[0].generation == 1
    assert api.conditions(second, "auto") == {
        "Accepted": ("False", "InvalidSpec"),
        "ResolvedRefs": ("Unknown", "NotAccepted"),
        "ModelLoaded": ("Unknown", "NotAccepted"),
        "Programmed": ("False", "NotAccepted"),
        "Ready": ("False", "InvalidSpec"),
    }
    assert "generation 1 stays in force" in api.message(second, "auto", "Ready")


def test_after_a_restart_the_snapshot_of_a_broken_policy_stays_as_it_is(api):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    restarted = Previous(snapshots=first.next.snapshots, stored=first.next.stored)
    second = api.reconcile(
        api.observe(
            api.policy(meta={"generation": 2}, models=[]), api.expert(addresses=["10.0.0.9:1"])
        ),
        restarted,
    )
    assert second.snapshots == first.snapshots
    assert not second.config_maps


def test_a_new_policy_does_not_inherit_from_another_of_its_name(api):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    successor = api.policy(meta={"uid": "another"}, models=[])
    assert api.reconcile(api.observe(successor), first.next).snapshots == ()


def test_an_unknown_algorithm_is_named(api):
    outcome = api.reconcile(api.observe(api.policy(algorithm="HanDrl2"), api.expert()))
    assert api.conditions(outcome, "auto")["Accepted"] == ("False", "UnknownAlgorithm")
    assert "spec.algorithm" in api.message(outcome, "auto", "Accepted")
    assert outcome.snapshots == ()


# --- references ------------------------------------------------------------------------

UNRESOLVED = {
    "no service": ({"service": {"name": "gone", "port": 80}}, "ServiceNotFound"),
    "no port": ({"service": {"name": "engine", "port": 81}}, "PortNotFound"),
    "external name": ({"service": {"name": "external", "port": 80}}, "ServiceNotSupported"),
    "no pool": ({"inferencePool": {"name": "gone"}}, "InferencePoolNotFound"),
}


@pytest.mark.parametrize(("backend", "reason"), UNRESOLVED.values(), ids=UNRESOLVED)
def test_a_reference_that_leads_nowhere(api, backend, reason):
    objects = (api.service(), api.service("external", type="ExternalName"), api.policy())
    outcome = api.reconcile(api.observe(*objects, api.expert(**backend)))
    assert api.conditions(outcome, "coder")["Ready"] == ("False", reason)
    assert api.conditions(outcome, "auto")["ResolvedRefs"] == ("False", "ExpertNotResolved")
    assert api.conditions(outcome, "auto")["Ready"] == ("False", "NoReadyEndpoints")
    assert api.addresses(outcome) == []


def test_a_pool_without_its_crd(api):
    seen = api.observe(api.expert(inferencePool={"name": "pool"}), pools_installed=False)
    outcome = api.reconcile(seen)
    assert api.conditions(outcome, "coder")["Ready"] == ("False", "InferencePoolNotInstalled")


def test_a_mistyped_service_keeps_what_the_expert_had_looked_up_anew(api):
    good = api.expert(service={"name": "engine", "port": 80})
    world = (api.policy(), api.service())
    first = api.reconcile(api.observe(*world, good, api.slice("engine", "10.0.0.1")))
    typo = api.expert(service={"name": "engin", "port": 80}, meta={"generation": 2})
    moved = api.slice("engine", "10.0.0.2")
    second = api.reconcile(api.observe(*world, typo, moved), first.next)
    assert api.addresses(second) == ["10.0.0.2:8000"]
    assert api.conditions(second, "coder")["Ready"] == ("False", "ServiceNotFound")
    assert "what was in force before stays" in api.message(second, "coder", "Ready")
    third = api.reconcile(api.observe(*world, good, moved), second.next)
    assert api.conditions(third, "coder")["Ready"] == ("True", "EndpointsReady")


def test_after_a_restart_the_candidates_of_a_broken_expert_stay_as_they_are(api):
    world = (api.policy(), api.expert("chat", addresses=["10.0.0.5:1"]))
    first = api.reconcile(api.observe(*world, api.expert()))
    restarted = Previous(snapshots=first.next.snapshots, stored=first.next.stored)
    typo = api.expert(service={"name": "gone", "port": 80})
    second = api.reconcile(api.observe(*world, typo), restarted)
    assert api.addresses(second) == ["10.0.0.5:1", "10.0.0.1:8000"]
    assert second.snapshots == first.snapshots
    changed = (api.policy(admission="Reject"), api.expert("chat", addresses=["10.0.0.6:1"]))
    third = api.reconcile(api.observe(*changed, typo), second.next)
    assert api.addresses(third) == ["10.0.0.6:1", "10.0.0.1:8000"]
    assert read_snapshot(third.snapshots[0].model_dump_json()) == third.snapshots[0]


def test_a_deleted_service_takes_its_endpoints_along(api):
    expert = api.expert(service={"name": "engine", "port": 80})
    seen = api.observe(api.policy(), api.service(), expert, api.slice("engine", "10.0.0.1"))
    first = api.reconcile(seen)
    second = api.reconcile(api.observe(api.policy(), expert), first.next)
    assert api.addresses(second) == []
    assert "stays" not in api.message(second, "coder", "Ready")


def test_a_policy_that_selects_nothing(api):
    seen = api.observe(api.policy(selector={"matchLabels": {"site": "x"}}), api.expert())
    outcome = api.reconcile(seen)
    assert api.conditions(outcome, "auto")["ResolvedRefs"] == ("False", "NoExperts")
    assert api.conditions(outcome, "auto")["Ready"] == ("False", "NoExperts")
    assert "site=x" in api.message(outcome, "auto", "ResolvedRefs")


# --- model names -----------------------------------------------------------------------


def rivals(api):
    return (
        api.policy(
            "late", models=["auto", "mine"], meta={"creationTimestamp": "2026-01-01T00:01:00Z"}
        ),
        api.policy("early", models=["auto"]),
        api.expert(),
    )


def test_the_oldest_policy_answers_a_contested_name(api):
    outcome = api.reconcile(api.observe(*rivals(api)))
    assert [one.policy for one in outcome.snapshots] == ["early"]
    assert api.conditions(outcome, "late")["Accepted"] == ("False", "ModelNameConflict")
    assert "auto is answered by default/early" in api.message(outcome, "late", "Accepted")


def test_of_the_same_age_the_first_by_name_wins_across_namespaces(api):
    outcome = api.reconcile(
        api.observe(
            api.policy("b", models=["auto"], meta={"namespace": "one"}),
            api.policy("a", models=["auto"], meta={"namespace": "two"}),
        )
    )
    assert [(one.namespace, one.policy) for one in outcome.snapshots] == [("one", "b")]


def test_the_loser_keeps_nothing_and_takes_over_when_the_winner_goes(api):
    alone = api.policy("late", models=["mine"], meta={"creationTimestamp": "2026-01-01T00:01:00Z"})
    first = api.reconcile(api.observe(alone, api.policy("early", models=["auto"]), api.expert()))
    assert len(first.snapshots) == 2
    contested = api.observe(*rivals(api))
    second = api.reconcile(contested, first.next)
    assert [one.policy for one in second.snapshots] == ["early"]
    assert second.stale_config_maps == (Key("default", "late"),)
    late, _, expert = rivals(api)
    third = api.reconcile(api.observe(late, expert), second.next)
    assert [one.policy for one in third.snapshots] == ["late"]
    assert third.stale_config_maps == (Key("default", "early"),)


def test_a_loser_takes_no_other_name(api):
    outcome = api.reconcile(
        api.observe(
            *rivals(api),
            api.policy("last", models=["mine"], meta={"creationTimestamp": "2026-01-03T00:00:00Z"}),
        )
    )
    assert [one.policy for one in outcome.snapshots] == ["early", "last"]


# --- config maps -----------------------------------------------------------------------


def test_a_config_map_is_written_when_it_differs(api):
    seen = api.observe(api.policy(), api.expert())
    first = api.reconcile(seen)
    (write,) = first.config_maps
    assert (write.policy, write.owner_uid) == (AUTO, "uid-RoutingPolicy-auto")
    version = write.snapshot.version
    for stored in (StoredSnapshot("", write.owner_uid), StoredSnapshot(version, "another")):
        assert api.reconcile(seen, Previous(stored={AUTO: stored})).config_maps
    stored = StoredSnapshot(version, write.owner_uid)
    assert not api.reconcile(seen, Previous(stored={AUTO: stored})).config_maps


def test_the_config_map_of_a_policy_that_is_gone_goes(api):
    previous = Previous(stored={AUTO: StoredSnapshot("x", "y")})
    assert api.reconcile(api.observe(), previous).stale_config_maps == (AUTO,)


# --- experts' conditions ---------------------------------------------------------------

ADDRESSES = ["10.0.0.1:1", "10.0.0.2:1"]
GOOD = Probe(answers=True, models=("coder-model", "other"))
SILENT = Probe(answers=False, error="refused")
OTHER = Probe(answers=True, models=("other",))
LOCKED = Probe(answers=True, error="/v1/models answered 401")

UP = ("True", "EndpointsReady")
ALL, SOME, NONE = ("True", "AllAnswer"), ("True", "SomeAnswer"), ("False", "NoneAnswers")
LISTED, NOT_LISTED = ("True", "ModelListed"), ("False", "ModelNotListed")
NOT_PROBED = ("Unknown", "NotProbed")

PROBED = {
    "none asked": ((), UP, NOT_PROBED, NOT_PROBED),
    "one asked": ((GOOD,), UP, NOT_PROBED, LISTED),
    "all good": ((GOOD, GOOD), UP, ALL, LISTED),
    "one silent": ((GOOD, SILENT), UP, SOME, LISTED),
    "all silent": ((SILENT, SILENT), NONE, NONE, NOT_PROBED),
    "other model": ((GOOD, OTHER), NOT_LISTED, ALL, NOT_LISTED),
    "no list": ((GOOD, LOCKED), UP, ALL, ("Unknown", "ListUnavailable")),
}


@pytest.mark.parametrize(("found", "ready", "reachable", "served"), PROBED.values(), ids=PROBED)
def test_probes_become_conditions(api, found, ready, reachable, served):
    probes = dict(zip(ADDRESSES, found, strict=False))
    outcome = api.reconcile(api.observe(api.expert(addresses=ADDRESSES), probes=probes))
    assert api.conditions(outcome, "coder") == {
        "Ready": ready,
        "Reachable": reachable,
        "ModelServed": served,
    }


def test_endpoints_are_counted(api):
    expert = api.expert(podSelector={"matchLabels": {"app": "llm"}, "port": 8000})
    pods = (api.pod("a", "10.0.1.1"), api.pod("b", "10.0.1.2", ready=False))
    (write,) = api.reconcile(api.observe(expert, *pods)).statuses
    assert write.status["endpoints"] == {"ready": 1, "total": 2}
    outcome = api.reconcile(api.observe(expert, pods[1]))
    assert api.conditions(outcome, "coder")["Ready"] == ("False", "NoReadyEndpoints")
    outcome = api.reconcile(api.observe(expert))
    assert api.conditions(outcome, "coder")["Ready"] == ("False", "NoEndpoints")


# --- policies' conditions --------------------------------------------------------------


def programmed(api, **servers):
    seen = api.observe(api.policy(), api.expert())
    first = api.reconcile(seen)
    states = {name: make(api.acknowledging(first)) for name, make in servers.items()}
    return api.reconcile(api.observe(api.policy(), api.expert(), servers=states), first.next)


def good(state):
    return state


def fresh(_):
    return ServerState()


def unready(_):
    return ServerState(counted=False)


def refusing(state):
    return ServerState(True, state.applied, "model auto is answered twice", refused=True)


def dead(state):
    return ServerState(True, state.applied, "cannot be reached")


SERVERS = {
    "all": ({"a": good, "b": good}, ("True", "Acknowledged"), "2/2"),
    "an unready one does not count": ({"a": good, "b": unready}, ("True", "Acknowledged"), "1/1"),
    "one is new": ({"a": good, "b": fresh}, ("Unknown", "Pending"), "1/2"),
    "one refuses": ({"a": dead, "b": refusing}, ("False", "Refused"), "answered twice"),
    "one is dead": ({"a": dead, "b": good}, ("False", "ServerUnreachable"), "1/2"),
}


@pytest.mark.parametrize(("servers", "condition", "text"), SERVERS.values(), ids=SERVERS)
def test_acknowledgements_become_programmed(api, servers, condition, text):
    # A status that stays the same is not written: then the first one said so already.
    outcome = programmed(api, **servers)
    assert api.conditions(outcome, "auto")["Programmed"] == condition
    assert text in api.message(outcome, "auto", "Programmed")
    ready = {"True": ("True", "Serving")}.get(condition[0], condition)
    assert api.conditions(outcome, "auto")["Ready"] == ready


def with_models(api, **servers):
    """A policy of HanDrl at servers that say so much of its model; None: nothing."""
    world = (api.policy(algorithm="HanDrl"), api.expert())
    first = api.reconcile(api.observe(*world))
    states = {
        name: api.acknowledging(
            first, models={} if said is None else dict.fromkeys(first.next.snapshots, said)
        )
        for name, said in servers.items()
    }
    return api.reconcile(api.observe(*world, servers=states), first.next)


MODELS = {
    "all": ({"a": ("ab" * 32, ""), "b": ("ab" * 32, "")}, ("True", "Loaded"), "abababababab"),
    "none yet": ({"a": None, "b": ("ab" * 32, "")}, ("Unknown", "Pending"), "1/2 policy servers"),
    "refused": (
        {"a": ("ab" * 32, ""), "b": ("", "x.onnx is corrupt")},
        ("False", "LoadFailed"),
        "b: x.onnx is corrupt",
    ),
}


@pytest.mark.parametrize(("servers", "condition", "text"), MODELS.values(), ids=MODELS)
def test_what_servers_say_of_the_model_becomes_model_loaded(api, servers, condition, text):
    outcome = with_models(api, **servers)
    assert api.conditions(outcome, "auto")["ModelLoaded"] == condition
    assert text in api.message(outcome, "auto", "ModelLoaded")
    ready = ("True", "Degraded") if condition[0] == "False" else ("True", "Serving")
    assert api.conditions(outcome, "auto")["Ready"] == ready


def test_without_policy_servers_nothing_is_programmed(api):
    outcome = api.reconcile(api.observe(api.policy(), api.expert()))
    assert api.conditions(outcome, "auto")["Programmed"] == ("False", "NoPolicyServers")


def test_a_policy_serves_although_some_expert_is_broken(api):
    world = (api.policy(), api.expert(), api.expert("bad", service={"name": "gone", "port": 1}))
    first = api.reconcile(api.observe(*world))
    seen = api.observe(*world, servers={"a": api.acknowledging(first)})
    outcome = api.reconcile(seen, first.next)
    assert api.conditions(outcome, "auto")["Ready"] == ("True", "Degraded")
    assert "bad (ServiceNotFound)" in api.message(outcome, "auto", "Ready")


def test_an_old_generation_is_not_programmed(api):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    servers = {"a": api.acknowledging(first)}
    changed = api.policy(meta={"generation": 2}, admission="Reject")
    outcome = api.reconcile(api.observe(changed, api.expert(), servers=servers), first.next)
    assert api.conditions(outcome, "auto")["Programmed"] == ("Unknown", "Pending")


def test_performance_is_written_where_the_crd_has_it(api, monkeypatch):
    fields = dict(module._STATUS_FIELDS)
    policy = next(kind for kind in fields if kind == "RoutingPolicy")
    fields[policy] = fields[policy] | {"averageQos", "violationRate"}
    monkeypatch.setattr(module, "_STATUS_FIELDS", fields)
    performance = {AUTO: Performance(0.5, 0.25)}
    (write,) = api.reconcile(api.observe(api.policy(), performance=performance)).statuses
    assert (write.status["averageQos"], write.status["violationRate"]) == (0.5, 0.25)
    monkeypatch.undo()
    fields[policy] = fields[policy] - {"averageQos", "violationRate"}
    monkeypatch.setattr(module, "_STATUS_FIELDS", fields)
    (write,) = api.reconcile(api.observe(api.policy(), performance=performance)).statuses
    assert "averageQos" not in write.status


# --- statuses over time ----------------------------------------------------------------


def test_every_condition_names_its_generation(api):
    seen = api.observe(api.policy(meta={"generation": 7}), api.expert(meta={"generation": 9}))
    for write in api.reconcile(seen).statuses:
        generation = {"auto": 7, "coder": 9}[write.ref.key.name]
        assert write.status["observedGeneration"] == generation
        assert {c["observedGeneration"] for c in write.status["conditions"]} == {generation}


def test_the_time_moves_only_with_the_status(api):
    first = api.reconcile(api.observe(api.expert(addresses=ADDRESSES)))
    seen = api.observe(api.expert(addresses=ADDRESSES), probes=dict.fromkeys(ADDRESSES, GOOD))
    second = later(api, seen, first.next)
    times = {c["type"]: c["lastTransitionTime"] for c in second.statuses[0].status["conditions"]}
    assert times == {
        "Ready": "2026-01-02T03:04:05Z",
        "Reachable": "2026-01-02T03:09:05Z",
        "ModelServed": "2026-01-02T03:09:05Z",
    }


def test_events_tell_transitions_only(api):
    seen = api.observe(api.expert(addresses=ADDRESSES))
    first = api.reconcile(seen)
    assert [(e.warning, e.reason) for e in first.statuses[0].events] == [(False, "EndpointsReady")]
    silent = dict.fromkeys(ADDRESSES, SILENT)
    seen = api.observe(api.expert(addresses=ADDRESSES), probes=silent)
    second = api.reconcile(seen, first.next)
    # Ready says the same as Reachable, once is enough.
    assert [(e.warning, e.reason) for e in second.statuses[0].events] == [(True, "NoneAnswers")]
    changed = dict.fromkeys(ADDRESSES, Probe(answers=False, error="timed out"))
    seen = api.observe(api.expert(addresses=ADDRESSES), probes=changed)
    third = api.reconcile(seen, second.next)
    assert third.statuses
    assert third.statuses[0].events == ()


def test_statuses_of_objects_that_are_gone_are_forgotten(api):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    second = api.reconcile(api.observe(api.policy(), api.expert()), first.next)
    assert second.next.statuses.keys() == first.next.statuses.keys()
    third = api.reconcile(api.observe(api.expert()), second.next)
    assert {ref.key for ref in third.next.statuses} == {CODER}


def test_a_successor_of_the_same_name_starts_anew(api):
    first = api.reconcile(api.observe(api.expert()))
    second = later(api, api.observe(api.expert(meta={"uid": "another"})), first.next)
    (write,) = second.statuses
    assert write.ref.uid == "another"
    assert write.status["conditions"][0]["lastTransitionTime"] == "2026-01-02T03:09:05Z"


def test_statuses_fit_the_crd(api):
    seen = api.observe(
        api.policy(), api.expert(), api.expert("bad", service={"name": "x", "port": 1})
    )
    for write in api.reconcile(seen).statuses:
        model = (
            LLMExpertStatus
            if isinstance(write.ref, Ref) and write.ref.kind == "LLMExpert"
            else RoutingPolicyStatus
        )
        model.model_validate(dict(write.status))


def test_long_lists_are_cut_short(api):
    many = [api.expert(f"e{n}", service={"name": "gone", "port": 1}) for n in range(6)]
    outcome = api.reconcile(api.observe(api.policy(), *many))
    text = api.message(outcome, "auto", "ResolvedRefs")
    assert text.startswith("6 of 6 experts not resolved: e0 (ServiceNotFound), e1")
    assert text.endswith("and 3 more")


def test_each_meaning_is_listed_once():
    rows = [(m.kind, m.type, m.status, m.reason) for m in MEANINGS]
    assert len(rows) == len(set(rows))
