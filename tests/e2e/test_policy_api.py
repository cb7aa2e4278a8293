"""The server's own gRPC services, beside a request path in use."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pointsman_policy.server import HEALTH_SERVICES
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import PolicyServiceStub


@pytest.fixture
async def channel(site):
    async with grpc.aio.insecure_channel(site.grpc_address) as channel:
        yield channel


async def test_decide_reserves_nothing(site, channel):
    decision = await PolicyServiceStub(channel).Decide(pb.DecideRequest(model="auto", prompt="Hi"))
    assert decision.policy == "default/auto"
    assert decision.algorithm == "LeastLoad"
    assert decision.served_model == f"{decision.expert}-model"
    assert {decision.endpoint, *decision.retry_on} == set(site.addresses.values())
    assert (await site.live())["in_flight"] == 0


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (pb.DecideRequest(model="x"), grpc.StatusCode.NOT_FOUND, "Available models: auto."),
        (
            pb.DecideRequest(model="auto", latency_per_token_ms=-1),
            grpc.StatusCode.INVALID_ARGUMENT,
            "latency_per_token_ms must be above 0 and at most 600000.",
        ),
    ],
)
async def test_decide_refuses_what_is_wrong(channel, request_, code, message):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await PolicyServiceStub(channel).Decide(request_)
    assert caught.value.code() is code
    assert message in caught.value.details()


async def test_explain_tells_how_each_candidate_would_be_judged(channel):
    wanted = pb.DecideRequest(model="auto", prompt="Hi", latency_per_token_ms=0.001)
    answer = await PolicyServiceStub(channel).Explain(pb.ExplainRequest(request=wanted))
    assert [c.expert for c in answer.candidates] == ["ant", "bee", "cow"]
    assert all(c.eligible and c.in_flight == 0 for c in answer.candidates)
    assert all(c.predicted_latency_per_token_ms > 0.001 for c in answer.candidates)
    assert not any(c.in_time for c in answer.candidates)


async def test_explain_tells_of_a_request_that_was(site, channel):
    _, headers, _ = await site.ask()
    subject = pb.ExplainRequest(request_id=headers["x-request-id"])
    answer = await PolicyServiceStub(channel).Explain(subject)
    assert answer.decision.endpoint == headers["x-pointsman-endpoint"]
    assert answer.decision.why == headers["x-pointsman-why"]
    with pytest.raises(grpc.aio.AioRpcError, match="not among the recent decisions"):
        await PolicyServiceStub(channel).Explain(pb.ExplainRequest(request_id="never"))


async def test_health_is_served_under_each_name(channel):
    for service in HEALTH_SERVICES:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, service


async def test_reflection_lists_the_api(channel):
    async def ask():
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    async for answer in stub.ServerReflectionInfo(ask()):
        names = {service.name for service in answer.list_services_response.service}
        assert "pointsman.v1.PolicyService" in names
        return
    pytest.fail("no answer")
