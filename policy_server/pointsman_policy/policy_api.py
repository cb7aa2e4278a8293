"""The server's own gRPC service, ``pointsman.v1.PolicyService``."""

from typing import NoReturn

import grpc
import numpy as np

from pointsman_core.latency import forecast
from pointsman_core.observation import Request
from pointsman_core.router import Decision, Router
from pointsman_policy.openai_api import CHARS_PER_TOKEN, ApiError
from pointsman_policy.service import (
    MAX_LIMIT_MS,
    Limits,
    RoutingService,
    make_request,
)
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import PolicyServiceServicer

_DecideContext = grpc.aio.ServicerContext[pb.DecideRequest, pb.Decision]
_ExplainContext = grpc.aio.ServicerContext[pb.ExplainRequest, pb.Explanation]

_CODES = {404: grpc.StatusCode.NOT_FOUND, 503: grpc.StatusCode.UNAVAILABLE}


class PolicyServicer(PolicyServiceServicer):
    """Decides and explains without touching the in-flight table."""

    def __init__(self, service: RoutingService) -> None:
        self._service = service

    async def Decide(  # noqa: N802 - gRPC's name
        self, request: pb.DecideRequest, context: _DecideContext
    ) -> pb.Decision:
        """Decide one request."""
        try:
            router, wanted = self._parse(request)
        except ApiError as error:
            await _abort(context, error)
        return _decision(self._service.decide(router, wanted))

    async def Explain(  # noqa: N802 - gRPC's name
        self, request: pb.ExplainRequest, context: _ExplainContext
    ) -> pb.Explanation:
        """Explain a decision that might come, or a recent one."""
        try:
            if request.WhichOneof("subject") == "request_id":
                return self._explain_past(request.request_id)
            return self._explain_now(request.request)
        except ApiError as error:
            await _abort(context, error)

    def _parse(self, request: pb.DecideRequest) -> tuple[Router, Request]:
        router = self._service.router(request.model)
        limits = Limits(
            _limit(request, "latency_per_token_ms"), _limit(request, "time_to_first_token_ms")
        )
        estimate = max(1, round(len(request.prompt) / CHARS_PER_TOKEN))
        return router, make_request(
            router.snapshot,
            limits,
            prompt=request.prompt,
            prompt_tokens=request.prompt_tokens or estimate,
            max_output_tokens=request.max_output_tokens or None,
            arrival_s=self._service.clock(),
            streams=True,
        )

    def _explain_past(self, request_id: str) -> pb.Explanation:
        decision = self._service.recent(request_id)
        if decision is None:
            raise ApiError(
                404, "unknown_request", f"{request_id!r} is not among the recent decisions."
            )
        return pb.Explanation(decision=_decision(decision), candidates=_candidates(decision))

    def _explain_now(self, request: pb.DecideRequest) -> pb.Explanation:
        router, wanted = self._parse(request)
        now = self._service.clock()
        decision = router.preview(wanted, now_s=now)
        seen = router.observe(wanted, now_s=now)
        predicted = forecast(seen)
        in_time = predicted.keeps_limits(seen)
        present = seen.per_candidate(np.ones_like(seen.resident_limit_s))
        candidates = _candidates(decision)
        for i, candidate in enumerate(candidates):
            if decision.in_time is None:  # what the decider itself goes by has its margins
                candidate.in_time = bool(in_time[i])
            candidate.predicted_latency_per_token_ms = 1e3 * float(predicted.per_token_s[i])
            candidate.predicted_time_to_first_token_ms = 1e3 * float(predicted.first_token_s[i])
            candidate.in_flight = int(present[i])
        return pb.Explanation(decision=_decision(decision), candidates=candidates)


def _limit(request: pb.DecideRequest, name: str) -> float | None:
    if not request.HasField(name):
        return None
    value = float(getattr(request, name))
    if not 0.0 < value <= MAX_LIMIT_MS:
        raise ApiError(
            400, "invalid_limit", f"{name} must be above 0 and at most {MAX_LIMIT_MS:.0f}."
        )
    return value


def _decision(decision: Decision) -> pb.Decision:
    chosen = decision.chosen
    return pb.Decision(
        policy=decision.snapshot.full_name,
        snapshot_version=decision.snapshot.version,
        algorithm=str(decision.algorithm),
        rejected=chosen is None,
        expert=chosen.expert if chosen else "",
        endpoint=chosen.address if chosen else "",
        served_model=chosen.model if chosen else "",
        retry_on=[c.address for c in decision.retry_on],
        why=decision.why,
        fallback_reason=decision.fallback_reason or "",
    )


_PARTS = {
    "policy_probability": "policy probability",
    "chance_in_time": "chance in time",
    "impact_on_others": "impact on others",
}
"""Fields of a candidate's explanation, and the names of the deciders' parts that fill them."""


def _candidates(decision: Decision) -> list[pb.CandidateExplanation]:
    return [_candidate(decision, i) for i in range(len(decision.snapshot.candidates))]


def _candidate(decision: Decision, i: int) -> pb.CandidateExplanation:
    candidate = decision.snapshot.candidates[i]
    explained = pb.CandidateExplanation(
        expert=candidate.expert,
        endpoint=candidate.address,
        eligible=bool(decision.eligible[i]),
        score=float(decision.scores[i]),
        expected_quality=float(decision.quality[i]),
        in_time=None if decision.in_time is None else bool(decision.in_time[i]),
    )
    for field, name in _PARTS.items():
        if name in decision.parts:
            setattr(explained, field, float(decision.parts[name][i]))
    return explained


async def _abort(context: _DecideContext | _ExplainContext, error: ApiError) -> NoReturn:
    code = _CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
    await context.abort(code, error.message)
    raise AssertionError("abort() raises")
