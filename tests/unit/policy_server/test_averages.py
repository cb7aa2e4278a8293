"""What the operator asks Prometheus for is what the policy server exports."""

import re

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from pointsman_operator.stats import AVERAGE_QOS, VIOLATION_RATE
from pointsman_policy.http_api import Health, build_app
from pointsman_policy.openai_api import ApiError, parse_completion
from pointsman_policy.service import Limits
from pointsman_policy.tracker import End

A, POLICY = "10.0.0.1:8000", "default/auto"
TERM = re.compile(r"sum by \(policy\) \(increase\((\w+)\[\w+\]\)\)")
QUERIES = pytest.mark.parametrize("query", [AVERAGE_QOS, VIOLATION_RATE], ids=["qos", "violations"])


@pytest.fixture
def handled(service, event):
    """Have the service handle one request with a known end."""
    count = iter(range(100))

    def handle(*, tokens=1, end=End.WHOLE, status=200, ended_s=100.01):
        name, tracker = f"r{next(count)}", service.tracker
        completion = parse_completion(
            b'{"model": "auto", "messages": [{"role": "user", "content": "hello"}]}'
        )
        tracker.opened(name, now_s=100.0)
        service.route(completion, Limits(), request_id=name, arrival_s=100.0)
        told = {"content_type": "text/event-stream", "served_by": A, "expert": "good"}
        tracker.responded(name, status=status, **told)
        for _ in range(tokens):
            tracker.received(name, event(), now_s=ended_s)
        tracker.ended(name, end, now_s=ended_s)

    return handle


@pytest.fixture
def ask(service):
    """The value of a query, as if all requests had come within its window."""

    async def evaluate(query):
        async with TestClient(TestServer(build_app(service, Health()))) as client:
            text = await (await client.get("/metrics")).text()
        families = list(text_string_to_metric_families(text))
        samples = [sample for family in families for sample in family.samples]

        def total(term):
            of = [s.value for s in samples if s.name == term[1] and s.labels["policy"] == POLICY]
            return str(sum(of)) if of else "None"

        # What is left of these queries means the same in Python.
        return eval(TERM.sub(total, query))

    return evaluate


@QUERIES
async def test_every_metric_asked_for_is_exported(query, service, handled):
    handled()
    exported = {
        sample.name
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("policy") == POLICY
    }
    assert set(re.findall(r"pointsman_\w+", query)) <= exported
    assert set(re.findall(r"pointsman_\w+", query)) == set(TERM.findall(query))


async def test_averages_are_those_of_the_server_s_own_window(service, handled, ask):
    handled()
    handled()
    handled(ended_s=109.0)  # too late
    handled(status=500)
    handled(end=End.EARLY)
    handled(end=End.UNSEEN)  # nobody knows how it did
    handled(tokens=0)  # its latency per token is not known
    for address in ("10.0.0.1:8000", "10.0.0.2:8000"):
        service.state.set_ready(address, ready=False)
    with pytest.raises(ApiError):
        handled()
    totals = service.statistics.totals(POLICY, now_s=service.clock())
    assert (totals.requests, totals.violations) == (6, 1)
    assert await ask(AVERAGE_QOS) == pytest.approx(totals.predicted_qos_sum / 6)
    assert await ask(AVERAGE_QOS) == pytest.approx(0.9 * 2 / 6)
    assert await ask(VIOLATION_RATE) == pytest.approx(1 / 6)


def test_before_the_first_request_the_counters_are_there(service):
    """An increase counts from the first value that Prometheus has seen."""
    for name in ("qos_requests_total", "predicted_qos_total"):
        found = service.metrics.registry.get_sample_value(f"pointsman_{name}", {"policy": POLICY})
        assert found == 0


async def test_without_a_violation_the_rate_is_zero(handled, ask):
    handled()
    assert await ask(VIOLATION_RATE) == 0


async def test_where_all_is_rejected_both_are_zero(service, handled, ask):
    for address in ("10.0.0.1:8000", "10.0.0.2:8000"):
        service.state.set_ready(address, ready=False)
    with pytest.raises(ApiError):
        handled()
    assert await ask(VIOLATION_RATE) == 0
    assert await ask(AVERAGE_QOS) == 0
