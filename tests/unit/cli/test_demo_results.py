import json

import pytest

from pointsman_cli.demo.load import Ending, Outcome
from pointsman_cli.demo.results import (
    DemoReport,
    HostLoad,
    RunResult,
    WorkloadReport,
    compare,
    level,
    summarise,
)

IDLE = HostLoad(loop_lag_p99_ms=1.0, cpu_busy=0.2)


class Table:
    """Scores by request; experts named ``prior…`` have none of their own."""

    def __init__(self, *scores: float) -> None:
        self._scores = scores

    def score(self, index: int, expert: str) -> tuple[float, bool]:
        return self._scores[index], not expert.startswith("prior")


def answered(index: int, *, at: float, last: float, tokens: int, expert: str = "a") -> Outcome:
    return Outcome(
        index=index,
        arrival_s=at,
        ending=Ending.ANSWERED,
        expert=expert,
        decided=True,
        first_token_s=at + 0.5,
        last_token_s=last,
        output_tokens=tokens,
    )


def run(outcomes, *scores: float, limit_ms: float = 100.0) -> RunResult:
    return summarise(
        "Random",
        outcomes,
        Table(*scores),
        limit_ms=limit_ms,
        in_flight_at_end=0,
        host=IDLE,
    )


@pytest.fixture
def result() -> RunResult:
    """Five requests: 100 ms and 50 ms per token in time, 200 late, one failed, one rejected."""
    return run(
        [
            answered(0, at=0.0, last=1.0, tokens=10),
            answered(1, at=1.0, last=2.0, tokens=20, expert="prior-b"),
            answered(2, at=2.0, last=4.0, tokens=10),
            Outcome(index=3, arrival_s=3.0, reason="connection: ServerDisconnectedError"),
            Outcome(index=4, arrival_s=4.0, ending=Ending.REJECTED, reason="HTTP 429: full"),
        ],
        *(1.0, 0.5, 0.8, 1.0, 1.0),
    )


def test_average_qos_goes_over_all_requests(result):
    # In time: 1.0 (exactly at the limit) and 0.5; the late 0.8 counts nothing.
    assert result.average_qos == pytest.approx(1.5 / 5)
    # Squares of 1, 0.5 and three zeros: mean 0.25, less 0.3 squared.
    assert result.average_qos_95 == pytest.approx(1.96 * (0.16 / 5) ** 0.5)
    assert result.requests == 5
    assert (result.late, result.failed, result.rejected) == (1, 1, 1)
    assert result.violation_rate == pytest.approx(2 / 5)


def test_latencies_are_those_of_answers(result):
    assert result.ms_per_token == pytest.approx([50.0, 100.0, 200.0])
    assert result.p50_ms_per_token == pytest.approx(100.0)
    assert result.p99_ms_per_token == pytest.approx(198.0)
    assert result.p50_ms_to_first_token == pytest.approx(500.0)


def test_quality_is_that_of_answers_late_or_not(result):
    assert result.mean_quality == pytest.approx((1.0 + 0.5 + 0.8) / 3)
    assert result.without_score == 1
    assert result.output_tokens_per_second == pytest.approx(40 / 4.0)
    assert result.duration_seconds == 4.0


def test_shares_sum_to_one(result):
    shares = result.shares.model_dump()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares == pytest.approx(
        {
            "quality_in_time": 0.3,
            "missing_in_time": 0.1,
            "late": 0.2,
            "failed": 0.2,
            "rejected": 0.2,
        }
    )


def test_split_by_expert(result):
    assert list(result.experts) == ["a", "prior-b"]
    own = result.experts["a"]
    assert (own.requests, own.late, own.output_tokens) == (2, 1, 20)
    assert own.mean_quality == pytest.approx(0.9)
    assert result.failures == {
        "connection: ServerDisconnectedError": 1,
        "HTTP 429: full": 1,
    }


def test_answers_without_a_decision_count_but_score_nothing():
    outcome = answered(0, at=0.0, last=0.1, tokens=10)
    outcome.expert, outcome.decided = None, False
    result = run([outcome], 1.0)
    assert result.average_qos == 0.0
    assert result.without_decision == 1
    assert list(result.experts) == ["unknown"]


@pytest.mark.parametrize("outcomes", [[], [Outcome(index=0, arrival_s=0.0)]], ids=["none", "lost"])
def test_nothing_answered(outcomes):
    result = run(outcomes, 1.0)
    assert result.average_qos == 0.0
    assert result.p50_ms_per_token is None
    assert result.mean_quality is None
    assert result.experts == {}


def test_report_as_json(result):
    report = DemoReport(
        runs=[result],
        workload=WorkloadReport(
            description="composed: …",
            requests=5,
            seconds=5.0,
            rate=1.0,
            estimated_load=None,
            mean_input_tokens=10.0,
            max_output_tokens=400,
            limit_ms_per_token=100.0,
            seed=0,
        ),
        simulated=True,
        simulated_experts=["a"],
        warnings=[],
    )
    data = json.loads(report.model_dump_json())
    assert set(data) >= {"runs", "workload", "simulated"}
    assert data["simulated"] is True
    assert set(data["runs"][0]) >= {
        "decider",
        "requests",
        "failed",
        "rejected",
        "average_qos",
        "violation_rate",
        "p50_ms_per_token",
        "p99_ms_per_token",
        "mean_quality",
        "experts",
    }
    # One number per request would bury the rest.
    assert {"ms_per_token", "qos", "answered_by"}.isdisjoint(data["runs"][0])


def test_choices_of_the_fallback_are_counted():
    outcome = answered(0, at=0.0, last=0.1, tokens=10)
    outcome.fell_back = True
    assert run([outcome], 1.0).by_fallback == 1


def test_compares_request_by_request(result):
    # The second goes to another expert, the third is in time: QoS 1, 0.5, 0.8 and 0, 0.
    simulated = run(
        [
            answered(0, at=0.0, last=0.5, tokens=10),
            answered(1, at=1.0, last=2.0, tokens=20),
            answered(2, at=2.0, last=2.5, tokens=10),
            Outcome(index=3, arrival_s=3.0),
            Outcome(index=4, arrival_s=4.0, ending=Ending.REJECTED),
        ],
        *(1.0, 0.5, 0.8, 1.0, 1.0),
    )
    compared = compare(result, simulated)
    assert compared.simulator.average_qos == pytest.approx(2.3 / 5)
    assert compared.difference == pytest.approx(-0.8 / 5)
    # Differences are four zeros and -0.8: mean square 0.128, less 0.16 squared.
    assert compared.difference_95 == pytest.approx(1.96 * (0.1024 / 5) ** 0.5)
    assert compared.same_expert == pytest.approx(4 / 5)


def with_qos(result, decider, qos):
    return result.model_copy(
        update={"decider": decider, "qos": qos, "average_qos": sum(qos) / len(qos)}
    )


def test_level_with_the_best_is_what_the_same_requests_do_not_tell_from_it(result):
    hard = [0.0, 1.0] * 50  # the requests differ far more than the deciders do
    runs = [
        with_qos(result, "a little worse on all", [max(0.0, one - 0.02) for one in hard]),
        with_qos(result, "best", hard),
        with_qos(result, "worse on one alone", [*hard[:-1], 0.5]),
        with_qos(result, "the same", hard),
        with_qos(result, "hopeless", [0.0] * 100),
    ]
    assert level(runs) == ["worse on one alone", "the same"]
    assert level(runs[1:2]) == []
