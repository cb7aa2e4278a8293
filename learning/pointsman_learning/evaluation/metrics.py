"""What is measured of one run: one decider on one scenario.

All shares are of the requests that arrived: answered in time, violations (late or failed) and
rejected make 1. Latencies are over answered requests only, so read them beside the shares: a
decider that rejects much looks fast.
"""

from dataclasses import dataclass

import numpy as np

from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.simulator.scenario import REJECTED, Outcome

TIMELINE_BINS = 60
"""Equal stretches of time into which a run's arrivals are cut."""
NO_DOMAIN = "all"
"""Stands for the domain where a scenario tells none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Numbers of one run; NaN where nothing was there to be measured."""

    requests: int
    average_qos: float
    """Mean QoS over all arrived requests: the headline."""
    quality: float
    """Mean actual quality of the answers given, late ones too."""
    violation_rate: float
    """Share late or failed."""
    rejected: float
    """Share for which no endpoint was chosen."""
    failed: float
    """Share lost with its endpoint; part of the violations."""
    latency_p50_ms: float
    """Latency per token."""
    latency_p95_ms: float
    latency_p99_ms: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    resource_efficiency: float
    """Sum of QoS per busy accelerator-second."""
    busy: float
    """Share of accelerator time in use until the last answer."""
    preemptions: int


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Where requests of each domain went."""

    domains: tuple[str, ...]
    """D names."""
    experts: tuple[str, ...]
    """X names, each once though it may have several endpoints."""
    requests: IntArray
    """(D, X + 1) requests sent to each expert; last column: rejected."""
    qos: FloatArray
    """(D, X + 1) sum of their QoS."""


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """QoS over time, by arrival."""

    bin_s: float
    """Length of one of the B stretches."""
    requests: IntArray
    """(B,) arrivals."""
    qos: FloatArray
    """(B,) sum of their QoS."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """QoS by prompt; the same prompt asked in several windows, or twice in one, is one row."""

    rows: IntArray
    """(K,) the prompts asked, as rows of the corpus, ascending."""
    requests: IntArray
    """(K,) how often each was asked."""
    qos: FloatArray
    """(K,) sum of the QoS of its answers."""


def measure(outcome: Outcome) -> Metrics:
    """Sum a run up."""
    scenario = outcome.scenario
    answered = np.isfinite(outcome.finish_s)
    rejected = outcome.endpoint == REJECTED
    qos = outcome.qos
    latency_ms = outcome.latency_per_token_s[answered] * 1e3
    first_ms = (outcome.first_token_s - scenario.arrival_s)[answered] * 1e3
    served = np.flatnonzero(answered)
    quality = scenario.score[served, outcome.endpoint[served]]
    violated = ~rejected & ~outcome.in_time
    p50, p95, p99 = _percentiles(latency_ms, (50, 95, 99))
    first_p50, first_p99 = _percentiles(first_ms, (50, 99))
    busy_s = float(outcome.busy_s.sum())
    end_s = float(np.max(outcome.finish_s[answered], initial=scenario.arrival_s[-1]))
    return Metrics(
        requests=len(scenario),
        average_qos=float(qos.mean()),
        quality=_mean(quality),
        violation_rate=float(violated.mean()),
        rejected=float(rejected.mean()),
        failed=float((~answered & ~rejected).mean()),
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        first_token_p50_ms=first_p50,
        first_token_p99_ms=first_p99,
        resource_efficiency=float(qos.sum()) / busy_s if busy_s > 0 else float("nan"),
        busy=busy_s / (end_s * scenario.endpoints) if end_s > 0 else float("nan"),
        preemptions=int(outcome.preemptions.sum()),
    )


def routing(outcome: Outcome) -> Routing:
    """Count where requests of each domain went, endpoints of one expert together."""
    scenario = outcome.scenario
    names = [candidate.expert for candidate in scenario.snapshot.candidates]
    experts = tuple(dict.fromkeys(names))
    column = np.array([experts.index(name) for name in names], np.int64)
    target = np.where(outcome.endpoint == REJECTED, len(experts), column[outcome.endpoint])
    domains, domain = scenario.domains, scenario.domain
    if domain is None:
        domains, domain = (NO_DOMAIN,), np.zeros(len(scenario), np.int64)
    shape = (len(domains), len(experts) + 1)
    cell = domain * shape[1] + target
    cells = shape[0] * shape[1]
    return Routing(
        domains=domains,
        experts=experts,
        requests=np.bincount(cell, minlength=cells).reshape(shape),
        qos=_sums(cell, outcome.qos, cells).reshape(shape),
    )


def prompts(outcome: Outcome) -> Prompts | None:
    """Sum QoS up by prompt; None where the scenario does not tell which was asked."""
    asked = outcome.scenario.prompt
    if asked is None:
        return None
    rows, number, requests = np.unique(asked, return_inverse=True, return_counts=True)
    return Prompts(rows, requests, _sums(number, outcome.qos, len(rows)))


def timeline(outcome: Outcome, *, bins: int = TIMELINE_BINS) -> Timeline:
    """Cut a run's arrivals into equal stretches of time."""
    arrival_s = outcome.scenario.arrival_s
    bin_s = max(float(arrival_s[-1]), 1e-9) / bins
    number = np.minimum((arrival_s / bin_s).astype(np.int64), bins - 1)
    return Timeline(
        bin_s=bin_s,
        requests=np.bincount(number, minlength=bins),
        qos=_sums(number, outcome.qos, bins),
    )


def _sums(group: IntArray, values: FloatArray, groups: int) -> FloatArray:
    return np.bincount(group, weights=values, minlength=groups).astype(np.float64)


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _percentiles(values: FloatArray, at: tuple[int, ...]) -> tuple[float, ...]:
    if not len(values):
        return (float("nan"),) * len(at)
    return tuple(float(value) for value in np.percentile(values, at))
