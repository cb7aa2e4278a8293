"""Policies at work on one live state: installing, limits, decisions, refusals, counts."""

import math

import pytest

from pointsman_core.resources import Algorithm
from pointsman_policy.http_api import live_state, show_state
from pointsman_policy.openai_api import ApiError, parse_completion
from pointsman_policy.service import (
    RECENT_DECISIONS,
    Limits,
    make_request,
    parse_limits,
)
from pointsman_policy.tracker import End

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
AUTO = "default/auto"
BODY = b'{"model": "auto", "messages": [{"content": "hello"}], "stream": true}'


def route(service, request_id="r1", *, limits=None, body=BODY):
    return service.route(
        parse_completion(body), limits or Limits(), request_id=request_id, arrival_s=100.0
    )


class TestInstall:
    def test_models_are_those_of_all_policies(self, service, build):
        one = build.snapshot(build.expert("x", A), name="one", models=["b", "a"])
        two = build.snapshot(build.expert("y", B), name="two", models=["c"])
        service.install([one, two])
        assert service.models == ["a", "b", "c"]
        assert service.router("c").snapshot is two
        assert [s.full_name for s in service.snapshots] == ["default/one", "default/two"]

    def test_what_is_not_installed_again_is_gone(self, service, build):
        service.install([build.snapshot(build.expert("y", C), name="two", models=["c"])])
        assert service.models == ["c"]
        assert service.state.addresses == (C,)
        info = service.metrics.snapshot_info.collect()[0].samples
        assert [sample.labels["policy"] for sample in info] == ["default/two"]

    def test_nothing_leaves_nothing(self, service):
        service.install([])
        assert service.models == []
        assert service.candidates() == {}
        with pytest.raises(ApiError, match="Available models: none"):
            service.router("auto")

    def test_a_policy_that_did_not_change_goes_on_where_it_was(self, make_service, build):
        service = make_service(algorithm="RoundRobin")
        kept = service.snapshots
        assert route(service, "r1").chosen.address == B
        other = build.snapshot(build.expert("y", C), name="two", models=["c"])
        service.install([*kept, other])
        assert route(service, "r2").chosen.address == A

    def test_a_policy_that_changed_starts_anew(self, service, build):
        old = service.router("auto")
        service.install([build.snapshot(build.expert("good", A, B))])
        assert service.router("auto") is not old
        assert {route(service, f"r{i}").chosen.expert for i in range(9)} == {"good"}

    def test_requests_under_way_stay_counted(self, service, build):
        route(service, "r1")
        assert service.state.in_flight(A) == 1
        service.install([build.snapshot(build.expert("fast", B))])
        assert service.state.in_flight(A) == 1
        assert route(service, "r2").chosen.address == B
        service.tracker.ended("r1", End.WHOLE, now_s=101.0)
        service.tracker.ended("r2", End.WHOLE, now_s=101.0)
        assert len(service.state) == 0

    def test_readiness_is_kept(self, service, build):
        service.state.set_ready(A, ready=False)
        service.install([build.snapshot(build.expert("good", A), build.expert("new", C))])
        assert not service.state.is_ready(A)
        assert service.state.is_ready(C)

    def test_candidates_are_told_by_address_with_all_experts_there(self, service, build):
        shared = [build.expert("x", A), build.expert("y", A, B)]
        one = build.snapshot(*shared, name="one", models=["a"])
        two = build.snapshot(*shared, name="two", models=["b"])
        service.install([one, two])
        found = {address: [c.expert for c in cs] for address, cs in service.candidates().items()}
        assert found == {A: ["x", "y"], B: ["y"]}


class TestLimitHeaders:
    def test_none_given(self):
        assert parse_limits({}) == Limits(None, None)

    @pytest.mark.parametrize(
        ("text", "want"),
        [("60", 60.0), ("0.5", 0.5), ("600000", 600_000.0), ("1e3", 1000.0), (" 7 ", 7.0)],
    )
    def test_good_ones(self, text, want):
        headers = {"x-slo-tpot-ms": text, "x-slo-ttft-ms": text}
        assert parse_limits(headers) == Limits(want, want)

    @pytest.mark.parametrize("name", ["x-slo-tpot-ms", "x-slo-ttft-ms"])
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "fast",
            "nan",
            "inf",
            "-inf",
            "-1",
            "0",
            "-0",
            "600001",
            "1e9",
            "1e999",
            "1_0",
            "١٢",
            "50, 60",
            "60ms",
            "6,5",
        ],
    )
    def test_bad_ones_are_refused_by_name(self, name, text):
        with pytest.raises(ApiError) as refused:
            parse_limits({name: text})
        error = refused.value
        assert (error.status, error.code, error.param) == (400, "invalid_limit", name)
        assert error.message == (
            f"The header {name} must be a number of milliseconds above 0 and at most 600000,"
            f" not {text!r}."
        )

    def test_a_long_one_is_shown_in_part(self):
        with pytest.raises(ApiError, match=r"not 'x{40}'\.$"):
            parse_limits({"x-slo-tpot-ms": "x" * 5000})


class TestLimits:
    @pytest.mark.parametrize("algorithm", list(Algorithm))
    @pytest.mark.parametrize("tiny", [5e-324, 1e-310])
    def test_one_next_to_nothing_spoils_no_decision(self, make_service, algorithm, tiny):
        """Neither its own, nor those made while it is in flight."""
        service = make_service(algorithm=algorithm, fallback="RoundRobin")
        own = parse_limits({"x-slo-tpot-ms": str(tiny), "x-slo-ttft-ms": str(tiny)})
        assert route(service, "tiny", limits=own).fallback_reason is None
        assert route(service, "other").fallback_reason is None

    @pytest.mark.parametrize(
        ("desc", "qos", "own", "want"),
        [
            ("the policy's", {}, Limits(), (0.06, math.inf)),
            ("both of the policy's", {"time_to_first_token_ms": 900}, Limits(), (0.06, 0.9)),
            ("one's own", {}, Limits(20.0, 300.0), (0.02, 0.3)),
            ("one of each", {"time_to_first_token_ms": 900}, Limits(20.0), (0.02, 0.9)),
            ("no override", {"allow_override": False}, Limits(20.0, 300.0), (0.06, math.inf)),
        ],
    )
    def test_of_a_request(self, desc, qos, own, want, build):
        got = make_request(
            build.snapshot(qos=qos),
            own,
            prompt="p",
            prompt_tokens=3,
            max_output_tokens=4,
            arrival_s=5.0,
            streams=False,
        )
        assert (got.limit_s, got.first_token_limit_s) == pytest.approx(want), desc
        assert (got.prompt, got.prompt_tokens, got.max_output_tokens) == ("p", 3, 4)
        assert (got.arrival_s, got.streams) == (5.0, False)

    def test_reach_the_in_flight_table(self, service):
        route(service, limits=Limits(latency_per_token_ms=20.0))
        assert service.state.residents().limit_s.tolist() == [0.02]


class TestRoute:
    def test_puts_the_request_where_it_was_sent(self, service, counted):
        decision = route(service)
        assert decision.chosen.address == A
        residents = service.state.residents()
        assert service.state.in_flight(A) == len(service.state) == 1
        assert residents.arrival_s.tolist() == [100.0]
        assert residents.quality.tolist() == [0.9]
        assert residents.streams.tolist() == [1]
        labels = {"policy": AUTO, "algorithm": "QualityGreedy", "expert": "good"}
        assert counted(service, "decisions_total", **labels) == 1
        assert counted(service, "decision_seconds_count", algorithm="QualityGreedy") == 1

    def test_without_an_id_decides_but_does_not_track(self, service, counted):
        assert route(service, None).chosen.address == A
        assert len(service.state) == 0
        assert counted(service, "untracked_total") == 1

    def test_an_unknown_model_is_not_found(self, service):
        with pytest.raises(ApiError) as refused:
            route(service, body=b'{"model": "gpt-9", "prompt": "x"}')
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
        assert refused.value.message == (
            "The model `gpt-9` does not exist. Available models: auto."
        )

    @pytest.mark.parametrize("algorithm", ["LatencyQualityGreedy", "RoundRobin"])
    def test_no_ready_endpoint_is_unavailable(self, algorithm, make_service, counted):
        service = make_service(algorithm=algorithm)
        for address in (A, B):
            service.state.set_ready(address, ready=False)
        with pytest.raises(ApiError) as refused:
            route(service)
        error = refused.value
        assert (error.status, error.code, error.headers) == (503, "no_ready_endpoint", ())
        assert error.message == (
            "Policy default/auto has no endpoint for this request: 0 of 2 endpoints are ready."
        )
        assert len(service.state) == 0
        assert counted(service, "rejections_total", policy=AUTO, reason="no_ready_endpoint") == 1

    def test_a_policy_without_endpoints_is_unavailable(self, service, build):
        service.install([build.snapshot(algorithm="RoundRobin", fallback="RoundRobin")])
        with pytest.raises(ApiError, match="0 of 0 endpoints are ready") as refused:
            route(service)
        assert refused.value.status == 503

    def test_what_cannot_be_in_time_is_rejected_where_the_policy_says_so(
        self, make_service, counted
    ):
        service = make_service(algorithm="LatencyQualityGreedy", admission="Reject")
        with pytest.raises(ApiError) as refused:
            route(service, limits=Limits(latency_per_token_ms=0.001))
        error = refused.value
        assert (error.status, error.code) == (429, "over_limit")
        assert error.headers == (("retry-after", "1"),)
        assert error.message == (
            "Rejected by policy default/auto: the chosen endpoint cannot keep the latency limit."
        )
        assert len(service.state) == 0
        assert counted(service, "rejections_total", policy=AUTO, reason="over_limit") == 1

    def test_a_rejection_by_the_fallback_is_told_apart_too(self, make_service, fixed_scores):
        service = make_service(
            algorithm="Random", fallback="LatencyQualityGreedy", admission="Reject"
        )
        service.router("auto").replace_decider(fixed_scores(RuntimeError("x")))
        with pytest.raises(ApiError) as refused:
            route(service, limits=Limits(latency_per_token_ms=0.001))
        assert (refused.value.status, refused.value.code) == (429, "over_limit")

    def test_the_fallback_is_counted(self, make_service, fixed_scores, counted):
        service = make_service(algorithm="Random", fallback="QualityGreedy")
        service.router("auto").replace_decider(fixed_scores(RuntimeError("x")))
        decision = route(service)
        assert decision.chosen.address == A
        assert counted(service, "fallbacks_total", policy=AUTO, algorithm="QualityGreedy") == 1
        labels = {"policy": AUTO, "algorithm": "QualityGreedy", "expert": "good"}
        assert counted(service, "decisions_total", **labels) == 1


class TestRecent:
    def test_decisions_are_remembered_rejections_too(self, make_service):
        service = make_service(algorithm="LatencyQualityGreedy", admission="Reject")
        decision = route(service, "kept")
        with pytest.raises(ApiError):
            route(service, "rejected", limits=Limits(latency_per_token_ms=0.001))
        assert service.recent("kept") is decision
        assert service.recent("rejected").chosen is None
        assert service.recent("other") is None

    def test_the_oldest_are_forgotten(self, service):
        for i in range(RECENT_DECISIONS + 1):
            route(service, f"r{i}")
        assert service.recent("r0") is None
        assert service.recent("r1") is not None


class TestShown:
    def test_the_live_state(self, service):
        route(service)
        service.state.set_ready(B, ready=False)
        shown = live_state(service)
        assert (shown["in_flight"], shown["tracked"]) == (1, 1)
        version = service.snapshots[0].version
        assert shown["snapshots"] == {AUTO: {"version": version, "generation": 1}}
        empty = {"paused": False, "foreign": 0, "running": None, "waiting": None, "kv_usage": None}
        assert shown["endpoints"] == {
            A: {"expert": "good", "ready": True, "in_flight": 1} | empty,
            B: {"expert": "fast", "ready": False, "in_flight": 0} | empty,
        }

    def test_the_gauges(self, service, build, counted):
        route(service)
        show_state(service)
        assert counted(service, "in_flight", endpoint=A, expert="good") == 1
        assert counted(service, "endpoint_ready", endpoint=B, expert="fast") == 1
        service.install([build.snapshot(build.expert("new", C))])
        show_state(service)
        samples = service.metrics.endpoint_ready.collect()[0].samples
        assert [sample.labels for sample in samples] == [{"endpoint": C, "expert": "new"}]
