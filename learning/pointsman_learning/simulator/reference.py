"""The slow, obvious simulator that the compiled one must equal to the last bit.

Core's `Batcher`, one object per endpoint, and a heap of events; nothing is shared with
`engine.py` but the rules it is written from. `verify` compares the two on random cases.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from pointsman_core.batching import BLOCK_TOKENS, Batcher, Iteration
from pointsman_core.cost import CostModel
from pointsman_core.resources import (
    Admission,
    Algorithm,
    Engine,
    ExpertLimits,
    PerformanceProfile,
    QoS,
    QualityPriors,
)
from pointsman_core.snapshot import Candidate, Snapshot
from pointsman_core.state import GAUGES_STALE_AFTER_S, FloatArray
from pointsman_learning.simulator.checks import cost_models
from pointsman_learning.simulator.scenario import (
    REJECTED,
    Availability,
    Change,
    Gauges,
    Scenario,
)
from pointsman_learning.simulator.simulation import Simulation

Choose = Callable[[int, list[int]], int]
"""The endpoint for a request, given those that seem ready; or `REJECTED`."""


class _Event(IntEnum):
    """What happens first when times are equal."""

    END = 0
    READ_GAUGES = 1
    CHANGE = 2
    NOTICE = 3
    ARRIVE = 4
    BEGIN = 5


@dataclass(slots=True)
class _Endpoint:
    cost: CostModel
    batcher: Batcher
    listed: bool = True
    """Whether the router takes it for ready."""
    failed: bool = False
    life: int = 0
    """Number of failures so far: events of an earlier life do not happen."""
    began_s: float | None = None
    """Start of the iteration in progress."""
    iteration: Iteration | None = None
    begins: bool = False
    """Whether an event for the next iteration's start is on the heap."""
    busy_s: float = 0.0
    iterations: int = 0
    readings: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a router sees when a request arrives."""

    tokens: dict[int, tuple[int, int]]
    """Endpoint and tokens so far of each request in flight."""
    kv_usage: list[float]


class Reference:
    """Runs a scenario from its start to its end."""

    def __init__(self, scenario: Scenario, choose: Choose) -> None:
        self.scenario = scenario
        self._choose = choose
        self.endpoints = [_Endpoint(cost, Batcher(cost)) for cost in cost_models(scenario)]
        self.endpoint: dict[int, int] = {}
        self.token_times: dict[int, list[float]] = {i: [] for i in range(len(scenario))}
        self.finish_s: dict[int, float] = {}
        self.preemptions = dict.fromkeys(range(len(scenario)), 0)
        self.in_flight: dict[int, int] = {}
        """Endpoint of each request in flight."""
        self.seen: list[Seen] = []
        """One entry per request, as it was when it arrived."""
        self._heap: list[tuple[float, _Event, int, int, int]] = []
        self._order = 0

    def run(self) -> "Reference":
        """Let everything happen."""
        for index, change in enumerate(self.scenario.availability):
            self._push(change.time_s, _Event.CHANGE, index)
            self._push(change.time_s + self.scenario.detection_s, _Event.NOTICE, index)
        for i, arrival in enumerate(self.scenario.arrival_s.tolist()):
            self._push(arrival, _Event.ARRIVE, i)
        self._push(-self.scenario.gauges.lag_s, _Event.READ_GAUGES, 0)
        while any(event is not _Event.READ_GAUGES for _, event, *_ in self._heap):
            now, event, _, what, life = heapq.heappop(self._heap)
            self._happen(now, event, what, life)
        return self

    def _push(self, when: float, event: _Event, what: int, life: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._heap, (when, event, self._order, what, life))

    def _happen(self, now: float, event: _Event, what: int, life: int) -> None:
        if event is _Event.READ_GAUGES:
            self._read_gauges(what)
        elif event is _Event.CHANGE:
            self._change(now, self.scenario.availability[what])
        elif event is _Event.NOTICE:
            change = self.scenario.availability[what]
            self.endpoints[change.endpoint].listed = change.change is Change.JOIN
        elif event is _Event.ARRIVE:
            self._arrive(now, what)
        elif life == self.endpoints[what].life:
            if event is _Event.BEGIN:
                self._begin(now, what)
            else:
                self._end(now, what)

    # --- engines -----------------------------------------------------------------------

    def _begin(self, now: float, e: int) -> None:
        endpoint = self.endpoints[e]
        endpoint.begins = False
        endpoint.iteration = endpoint.batcher.step()
        if endpoint.iteration is None:
            raise AssertionError(f"endpoint {e} began an iteration with nothing to do")
        endpoint.began_s = now
        for name in endpoint.iteration.preempted:
            self.preemptions[int(name)] += 1
        self._push(now + endpoint.iteration.seconds, _Event.END, e, endpoint.life)

    def _end(self, now: float, e: int) -> None:
        endpoint = self.endpoints[e]
        iteration = endpoint.iteration
        if iteration is None:
            raise AssertionError(f"endpoint {e} ended an iteration that never began")
        for name in iteration.tokens:
            self.token_times[int(name)].append(now)
        for name in iteration.finished:
            self.finish_s[int(name)] = now
            del self.in_flight[int(name)]
        endpoint.busy_s += iteration.seconds
        endpoint.iterations += 1
        endpoint.iteration = endpoint.began_s = None
        if endpoint.batcher.running or endpoint.batcher.waiting:
            self._begin_soon(now, e)

    def _begin_soon(self, now: float, e: int) -> None:
        endpoint = self.endpoints[e]
        if endpoint.iteration is None and not endpoint.begins:
            endpoint.begins = True
            self._push(now, _Event.BEGIN, e, endpoint.life)

    def _change(self, now: float, change: Availability) -> None:
        endpoint = self.endpoints[change.endpoint]
        if change.change is Change.JOIN:
            endpoint.failed = False
        elif change.change is Change.FAIL:
            endpoint.failed = True
            if endpoint.began_s is not None:
                endpoint.busy_s += now - endpoint.began_s
            endpoint.iteration = endpoint.began_s = None
            endpoint.begins = False
            endpoint.life += 1
            endpoint.batcher = Batcher(endpoint.cost)
            lost = [i for i, e in self.in_flight.items() if e == change.endpoint]
            for i in lost:
                del self.in_flight[i]

    # --- router ------------------------------------------------------------------------

    def _arrive(self, now: float, i: int) -> None:
        tokens = {j: (e, len(self.token_times[j])) for j, e in self.in_flight.items()}
        self.seen.append(Seen(tokens, self._kv_usage(now)))
        e = self._choose(i, [e for e, endpoint in enumerate(self.endpoints) if endpoint.listed])
        self.endpoint[i] = e
        if e == REJECTED or self.endpoints[e].failed:
            return
        self.endpoints[e].batcher.submit(
            str(i),
            prompt_tokens=int(self.scenario.prompt_tokens[i]),
            output_tokens=int(self.scenario.output_tokens[i, e]),
        )
        self.in_flight[i] = e
        self._begin_soon(now, e)

    def _read_gauges(self, number: int) -> None:
        for endpoint in self.endpoints:
            endpoint.readings.append(np.nan if endpoint.failed else self._blocks_in_use(endpoint))
        gauges = self.scenario.gauges
        next_s = (number + 1) * gauges.period_s - gauges.lag_s
        self._push(next_s, _Event.READ_GAUGES, number + 1)

    def _blocks_in_use(self, endpoint: _Endpoint) -> float:
        """Share of the blocks; what finishes in the iteration in progress still holds its own."""
        used = endpoint.batcher.total_blocks - endpoint.batcher.free_blocks
        for name in endpoint.iteration.finished if endpoint.iteration else ():
            i = int(name)
            e = self.in_flight[i]
            cached = self.scenario.prompt_tokens[i] + self.scenario.output_tokens[i, e] - 1
            used += -(-int(cached) // BLOCK_TOKENS)
        return used / endpoint.batcher.total_blocks

    def _kv_usage(self, now: float) -> list[float]:
        gauges = self.scenario.gauges
        scrape = 0
        while (scrape + 1) * gauges.period_s <= now:
            scrape += 1
        if now - scrape * gauges.period_s > GAUGES_STALE_AFTER_S:
            return [np.nan] * len(self.endpoints)
        return [
            np.nan if e in gauges.missing else endpoint.readings[scrape]
            for e, endpoint in enumerate(self.endpoints)
        ]


# --- Random cases ----------------------------------------------------------------------


def random_case(rng: np.random.Generator) -> Scenario:
    """A small scenario that is likely to go through the corners of the rules.

    Tiny KV caches, batches and budgets; failures, drains and returns; in half of the cases
    all times are sums of powers of two, so that events coincide exactly.
    """
    dyadic = bool(rng.random() < 0.5)
    candidates = tuple(_candidate(rng, i, dyadic=dyadic) for i in range(rng.integers(1, 5)))
    snapshot = make_snapshot(candidates)
    costs = [CostModel.from_profile(c.profile, c.limits) for c in candidates]
    capacity = np.array([c.kv_capacity_tokens // BLOCK_TOKENS * BLOCK_TOKENS for c in costs])
    n, e = int(rng.integers(1, 60)), len(candidates)
    longest = min(int(capacity.min()), 600)
    prompts = 1 + (rng.random(n) ** 3 * (longest - 1)).astype(np.int64)
    room = np.minimum(capacity[None, :] - prompts[:, None], 150)
    output = 1 + (rng.random((n, e)) ** 2 * room).astype(np.int64)
    output = np.minimum(output, room)
    arrival = _arrivals(rng, n, dyadic=dyadic)
    return Scenario(
        snapshot=snapshot,
        arrival_s=arrival,
        prompt_tokens=prompts,
        limit_s=rng.uniform(0.01, 0.2, n),
        score=rng.random((n, e)),
        output_tokens=output,
        predicted_quality=rng.random((n, e)),
        predicted_output_tokens=rng.uniform(1.0, 100.0, (n, e)),
        availability=tuple(_mishaps(rng, e, arrival, dyadic=dyadic)),
        detection_s=float(rng.choice([0.0, 0.125] if dyadic else [0.0, 0.1, 0.37])),
        gauges=_gauges(rng, e, dyadic=dyadic),
        description="a random case",
    )


def make_snapshot(candidates: tuple[Candidate, ...]) -> Snapshot:
    """A snapshot of hand-made candidates."""
    return Snapshot(
        namespace="default",
        policy="simulated",
        generation=1,
        models=("auto",),
        qos=QoS(),
        algorithm=Algorithm.ROUND_ROBIN,
        fallback=Algorithm.RANDOM,
        admission=Admission.BEST_EFFORT,
        domains=(),
        explain_headers=False,
        candidates=candidates,
    )


def _candidate(rng: np.random.Generator, index: int, *, dyadic: bool) -> Candidate:
    tokens = int(rng.integers(2, 24) * BLOCK_TOKENS + rng.integers(0, BLOCK_TOKENS))
    if rng.random() < 0.2:
        tokens *= 50
    kv_bytes = 2**28
    if dyadic:  # 2 ** -8 s per token and of overhead; memory never takes longer
        profile = PerformanceProfile(
            parameters_billions=1.073741824,
            peak_tflops=0.549755813888,
            compute_efficiency=1.0,
            memory_bandwidth_gbps=1e6,
            bandwidth_efficiency=1.0,
            kv_bytes_per_token=kv_bytes,
            kv_cache_gib=tokens / 4,
            iteration_overhead_ms=3.90625,
            max_batched_tokens=int(rng.choice([1, 3, 16, 64])),
        )
    else:
        profile = PerformanceProfile(
            parameters_billions=float(rng.uniform(0.5, 8.0)),
            memory_bandwidth_gbps=float(rng.uniform(300.0, 2000.0)),
            kv_bytes_per_token=kv_bytes,
            kv_cache_gib=tokens / 4,
            iteration_overhead_ms=float(rng.uniform(0.0, 4.0)),
            max_batched_tokens=int(rng.choice([2, 10, 64, 512])),
        )
    return Candidate(
        expert=f"expert-{index}",
        address=f"10.0.0.{index + 1}:8000",
        model=f"model-{index}",
        engine=Engine(),
        limits=ExpertLimits(context_tokens=10**6, concurrency=int(rng.choice([1, 2, 4, 8]))),
        profile=profile,
        quality=QualityPriors(),
        expected_output_tokens=100,
    )


def _arrivals(rng: np.random.Generator, n: int, *, dyadic: bool) -> FloatArray:
    gaps = rng.exponential(rng.choice([0.0, 0.005, 0.05, 0.3]), n)
    if dyadic:
        gaps = np.round(gaps * 2**8) / 2**8
    arrival: FloatArray = np.cumsum(gaps)
    return arrival


def _mishaps(
    rng: np.random.Generator, endpoints: int, arrival: FloatArray, *, dyadic: bool
) -> Iterator[Availability]:
    count = int(rng.choice([0, 0, 0, 4]))
    times = rng.uniform(0.0, arrival[-1] + 0.5, count)
    if dyadic:
        times = np.round(times * 2**8) / 2**8
        times[::2] = rng.choice(arrival, len(times[::2]))
    times.sort()
    for time_s in times.tolist():
        yield Availability(time_s, int(rng.integers(endpoints)), Change(int(rng.integers(3))))


def _gauges(rng: np.random.Generator, endpoints: int, *, dyadic: bool) -> Gauges:
    missing = frozenset(np.flatnonzero(rng.random(endpoints) < 0.2).tolist())
    if dyadic:
        return Gauges(float(rng.choice([0.125, 1.0])), float(rng.choice([0.0, 0.5])), missing)
    period = float(rng.choice([0.07, 0.1, 1.0, 7.0]))
    return Gauges(period, float(rng.choice([0.0, 0.25, 1.3])), missing)


# --- Comparison ------------------------------------------------------------------------


class MismatchError(AssertionError):
    """The two simulators differ; the message says where."""


@dataclass(slots=True)
class Compared:
    """How much was found equal."""

    cases: int = 0
    requests: int = 0
    tokens: int = 0
    iterations: int = 0
    preemptions: int = 0
    lost: int = 0
    """Requests lost with their endpoints."""
    rejected: int = 0

    def add(self, reference: Reference) -> None:
        """Count one case."""
        self.cases += 1
        self.requests += len(reference.scenario)
        self.tokens += sum(len(times) for times in reference.token_times.values())
        self.iterations += sum(e.iterations for e in reference.endpoints)
        self.preemptions += sum(reference.preemptions.values())
        rejected = sum(e == REJECTED for e in reference.endpoint.values())
        self.rejected += rejected
        self.lost += len(reference.scenario) - rejected - len(reference.finish_s)


def verify(
    cases: int, *, seed: int = 0, progress: Callable[[int], None] = lambda _: None
) -> Compared:
    """Compare both simulators on so many random cases.

    Raises:
        MismatchError: at the first difference, with the number of the case.

    """
    compared = Compared()
    for case in range(cases):
        rng = np.random.default_rng((seed, case))
        scenario = random_case(rng)
        try:
            compared.add(compare(scenario, _random_choice(rng, len(scenario))))
        except MismatchError as mismatch:
            raise MismatchError(f"case {case} of seed {seed}: {mismatch}") from None
        progress(case + 1)
    return compared


def _random_choice(rng: np.random.Generator, n: int) -> Choose:
    """The same choice whoever asks: each request has its own random number."""
    drawn = rng.random(n).tolist()

    def choose(i: int, ready: list[int]) -> int:
        if not ready or drawn[i] < 0.05:
            return REJECTED
        return ready[int((drawn[i] - 0.05) / 0.95 * len(ready))]

    return choose


def compare(scenario: Scenario, choose: Choose) -> Reference:
    """Run both simulators on one scenario and compare all that can be seen of them.

    Raises:
        MismatchError: they differ.

    """
    reference = Reference(scenario, choose).run()
    simulation = Simulation(scenario, trace=True)
    for i, arrival in enumerate(scenario.arrival_s.tolist()):
        simulation.advance(arrival)
        _compare_view(i, simulation, reference.seen[i])
        e = choose(i, np.flatnonzero(simulation.state.ready()).tolist())
        if e == REJECTED:
            simulation.reject(i)
        else:
            simulation.submit(i, e)
    outcome = simulation.finish()
    for i in range(len(scenario)):
        _same(f"endpoint of request {i}", int(outcome.endpoint[i]), reference.endpoint[i])
        _same(
            f"tokens of request {i}", simulation.token_times(i).tolist(), reference.token_times[i]
        )
        first = reference.token_times[i][0] if reference.token_times[i] else np.inf
        _same(f"first token of request {i}", float(outcome.first_token_s[i]), first)
        finish = reference.finish_s.get(i, np.inf)
        _same(f"finish of request {i}", float(outcome.finish_s[i]), finish)
        got = int(outcome.preemptions[i])
        _same(f"preemptions of request {i}", got, reference.preemptions[i])
    for e, endpoint in enumerate(reference.endpoints):
        _same(f"iterations of endpoint {e}", int(simulation.iterations[e]), endpoint.iterations)
        _same(f"busy time of endpoint {e}", float(outcome.busy_s[e]), endpoint.busy_s)
        free = endpoint.batcher.free_blocks
        _same(f"free blocks of endpoint {e}", int(simulation.free_blocks[e]), free)
    return reference


def _compare_view(i: int, simulation: Simulation, seen: Seen) -> None:
    rows = simulation.state.residents()
    got = sorted(
        zip(rows.row.tolist(), rows.arrival_s.tolist(), rows.output_tokens.tolist(), strict=True)
    )
    arrival = simulation.scenario.arrival_s
    want = sorted((e, float(arrival[j]), float(tokens)) for j, (e, tokens) in seen.tokens.items())
    _same(f"requests in flight when request {i} arrives", got, want)
    usage = simulation.state.kv_usage(now_s=simulation.now_s)
    if not np.array_equal(usage, np.array(seen.kv_usage), equal_nan=True):
        raise MismatchError(
            f"KV usage when request {i} arrives: {usage}, the reference has {seen.kv_usage}"
        )


def _same(what: str, got: object, want: object) -> None:
    if got != want:
        raise MismatchError(f"{what}: {got}, the reference has {want}")
