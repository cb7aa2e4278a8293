"""Many simulations that decide in step, as one set of flat arrays.

Branch rollouts play thousands of short futures. One at a time, almost all the time goes into
NumPy's overhead on arrays of a handful of endpoints. Here all *worlds* (a scenario from some
moment on) take their k-th decision together: their endpoints are *lanes* of one array, their
requests *slots*, and one `Observation` of all lanes is scored by one call of a core decider.
The numbers of the request, which are scalars in an `Observation`, are then arrays with the
value of each lane's own world: NumPy broadcasts both alike.

The engine is the simulator's own (`pointsman_learning.simulator.engine`), so every world ends
exactly, to the last bit, as its `Simulation` would.

Shapes: G worlds, L lanes, M slots, E endpoints of the largest world, R requests in flight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_core.deciders import Decider
from pointsman_core.observation import CostColumns, Observation
from pointsman_core.resources import Admission
from pointsman_core.state import GAUGES_STALE_AFTER_S, BoolArray, FloatArray, IntArray
from pointsman_learning.simulator import REJECTED, Change, Scenario, engine
from pointsman_learning.simulator.arrays import Arrays
from pointsman_learning.simulator.engine import kernel
from pointsman_learning.simulator.scenario import Event

ARRIVAL, PROMPT_TOKENS, LIMIT = range(3)
"""Columns of ``known``."""


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """What never changes of one world."""

    scenario: Scenario
    number: int = 0
    """Which scenario it is, for whoever made it."""
    events: tuple[Event, ...] = field(init=False)
    """The scenario's."""

    def __post_init__(self) -> None:
        """Sort the events once for all branches."""
        object.__setattr__(self, "events", self.scenario.events())

    @property
    def may_reject(self) -> bool:
        """Whether rejection is an action."""
        return self.scenario.snapshot.admission is Admission.REJECT


@dataclass(slots=True, eq=False)
class Lanes:
    """Endpoints: (L, …)."""

    counts: IntArray
    clocks: FloatArray
    running: IntArray
    readings: FloatArray
    context_limit: FloatArray
    missing: BoolArray
    cost: FloatArray
    """(L, 7) in the order of `CostColumns`."""


@dataclass(slots=True, eq=False)
class Slots:
    """Requests: (M, …)."""

    requests: IntArray
    times: FloatArray
    choice: IntArray
    """Endpoint within the world, `REJECTED` or `UNDECIDED`."""
    known: FloatArray
    quality: FloatArray
    """(M, E) predicted; beyond a world's endpoints 0."""
    expected: FloatArray
    """(M, E) predicted output tokens."""
    output: IntArray
    """(M, E) actual output tokens; the decider never sees them."""
    score: FloatArray
    """(M, E) actual quality; the decider never sees it."""
    number: IntArray
    """Request of the scenario."""


class Lockstep:
    """Worlds that all have the same number of decisions ahead."""

    def __init__(
        self,
        worlds: Sequence[World],
        lanes: Lanes,
        slots: Slots,
        *,
        endpoints: Sequence[int],
        next_slot: IntArray,
        decisions: int,
        now_s: FloatArray,
        changes: Sequence[int],
    ) -> None:
        self.worlds = list(worlds)
        self.lanes, self.slots = lanes, slots
        self.endpoints: IntArray = np.array(endpoints, np.int64)
        """(G,) endpoints of each world."""
        self.first_lane: IntArray = np.concatenate(([0], np.cumsum(self.endpoints)[:-1]))
        """(G,)"""
        self.slot: IntArray = next_slot
        """(G,) slot of each world's request at hand."""
        self.left = decisions
        """Decisions ahead."""
        self.now_s = now_s
        """(G,) current time of each world."""
        self.changes_seen = list(changes)
        self._lane_world: IntArray = np.repeat(np.arange(len(worlds)), self.endpoints)
        self._local: IntArray = np.arange(len(self._lane_world)) - self.first_lane[self._lane_world]
        widest = int(self.endpoints.max())
        self._exists: BoolArray = np.arange(widest) < self.endpoints[:, None]
        self.gauges = worlds[0].scenario.gauges
        self._gauge_times = np.array([self.gauges.period_s, self.gauges.lag_s])
        self._finished = np.ones(len(slots.requests) + 1, np.int64)
        self._cost = CostColumns(*np.ascontiguousarray(lanes.cost.T))
        self._next_change = np.array([self._change_time(g) for g in range(len(worlds))])
        self._rejects = np.array([world.may_reject for world in worlds])
        self._buffers = np.zeros((2, 0), np.int64), np.zeros((6, 0))
        self._collect()

    def __len__(self) -> int:
        return len(self.worlds)

    # --- making ------------------------------------------------------------------------

    @classmethod
    def of(cls, scenarios: Sequence[Scenario]) -> "Lockstep":
        """Whole scenarios from their beginning.

        Raises:
            ValueError: they differ in the number of requests or in when gauges are read, or
                one has limits of the time to the first token.

        """
        if len({len(scenario) for scenario in scenarios}) != 1:
            raise ValueError("scenarios in lockstep must have equally many requests")
        if any(scenario.first_token_limit_s is not None for scenario in scenarios):
            raise ValueError("limits of the time to the first token are not supported here")
        parts = [_whole(scenario, number) for number, scenario in enumerate(scenarios)]
        return join(parts, [1] * len(parts))

    def take(self, world: int, decisions: int) -> "Lockstep":
        """One world alone, with what is in flight and the next ``decisions`` requests."""
        first, size = int(self.first_lane[world]), int(self.endpoints[world])
        start = int(self.slot[world])
        own = np.flatnonzero((self._in_flight[0] >= first) & (self._in_flight[0] < first + size))
        present = self._in_flight[1][own]
        kept = np.concatenate((present, np.arange(start, start + decisions)))
        place = np.full(len(self.slots.requests) + 1, engine.NOBODY, np.int64)
        place[kept] = np.arange(len(kept))  # the last entry stands for NOBODY
        slots = Slots(*(getattr(self.slots, f.name)[kept] for f in fields(Slots)))
        slots.requests[:, engine.NEXT] = place[slots.requests[:, engine.NEXT]]
        part = slice(first, first + size)
        lanes = Lanes(*(getattr(self.lanes, f.name)[part].copy() for f in fields(Lanes)))
        lanes.running = place[lanes.running]
        for pointer in (engine.HEAD, engine.TAIL):
            lanes.counts[:, pointer] = place[lanes.counts[:, pointer]]
        return Lockstep(
            [self.worlds[world]],
            lanes,
            slots,
            endpoints=[size],
            next_slot=np.array([len(present)]),
            decisions=decisions,
            now_s=self.now_s[[world]],
            changes=[self.changes_seen[world]],
        )

    def copy(self) -> "Lockstep":
        """An exact copy that goes its own way."""
        return join([self], [1])

    # --- time --------------------------------------------------------------------------

    def advance_to_arrivals(self) -> None:
        """Let time pass in each world until its next request arrives."""
        self._advance(self.slots.known[self.slot, ARRIVAL])

    def drain(self, *, mishaps: bool = True) -> None:
        """Run until nothing is left to do; without ``mishaps`` no endpoint changes any more."""
        if not mishaps:
            self._next_change[:] = np.inf
        self._advance(np.full(len(self), np.inf))

    def _advance(self, until_s: FloatArray) -> None:
        while True:
            now = np.minimum(until_s, self._next_change)
            lanes, slots = self.lanes, self.slots
            advance(
                slots.requests,
                slots.times,
                self._finished,
                lanes.running,
                lanes.counts,
                lanes.clocks,
                lanes.readings,
                self._gauge_times,
                now[self._lane_world],
            )
            self.now_s = now
            changing = np.flatnonzero((self._next_change <= until_s) & (self._next_change < np.inf))
            if not len(changing):
                break
            for world in changing.tolist():
                self._change(world)
        self._collect()

    def _change_time(self, world: int) -> float:
        events, at = self.worlds[world].events, self.changes_seen[world]
        return events[at].time_s if at < len(events) else np.inf

    def _change(self, world: int) -> None:
        """The next change of availability, or notice of one, as in `Simulation`."""
        event = self.worlds[world].events[self.changes_seen[world]]
        lane = int(self.first_lane[world]) + event.endpoint
        lanes, status = self.lanes, engine.STATUS
        if event.noticed:
            lanes.counts[lane, engine.LISTED] = event.change is Change.JOIN
        elif event.change is Change.FAIL:
            engine.fail(
                self.slots.requests,
                lanes.running,
                lanes.counts,
                lanes.clocks,
                lane,
                float(self.now_s[world]),
            )
            lanes.counts[lane, status] = engine.FAILED
        elif event.change is Change.JOIN:
            lanes.counts[lane, status] = engine.READY
        elif lanes.counts[lane, status] != engine.FAILED:
            lanes.counts[lane, status] = engine.DRAINING
        self.changes_seen[world] += 1
        self._next_change[world] = self._change_time(world)

    # --- looking -----------------------------------------------------------------------

    def _collect(self) -> None:
        counts = self.lanes.counts
        total = int(counts[:, [engine.RUNNING, engine.WAITING]].sum())
        if total > self._buffers[0].shape[1]:
            self._buffers = np.zeros((2, 2 * total), np.int64), np.zeros((6, 2 * total))
        where, columns = self._buffers
        slots = self.slots
        collect(
            slots.requests,
            self.lanes.running,
            counts,
            slots.known,
            slots.quality,
            slots.expected,
            self._local,
            where,
            columns,
        )
        self._in_flight = where[:, :total]
        self._columns = columns[:, :total]

    @property
    def request(self) -> IntArray:
        """(G,) the same as a number of its scenario."""
        numbers: IntArray = self.slots.number[self.slot]
        return numbers

    def observe(self) -> Observation:
        """What a router would know now, of all worlds: `pointsman_core.observation.observe`.

        The request's numbers are arrays (L,). To be used before the next change.
        """
        slot = self.slot[self._lane_world]
        known = self.slots.known[slot]
        residents, columns = self._in_flight, self._columns
        elapsed = self.now_s[self._lane_world[residents[0]]] - columns[0]
        return Observation(
            prompt_tokens=cast("float", known[:, PROMPT_TOKENS]),
            waited_s=0.0,
            limit_s=cast("float", known[:, LIMIT]),
            first_token_limit_s=np.inf,
            eligible=self._eligible(known[:, PROMPT_TOKENS] + 1),
            quality=self.slots.quality[slot, self._local],
            output_tokens=self.slots.expected[slot, self._local],
            foreign=np.zeros(len(slot)),
            kv_usage=self._kv_usage(),
            cost=self._cost,
            resident_candidate=residents[0].copy(),
            resident_elapsed_s=elapsed,
            resident_prompt_tokens=columns[1].copy(),
            resident_expected_output=np.maximum(columns[2], columns[3] + 1.0),
            resident_output_tokens=columns[3].copy(),
            resident_limit_s=columns[4].copy(),
            resident_quality=columns[5].copy(),
            learned=np.ones(len(slot), np.bool_),
        )

    def _eligible(self, needed: FloatArray) -> BoolArray:
        """(L,) ready endpoints whose context holds the request; else the roomiest ready ones."""
        ready = self.lanes.counts[:, engine.LISTED] == 1
        limit = self.lanes.context_limit
        fits: BoolArray = ready & (limit >= needed)
        some = np.logical_or.reduceat(fits, self.first_lane)
        if some.all():
            return fits
        most = np.maximum.reduceat(np.where(ready, limit, -np.inf), self.first_lane)
        roomiest = ready & (limit == most[self._lane_world])
        eligible: BoolArray = np.where(some[self._lane_world], fits, roomiest)
        return eligible

    def _kv_usage(self) -> FloatArray:
        """(L,) as `SimulatedState.kv_usage` has it."""
        readings, period = self.lanes.readings, self.gauges.period_s
        scrape = (self.now_s / period).astype(np.int64)
        scrape -= scrape * period > self.now_s
        stale = self.now_s - scrape * period > GAUGES_STALE_AFTER_S
        column = (scrape % readings.shape[1])[self._lane_world]
        usage: FloatArray = readings[np.arange(len(readings)), column]
        usage[self.lanes.missing | stale[self._lane_world]] = np.nan
        return usage

    def one(self, seen: Observation, world: int, *, alike: int = 1) -> Observation:
        """The part of an `observe`d whole that is one world's, with scalars as core has it.

        With ``alike`` it is that of so many worlds from that one on, see `alike`: candidates
        of all of them, one world after the other.
        """
        first = int(self.first_lane[world])
        part = slice(first, first + alike * int(self.endpoints[world]))
        low, high = np.searchsorted(seen.resident_candidate, [part.start, part.stop])
        own = slice(int(low), int(high))
        prompt, limit = cast("FloatArray", seen.prompt_tokens), cast("FloatArray", seen.limit_s)
        cost = CostColumns(*(getattr(seen.cost, f.name)[part] for f in fields(CostColumns)))
        return replace(
            seen,
            prompt_tokens=float(prompt[first]),
            limit_s=float(limit[first]),
            eligible=seen.eligible[part],
            quality=seen.quality[part],
            output_tokens=seen.output_tokens[part],
            foreign=seen.foreign[part],
            kv_usage=seen.kv_usage[part],
            cost=cost,
            resident_candidate=seen.resident_candidate[own] - first,
            resident_elapsed_s=seen.resident_elapsed_s[own],
            resident_prompt_tokens=seen.resident_prompt_tokens[own],
            resident_expected_output=seen.resident_expected_output[own],
            resident_output_tokens=seen.resident_output_tokens[own],
            resident_limit_s=seen.resident_limit_s[own],
            resident_quality=seen.resident_quality[own],
            learned=None if seen.learned is None else seen.learned[part],
        )

    def alike(self, seen: Observation) -> list[tuple[int, int]]:
        """Runs of worlds that decide on like requests for as many endpoints: first, number.

        Such are the branches of one state, whose futures have the same requests.
        """
        prompt, limit = cast("FloatArray", seen.prompt_tokens), cast("FloatArray", seen.limit_s)
        first = self.first_lane
        told = np.stack([prompt[first], limit[first], self.endpoints])
        starts = np.flatnonzero(np.append(True, (np.diff(told, axis=1) != 0).any(axis=0)))
        counts = np.diff(np.append(starts, len(self)))
        return list(zip(starts.tolist(), counts.tolist(), strict=True))

    def residents(self, world: int) -> IntArray:
        """Slots of the requests in flight in a world, in the order of its `Observation`."""
        low, high = np.searchsorted(
            self._in_flight[0],
            [self.first_lane[world], self.first_lane[world] + self.endpoints[world]],
        )
        own: IntArray = self._in_flight[1][low:high].copy()
        return own

    # --- deciding ----------------------------------------------------------------------

    def padded(self, values: FloatArray | BoolArray, fill: float) -> FloatArray:
        """(L,) to (G, E), with ``fill`` where a world has no such endpoint."""
        table = np.full(self._exists.shape, fill)
        table[self._exists] = values
        return table

    def choices(
        self, seen: Observation, values: FloatArray, acceptable: BoolArray | None
    ) -> IntArray:
        """(G,) what core's `Router` would choose: an endpoint of the world, or `REJECTED`.

        Of equals the first wins; the router draws lots.
        """
        best = self.padded(np.where(seen.eligible, values, -np.inf), -np.inf)
        chosen = best.argmax(axis=1)
        none = np.isneginf(best.max(axis=1))
        if acceptable is not None:
            good = self.padded(acceptable, fill=False)[np.arange(len(self)), chosen]
            none |= self._rejects & ~good.astype(np.bool_)
        choices: IntArray = np.where(none, REJECTED, chosen)
        return choices

    def apply(self, chosen: IntArray) -> None:
        """Send each world's request to the chosen endpoint, or reject it, and go on."""
        slots, lanes = self.slots, self.lanes
        slots.choice[self.slot] = chosen
        served = np.flatnonzero(chosen != REJECTED)
        slot, lane = self.slot[served], (self.first_lane + chosen)[served]
        output = slots.output[slot, chosen[served]]
        capacity = lanes.counts[lane, engine.TOTAL_BLOCKS] * BLOCK_TOKENS
        fits = slots.requests[slot, engine.PROMPT] + output <= capacity
        fits &= lanes.counts[lane, engine.STATUS] != engine.FAILED
        submit_all(
            slots.requests,
            lanes.counts,
            lanes.clocks,
            slot[fits],
            lane[fits],
            output[fits],
            self.now_s[served][fits],
        )
        self.slot = self.slot + 1
        self.left -= 1

    # --- results -----------------------------------------------------------------------

    def qos(self, slots: IntArray, *, actual: bool = False) -> FloatArray:
        """Quality of those slots' answers where in time, else 0; predicted unless ``actual``."""
        known = self.slots
        served = np.maximum(known.choice[slots], 0)
        table = known.score if actual else known.quality
        return np.where(self.in_time(slots), table[slots, served], 0.0)

    def in_time(self, slots: IntArray) -> BoolArray:
        """Whether those slots' answers were there in time; after `drain`."""
        known = self.slots
        finish = known.times[slots, engine.FINISH]
        tokens = known.output[slots, np.maximum(known.choice[slots], 0)]
        with np.errstate(invalid="ignore"):
            latency = (finish - known.known[slots, ARRIVAL]) / tokens
        kept: BoolArray = np.isfinite(finish) & (latency <= known.known[slots, LIMIT])
        return kept

    def choice(self, slots: IntArray) -> IntArray:
        """Endpoints chosen for those slots, or `REJECTED`."""
        return self.slots.choice[slots]


Policy = Callable[[Lockstep, Observation], IntArray]
"""Chooses (G,) actions for the requests at hand of all worlds."""


def by_decider(decider: Decider) -> Policy:
    """What core's router would do with that decider; one without state between calls."""

    def choose(worlds: Lockstep, seen: Observation) -> IntArray:
        scores = decider.score(seen)
        return worlds.choices(seen, scores.values, scores.acceptable)

    return choose


def play(worlds: Lockstep, policy: Policy, decisions: int) -> None:
    """Let a policy take so many decisions in every world."""
    for _ in range(decisions):
        worlds.advance_to_arrivals()
        worlds.apply(policy(worlds, worlds.observe()))


def _whole(scenario: Scenario, number: int) -> Lockstep:
    arrays = Arrays.of(scenario, trace=False)
    facts, candidates = arrays.facts, scenario.snapshot.candidates
    missing = np.zeros(scenario.endpoints, np.bool_)
    missing[sorted(scenario.gauges.missing)] = True
    cost = CostColumns.of(candidates)
    lanes = Lanes(
        arrays.counts,
        arrays.clocks,
        arrays.running,
        arrays.readings,
        np.array([c.limits.context_tokens for c in candidates], np.float64),
        missing,
        np.stack([getattr(cost, f.name) for f in fields(CostColumns)], axis=1),
    )
    slots = Slots(
        arrays.requests,
        arrays.times,
        arrays.endpoint,
        facts.known,
        facts.predicted_quality,
        facts.predicted_output_tokens,
        facts.output_tokens,
        np.array(scenario.score, np.float64),
        np.arange(len(scenario)),
    )
    return Lockstep(
        [World(scenario, number)],
        lanes,
        slots,
        endpoints=[scenario.endpoints],
        next_slot=np.zeros(1, np.int64),
        decisions=len(scenario),
        now_s=np.zeros(1),
        changes=[0],
    )


def join(parts: Sequence[Lockstep], copies: Sequence[int]) -> Lockstep:
    """All worlds of the parts, each part so many times, with arrays of their own.

    Raises:
        ValueError: they differ in decisions ahead or in when gauges are read.

    """
    repeated = [part for part, count in zip(parts, copies, strict=True) for _ in range(count)]
    if len({part.left for part in parts}) != 1 or len({part.gauges for part in parts}) != 1:
        raise ValueError("worlds in lockstep must have equally many decisions and equal gauges")
    sizes = [len(part.slots.requests) for part in repeated]
    shift = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    lane_shift = np.repeat(shift, [len(part.lanes.counts) for part in repeated])
    slot_shift = np.repeat(shift, sizes)
    lanes = Lanes(*(_stack([getattr(p.lanes, f.name) for p in repeated]) for f in fields(Lanes)))
    slots = Slots(*(_stack([getattr(p.slots, f.name) for p in repeated]) for f in fields(Slots)))
    lanes.running += lane_shift[:, None]
    for pointer in (engine.HEAD, engine.TAIL):
        lanes.counts[:, pointer] += np.where(lanes.counts[:, pointer] >= 0, lane_shift, 0)
    following = slots.requests[:, engine.NEXT]
    slots.requests[:, engine.NEXT] += np.where(following >= 0, slot_shift, 0)
    starts = [part.slot + offset for part, offset in zip(repeated, shift, strict=True)]
    return Lockstep(
        [world for part in repeated for world in part.worlds],
        lanes,
        slots,
        endpoints=[int(size) for part in repeated for size in part.endpoints],
        next_slot=np.concatenate(starts),
        decisions=parts[0].left,
        now_s=np.concatenate([part.now_s for part in repeated]),
        changes=[at for part in repeated for at in part.changes_seen],
    )


def _stack(arrays: Sequence[Any]) -> Any:  # noqa: ANN401 - numbers of all kinds
    """Concatenate rows; narrower tables get columns of zeros."""
    if arrays[0].ndim == 1 or len({array.shape[1] for array in arrays}) == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    whole = np.zeros((sum(map(len, arrays)), width), arrays[0].dtype)
    at = 0
    for array in arrays:
        whole[at : at + len(array), : array.shape[1]] = array
        at += len(array)
    return whole


# --- Compiled loops ----------------------------------------------------------------------


@kernel
def advance(
    requests: IntArray,
    times: FloatArray,
    finished: IntArray,
    running: IntArray,
    counts: IntArray,
    clocks: FloatArray,
    readings: FloatArray,
    gauges: FloatArray,
    until_s: FloatArray,
) -> None:
    """`engine.advance` with a time of its own for each lane."""
    no_tokens, no_offsets = np.zeros(0), np.zeros(0, np.int64)
    for e in range(counts.shape[0]):
        until = until_s[e]
        while True:
            if clocks[e, engine.END] < np.inf:
                if clocks[e, engine.END] > until:
                    break
                engine.read_gauges(counts, readings, gauges, e, clocks[e, engine.END], True)
                engine.complete(
                    requests, times, finished, running, counts, clocks, no_tokens, no_offsets, e
                )
            else:
                if clocks[e, engine.START] >= until:
                    break
                engine.read_gauges(counts, readings, gauges, e, clocks[e, engine.START], False)
                engine.plan(requests, running, counts, clocks, e)
        if until < np.inf:
            engine.read_gauges(counts, readings, gauges, e, until, False)


@kernel
def collect(
    requests: IntArray,
    running: IntArray,
    counts: IntArray,
    known: FloatArray,
    quality: FloatArray,
    expected: FloatArray,
    local: IntArray,
    where: IntArray,
    columns: FloatArray,
) -> None:
    """`engine.collect` for lanes: into ``where`` (2, R) lane and slot, ``columns`` (6, R).

    Columns: arrival, prompt tokens, predicted output tokens, tokens so far, limit, quality.
    """
    entry = 0
    for e in range(counts.shape[0]):
        r = counts[e, engine.HEAD]
        for index in range(counts[e, engine.RUNNING] + counts[e, engine.WAITING]):
            if index < counts[e, engine.RUNNING]:
                request = running[e, index]
            else:
                request = r
                r = requests[r, engine.NEXT]
            where[0, entry] = e
            where[1, entry] = request
            columns[0, entry] = known[request, 0]
            columns[1, entry] = known[request, 1]
            columns[2, entry] = expected[request, local[e]]
            columns[3, entry] = requests[request, engine.GENERATED]
            columns[4, entry] = known[request, 2]
            columns[5, entry] = quality[request, local[e]]
            entry += 1


@kernel
def submit_all(
    requests: IntArray,
    counts: IntArray,
    clocks: FloatArray,
    slots: IntArray,
    lanes: IntArray,
    output_tokens: IntArray,
    now_s: FloatArray,
) -> None:
    """`engine.submit` for many."""
    for i in range(len(slots)):
        engine.submit(requests, counts, clocks, slots[i], lanes[i], output_tokens[i], now_s[i])
