"""Decide and Explain, without a server."""

import grpc
import pytest

from pointsman_policy.openai_api import ApiError, parse_completion
from pointsman_policy.policy_api import PolicyServicer
from pointsman_policy.service import Limits
from pointsman_proto.v1.pointsman_pb2 import DecideRequest, ExplainRequest

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


class AbortedError(Exception):
    """What a gRPC context raises on abort."""


class Context:
    async def abort(self, code, message):
        raise AbortedError(code, message)


def route(service, request_id, limits=None):
    completion = parse_completion(b'{"model": "auto", "prompt": "x"}')
    service.route(completion, limits or Limits(), request_id=request_id, arrival_s=100.0)


async def decide(service, **fields):
    request = DecideRequest(**({"model": "auto", "prompt": "hello"} | fields))
    return await PolicyServicer(service).Decide(request, Context())


async def explain(service, **fields):
    return await PolicyServicer(service).Explain(ExplainRequest(**fields), Context())


class TestDecide:
    async def test_tells_the_choice(self, service):
        got = await decide(service)
        assert (got.policy, got.algorithm) == ("default/auto", "QualityGreedy")
        assert (got.expert, got.endpoint, got.served_model) == ("good", A, "good-model")
        assert list(got.retry_on) == [B]
        assert got.snapshot_version == service.snapshots[0].version
        assert got.why.startswith("QualityGreedy: score 0.900")
        assert not got.rejected
        assert got.fallback_reason == ""

    async def test_reserves_nothing_but_counts(self, service, counted):
        await decide(service)
        assert len(service.state) == 0
        labels = {"policy": "default/auto", "algorithm": "QualityGreedy", "expert": "good"}
        assert counted(service, "decisions_total", **labels) == 1

    async def test_tells_a_rejection(self, make_service):
        service = make_service(algorithm="LatencyQualityGreedy", admission="Reject")
        got = await decide(service, latency_per_token_ms=0.001)
        assert got.rejected
        assert (got.expert, got.endpoint, got.served_model, list(got.retry_on)) == ("", "", "", [])
        assert got.why == "the chosen endpoint cannot keep the latency limit"

    async def test_tells_that_the_fallback_decided(self, make_service, fixed_scores):
        service = make_service(algorithm="Random", fallback="QualityGreedy")
        service.router("auto").replace_decider(fixed_scores(RuntimeError("x")))
        got = await decide(service)
        assert (got.algorithm, got.fallback_reason) == (
            "QualityGreedy",
            "Random failed: RuntimeError: x",
        )

    async def test_an_unknown_model_is_not_found(self, service):
        with pytest.raises(AbortedError) as aborted:
            await decide(service, model="gpt-9")
        assert aborted.value.args == (
            grpc.StatusCode.NOT_FOUND,
            "The model `gpt-9` does not exist. Available models: auto.",
        )

    @pytest.mark.parametrize("name", ["latency_per_token_ms", "time_to_first_token_ms"])
    @pytest.mark.parametrize("value", [0.0, -1.0, 600_001.0, float("nan"), float("inf")])
    async def test_a_bad_limit_is_an_invalid_argument(self, name, value, service):
        with pytest.raises(AbortedError) as aborted:
            await decide(service, **{name: value})
        assert aborted.value.args == (
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{name} must be above 0 and at most 600000.",
        )

    @pytest.mark.parametrize(
        ("fields", "tokens"),
        [({"prompt": "x" * 4000}, 1000), ({"prompt_tokens": 7}, 7), ({"prompt": ""}, 1)],
    )
    async def test_the_prompts_length_is_the_callers_or_estimated(self, fields, tokens, service):
        _, request = PolicyServicer(service)._parse(DecideRequest(model="auto", **fields))
        assert request.prompt_tokens == tokens


class TestExplainNow:
    async def test_tells_all_candidates(self, service, build):
        service.state.begin("r", B, build.admitted())
        service.state.set_ready(B, ready=False)
        request = DecideRequest(model="auto", prompt_tokens=100, latency_per_token_ms=20)
        got = await explain(service, request=request)
        assert got.decision.endpoint == A
        busy, idle = sorted(got.candidates, key=lambda c: c.expert)
        assert (idle.expert, idle.endpoint, idle.eligible, idle.in_flight) == ("good", A, True, 0)
        assert (idle.score, idle.expected_quality) == (0.9, 0.9)
        # As worked out in the forecast's own tests.
        assert idle.predicted_time_to_first_token_ms == pytest.approx(101)
        assert idle.predicted_latency_per_token_ms == pytest.approx(12.8945)
        assert idle.in_time
        assert (busy.expert, busy.eligible, busy.in_flight) == ("fast", False, 1)
        assert busy.predicted_time_to_first_token_ms > 101

    async def test_changes_nothing(self, make_service, counted):
        service = make_service(algorithm="RoundRobin")
        request = DecideRequest(model="auto")
        first = await explain(service, request=request)
        again = await explain(service, request=request)
        assert first == again
        assert (await decide(service)).endpoint == first.decision.endpoint
        assert (await explain(service, request=request)).decision != first.decision
        assert len(service.state) == 0
        assert counted(service, "decision_seconds_count", algorithm="RoundRobin") == 1

    @pytest.mark.parametrize("fields", [{}, {"request": DecideRequest(model="gpt-9")}])
    async def test_an_unknown_model_is_not_found(self, fields, service):
        with pytest.raises(AbortedError) as aborted:
            await explain(service, **fields)
        assert aborted.value.args[0] is grpc.StatusCode.NOT_FOUND

    async def test_in_time_is_what_the_decider_says(self, make_service):
        """It counts predicted latencies with a margin; by themselves they are within the limit."""
        service = make_service(algorithm="LatencyQualityGreedy")
        idle = (await explain(service, request=DecideRequest(model="auto", prompt="x"))).candidates
        barely = 1.05 * idle[0].predicted_latency_per_token_ms
        wanted = DecideRequest(model="auto", prompt="x", latency_per_token_ms=barely)
        got = await explain(service, request=wanted)
        assert got.decision.why.endswith("0 in time")
        assert not any(candidate.in_time for candidate in got.candidates)

    async def test_a_policy_without_endpoints_has_none_to_explain(self, service, build):
        service.install([build.snapshot()])
        got = await explain(service, request=DecideRequest(model="auto"))
        assert got.decision.rejected
        assert got.decision.why == "no endpoint is ready"
        assert list(got.candidates) == []


class TestExplainPast:
    async def test_tells_what_was_decided(self, service):
        route(service, "r1")
        service.state.set_ready(A, ready=False)
        got = await explain(service, request_id="r1")
        assert got.decision.endpoint == A
        assert {c.expert: c.eligible for c in got.candidates} == {"good": True, "fast": True}
        assert not any(c.HasField("in_time") for c in got.candidates)
        assert not any(c.HasField("in_flight") for c in got.candidates)

    async def test_tells_what_was_in_time_if_that_was_looked_at(self, make_service):
        service = make_service(algorithm="LatencyQualityGreedy", admission="Reject")
        with pytest.raises(ApiError):
            route(service, "r1", Limits(latency_per_token_ms=0.001))
        got = await explain(service, request_id="r1")
        assert got.decision.rejected
        assert [c.in_time for c in got.candidates if c.HasField("in_time")] == [False, False]

    async def test_an_unknown_one_is_not_found(self, service):
        with pytest.raises(AbortedError) as aborted:
            await explain(service, request_id="r9")
        assert aborted.value.args == (
            grpc.StatusCode.NOT_FOUND,
            "'r9' is not among the recent decisions.",
        )
