"""A simulation's whole state as flat arrays."""

from dataclasses import dataclass, replace

import numpy as np

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_core.state import FloatArray, IntArray, Residents
from pointsman_learning.simulator import engine
from pointsman_learning.simulator.checks import cost_models
from pointsman_learning.simulator.scenario import Scenario

UNDECIDED = -2
"""In `Simulation.endpoint`: neither submitted nor rejected yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What never changes in a run, in the types that the compiled loops expect."""

    known: FloatArray
    """(N, 3) arrival, prompt tokens and limit."""
    output_tokens: IntArray
    """(N, E)"""
    predicted_quality: FloatArray
    """(N, E)"""
    predicted_output_tokens: FloatArray
    """(N, E)"""
    gauges: FloatArray
    """(2,) period and lag, in seconds."""
    token_offset: IntArray
    """(N,) first entry of each request in ``token_s``."""

    @classmethod
    def of(cls, scenario: Scenario, *, trace: bool) -> "Facts":
        """Copies, so that equal types of arrays meet the compiled code in every run."""
        known = [scenario.arrival_s, scenario.prompt_tokens, scenario.limit_s]
        output = np.array(scenario.output_tokens, np.int64, order="C")
        longest = output.max(axis=1) if trace else np.zeros(len(output), np.int64)
        return cls(
            known=np.stack(known, axis=1).astype(np.float64),
            output_tokens=output,
            predicted_quality=np.array(scenario.predicted_quality, np.float64, order="C"),
            predicted_output_tokens=np.array(
                scenario.predicted_output_tokens, np.float64, order="C"
            ),
            gauges=np.array([scenario.gauges.period_s, scenario.gauges.lag_s]),
            token_offset=np.cumsum(longest) - longest,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """What changes in a run; columns are named in `engine`."""

    facts: Facts
    requests: IntArray
    """(N, 8)"""
    times: FloatArray
    """(N, 2)"""
    endpoint: IntArray
    """(N,) chosen endpoint, `REJECTED` or `UNDECIDED`."""
    finished: IntArray
    """(N + 1,) requests in the order in which they finished; [0] is one past the last entry."""
    running: IntArray
    """(E, S) batches, oldest request first."""
    counts: IntArray
    """(E, 12)"""
    clocks: FloatArray
    """(E, 8)"""
    readings: FloatArray
    """(E, K) KV usage at the last reading times, a ring."""
    token_s: FloatArray
    """Time of every token where a trace is kept, else empty."""

    @classmethod
    def of(cls, scenario: Scenario, *, trace: bool) -> "Arrays":
        """Idle, ready endpoints and undecided requests."""
        n = len(scenario)
        requests = np.zeros((n, engine.REQUEST_COLUMNS), np.int64)
        requests[:, engine.PROMPT] = scenario.prompt_tokens
        requests[:, engine.NEXT] = engine.NOBODY
        counts, clocks = _endpoints(scenario)
        places = int(min(n, counts[:, engine.PLACES].max()))
        # Readings under way, the one that shows, and one to spare.
        kept = int(scenario.gauges.lag_s / scenario.gauges.period_s) + 3
        tokens = int(scenario.output_tokens.max(axis=1).sum()) if trace else 0
        return cls(
            facts=Facts.of(scenario, trace=trace),
            requests=requests,
            times=np.full((n, 2), np.inf),
            endpoint=np.full(n, UNDECIDED, np.int64),
            finished=np.ones(n + 1, np.int64),
            running=np.zeros((scenario.endpoints, places), np.int64),
            counts=counts,
            clocks=clocks,
            readings=np.zeros((scenario.endpoints, kept)),
            token_s=np.full(tokens, np.inf),
        )

    def copy(self) -> "Arrays":
        """All that changes, copied."""
        return replace(
            self,
            requests=self.requests.copy(),
            times=self.times.copy(),
            endpoint=self.endpoint.copy(),
            finished=self.finished.copy(),
            running=self.running.copy(),
            counts=self.counts.copy(),
            clocks=self.clocks.copy(),
            readings=self.readings.copy(),
            token_s=self.token_s.copy(),
        )

    @property
    def in_flight(self) -> int:
        """Requests on all endpoints."""
        return int(self.counts[:, : engine.WAITING + 1].sum())

    def advance(self, until_s: float) -> None:
        """Run all endpoints until a time."""
        engine.advance(
            self.requests,
            self.times,
            self.finished,
            self.running,
            self.counts,
            self.clocks,
            self.readings,
            self.facts.gauges,
            self.token_s,
            self.facts.token_offset,
            float(until_s),
        )

    def submit(self, request: int, endpoint: int, now_s: float) -> None:
        """Put a request in an endpoint's queue.

        It is lost where the endpoint has failed or its KV cache is too small.
        """
        self.endpoint[request] = endpoint
        output = int(self.facts.output_tokens[request, endpoint])
        capacity = int(self.counts[endpoint, engine.TOTAL_BLOCKS]) * BLOCK_TOKENS
        failed = self.counts[endpoint, engine.STATUS] == engine.FAILED
        if not failed and int(self.requests[request, engine.PROMPT]) + output <= capacity:
            engine.submit(self.requests, self.counts, self.clocks, request, endpoint, output, now_s)

    def fail(self, endpoint: int, now_s: float) -> None:
        """Lose all that an endpoint has."""
        engine.fail(self.requests, self.running, self.counts, self.clocks, endpoint, now_s)

    def collect(self, row: IntArray, columns: FloatArray) -> Residents:
        """The requests in flight, written into ``row`` (>= R,) and ``columns`` (7, >= R)."""
        engine.collect(
            self.requests,
            self.running,
            self.counts,
            self.facts.known,
            self.facts.predicted_quality,
            self.facts.predicted_output_tokens,
            row,
            columns,
        )
        count = self.in_flight
        return Residents(row[:count], *columns[:, :count])


def _endpoints(scenario: Scenario) -> tuple[IntArray, FloatArray]:
    """Idle endpoints: counts (E, 12) and clocks (E, 8)."""
    counts = np.zeros((scenario.endpoints, engine.COUNT_COLUMNS), np.int64)
    clocks = np.zeros((scenario.endpoints, engine.CLOCK_COLUMNS))
    for e, cost in enumerate(cost_models(scenario)):
        blocks = cost.kv_capacity_tokens // BLOCK_TOKENS
        counts[e, engine.FREE_BLOCKS] = counts[e, engine.TOTAL_BLOCKS] = blocks
        counts[e, engine.BUDGET] = cost.max_batched_tokens
        counts[e, engine.PLACES] = cost.max_sequences
        clocks[e, engine.OVERHEAD] = cost.overhead_s
        clocks[e, engine.COMPUTE] = cost.compute_s_per_token
        clocks[e, engine.WEIGHTS] = cost.weights_s
        clocks[e, engine.CONTEXT] = cost.context_s_per_token
    counts[:, [engine.HEAD, engine.TAIL]] = engine.NOBODY
    counts[:, engine.STATUS] = engine.READY
    counts[:, engine.LISTED] = 1
    clocks[:, [engine.START, engine.END]] = np.inf
    return counts, clocks
