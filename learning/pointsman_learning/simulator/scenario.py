"""What a simulation is given: endpoints, requests with all their truth, and mishaps.

Shapes: N requests in order of arrival, E endpoints (the snapshot's candidates, in its order).
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from pointsman_core.snapshot import Snapshot
from pointsman_core.state import BoolArray, FloatArray, IntArray


class Change(IntEnum):
    """What happens to an endpoint."""

    FAIL = 0
    """It dies: requests on it are lost, and it takes no more."""
    LEAVE = 1
    """It drains: it takes no more requests and finishes those it has."""
    JOIN = 2
    """It is (again) ready, and empty after a failure."""


@dataclass(frozen=True, slots=True)
class Availability:
    """A change of one endpoint's availability; all endpoints start ready."""

    time_s: float
    endpoint: int
    change: Change


@dataclass(frozen=True, slots=True)
class Gauges:
    """How stale the engines' own metrics are when the router sees them."""

    period_s: float = 1.0
    """Time between scrapes."""
    lag_s: float = 0.5
    """Age of a gauge's value when it is scraped."""
    missing: frozenset[int] = frozenset()
    """Endpoints that tell nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """One run's input. Immutable: many deciders are given the same one."""

    snapshot: Snapshot
    arrival_s: FloatArray
    """(N,) ascending, from 0."""
    prompt_tokens: IntArray
    """(N,)"""
    limit_s: FloatArray
    """(N,) limit of the latency per token, in seconds."""
    score: FloatArray
    """(N, E) actual quality of each candidate's answer, in [0, 1]; the router never sees it."""
    output_tokens: IntArray
    """(N, E) actual length of each candidate's answer; the router never sees it."""
    predicted_quality: FloatArray
    """(N, E) what the router expects instead."""
    predicted_output_tokens: FloatArray
    """(N, E)"""
    first_token_limit_s: FloatArray | None = None
    """(N,) limit of the time to the first token, in seconds; None: no such limits."""
    domain: IntArray | None = None
    """(N,) number of the prompt's domain in ``domains``, for reports only."""
    domains: tuple[str, ...] = ()
    availability: tuple[Availability, ...] = ()
    """In order of time."""
    gauges: Gauges = field(default_factory=Gauges)
    seed: int = 0
    description: str = ""
    """Where the parts come from, shown beside every result."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def endpoints(self) -> int:
        """E."""
        return len(self.snapshot.candidates)


REJECTED = -1
"""In `Outcome.endpoint`: no endpoint was chosen."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of each request of a scenario."""

    scenario: Scenario
    endpoint: IntArray
    """(N,) candidate that served it, or `REJECTED`."""
    first_token_s: FloatArray
    """(N,) time of the first token; inf when there was none."""
    finish_s: FloatArray
    """(N,) time of the last token; inf when rejected or lost with its endpoint."""
    preemptions: IntArray
    """(N,)"""
    busy_s: FloatArray
    """(E,) accelerator-seconds: sum of all iterations' times."""

    @property
    def latency_per_token_s(self) -> FloatArray:
        """(N,) time from arrival to last token over output tokens; inf when there was none."""
        rows = np.arange(len(self.endpoint))
        tokens = self.scenario.output_tokens[rows, np.maximum(self.endpoint, 0)]
        latency: FloatArray = (self.finish_s - self.scenario.arrival_s) / tokens
        return latency

    @property
    def in_time(self) -> BoolArray:
        """(N,) served within all limits."""
        # Without a limit (inf) a request still has to be served.
        kept: BoolArray = np.isfinite(self.finish_s)
        kept &= self.latency_per_token_s <= self.scenario.limit_s
        if self.scenario.first_token_limit_s is not None:
            waited = self.first_token_s - self.scenario.arrival_s
            kept &= waited <= self.scenario.first_token_limit_s
        return kept

    @property
    def qos(self) -> FloatArray:
        """(N,) actual quality where in time, else 0."""
        rows = np.arange(len(self.endpoint))
        quality = self.scenario.score[rows, np.maximum(self.endpoint, 0)]
        return np.where(self.in_time, quality, 0.0)
