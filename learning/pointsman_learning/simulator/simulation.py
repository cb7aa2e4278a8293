"""One run of a scenario in simulated time, steered from outside."""

import copy

import numpy as np

from pointsman_core.state import (
    GAUGES_STALE_AFTER_S,
    BoolArray,
    FloatArray,
    IntArray,
    Residents,
)
from pointsman_learning.simulator import engine
from pointsman_learning.simulator.arrays import UNDECIDED, Arrays
from pointsman_learning.simulator.checks import check
from pointsman_learning.simulator.scenario import REJECTED, Change, Event, Outcome, Scenario

_STATUS = {
    Change.FAIL: engine.FAILED,
    Change.LEAVE: engine.DRAINING,
    Change.JOIN: engine.READY,
}


class Simulation:
    """Endpoints that serve a scenario's requests as somebody else decides.

    Nothing in it is random: equal calls give equal results, to the last bit.
    """

    def __init__(self, scenario: Scenario, *, trace: bool = False) -> None:
        """Start at time 0 with idle, ready endpoints.

        ``trace`` keeps the time of every token, for `token_times`.

        Raises:
            ScenarioError: the scenario cannot be simulated, see `check`.

        """
        check(scenario)
        self.scenario = scenario
        self.now_s = 0.0
        """Current time."""
        self._arrival: list[float] = scenario.arrival_s.tolist()
        self._arrays = Arrays.of(scenario, trace=trace)
        self._trace = trace
        self._events = scenario.events()
        self._happened = 0  # so many of them
        rows = {c.address: i for i, c in enumerate(scenario.snapshot.candidates)}
        self.state = SimulatedState(scenario, self._arrays, rows)
        """What a router would know now."""

    # --- time --------------------------------------------------------------------------

    def advance(self, until_s: float) -> None:
        """Let time pass; inf runs until nothing is left to do.

        Raises:
            ValueError: that time is over.

        """
        if not until_s >= self.now_s:
            raise ValueError(f"it is {self.now_s} s already, time cannot go back to {until_s} s")
        events = self._events
        while self._happened < len(events) and events[self._happened].time_s <= until_s:
            event = events[self._happened]
            self._run(float(event.time_s))
            self._happen(event)
            self._happened += 1
        self._run(float(until_s))

    def _run(self, until_s: float) -> None:
        self._arrays.advance(until_s)
        if until_s == np.inf:
            ends = self.finish_s[self.finished]
            until_s = max(self.now_s, float(ends.max(initial=0.0)))
            self._arrays.advance(until_s)  # only gauges are left to read
        self.now_s = until_s
        self.state.forget()

    def _happen(self, event: Event) -> None:
        endpoint, change, counts = event.endpoint, event.change, self._arrays.counts
        if event.noticed:
            counts[endpoint, engine.LISTED] = change is Change.JOIN
            return
        if change is Change.FAIL:
            self._arrays.fail(endpoint, self.now_s)
        if change is not Change.LEAVE or counts[endpoint, engine.STATUS] != engine.FAILED:
            counts[endpoint, engine.STATUS] = _STATUS[change]

    # --- decisions ---------------------------------------------------------------------

    def submit(self, request: int, endpoint: int) -> None:
        """Send a request, which arrives now, to an endpoint.

        One that the endpoint's KV cache could never hold is refused by it, and so lost; so is
        one for an endpoint that has failed, which the router does not know yet.

        Raises:
            ValueError: the request was decided already or does not arrive now, or the
                endpoint does not exist or is not ready, as far as the router knows.

        """
        self._expect(request)
        counts = self._arrays.counts
        if not 0 <= endpoint < len(counts):
            raise ValueError(f"there is no endpoint {endpoint} among {len(counts)}")
        if not counts[endpoint, engine.LISTED]:
            raise ValueError(f"endpoint {endpoint} is not ready")
        self._arrays.submit(int(request), int(endpoint), self.now_s)
        self.state.forget()

    def reject(self, request: int) -> None:
        """Turn a request away that arrives now.

        Raises:
            ValueError: the request was decided already or does not arrive now.

        """
        self._expect(request)
        self._arrays.endpoint[request] = REJECTED

    def _expect(self, request: int) -> None:
        if not 0 <= request < len(self._arrival):
            raise ValueError(f"there is no request {request} among {len(self._arrival)}")
        if self._arrays.endpoint[request] != UNDECIDED:
            raise ValueError(f"request {request} has been decided already")
        if self._arrival[request] != self.now_s:
            raise ValueError(
                f"request {request} arrives at {self._arrival[request]} s, it is {self.now_s} s"
            )

    # --- results -----------------------------------------------------------------------
    # Views of live arrays: they change as time passes and are not to be written to.

    @property
    def endpoint(self) -> IntArray:
        """(N,) chosen endpoint, `REJECTED` or `UNDECIDED`."""
        return self._arrays.endpoint

    @property
    def finished(self) -> IntArray:
        """Requests that got their last token; new ones are appended as time passes.

        Those that one `advance` appends are in order of time on each endpoint only.
        """
        log = self._arrays.finished
        return log[1 : log[0]]

    @property
    def first_token_s(self) -> FloatArray:
        """(N,) time of the first token so far; inf where there is none."""
        return self._arrays.times[:, engine.FIRST_TOKEN]

    @property
    def finish_s(self) -> FloatArray:
        """(N,) time of the last token so far; inf where there is none."""
        return self._arrays.times[:, engine.FINISH]

    @property
    def output_tokens(self) -> IntArray:
        """(N,) tokens given out so far."""
        return self._arrays.requests[:, engine.GENERATED]

    @property
    def preemptions(self) -> IntArray:
        """(N,) so far."""
        return self._arrays.requests[:, engine.PREEMPTIONS]

    @property
    def busy_s(self) -> FloatArray:
        """(E,) time of all iterations that ended; of one cut short by a failure, its part."""
        return self._arrays.clocks[:, engine.BUSY]

    @property
    def iterations(self) -> IntArray:
        """(E,) iterations that ended."""
        return self._arrays.counts[:, engine.ITERATIONS]

    @property
    def running(self) -> IntArray:
        """(E,) requests in the batch."""
        return self._arrays.counts[:, engine.RUNNING]

    @property
    def waiting(self) -> IntArray:
        """(E,) requests in the queue."""
        return self._arrays.counts[:, engine.WAITING]

    @property
    def free_blocks(self) -> IntArray:
        """(E,) blocks of the KV cache that no request holds."""
        return self._arrays.counts[:, engine.FREE_BLOCKS]

    @property
    def total_blocks(self) -> IntArray:
        """(E,) blocks of the KV cache."""
        return self._arrays.counts[:, engine.TOTAL_BLOCKS]

    @property
    def in_flight(self) -> int:
        """Requests on all endpoints."""
        return self._arrays.in_flight

    def token_times(self, request: int) -> FloatArray:
        """(tokens so far,) when each was given out; needs ``trace``.

        Raises:
            ValueError: no times were kept.

        """
        if not self._trace:
            raise ValueError("no token times were kept: give Simulation trace=True")
        start = self._arrays.facts.token_offset[request]
        return self._arrays.token_s[start : start + self.output_tokens[request]]

    def finish(self) -> Outcome:
        """Run until nothing is left to do, and tell what became of each request.

        Raises:
            ValueError: some request was neither submitted nor rejected.

        """
        undecided = np.flatnonzero(self.endpoint == UNDECIDED)
        if len(undecided):
            raise ValueError(
                f"{len(undecided)} requests were neither submitted nor rejected,"
                f" the first is {undecided[0]}"
            )
        self.advance(np.inf)
        return Outcome(
            scenario=self.scenario,
            endpoint=self.endpoint.copy(),
            first_token_s=self.first_token_s.copy(),
            finish_s=self.finish_s.copy(),
            preemptions=self.preemptions.copy(),
            busy_s=self.busy_s.copy(),
        )

    def clone(self) -> "Simulation":
        """An exact copy that goes its own way; shares only what never changes."""
        twin = copy.copy(self)
        twin._arrays = self._arrays.copy()  # noqa: SLF001
        twin.state = self.state.over(twin._arrays)  # noqa: SLF001
        return twin


class SimulatedState:
    """`StateView` of a simulation; rows are the numbers of the endpoints."""

    def __init__(self, scenario: Scenario, arrays: Arrays, row_of: dict[str, int]) -> None:
        self._scenario = scenario
        self._arrays = arrays
        self._row_of = row_of
        self._missing = np.array(sorted(scenario.gauges.missing), np.int64)
        self._foreign = np.zeros(scenario.endpoints)
        self._residents: Residents | None = None
        self._buffers = np.zeros(0, np.int64), np.zeros((7, 0))

    def over(self, arrays: Arrays) -> "SimulatedState":
        """The same view of other arrays."""
        return SimulatedState(self._scenario, arrays, self._row_of)

    def forget(self) -> None:
        """Note that something changed."""
        self._residents = None

    def row(self, address: str) -> int:
        """Row of an endpoint.

        Raises:
            KeyError: the endpoint is not known.

        """
        return self._row_of[address]

    def ready(self) -> BoolArray:
        """(E,) endpoints that may be chosen, as far as the router knows."""
        ready: BoolArray = self._arrays.counts[:, engine.LISTED] == 1
        return ready

    def foreign(self, *, now_s: float) -> FloatArray:  # noqa: ARG002
        """(E,) zero: all requests come through the router."""
        return self._foreign

    def kv_usage(self, *, now_s: float) -> FloatArray:
        """(E,) share of the KV cache in use as last scraped, NaN where unknown or stale.

        Scrapes happen at multiples of the period, each of a value that is ``lag_s`` old.
        """
        readings = self._arrays.readings
        period = self._scenario.gauges.period_s
        scrape = int(now_s / period)
        if scrape * period > now_s:  # the division was rounded up
            scrape -= 1
        if now_s - scrape * period > GAUGES_STALE_AFTER_S:
            return np.full(len(readings), np.nan)
        usage: FloatArray = readings[:, scrape % readings.shape[1]].copy()
        usage[self._missing] = np.nan
        return usage

    def residents(self) -> Residents:
        """All requests in flight; valid until the next change."""
        if self._residents is None:
            count = self._arrays.in_flight
            if count > len(self._buffers[0]):
                self._buffers = np.zeros(2 * count, np.int64), np.zeros((7, 2 * count))
            self._residents = self._arrays.collect(*self._buffers)
        return self._residents
