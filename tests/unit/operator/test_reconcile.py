"""What is in force and what every status says, for one state of the cluster after another."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pointsman_core.resources import LLMExpertStatus, RoutingPolicyStatus
from pointsman_core.snapshot import read_snapshot
from pointsman_operator import reconcile as module
from pointsman_operator.conditions import MEANINGS
from pointsman_operator.observed import Key, Kind, Performance, Probe, ServerState
from pointsman_operator.reconcile import Previous, Ref, StoredSnapshot

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
AUTO, CODER = Key("default", "auto"), Key("default", "coder")


def later(api, observed, previous=None):
    return api.reconcile(observed, previous, LATER)


def restarted(outcome):
    """What a new process knows: the ConfigMaps."""
    return Previous(snapshots=outcome.next.snapshots, stored=outcome.next.stored)


def kept(outcome):
    """The same process goes on."""
    return outcome.next


MEMORIES = pytest.mark.parametrize("memory", [kept, restarted])


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
    text = api.message(second, "auto", "Ready")
    assert text.endswith("; generation 1 stays in force, for auto")


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


def test_a_restart_writes_no_status_for_a_broken_policy(api):
    world = (api.expert(), api.expert("idle", service={"name": "gone", "port": 1}))
    first = api.reconcile(api.observe(api.policy(), *world))
    broken = api.policy(meta={"generation": 2}, models=[])
    second = api.reconcile(api.observe(broken, *world), first.next)
    (status,) = [one.status for one in second.statuses if one.ref.key == AUTO]
    assert status["experts"] == 2
    seen = api.observe(broken | {"status": status}, *world)
    third = api.reconcile(seen, Previous(snapshots=second.next.snapshots, stored=first.next.stored))
    assert [one for one in third.statuses if one.ref.key == AUTO] == []


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


SERVICES = frozenset({(Kind.SERVICE, ""), (Kind.SLICE, "")})


@MEMORIES
def test_what_may_not_be_read_any_more_stays_as_it_is(api, memory):
    expert = api.expert(service={"name": "engine", "port": 80})
    world = (api.policy(), api.service(), expert, api.slice("engine", "10.0.0.1"))
    first = api.reconcile(api.observe(*world))
    seen = api.observe(api.policy(), expert, unreadable=SERVICES)
    second = api.reconcile(seen, memory(first))
    assert second.snapshots == first.snapshots
    assert api.conditions(second, "coder")["Ready"] == ("False", "NotPermitted")
    third = api.reconcile(seen, second.next)
    assert third.snapshots == first.snapshots
    assert api.addresses(api.reconcile(api.observe(*world), third.next)) == ["10.0.0.1:8000"]


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


EARLY, LATE = Key("default", "early"), Key("default", "late")
MINUTE_LATER = {"creationTimestamp": "2026-01-01T00:01:00Z"}


def names(outcome):
    """Model names in force, by policy."""
    return {one.policy: one.models for one in outcome.snapshots}


@MEMORIES
def test_a_new_policy_takes_no_name_from_one_in_force(api, memory):
    """Creation times are whole seconds: of two made within one, names would decide."""
    first = api.reconcile(api.observe(api.policy("zebra", models=["auto"]), api.expert()))
    rival = api.policy("ant", models=["auto"], meta={"creationTimestamp": "2025-01-01T00:00:00Z"})
    seen = api.observe(rival, api.policy("zebra", models=["auto"]), api.expert())
    second = api.reconcile(seen, memory(first))
    assert names(second) == {"zebra": ("auto",)}
    assert api.conditions(second, "ant")["Accepted"] == ("False", "ModelNameConflict")
    text = "auto is answered by default/zebra: use another name in spec.models"
    assert api.message(second, "ant", "Accepted") == text
    assert api.message(second, "ant", "Ready") == f"{text}; nothing of it is in force"


def test_without_its_config_map_the_accepted_one_is_known_by_its_status(api):
    zebra = api.policy("zebra", models=["auto"])
    first = api.reconcile(api.observe(zebra, api.expert()))
    (status,) = [one.status for one in first.statuses if one.ref.key.name == "zebra"]
    zebra["status"] = status
    second = api.reconcile(api.observe(api.policy("ant", models=["auto"]), zebra, api.expert()))
    assert names(second) == {"zebra": ("auto",)}


def test_the_loser_takes_over_when_the_winner_goes(api):
    first = api.reconcile(api.observe(*rivals(api)))
    assert names(first) == {"early": ("auto",)}
    late, _, expert = rivals(api)
    second = api.reconcile(api.observe(late, expert), first.next)
    assert names(second) == {"late": ("auto", "mine")}
    assert second.stale_config_maps == (EARLY,)


@MEMORIES
def test_an_edit_into_a_conflict_leaves_the_last_good_snapshot_in_force(api, memory):
    early = api.policy("early", models=["auto"], meta=MINUTE_LATER)
    late = api.policy("late", models=["mine"], qos={"latencyPerTokenMs": 30})
    first = api.reconcile(api.observe(early, late, api.expert()))
    edited = api.policy(
        "late", models=["more", "auto"], qos={"latencyPerTokenMs": 99}, meta={"generation": 2}
    )
    seen = api.observe(early, edited, api.expert())
    second = api.reconcile(seen, memory(first))
    assert second.snapshots == first.snapshots
    assert not second.config_maps
    assert not second.stale_config_maps
    assert api.conditions(second, "late") == {
        "Accepted": ("False", "ModelNameConflict"),
        "ResolvedRefs": ("Unknown", "NotAccepted"),
        "ModelLoaded": ("Unknown", "NotAccepted"),
        "Programmed": ("False", "NotAccepted"),
        "Ready": ("False", "ModelNameConflict"),
    }
    text = api.message(second, "late", "Ready")
    assert "auto is answered by default/early" in text
    assert text.endswith("; generation 1 stays in force, for mine")
    third = api.reconcile(seen, memory(second))
    assert third.snapshots == first.snapshots
    mended = api.policy("late", models=["more"], meta={"generation": 3})
    fourth = api.reconcile(api.observe(early, mended, api.expert()), memory(third))
    assert names(fourth) == {"early": ("auto",), "late": ("more",)}
    assert api.conditions(fourth, "late")["Accepted"] == ("True", "Accepted")


def test_what_stays_in_force_after_a_conflict_keeps_live_endpoints(api):
    world = (api.policy("early", models=["auto"]),)
    late = api.policy("late", models=["mine"])
    first = api.reconcile(api.observe(*world, late, api.expert()))
    edited = api.policy("late", models=["auto"], meta={"generation": 2})
    moved = api.expert(addresses=["10.0.0.9:8000"])
    second = api.reconcile(api.observe(*world, edited, moved), first.next)
    assert api.addresses(second, "late") == ["10.0.0.9:8000"]
    assert names(second) == {"early": ("auto",), "late": ("mine",)}


@MEMORIES
def test_a_name_kept_in_force_is_not_free_for_others(api, memory):
    """`late` has lost its edit and falls back on what a third policy would like to have."""
    early = api.policy("early", models=["auto"])
    late = api.policy("late", models=["mine"])
    first = api.reconcile(api.observe(early, late, api.expert()))
    edited = api.policy("late", models=["auto"], meta={"generation": 2})
    third = api.policy("a-third", models=["mine"])
    second = api.reconcile(api.observe(early, edited, third, api.expert()), memory(first))
    assert names(second) == {"early": ("auto",), "late": ("mine",)}
    assert "mine is answered by default/late" in api.message(second, "a-third", "Accepted")


@MEMORIES
def test_a_name_that_is_given_up_is_free_at_once(api, memory):
    early, late = api.policy("early", models=["a"]), api.policy("late", models=["b"])
    first = api.reconcile(api.observe(early, late))
    early = api.policy("early", models=["b"], meta={"generation": 2})
    late = api.policy("late", models=["c"], meta={"generation": 2})
    second = api.reconcile(api.observe(early, late), memory(first))
    assert names(second) == {"early": ("b",), "late": ("c",)}


@MEMORIES
def test_an_invalid_policy_keeps_its_names(api, memory):
    late = api.policy("late", models=["auto"], meta=MINUTE_LATER)
    first = api.reconcile(api.observe(late, api.expert()))
    broken = api.policy("late", models=[], meta=MINUTE_LATER | {"generation": 2})
    early = api.policy("early", models=["auto"])
    second = api.reconcile(api.observe(broken, early, api.expert()), memory(first))
    assert second.snapshots == first.snapshots
    assert api.message(second, "late", "Ready").endswith("; generation 1 stays in force, for auto")
    assert "auto is answered by default/late" in api.message(second, "early", "Accepted")


def test_config_maps_that_contradict_each_other_are_not_both_in_force(api):
    """As when the operator ended between two writes."""
    first = api.reconcile(api.observe(api.policy("early", models=["auto"])))
    other = api.reconcile(api.observe(api.policy("late", models=["auto", "mine"])))
    both = Previous(
        snapshots={**first.next.snapshots, **other.next.snapshots},
        stored={**first.next.stored, **other.next.stored},
    )
    broken = [api.policy(name, models=[]) for name in ("early", "late")]
    assert names(api.reconcile(api.observe(*broken), both)) == {"early": ("auto",)}


@MEMORIES
@pytest.mark.parametrize("field", ["algorithm", "fallback"])
def test_an_edit_to_an_unknown_algorithm_leaves_the_last_good_snapshot_in_force(api, memory, field):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    edited = api.policy(**{field: "HanDrl2"}, meta={"generation": 2})
    second = api.reconcile(api.observe(edited, api.expert()), memory(first))
    assert second.snapshots == first.snapshots
    assert api.conditions(second, "auto")["Ready"] == ("False", "UnknownAlgorithm")
    assert api.message(second, "auto", "Ready").endswith("; generation 1 stays in force, for auto")


@MEMORIES
def test_a_successor_of_the_same_name_holds_none_of_its_names(api, memory):
    first = api.reconcile(api.observe(api.policy("late", models=["auto"])))
    successor = api.policy("late", models=["auto"], meta={"uid": "another"})
    second = api.reconcile(
        api.observe(successor, api.policy("early", models=["auto"])), memory(first)
    )
    assert names(second) == {"early": ("auto",)}


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
    "one serves another model": ((GOOD, OTHER), UP, ALL, NOT_LISTED),
    "all serve another model": ((OTHER, OTHER), NOT_LISTED, ALL, NOT_LISTED),
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


@pytest.mark.parametrize("valid", [True, False])
def test_without_the_permission_to_look_what_was_found_stays(api, valid):
    selector = {"podSelector": {"matchLabels": {"app": "llm"}, "port": 8000}}
    expert = api.expert(**selector)
    first = api.reconcile(api.observe(api.policy(), expert, api.pod(ip="10.0.1.1")))
    if not valid:
        expert = api.expert(**selector, spec={"limits": {"concurrency": -1}})
    blind = api.observe(api.policy(), expert, unreadable=frozenset({(Kind.POD, "")}))
    second = api.reconcile(blind, first.next)
    assert second.snapshots == first.snapshots
    assert api.addresses(second) == ["10.0.1.1:8000"]
    third = api.reconcile(blind, second.next)
    assert third.snapshots == first.snapshots


A1, A2 = ADDRESSES


def test_an_endpoint_that_serves_another_model_gets_no_requests(api):
    """It would answer each with 404; it is still probed, as it may change."""
    world = (api.policy(), api.expert(addresses=ADDRESSES))
    first = api.reconcile(api.observe(*world))
    assert api.addresses(first) == ADDRESSES, "nothing is known yet"
    seen = api.observe(*world, probes={A1: GOOD, A2: OTHER})
    second = api.reconcile(seen, first.next)
    assert api.addresses(second) == [A1]
    assert second.addresses == set(ADDRESSES)
    text = f"{A2} does not serve coder-model; it serves other"
    assert api.message(second, "coder", "ModelServed") == text
    assert api.message(second, "coder", "Ready") == f"1 of 2 endpoints is ready; {text}"
    (write,) = [one for one in second.statuses if one.ref.key == CODER]
    assert write.status["endpoints"] == {"ready": 1, "total": 2}
    third = api.reconcile(api.observe(*world, probes={A1: GOOD, A2: GOOD}), second.next)
    assert api.addresses(third) == ADDRESSES
    assert api.conditions(third, "coder")["ModelServed"] == LISTED


def test_an_expert_that_serves_another_model_gets_no_requests(api):
    world = (api.policy(), api.expert(addresses=ADDRESSES))
    outcome = api.reconcile(api.observe(*world, probes=dict.fromkeys(ADDRESSES, OTHER)))
    assert api.addresses(outcome) == []
    assert api.conditions(outcome, "coder")["Ready"] == NOT_LISTED
    assert api.conditions(outcome, "auto")["Ready"] == ("False", "NoReadyEndpoints")
    text = "1 of 1 expert is not ready: coder (ModelNotListed)"
    assert api.message(outcome, "auto", "Ready") == text


@pytest.mark.parametrize("found", [SILENT, LOCKED, None], ids=["off", "401", "not asked"])
def test_an_endpoint_whose_list_is_unknown_gets_requests(api, found):
    probes = {} if found is None else dict.fromkeys(ADDRESSES, found)
    outcome = api.reconcile(
        api.observe(api.policy(), api.expert(addresses=ADDRESSES), probes=probes)
    )
    assert api.addresses(outcome) == ADDRESSES


def test_an_endpoint_that_served_another_model_and_is_silent_stays_out(api):
    world = (api.policy(), api.expert(addresses=ADDRESSES))
    first = api.reconcile(api.observe(*world, probes={A1: GOOD, A2: OTHER}))
    second = api.reconcile(api.observe(*world, probes={A1: GOOD, A2: SILENT}), first.next)
    assert api.addresses(second) == [A1]
    # The list may be hidden by now, which says nothing of the models.
    third = api.reconcile(api.observe(*world, probes={A1: GOOD, A2: LOCKED}), second.next)
    assert api.addresses(third) == ADDRESSES


@pytest.mark.parametrize("probes", [{A1: GOOD, A2: OTHER}, dict.fromkeys(ADDRESSES, OTHER)])
def test_a_restart_brings_no_endpoint_back_that_serves_another_model(api, probes):
    world = (api.policy(), api.expert(addresses=ADDRESSES))
    first = api.reconcile(api.observe(*world, probes=probes))
    statuses = {one.ref.key: one.status for one in first.statuses}
    world = (
        api.policy(status=statuses[AUTO]),
        api.expert(addresses=ADDRESSES, status=statuses[CODER]),
    )
    second = api.reconcile(api.observe(*world), restarted(first))
    assert second.snapshots == first.snapshots
    assert second.statuses == ()
    third = api.reconcile(api.observe(*world, probes=dict.fromkeys(ADDRESSES, GOOD)), second.next)
    assert api.addresses(third) == ADDRESSES


def test_ollama_leaves_out_the_tag_latest(api):
    tagged = Probe(answers=True, models=("coder-model:latest",))
    for engine, expected in (("ollama", LISTED), ("vllm", NOT_LISTED)):
        expert = api.expert(addresses=[A1], spec={"engine": {"type": engine}})
        outcome = api.reconcile(api.observe(expert, probes={A1: tagged}))
        assert api.conditions(outcome, "coder")["ModelServed"] == expected


def test_llama_cpp_answers_to_any_name(api):
    """What it lists is the path of its file, unless it was given another name."""
    expert = api.expert(addresses=[A1], spec={"engine": {"type": "llamacpp"}})
    probes = {A1: Probe(answers=True, models=("/models/a.gguf",))}
    outcome = api.reconcile(api.observe(api.policy(), expert, probes=probes))
    assert api.addresses(outcome) == [A1]
    assert api.conditions(outcome, "coder") == {
        "Ready": UP,
        "Reachable": ALL,
        "ModelServed": NOT_LISTED,
    }
    text = f"{A1} lists /models/a.gguf, not coder-model; llama.cpp takes any name"
    assert api.message(outcome, "coder", "ModelServed") == text


def verdicts(outcome):
    (write,) = [one for one in outcome.statuses if one.ref.kind is Kind.EXPERT]
    return {one["type"]: one["reason"] for one in write.status["conditions"]}


FORGOTTEN = {"Ready": "EndpointsReady", "Reachable": "NotProbed", "ModelServed": "NotProbed"}


@pytest.mark.parametrize("found", [GOOD, SILENT, OTHER, LOCKED], ids=["ok", "off", "other", "401"])
def test_a_restart_forgets_no_verdict(api, found):
    """Else every expert would be told of twice, and a broken one be ready for a moment."""
    seen = api.observe(api.expert(addresses=ADDRESSES), probes=dict.fromkeys(ADDRESSES, found))
    (write,) = api.reconcile(seen).statuses
    again = api.observe(api.expert(addresses=ADDRESSES, status=write.status))
    assert api.reconcile(again).statuses == ()


def test_a_verdict_on_another_generation_is_forgotten(api):
    probes = dict.fromkeys(ADDRESSES, SILENT)
    (write,) = api.reconcile(api.observe(api.expert(addresses=ADDRESSES), probes=probes)).statuses
    newer = api.expert(addresses=ADDRESSES, status=write.status, meta={"generation": 2})
    assert verdicts(api.reconcile(api.observe(newer))) == FORGOTTEN


def test_a_verdict_of_another_version_of_the_operator_is_forgotten(api):
    probes = dict.fromkeys(ADDRESSES, SILENT)
    (write,) = api.reconcile(api.observe(api.expert(addresses=ADDRESSES), probes=probes)).statuses
    for condition in write.status["conditions"]:
        condition["reason"] = "OfLongAgo"
    old = api.expert(addresses=ADDRESSES, status=write.status)
    assert verdicts(api.reconcile(api.observe(old))) == FORGOTTEN


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


def test_a_snapshot_that_fits_no_config_map_is_served_and_told_of_once(api, monkeypatch):
    seen = api.observe(api.policy(), api.expert())
    small = api.reconcile(seen)
    (snapshot,) = small.snapshots
    served = replace(seen, servers={"s": api.acknowledging(small)})
    serving = api.reconcile(served, small.next)
    assert api.conditions(serving, "auto")["Ready"] == ("True", "Serving")

    monkeypatch.setattr(module, "MAX_STORED_BYTES", module.stored_bytes(snapshot) - 1)
    large = api.reconcile(served, replace(serving.next, stored={}))
    assert large.snapshots == small.snapshots
    assert (large.config_maps, large.stale_config_maps) == ((), ())
    (write,) = large.statuses
    assert api.conditions(large, "auto")["Ready"] == ("True", "SnapshotTooLarge")
    assert "too large for its ConfigMap" in api.message(large, "auto", "Ready")
    assert [(one.warning, one.reason) for one in write.events] == [(True, "SnapshotTooLarge")]
    again = api.reconcile(served, large.next)
    assert (again.statuses, again.config_maps) == ((), ())

    monkeypatch.setattr(module, "MAX_STORED_BYTES", module.stored_bytes(snapshot))
    fits = api.reconcile(served, large.next)
    assert [one.snapshot for one in fits.config_maps] == [snapshot]
    assert api.conditions(fits, "auto")["Ready"] == ("True", "Serving")


def test_of_a_snapshot_that_grew_too_large_the_last_stored_one_stays(api, monkeypatch):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    monkeypatch.setattr(module, "MAX_STORED_BYTES", module.stored_bytes(first.snapshots[0]))
    grown = api.observe(api.policy(), api.expert(), api.expert("chat"))
    second = api.reconcile(grown, first.next)
    assert second.snapshots != first.snapshots
    assert (second.config_maps, second.stale_config_maps) == ((), ())
    assert second.next.stored == first.next.stored


def serving(api, *world, **observed):
    """The same with a policy server that has everything in force."""
    first = api.reconcile(api.observe(*world, **observed))
    servers = {"a": api.acknowledging(first)}
    return api.reconcile(api.observe(*world, servers=servers, **observed))


def test_a_policy_is_not_ready_when_no_expert_answers(api):
    world = (
        api.policy(),
        api.expert(addresses=ADDRESSES),
        api.expert("idle", service={"name": "gone", "port": 1}),
    )
    outcome = serving(api, *world, probes=dict.fromkeys(ADDRESSES, SILENT))
    assert api.addresses(outcome) == ADDRESSES, "the policy servers look for themselves"
    assert api.conditions(outcome, "auto")["Programmed"] == ("True", "Acknowledged")
    assert api.conditions(outcome, "auto")["Ready"] == NONE
    text = "2 of 2 experts are not ready: coder (NoneAnswers), idle (ServiceNotFound)"
    assert api.message(outcome, "auto", "Ready") == text


def test_a_policy_is_ready_when_one_endpoint_answers(api):
    world = (api.policy(), api.expert(addresses=ADDRESSES))
    outcome = serving(api, *world, probes={A1: SILENT, A2: GOOD})
    assert api.conditions(outcome, "auto")["Ready"] == ("True", "Serving")
    assert api.message(outcome, "auto", "Ready") == "2 endpoints of 1 expert routed"


def test_a_policy_is_degraded_when_some_expert_does_not_answer(api):
    world = (api.policy(), api.expert(addresses=[A1]), api.expert("chat", addresses=[A2]))
    outcome = serving(api, *world, probes={A1: SILENT, A2: LOCKED})
    assert api.conditions(outcome, "auto")["ResolvedRefs"] == ("True", "AllResolved")
    assert api.conditions(outcome, "auto")["Ready"] == ("True", "Degraded")
    text = "2 endpoints of 2 experts routed; 1 of 2 experts is not ready: coder (NoneAnswers)"
    assert api.message(outcome, "auto", "Ready") == text


def test_a_policy_that_degrades_and_recovers_tells_of_both_once(api):
    world = (api.policy(), api.expert(addresses=[A1]), api.expert("chat", addresses=[A2]))
    first = api.reconcile(api.observe(*world))
    servers = {"a": api.acknowledging(first)}

    def told(previous, probe):
        seen = api.observe(*world, servers=servers, probes={A1: probe, A2: LOCKED})
        outcome = api.reconcile(seen, previous)
        events = [e for w in outcome.statuses if w.ref.key == AUTO for e in w.events]
        return outcome.next, [(one.warning, one.reason) for one in events]

    now, events = told(first.next, SILENT)
    assert (True, "Degraded") in events
    assert told(now, SILENT)[1] == []
    now, events = told(now, GOOD)
    assert events == [(False, "Serving")]
    assert told(now, SILENT)[1] == [(True, "Degraded")]


def test_a_restart_forgets_not_that_no_expert_answers(api):
    world = (api.policy(), api.expert(addresses=[A1]))
    first = serving(api, *world, probes={A1: SILENT})
    statuses = {one.ref.key: one.status for one in first.statuses}
    world = (api.policy(status=statuses[AUTO]), api.expert(addresses=[A1], status=statuses[CODER]))
    servers = {"a": api.acknowledging(first)}
    assert api.reconcile(api.observe(*world, servers=servers), restarted(first)).statuses == ()


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


def test_a_policy_with_nothing_in_force_has_no_performance(api):
    """Policy servers still count what a predecessor of its name did."""
    first = api.reconcile(api.observe(api.policy("old", models=["auto"]), api.expert()))
    world = (api.policy("old", models=["auto"]), api.policy("auto"), api.expert())
    seen = api.observe(*world, performance={AUTO: Performance(0.5, 0.25)})
    (write,) = (w for w in api.reconcile(seen, first.next).statuses if w.ref.key.name == "auto")
    assert api.conditions(api.reconcile(seen, first.next), "auto")["Ready"] == (
        "False",
        "ModelNameConflict",
    )
    assert {"averageQos", "violationRate"}.isdisjoint(write.status)


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


def test_endpoints_that_flap_are_told_of_once(api):
    """Not again as answering and serving the model at each return: it was so before, too."""
    flapping = "10.0.0.1:8000"
    world = [api.service(), api.expert(service={"name": "engine", "port": 80})]
    there = api.observe(*world, api.slice("engine", "10.0.0.1"), probes={flapping: GOOD})
    away = api.observe(*world, api.slice("engine", "10.0.0.1", ready=False))
    now = api.reconcile(there)
    for seen, expected in [(away, "NoReadyEndpoints"), (there, "EndpointsReady")] * 2:
        now = api.reconcile(seen, now.next)
        assert [reason for _, reason, _ in told(now, "coder")] == [expected]
    silent = api.observe(*world, api.slice("engine", "10.0.0.1"), probes={flapping: SILENT})
    now = api.reconcile(silent, api.reconcile(away, now.next).next)
    assert "NoneAnswers" in [reason for _, reason, _ in told(now, "coder")]


def told(outcome, name):
    (write,) = [one for one in outcome.statuses if one.ref.key.name == name]
    return [(event.warning, event.reason, event.message) for event in write.events]


@pytest.mark.parametrize(("backend", "reason"), UNRESOLVED.values(), ids=UNRESOLVED)
def test_an_expert_that_leads_nowhere_from_the_start_is_told(api, backend, reason):
    objects = (api.service(), api.service("external", type="ExternalName"), api.expert(**backend))
    outcome = api.reconcile(api.observe(*objects))
    message = f"Ready: {api.message(outcome, 'coder', 'Ready')}"
    assert told(outcome, "coder") == [(True, reason, message)]
    assert api.reconcile(api.observe(*objects), outcome.next).statuses == ()


def test_an_expert_that_is_only_starting_is_not_told(api):
    expert = api.expert(service={"name": "engine", "port": 80})
    assert told(api.reconcile(api.observe(api.service(), expert)), "coder") == []


@pytest.mark.parametrize(("found", "reason"), [(SILENT, "NoneAnswers"), (OTHER, "ModelNotListed")])
def test_an_expert_that_cannot_serve_from_the_start_is_told_once(api, found, reason):
    seen = api.observe(api.expert(addresses=[A1]), probes={A1: found})
    assert [event[:2] for event in told(api.reconcile(seen), "coder")] == [(True, reason)]


def test_an_invalid_object_is_told_once(api):
    broken = (api.policy(models=[]), api.expert(spec={"profile": {"peakTflops": -1}}))
    outcome = api.reconcile(api.observe(*broken))
    (event,) = told(outcome, "auto")
    assert event[:2] == (True, "InvalidSpec")
    assert event[2].startswith("Accepted: spec.models: ")
    (event,) = told(outcome, "coder")
    assert event[:2] == (True, "InvalidSpec")


def test_conditions_come_in_a_fixed_order_ready_first(api):
    outcome = api.reconcile(api.observe(api.policy(), api.expert()))
    assert list(api.conditions(outcome, "coder")) == ["Ready", "Reachable", "ModelServed"]
    assert list(api.conditions(outcome, "auto")) == [
        *("Ready", "Accepted", "ResolvedRefs", "ModelLoaded", "Programmed")
    ]


def test_another_order_of_conditions_is_no_change(api):
    """The API server may keep the order that it knows."""
    (write,) = api.reconcile(api.observe(api.policy())).statuses
    shuffled = {**write.status, "conditions": write.status["conditions"][::-1]}
    assert api.reconcile(api.observe(api.policy(status=shuffled))).statuses == ()


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


def test_one_is_told_as_one(api):
    outcome = serving(api, api.policy(), api.expert(), probes={"10.0.0.1:8000": GOOD})
    assert api.message(outcome, "coder", "Ready") == "1 of 1 endpoint is ready"
    assert api.message(outcome, "coder", "Reachable") == "1 of 1 endpoint answers"
    assert api.message(outcome, "auto", "Ready") == "1 endpoint of 1 expert routed"
    assert api.message(outcome, "auto", "ResolvedRefs") == "1 expert"
    assert api.message(outcome, "auto", "Programmed") == "1/1 policy server has generation 1"


def test_several_are_told_as_several(api):
    world = (
        api.policy(),
        api.expert(addresses=ADDRESSES),
        api.expert("chat", addresses=["10.1.1.1:1"]),
    )
    seen = api.observe(*world, probes={A1: GOOD, A2: SILENT})
    first = api.reconcile(seen)
    servers = {"a": api.acknowledging(first), "b": api.acknowledging(first)}
    outcome = api.reconcile(api.observe(*world, servers=servers, probes={A1: GOOD, A2: GOOD}))
    assert api.message(outcome, "coder", "Ready") == "2 of 2 endpoints are ready"
    assert api.message(outcome, "coder", "Reachable") == "2 of 2 endpoints answer"
    assert api.message(first, "coder", "Reachable") == f"1 of 2 endpoints answers: {A2} refused"
    assert api.message(outcome, "auto", "Ready") == "3 endpoints of 2 experts routed"
    assert api.message(outcome, "auto", "ResolvedRefs") == "2 experts"
    assert api.message(outcome, "auto", "Programmed") == "2/2 policy servers have generation 1"


def test_long_lists_are_cut_short(api):
    many = [api.expert(f"e{n}", service={"name": "gone", "port": 1}) for n in range(6)]
    outcome = api.reconcile(api.observe(api.policy(), *many))
    text = api.message(outcome, "auto", "ResolvedRefs")
    assert text.startswith("6 of 6 experts not resolved: e0 (ServiceNotFound), e1")
    assert text.endswith("and 3 more")


def test_each_meaning_is_listed_once():
    rows = [(m.kind, m.type, m.status, m.reason) for m in MEANINGS]
    assert len(rows) == len(set(rows))


OWN = [frozenset({(Kind.POLICY, "default"), (Kind.EXPERT, "default")})]
OWN += [frozenset({one}) for one in OWN[0]]


@pytest.mark.parametrize("blind", OWN)
def test_a_namespace_that_cannot_be_looked_at_keeps_what_is_in_force(api, blind):
    world = [api.policy(), api.expert()]
    first = api.reconcile(api.observe(*world))
    left = [one for one in world if (Kind(one["kind"]), "default") not in blind]
    other = {"namespace": "b", "uid": "b"}
    more = [api.policy(meta=other, models=["b"]), api.expert(meta=other)]
    rival = api.policy("rival", meta=other | {"uid": "r"}, models=["auto"])
    seen = api.observe(*left, *more, rival, unreadable=blind)
    second = api.reconcile(seen, first.next)
    assert first.snapshots[0] in second.snapshots
    assert [one.policy for one in second.snapshots if one.namespace == "b"] == ["auto"]
    assert second.stale_config_maps == ()
    assert api.conditions(second, "rival")["Accepted"] == ("False", "ModelNameConflict")
    assert api.reconcile(seen, second.next).snapshots == second.snapshots
    back = api.reconcile(api.observe(*world, *more, rival), second.next)
    assert first.snapshots[0] in back.snapshots


def test_a_config_map_that_is_refused_is_named(api):
    world = api.policy(), api.expert()
    server = {"s": api.acknowledging(api.reconcile(api.observe(*world)))}
    seen = api.observe(*world, servers=server, unstored={AUTO: "exceeded quota"})
    outcome = api.reconcile(seen)
    assert api.conditions(outcome, "auto")["Ready"] == ("True", "SnapshotNotStored")
    text = api.message(outcome, "auto", "Ready")
    assert "not in ConfigMap pointsman-snapshot-auto" in text
    assert text.endswith("exceeded quota")
    (write,) = (one for one in outcome.statuses if one.ref.key == AUTO)
    assert (True, "SnapshotNotStored") in [(one.warning, one.reason) for one in write.events]


def test_a_config_map_that_is_refused_is_named_also_while_nothing_is_routed(api):
    world = api.policy(), api.expert()
    unreached = {"s": ServerState(error="cannot be reached")}
    outcome = api.reconcile(api.observe(*world, servers=unreached, unstored={AUTO: "a quota"}))
    assert api.conditions(outcome, "auto")["Ready"] == ("False", "ServerUnreachable")
    text = api.message(outcome, "auto", "Ready")
    assert "cannot be reached; the snapshot is not in ConfigMap pointsman-snapshot-auto" in text
    assert text.endswith("; a quota")


def test_a_condition_of_somebody_else_is_no_change(api):
    first = api.reconcile(api.observe(api.policy(), api.expert()))
    foreign = {"type": "Approved", "status": "True", "reason": "By", "message": "hand"}
    bodies = [
        make(status={**write.status, "conditions": [foreign, *write.status["conditions"]]})
        for make, write in zip((api.expert, api.policy), first.statuses, strict=True)
    ]
    previous = replace(first.next, statuses={})
    assert api.reconcile(api.observe(*bodies), previous).statuses == ()


@pytest.mark.parametrize("algorithm", ["LeastLoad", "HanDrl"])
def test_a_policy_in_the_place_of_another_is_not_yet_acknowledged(api, algorithm):
    """Both have generation 1; the server has that of the first."""
    had = api.observe(api.policy(models=["old"], algorithm=algorithm), api.expert())
    first = api.reconcile(had)
    models = {Key("default", "auto"): ("ab" * 32, "")}
    server = api.acknowledging(first, models=models)
    body = api.policy(algorithm=algorithm, meta={"uid": "another"})
    servers = {"127.0.0.1:9003": server}
    second = api.reconcile(api.observe(body, api.expert(), servers=servers), first.next)
    found = api.conditions(second, "auto")
    assert found["Programmed"] == ("Unknown", "Pending")
    assert found["ModelLoaded"] == (
        ("Unknown", "Pending") if algorithm == "HanDrl" else ("True", "NoModelNeeded")
    )
    servers = {"127.0.0.1:9003": api.acknowledging(second, models=models)}
    third = api.reconcile(api.observe(body, api.expert(), servers=servers), second.next)
    assert api.conditions(third, "auto")["Programmed"] == ("True", "Acknowledged")
    # From then on the endpoints of the same generation may change.
    moved = api.expert(addresses=["10.0.0.9:8000"])
    fourth = api.reconcile(api.observe(body, moved, servers=servers), third.next)
    assert api.conditions(fourth, "auto")["Programmed"] == ("True", "Acknowledged")
