from dataclasses import replace

import numpy as np
import pytest

from pointsman_learning.evaluation.metrics import NO_DOMAIN, measure, prompts, routing, timeline
from pointsman_learning.simulator import Outcome


def test_every_request_is_in_time_violated_or_rejected(outcome: Outcome) -> None:
    metrics = measure(outcome)
    assert metrics.requests == 5
    assert metrics.rejected == pytest.approx(1 / 5)
    assert metrics.failed == pytest.approx(1 / 5)
    assert metrics.violation_rate == pytest.approx(2 / 5)  # one late, one failed
    in_time = outcome.in_time.mean()
    assert in_time + metrics.violation_rate + metrics.rejected == pytest.approx(1)


def test_qos_is_over_all_arrived_requests(outcome: Outcome) -> None:
    metrics = measure(outcome)
    assert metrics.average_qos == pytest.approx((0.5 + 0.9) / 5)
    assert metrics.resource_efficiency == pytest.approx((0.5 + 0.9) / 2.0)
    assert metrics.preemptions == 2


def test_quality_and_latencies_are_of_answered_requests(outcome: Outcome) -> None:
    metrics = measure(outcome)
    assert metrics.quality == pytest.approx((0.5 + 0.9 + 0.5) / 3)
    assert metrics.latency_p50_ms == pytest.approx(100)
    assert metrics.latency_p99_ms == pytest.approx(np.percentile([50, 100, 200], 99))
    assert metrics.first_token_p50_ms == pytest.approx(200)


def test_busy_is_the_share_of_accelerator_time_until_the_last_answer(outcome: Outcome) -> None:
    assert measure(outcome).busy == pytest.approx(2.0 / (4.0 * 3))


def test_a_limit_of_the_first_token_counts_too(outcome: Outcome) -> None:
    limited = replace(outcome.scenario, first_token_limit_s=np.full(5, 0.15))
    metrics = measure(replace(outcome, scenario=limited))
    assert metrics.average_qos == pytest.approx(0.5 / 5)


def test_nothing_answered_is_not_a_number(outcome: Outcome) -> None:
    nothing = replace(
        outcome,
        endpoint=np.full(5, -1),
        finish_s=np.full(5, np.inf),
        first_token_s=np.full(5, np.inf),
        busy_s=np.zeros(3),
    )
    metrics = measure(nothing)
    assert metrics.average_qos == 0
    assert metrics.rejected == 1
    assert np.isnan([metrics.quality, metrics.latency_p50_ms, metrics.resource_efficiency]).all()


def test_routing_counts_endpoints_of_one_expert_together(outcome: Outcome) -> None:
    found = routing(outcome)
    assert found.domains == ("code", "math")
    assert found.experts == ("chat", "coder")
    # code: requests 0, 2, 4; math: 1, 3
    assert found.requests.tolist() == [[2, 1, 0], [0, 1, 1]]
    assert found.qos.tolist() == [[0.5, 0, 0], [0, 0.9, 0]]


def test_routing_without_domains(outcome: Outcome) -> None:
    plain = replace(outcome.scenario, domain=None, domains=())
    found = routing(replace(outcome, scenario=plain))
    assert found.domains == (NO_DOMAIN,)
    assert found.requests.sum() == 5


def test_timeline_loses_no_request(outcome: Outcome) -> None:
    line = timeline(outcome, bins=2)
    assert line.bin_s == pytest.approx(2.0)
    assert line.requests.tolist() == [2, 3]
    assert line.qos.tolist() == pytest.approx([1.4, 0])


def test_qos_by_prompt(outcome: Outcome) -> None:
    assert prompts(outcome) is None
    asked = replace(outcome.scenario, prompt=np.array([7, 2, 7, 2, 9]))
    told = prompts(replace(outcome, scenario=asked))
    assert told is not None
    assert told.rows.tolist() == [2, 7, 9]
    assert told.requests.tolist() == [2, 2, 1]
    assert told.qos == pytest.approx([0.9, 0.5, 0.0])
