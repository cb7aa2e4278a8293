"""What a simulation is given: endpoints, requests with all their truth, and mishaps.

Shapes: N requests in order of arrival, E endpoints (the snapshot's candidates, in its order).
"""

from dataclasses import dataclass, field, replace
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
class Event:
    """A change happens to an endpoint, or the router learns of it."""

    time_s: float
    endpoint: int
    change: Change
    noticed: bool
    """False: it happens; True: the router learns of it."""


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
    prompt: IntArray | None = None
    """(N,) row of the corpus that each request asks, for reports only: repeats share it."""
    availability: tuple[Availability, ...] = ()
    """In order of time."""
    detection_s: float = 0.1
    """Time after which the router learns of a change of availability; ours. What it sends to a
    failed endpoint until then is lost; one that leaves still serves it."""
    gauges: Gauges = field(default_factory=Gauges)
    seed: int = 0
    load: float | None = None
    """Arrival rate as a share of the endpoints' capacity, where that was estimated."""
    description: str = ""
    """Where the parts come from, shown beside every result."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def endpoints(self) -> int:
        """E."""
        return len(self.snapshot.candidates)

    def events(self) -> tuple[Event, ...]:
        """Changes and when they are noticed, in order of time; of one moment, changes first."""
        happen = [Event(c.time_s, c.endpoint, c.change, noticed=False) for c in self.availability]
        noticed = [replace(e, time_s=e.time_s + self.detection_s, noticed=True) for e in happen]
        return tuple(sorted((*happen, *noticed), key=lambda event: (event.time_s, event.noticed)))


REJECTED = -1
"""In `Outcome.endpoint`: no endpoint was chosen."""


def latency_per_token(
    scenario: Scenario, requests: IntArray, *, endpoint: IntArray, finish_s: FloatArray
) -> FloatArray:
    """(R,) time from arrival to last token over output tokens; inf when there was none.

    Args:
        scenario: what was run.
        requests: (R,) numbers of its requests.
        endpoint: (R,) where they were served, or `REJECTED`.
        finish_s: (R,) time of the last token; inf where there was none.

    """
    tokens = scenario.output_tokens[requests, np.maximum(endpoint, 0)]
    latency: FloatArray = (finish_s - scenario.arrival_s[requests]) / tokens
    return latency


def in_time(
    scenario: Scenario,
    requests: IntArray,
    *,
    endpoint: IntArray,
    first_token_s: FloatArray,
    finish_s: FloatArray,
) -> BoolArray:
    """(R,) served within all limits; arguments as of `latency_per_token`."""
    # Without a limit (inf) a request still has to be served.
    kept: BoolArray = np.isfinite(finish_s)
    latency = latency_per_token(scenario, requests, endpoint=endpoint, finish_s=finish_s)
    kept &= latency <= scenario.limit_s[requests]
    if scenario.first_token_limit_s is not None:
        waited = first_token_s - scenario.arrival_s[requests]
        kept &= waited <= scenario.first_token_limit_s[requests]
    return kept


def qos_of(
    scenario: Scenario,
    requests: IntArray,
    *,
    endpoint: IntArray,
    first_token_s: FloatArray,
    finish_s: FloatArray,
    quality: FloatArray | None = None,
) -> FloatArray:
    """(R,) quality of the answers that were in time, else 0: the one rule of QoS.

    ``quality`` is (N, E), by default the scenario's actual ``score``; other arguments as of
    `latency_per_token`.
    """
    kept = in_time(
        scenario, requests, endpoint=endpoint, first_token_s=first_token_s, finish_s=finish_s
    )
    table = scenario.score if quality is None else quality
    return np.where(kept, table[requests, np.maximum(endpoint, 0)], 0.0)


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
        return latency_per_token(
            self.scenario, self._requests, endpoint=self.endpoint, finish_s=self.finish_s
        )

    @property
    def in_time(self) -> BoolArray:
        """(N,) served within all limits."""
        return in_time(
            self.scenario,
            self._requests,
            endpoint=self.endpoint,
            first_token_s=self.first_token_s,
            finish_s=self.finish_s,
        )

    @property
    def qos(self) -> FloatArray:
        """(N,) actual quality where in time, else 0."""
        return qos_of(
            self.scenario,
            self._requests,
            endpoint=self.endpoint,
            first_token_s=self.first_token_s,
            finish_s=self.finish_s,
        )

    @property
    def _requests(self) -> IntArray:
        return np.arange(len(self.endpoint))
