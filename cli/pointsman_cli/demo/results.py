"""Statistics of one decider's run, and the report of all of them.

QoS of a request is the score of the answer if its latency per token kept the limit, else
0; averages go over all requests that arrived, so failing or refusing one costs its QoS.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pointsman_cli.demo.load import Ending, Outcome


class Grader(Protocol):
    """Knows how good each expert's answer to each request is."""

    def score(self, index: int, expert: str) -> tuple[float, bool]:
        """Score from 0 to 1 of request ``index``, and whether it was measured."""
        ...


class Frozen(BaseModel):
    """Base of the report's parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ExpertShare(Frozen):
    """What one expert did in a run."""

    requests: int
    """Requests it answered."""
    late: int
    mean_quality: float
    """Mean score of its answers, in time or not."""
    output_tokens: int


class HostLoad(Frozen):
    """How busy this machine was during a run; too busy, and the numbers are not the policy's."""

    loop_lag_p99_ms: float
    """99th percentile of how late the load generator's own timers fired."""
    cpu_busy: float | None
    """Share of all cores in use, 0 to 1; None where the system does not tell."""


class Shares(Frozen):
    """All requests of a run, split so that the parts sum to 1."""

    quality_in_time: float
    """The average QoS."""
    missing_in_time: float
    """What the answers in time lacked to a score of 1."""
    late: float
    failed: float
    rejected: float


class ModelReport(Frozen):
    """What HanDrl decided by."""

    source: str = ""
    sha256: str = ""
    """Empty: it had none, so the policy's fallback decided."""
    trained: bool = False
    error: str = ""
    """Why it had none."""


class RunResult(Frozen):
    """One decider under the workload."""

    decider: str
    requests: int
    failed: int
    rejected: int
    late: int
    average_qos: float
    average_qos_95: float
    """Half the width of its 95 % interval, taking requests as independent: queues tie them
    together, so the true one is wider."""
    violation_rate: float
    """Late or failed requests over all."""
    p50_ms_per_token: float | None
    p99_ms_per_token: float | None
    p50_ms_to_first_token: float | None
    p99_ms_to_first_token: float | None
    mean_quality: float | None
    """Mean score of all answers, in time or not."""
    output_tokens_per_second: float
    duration_seconds: float
    """From the first arrival to the end of the last answer."""
    experts: dict[str, ExpertShare]
    shares: Shares
    failures: dict[str, int]
    """Failed and rejected requests by reason."""
    without_decision: int
    """Answers that Envoy routed by itself, the policy server being silent."""
    by_fallback: int
    """Answers whose endpoint the policy's fallback chose, the decider having failed."""
    without_score: int
    """Answers graded by a declared prior, the workload having no score of that expert."""
    in_flight_at_end: int
    """Entries left in the server's in-flight table after the run."""
    host: HostLoad
    ms_per_token: list[float] = Field(exclude=True, repr=False)
    """Latency per token of each answer, ascending; for the plot."""
    qos: list[float] = Field(exclude=True, repr=False)
    """QoS of each request, in order of arrival; for `compare`."""
    answered_by: list[str | None] = Field(exclude=True, repr=False)
    """Expert that answered each request, in order of arrival."""


class Comparison(Frozen):
    """One decider's run, and the same requests in the laboratory's simulator."""

    decider: str
    simulator: RunResult
    difference: float
    """Average QoS of the data plane less that of the simulator."""
    difference_95: float
    """Half the width of its 95 % interval over the requests, which are paired; taken as
    independent of each other, so the true one is wider."""
    same_expert: float
    """Share of the requests that the same expert answered in both, or none in both."""


class WorkloadReport(Frozen):
    """What all runs had in common."""

    description: str
    requests: int
    seconds: float
    rate: float
    """Requests per second."""
    estimated_load: float | None
    """Rate over what the cost model says the site can do within its limit."""
    mean_input_tokens: float
    max_output_tokens: int
    limit_ms_per_token: float
    seed: int


class DemoReport(Frozen):
    """What ``pointsman demo --json`` prints."""

    runs: list[RunResult]
    level_with_best: list[str] = []
    """Deciders whose average QoS these requests do not tell from the best one's: see `level`."""
    workload: WorkloadReport
    simulated: bool
    """Whether any engine was a simulation."""
    simulated_experts: list[str]
    model: ModelReport | None = None
    """Of HanDrl; None where it took no part."""
    comparison: list[Comparison] = []
    """By decider, where ``--compare`` asked for it."""
    warnings: list[str]
    note: Literal["simulated engines and composed scores: compare deciders, not sites"] = (
        "simulated engines and composed scores: compare deciders, not sites"
    )


def summarise(
    decider: str,
    outcomes: Sequence[Outcome],
    grader: Grader,
    *,
    limit_ms: float,
    in_flight_at_end: int,
    host: HostLoad,
) -> RunResult:
    """Statistics over all requests that arrived in one run."""
    answered = [outcome for outcome in outcomes if outcome.ending is Ending.ANSWERED]
    graded = [_grade(outcome, grader) for outcome in answered]
    scores = np.array([score for score, _ in graded])
    per_token = np.array([outcome.ms_per_token or 0.0 for outcome in answered])
    first = np.array([o.ms_to_first_token for o in answered if o.ms_to_first_token is not None])
    in_time = per_token <= limit_ms
    endings = Counter(outcome.ending for outcome in outcomes)
    total = max(1, len(outcomes))
    duration = max((o.last_token_s or 0.0 for o in answered), default=0.0)
    late = int(np.count_nonzero(~in_time))
    qos = np.zeros(total)
    qos[[outcome.index for outcome in answered]] = np.where(in_time, scores, 0.0)
    average_qos = float(qos.mean())
    return RunResult(
        decider=decider,
        requests=len(outcomes),
        failed=endings[Ending.FAILED],
        rejected=endings[Ending.REJECTED],
        late=late,
        average_qos=average_qos,
        average_qos_95=1.96 * float(qos.std()) / math.sqrt(total),
        violation_rate=(late + endings[Ending.FAILED]) / total,
        p50_ms_per_token=percentile(per_token, 50),
        p99_ms_per_token=percentile(per_token, 99),
        p50_ms_to_first_token=percentile(first, 50),
        p99_ms_to_first_token=percentile(first, 99),
        mean_quality=float(scores.mean()) if len(scores) else None,
        output_tokens_per_second=sum(o.output_tokens for o in answered) / max(duration, 1e-9),
        duration_seconds=duration,
        experts=_by_expert(answered, scores, in_time),
        shares=Shares(
            quality_in_time=average_qos,
            missing_in_time=float((1 - scores[in_time]).sum()) / total,
            late=late / total,
            failed=endings[Ending.FAILED] / total,
            rejected=endings[Ending.REJECTED] / total,
        ),
        failures=dict(Counter(o.reason for o in outcomes if o.reason).most_common()),
        without_decision=sum(not outcome.decided for outcome in answered),
        by_fallback=sum(outcome.fell_back for outcome in answered),
        without_score=sum(not measured for _, measured in graded),
        in_flight_at_end=in_flight_at_end,
        host=host,
        ms_per_token=np.sort(per_token).tolist(),
        qos=qos.tolist(),
        answered_by=[o.expert if o.ending is Ending.ANSWERED else None for o in outcomes],
    )


def level(runs: Sequence[RunResult]) -> list[str]:
    """Deciders, but for the best, that the same requests do not tell from it.

    The 95 % interval of the difference of their average QoS, paired by request, holds 0.
    """
    best = max(runs, key=lambda run: run.average_qos)
    gaps = [(run.decider, *_difference(best, run)) for run in runs if run is not best]
    return [decider for decider, gap, margin in gaps if gap <= margin]


def compare(run: RunResult, simulated: RunResult) -> Comparison:
    """Set a run beside the simulation of the same requests."""
    difference, margin = _difference(run, simulated)
    pairs = zip(run.answered_by, simulated.answered_by, strict=True)
    return Comparison(
        decider=run.decider,
        simulator=simulated,
        difference=difference,
        difference_95=margin,
        same_expert=sum(one == other for one, other in pairs) / len(run.qos),
    )


def _difference(run: RunResult, other: RunResult) -> tuple[float, float]:
    """Average QoS of one less that of the other, and half the width of its 95 % interval.

    Paired by request, and these taken as independent of each other.
    """
    differences = np.subtract(run.qos, other.qos)
    margin = 1.96 * float(differences.std()) / math.sqrt(len(differences))
    return float(differences.mean()), margin


def percentile(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", q: float) -> float | None:
    """The ``q``-th percentile, interpolated; None of nothing."""
    return float(np.percentile(values, q)) if len(values) else None


def _grade(outcome: Outcome, grader: Grader) -> tuple[float, bool]:
    if outcome.expert is None:
        return 0.0, False
    return grader.score(outcome.index, outcome.expert)


def _by_expert(
    answered: Iterable[Outcome], scores: Iterable[float], in_time: Iterable[bool]
) -> dict[str, ExpertShare]:
    rows: dict[str, list[tuple[Outcome, float, bool]]] = {}
    for outcome, score, kept in zip(answered, scores, in_time, strict=True):
        rows.setdefault(outcome.expert or "unknown", []).append((outcome, score, bool(kept)))
    return {
        expert: ExpertShare(
            requests=len(own),
            late=sum(not kept for _, _, kept in own),
            mean_quality=float(np.mean([score for _, score, _ in own])),
            output_tokens=sum(outcome.output_tokens for outcome, _, _ in own),
        )
        for expert, own in sorted(rows.items())
    }
