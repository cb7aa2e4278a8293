"""What must hold in every run, whatever arrives and whoever decides."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_learning.simulator import (
    REJECTED,
    Availability,
    Change,
    Gauges,
    Scenario,
    Simulation,
)
from pointsman_learning.simulator.reference import compare

BLOCKS = st.integers(2, 12)


@dataclass(frozen=True)
class Play:
    """A scenario and what is decided: a number per request that picks among the ready."""

    scenario: Scenario
    picks: tuple[int, ...]

    def choose(self, i, ready):
        """None of the ready ones now and then."""
        pick = self.picks[i] % (len(ready) + 1) if ready else 0
        return ready[pick - 1] if pick else REJECTED

    def run(self, simulation, first=0):
        for i, arrival in enumerate(self.scenario.arrival_s.tolist()):
            if i < first:
                continue
            simulation.advance(arrival)
            self.decide(simulation, i)
            yield i

    def decide(self, simulation, i):
        endpoint = self.choose(i, np.flatnonzero(simulation.state.ready()).tolist())
        if endpoint == REJECTED:
            simulation.reject(i)
        else:
            simulation.submit(i, endpoint)

    def finish(self, **options):
        simulation = Simulation(self.scenario, **options)
        for _ in self.run(simulation):
            pass
        return simulation, simulation.finish()


@st.composite
def plays(draw, lab):
    sizes = draw(st.lists(BLOCKS, min_size=1, max_size=3))
    experts = [
        lab.build.expert(
            f"e{i}",
            f"10.0.0.{i + 1}:8000",
            profile={
                "kv_cache_gib": blocks * BLOCK_TOKENS / 1024,
                "max_batched_tokens": draw(st.sampled_from([1, 5, 40, 512])),
            },
            limits={
                "concurrency": draw(st.integers(1, 5)),
                "context_tokens": blocks * BLOCK_TOKENS,
            },
        )
        for i, blocks in enumerate(sizes)
    ]
    room = min(sizes) * BLOCK_TOKENS
    requests, now = [], 0.0
    for _ in range(draw(st.integers(1, 20))):
        now += draw(st.sampled_from([0.0, 0.001, 0.004, 0.02, 0.1]))
        prompt = draw(st.integers(1, room - 1))
        requests.append((now, prompt, draw(st.integers(1, room - prompt))))
    changes = draw(
        st.lists(
            st.tuples(
                st.floats(0.0, now + 0.2),
                st.sampled_from(range(len(sizes))),
                st.sampled_from(Change),
            ),
            max_size=4,
        )
    )
    scenario = lab.scenario(
        *requests,
        snapshot=lab.build.snapshot(*experts),
        availability=tuple(Availability(*c) for c in sorted(changes)),
        detection_s=draw(st.sampled_from([0.0, 0.004, 0.15])),
        gauges=Gauges(period_s=0.05, lag_s=draw(st.sampled_from([0.0, 0.02, 0.12]))),
    )
    return Play(scenario, tuple(draw(st.lists(st.integers(0, 11), min_size=20, max_size=20))))


def every_play(test):
    """Run a test with plays of all kinds; it gets one as ``play``."""

    @settings(max_examples=40)
    @given(data=st.data())
    def property_of(lab, data):
        test(data.draw(plays(lab)))

    property_of.__name__ = test.__name__
    return property_of


@every_play
def test_it_equals_the_reference(play):
    compare(play.scenario, play.choose)


@every_play
def test_no_request_is_lost_duplicated_or_served_twice(play):
    simulation, outcome = play.finish(trace=True)
    failed = any(c.change is Change.FAIL for c in play.scenario.availability)
    assert simulation.in_flight == 0
    assert len(set(simulation.finished.tolist())) == len(simulation.finished)
    for i, endpoint in enumerate(outcome.endpoint.tolist()):
        served = np.isfinite(outcome.finish_s[i])
        given_out = len(simulation.token_times(i))
        if endpoint == REJECTED:
            assert not served
            assert given_out == 0
        else:
            assert served or failed
            assert served == (given_out == play.scenario.output_tokens[i, endpoint])
            assert served == (i in simulation.finished)


@every_play
def test_requests_in_flight_are_each_on_the_chosen_endpoint_once(play):
    simulation = Simulation(play.scenario)
    for i in play.run(simulation):
        residents = simulation.state.residents()
        arrivals = play.scenario.arrival_s
        done = set(simulation.finished.tolist())
        expected = Counter(
            (int(simulation.endpoint[j]), float(arrivals[j]))
            for j in range(i + 1)
            if simulation.endpoint[j] != REJECTED and j not in done
        )
        seen = Counter(zip(residents.row.tolist(), residents.arrival_s.tolist(), strict=True))
        assert not seen - expected
        if not any(c.change is Change.FAIL for c in play.scenario.availability):
            assert seen == expected


@every_play
def test_no_token_comes_before_its_request_and_none_before_the_one_before(play):
    simulation, outcome = play.finish(trace=True)
    for i, arrival in enumerate(play.scenario.arrival_s.tolist()):
        times = simulation.token_times(i)
        assert (np.diff(times, prepend=arrival) > 0).all()
        if len(times):
            assert outcome.first_token_s[i] == times[0]
        if np.isfinite(outcome.finish_s[i]):
            assert outcome.finish_s[i] == times[-1]


@every_play
def test_memory_is_never_exceeded(play):
    simulation = Simulation(play.scenario)

    def check():
        assert (simulation.free_blocks >= 0).all()
        assert (simulation.free_blocks <= simulation.total_blocks).all()
        usage = simulation.state.kv_usage(now_s=simulation.now_s)
        assert not (usage < 0).any()
        assert not (usage > 1).any()
        residents = simulation.state.residents()
        for e, total in enumerate(simulation.total_blocks.tolist()):
            mine = residents.row == e
            # Whoever has got a token and still runs has at least its prompt in the cache.
            running = np.flatnonzero(mine)[: simulation.running[e]]
            started = running[residents.output_tokens[running] > 0]
            held = residents.prompt_tokens[started].sum()
            assert held <= (total - simulation.free_blocks[e]) * BLOCK_TOKENS or (
                simulation.preemptions.any()
            )

    for _ in play.run(simulation):
        check()
        next_s = simulation.now_s
        simulation.clone().advance(next_s + 0.01)
        check()
    simulation.finish()
    assert simulation.free_blocks.tolist() == simulation.total_blocks.tolist()


@every_play
def test_work_is_conserved(play):
    """Busy exactly while there is work: no endpoint idles with a request on it."""
    simulation, outcome = play.finish(trace=True)
    if any(c.change is Change.FAIL for c in play.scenario.availability):
        return
    for e in range(play.scenario.endpoints):
        mine = np.flatnonzero(outcome.endpoint == e)
        spans = sorted(zip(play.scenario.arrival_s[mine], outcome.finish_s[mine], strict=True))
        covered, until = 0.0, 0.0
        for start, end in spans:
            covered += max(0.0, end - max(start, until))
            until = max(until, end)
        np.testing.assert_allclose(outcome.busy_s[e], covered, rtol=1e-9, atol=1e-9)
        if len(mine):
            per_iteration = outcome.busy_s[e] / simulation.iterations[e]
            assert per_iteration >= 0.003 - 1e-9  # overhead and weights


@every_play
def test_the_same_decisions_give_the_same_trace(play):
    first, second = play.finish(trace=True), play.finish(trace=True)
    for i in range(len(play.scenario)):
        assert first[0].token_times(i).tolist() == second[0].token_times(i).tolist()
    for name in ("endpoint", "first_token_s", "finish_s", "preemptions", "busy_s"):
        assert np.array_equal(getattr(first[1], name), getattr(second[1], name))


@every_play
def test_a_clone_that_is_told_the_same_ends_the_same(play):
    _, straight = play.finish()
    simulation = Simulation(play.scenario)
    middle = len(play.scenario) // 2
    twin = simulation.clone()
    for i in play.run(simulation):
        if i == middle:
            twin = simulation.clone()
    for _ in play.run(twin, first=middle + 1):
        pass
    for outcome in (simulation.finish(), twin.finish()):
        for name in ("endpoint", "first_token_s", "finish_s", "preemptions", "busy_s"):
            assert np.array_equal(getattr(outcome, name), getattr(straight, name)), name


@every_play
def test_time_never_goes_back(play):
    simulation = Simulation(play.scenario)
    before, busy, tokens = 0.0, simulation.busy_s.copy(), simulation.output_tokens.copy()
    for _ in play.run(simulation):
        assert simulation.now_s >= before
        assert (simulation.busy_s >= busy).all()
        assert (simulation.output_tokens >= tokens).all()
        finished = simulation.finish_s[simulation.finished]
        assert (finished <= simulation.now_s).all()
        before = simulation.now_s
        busy, tokens = simulation.busy_s.copy(), simulation.output_tokens.copy()
    outcome = simulation.finish()
    assert simulation.now_s >= outcome.finish_s[np.isfinite(outcome.finish_s)].max(initial=before)
