"""What one run does, by hand-made cases; `test_reference.py` has the random ones."""

import numpy as np
import pytest

from pointsman_core.state import GAUGES_STALE_AFTER_S, LiveState
from pointsman_learning.simulator import (
    REJECTED,
    UNDECIDED,
    Availability,
    Change,
    Gauges,
    Simulation,
)
from pointsman_learning.simulator.scenario import qos_of

LONG = (0.0, 10, 900)
"""A request that decodes for about 2.8 s."""


def finished_alone(prompt: int, output: int) -> float:
    """Seconds on an idle endpoint: see ROUND_PROFILE; the prompt must fit one iteration."""
    contexts = np.arange(prompt + 1, prompt + output)
    return (1 + max(prompt, 2 + prompt / 1e3) + (3 + contexts / 1e3).sum()) / 1e3


class TestOneRequest:
    def test_tokens_come_at_the_ends_of_its_iterations(self, lab):
        simulation = lab.play(Simulation(lab.scenario((2.0, 10, 3)), trace=True))
        outcome = simulation.finish()
        want = 2.0 + np.array([0.011, 0.011 + 0.003011, 0.011 + 0.003011 + 0.003012])
        assert simulation.token_times(0) == pytest.approx(want, rel=1e-12)
        assert outcome.first_token_s[0] == simulation.token_times(0)[0]
        assert outcome.finish_s[0] == simulation.token_times(0)[-1]
        assert outcome.busy_s == pytest.approx([0.017023], rel=1e-12)
        assert outcome.preemptions.tolist() == [0]
        assert simulation.now_s == outcome.finish_s[0]
        assert simulation.free_blocks == simulation.total_blocks == 64

    def test_a_long_prompt_is_computed_in_chunks(self, lab):
        snapshot = lab.snapshot(profile={"max_batched_tokens": 100})
        simulation = lab.play(Simulation(lab.scenario((0.0, 250, 1), snapshot=snapshot)))
        assert simulation.finish().finish_s[0] == pytest.approx(0.101 + 0.101 + 0.051)
        assert simulation.iterations.tolist() == [3]

    def test_its_token_is_not_seen_before_it_is_there(self, lab):
        simulation = lab.play(Simulation(lab.scenario((0.0, 10, 3))))
        first = 1e-3 + 1e-3 * 10
        for when, seen in [(first / 2, 0), (np.nextafter(first, 0), 0), (first, 1)]:
            simulation.advance(when)
            assert simulation.state.residents().output_tokens.tolist() == [seen]
            assert np.isinf(simulation.first_token_s[0]) == (seen == 0)
        simulation.advance(1.0)
        assert len(simulation.state.residents().row) == 0
        assert simulation.finished.tolist() == [0]


class TestArrivals:
    def test_of_one_moment_share_an_iteration(self, lab):
        simulation = lab.play(Simulation(lab.scenario((1.0, 10, 1), (1.0, 20, 1))))
        assert simulation.finish().finish_s == pytest.approx([1.031, 1.031])
        assert simulation.iterations.tolist() == [1]

    def test_at_the_end_of_an_iteration_join_the_next_one(self, lab):
        end = 0.0 + (1e-3 + 1e-3 * 10)
        simulation = lab.play(Simulation(lab.scenario((0.0, 10, 2), (end, 20, 1))))
        assert simulation.finish().finish_s == pytest.approx([0.033, 0.033])

    def test_during_an_iteration_wait_for_its_end(self, lab):
        simulation = lab.play(Simulation(lab.scenario((0.0, 10, 1), (0.001, 20, 1))))
        assert simulation.finish().finish_s == pytest.approx([0.011, 0.011 + 0.021])

    def test_how_time_is_cut_into_steps_changes_nothing(self, lab):
        scenario = lab.scenario(*((0.01 * i, 30 + i, 20 + i) for i in range(30)), endpoints=2)
        whole = lab.play(Simulation(scenario)).finish()
        simulation = Simulation(scenario)
        for i, arrival in enumerate(scenario.arrival_s.tolist()):
            for part in np.linspace(simulation.now_s, arrival, 7):
                simulation.advance(part)
            simulation.submit(i, i % 2)
        while simulation.in_flight:
            simulation.advance(simulation.now_s + 0.0007)
        assert np.array_equal(simulation.finish().finish_s, whole.finish_s)
        assert np.array_equal(simulation.busy_s, whole.busy_s)


class TestQueue:
    def test_is_served_in_order_of_arrival(self, lab):
        snapshot = lab.snapshot(limits={"concurrency": 1})
        requests = [(0.0, 10, 5), (0.001, 10, 5), (0.002, 10, 1)]
        simulation = lab.play(Simulation(lab.scenario(*requests, snapshot=snapshot)))
        assert (simulation.running.tolist(), simulation.waiting.tolist()) == ([1], [2])
        finish = simulation.finish().finish_s
        alone = finished_alone(10, 5)
        want = [alone, 2 * alone, 2 * alone + finished_alone(10, 1)]
        assert finish == pytest.approx(want)

    def test_preempts_the_youngest_when_memory_runs_out(self, lab):
        # Two requests of 500 + 20 tokens need 66 blocks, there are 64.
        simulation = lab.play(Simulation(lab.scenario((0.0, 500, 20), (0.0, 500, 20))))
        outcome = simulation.finish()
        assert outcome.preemptions.tolist() == [0, 1]
        assert outcome.finish_s[0] < outcome.finish_s[1]
        assert simulation.free_blocks == simulation.total_blocks


class TestView:
    def test_tells_what_the_router_knows_of_each_request(self, lab):
        scenario = lab.scenario(LONG, (0.1, 11, 5), (0.2, 12, 5), endpoints=2)
        simulation = lab.play(Simulation(scenario), endpoints=[0, 1, 0])
        simulation.advance(0.2)
        residents = simulation.state.residents()
        assert residents.row.tolist() == [0, 0]  # the second request is done
        assert residents.arrival_s.tolist() == [0.0, 0.2]
        assert residents.prompt_tokens.tolist() == [10, 12]
        assert residents.expected_output_tokens.tolist() == [1800.0, 10.0]
        assert residents.quality.tolist() == scenario.predicted_quality[[0, 2], 0].tolist()
        assert residents.limit_s.tolist() == [0.05, 0.05]
        assert residents.streams.tolist() == [1, 1]
        assert residents.output_tokens[0] == pytest.approx(0.2 / 0.003, abs=10)
        assert residents.output_tokens[1] == 0

    def test_has_the_rows_of_the_snapshot(self, lab):
        simulation = Simulation(lab.scenario(LONG, endpoints=3))
        assert [simulation.state.row(f"10.0.0.{i}:8000") for i in (1, 2, 3)] == [0, 1, 2]
        assert simulation.state.ready().tolist() == [True] * 3
        assert simulation.state.foreign(now_s=0.0).tolist() == [0.0] * 3
        with pytest.raises(KeyError):
            simulation.state.row("10.9.9.9:1")

    def test_shows_memory_as_scraped_and_as_old_as_it_then_was(self, lab):
        scenario = lab.scenario((0.6, 500, 500), gauges=Gauges(period_s=1.0, lag_s=0.5))
        simulation = lab.play(Simulation(scenario))
        for when, want in [(0.7, 0.0), (1.0, 0.0), (1.9, 0.0)]:
            simulation.advance(when)
            assert simulation.state.kv_usage(now_s=when).tolist() == [want]
        held = simulation.total_blocks[0] - simulation.free_blocks[0]
        simulation.advance(2.0)  # tells of 1.5
        usage = simulation.state.kv_usage(now_s=2.0)[0]
        assert 500 / 1024 < usage < held / 64
        simulation.advance(2.9)
        assert simulation.state.kv_usage(now_s=2.9)[0] == usage

    def test_shows_no_memory_where_the_engine_tells_nothing(self, lab):
        gauges = Gauges(missing=frozenset({1}))
        simulation = lab.play(Simulation(lab.scenario(LONG, endpoints=2, gauges=gauges)))
        simulation.advance(2.0)
        usage = simulation.state.kv_usage(now_s=2.0)
        assert usage[0] > 0
        assert np.isnan(usage[1])

    def test_forgets_memory_as_old_as_a_live_router_would(self, lab):
        gauges = Gauges(period_s=2 * GAUGES_STALE_AFTER_S, lag_s=0.0)
        simulation = Simulation(lab.scenario(LONG, gauges=gauges))
        for when, known in [(GAUGES_STALE_AFTER_S, True), (GAUGES_STALE_AFTER_S + 0.1, False)]:
            simulation.advance(when)
            assert np.isnan(simulation.state.kv_usage(now_s=when)[0]) != known

    def test_never_shows_a_scrape_before_its_time(self, lab):
        period, now = 0.1, 1.7
        due = 17 * period
        assert now < due
        assert int(now / period) == 17  # the division is rounded up
        scenario = lab.scenario((1.65, 100, 900), gauges=Gauges(period_s=period, lag_s=0.0))
        simulation = lab.play(Simulation(scenario))
        simulation.advance(now)
        assert simulation.state.kv_usage(now_s=now).tolist() == [0.0]
        simulation.advance(due)
        assert simulation.state.kv_usage(now_s=due)[0] > 0

    def test_equals_a_live_state_that_was_told_the_same(self, lab, build):
        scenario = lab.scenario(LONG, (0.5, 20, 30), endpoints=2)
        simulation = lab.play(Simulation(scenario))
        simulation.advance(0.55)
        live = LiveState()
        live.set_endpoints(c.address for c in scenario.snapshot.candidates)
        for i in range(2):
            live.begin(
                str(i),
                scenario.snapshot.candidates[i].address,
                build.admitted(
                    arrival_s=scenario.arrival_s[i],
                    prompt_tokens=scenario.prompt_tokens[i],
                    expected_output_tokens=scenario.predicted_output_tokens[i, i],
                    limit_s=scenario.limit_s[i],
                    quality=scenario.predicted_quality[i, i],
                ),
            )
            live.add_tokens(str(i), int(simulation.output_tokens[i]))
        for (name, got), (_, want) in zip(
            simulation.state.residents().columns(), live.residents().columns(), strict=True
        ):
            assert got.tolist() == want.tolist(), name
            assert got.dtype == want.dtype


class TestAvailability:
    def test_failure_loses_the_requests_and_the_iteration_in_progress(self, lab):
        scenario = lab.scenario(
            LONG, LONG, endpoints=2, availability=(Availability(1.0, 0, Change.FAIL),)
        )
        simulation = lab.play(Simulation(scenario))
        simulation.advance(1.0)
        assert simulation.state.ready().tolist() == [False, True]
        assert simulation.state.residents().row.tolist() == [1]
        assert simulation.free_blocks[0] == 64
        outcome = simulation.finish()
        assert np.isinf(outcome.finish_s).tolist() == [True, False]
        assert outcome.first_token_s[0] == outcome.first_token_s[1]
        assert outcome.busy_s[0] == pytest.approx(1.0, rel=1e-9)
        assert outcome.qos.tolist() == [0.0, scenario.score[1, 1]]

    def test_one_that_fails_tells_nothing_and_comes_back_empty(self, lab):
        changes = (Availability(1.0, 0, Change.FAIL), Availability(3.0, 0, Change.JOIN))
        scenario = lab.scenario(LONG, (4.0, 10, 5), availability=changes)
        simulation = Simulation(scenario)
        simulation.advance(0.0)
        simulation.submit(0, 0)
        simulation.advance(2.9)
        assert np.isnan(simulation.state.kv_usage(now_s=2.9)[0])
        simulation.advance(4.0)
        assert simulation.state.kv_usage(now_s=4.0)[0] == 0.0
        simulation.submit(1, 0)
        assert simulation.finish().finish_s[1] == pytest.approx(4.0 + finished_alone(10, 5))

    def test_one_that_leaves_finishes_what_it_has(self, lab):
        changes = (Availability(1.0, 0, Change.LEAVE), Availability(2.0, 0, Change.JOIN))
        simulation = lab.play(Simulation(lab.scenario(LONG, availability=changes)))
        simulation.advance(1.5)
        assert not simulation.state.ready()[0]
        simulation.advance(2.0)
        assert simulation.state.ready()[0]
        assert simulation.finish().finish_s[0] == pytest.approx(finished_alone(10, 900))

    def test_one_that_failed_has_nothing_to_drain(self, lab):
        changes = (Availability(1.0, 0, Change.FAIL), Availability(2.0, 0, Change.LEAVE))
        simulation = Simulation(lab.scenario(LONG, availability=changes))
        simulation.advance(4.0)
        assert not simulation.state.ready()[0]
        assert np.isnan(simulation.state.kv_usage(now_s=4.0)[0])

    def test_a_token_of_the_very_moment_of_failure_still_comes(self, lab):
        first = 1e-3 + 1e-3 * 10
        scenario = lab.scenario((0.0, 10, 5), availability=(Availability(first, 0, Change.FAIL),))
        outcome = lab.play(Simulation(scenario)).finish()
        assert outcome.first_token_s[0] == first
        assert np.isinf(outcome.finish_s[0])

    def test_failures_after_the_last_arrival_count(self, lab):
        scenario = lab.scenario(LONG, availability=(Availability(0.5, 0, Change.FAIL),))
        assert np.isinf(lab.play(Simulation(scenario)).finish().finish_s[0])

    def test_a_router_learns_of_a_failure_later_and_loses_what_it_sends_until_then(self, lab):
        requests = [(0.5, 10, 5), (1.0, 10, 5), (1.2, 10, 5), (4.0, 10, 5)]
        changes = (Availability(1.0, 0, Change.FAIL), Availability(3.0, 0, Change.JOIN))
        scenario = lab.scenario(*requests, endpoints=2, availability=changes, detection_s=0.25)
        simulation = lab.play(Simulation(scenario), endpoints=[0, 0, 0, 0])
        outcome = simulation.finish()
        assert np.isfinite(outcome.finish_s).tolist() == [True, False, False, True]
        assert outcome.qos[1:3].tolist() == [0.0, 0.0]

        simulation = Simulation(scenario)
        for when, ready in [(1.2, True), (1.25, False), (3.2, False), (3.25, True)]:
            simulation.advance(when)
            assert simulation.state.ready().tolist() == [ready, True], when
            assert simulation.in_flight == 0

    def test_one_that_leaves_serves_what_comes_before_the_router_knows(self, lab):
        changes = (Availability(1.0, 0, Change.LEAVE),)
        scenario = lab.scenario((1.1, 10, 5), availability=changes, detection_s=0.25)
        outcome = lab.play(Simulation(scenario)).finish()
        assert outcome.finish_s[0] == pytest.approx(1.1 + finished_alone(10, 5))

    def test_events_of_one_moment_happen_before_they_are_noticed(self, lab):
        changes = (Availability(1.0, 0, Change.FAIL), Availability(1.25, 0, Change.JOIN))
        scenario = lab.scenario(LONG, availability=changes, detection_s=0.25)
        told = [(event.time_s, event.noticed) for event in scenario.events()]
        assert told == [(1.0, False), (1.25, False), (1.25, True), (1.5, True)]


class TestQos:
    @pytest.mark.parametrize("quality", [None, np.array([[0.5], [0.25], [1.0]])])
    def test_is_the_quality_of_what_was_served_in_time(self, lab, quality):
        limits = np.array([np.inf, np.inf, 1e-9])
        scenario = lab.scenario(*[(0.0, 10, 5)] * 3, limit_s=limits)
        got = qos_of(
            scenario,
            np.arange(3),
            endpoint=np.array([0, REJECTED, 0]),
            first_token_s=np.array([1.0, np.inf, 1.0]),
            finish_s=np.array([2.0, np.inf, 2.0]),
            quality=quality,
        )
        table = scenario.score if quality is None else quality
        assert got.tolist() == [table[0, 0], 0.0, 0.0]


class TestDecisions:
    def test_a_rejected_request_is_never_served(self, lab):
        simulation = Simulation(lab.scenario(LONG))
        assert simulation.endpoint.tolist() == [UNDECIDED]
        simulation.reject(0)
        outcome = simulation.finish()
        assert outcome.endpoint.tolist() == [REJECTED]
        assert np.isinf(outcome.finish_s[0])
        assert outcome.qos.tolist() == [0.0]
        assert outcome.busy_s.tolist() == [0.0]

    def test_one_without_a_limit_still_has_to_be_served(self, lab):
        scenario = lab.scenario((0.0, 10, 5), (0.0, 10, 5), limit_s=np.full(2, np.inf))
        simulation = Simulation(scenario)
        simulation.reject(0)
        simulation.submit(1, 0)
        outcome = simulation.finish()
        assert outcome.in_time.tolist() == [False, True]
        assert outcome.qos.tolist() == [0.0, scenario.score[1, 0]]

    def test_one_longer_than_the_cache_is_refused_by_the_engine(self, lab):
        small = lab.build.expert("a", "10.0.0.1:8000", limits={"context_tokens": 100})
        large = lab.build.expert(
            "b", "10.0.0.2:8000", limits={"context_tokens": 4096}, profile={"kv_cache_gib": 4.0}
        )
        scenario = lab.scenario((0.0, 2000, 5), snapshot=lab.build.snapshot(small, large))
        outcome = lab.play(Simulation(scenario), endpoints=[0]).finish()
        assert outcome.endpoint.tolist() == [0]
        assert np.isinf(outcome.finish_s[0])

    def test_wrong_ones_are_told(self, lab):
        changes = (Availability(0.0, 1, Change.LEAVE),)
        scenario = lab.scenario(LONG, (1.0, 10, 5), endpoints=2, availability=changes)
        simulation = Simulation(scenario)
        simulation.advance(0.0)
        with pytest.raises(ValueError, match="there is no endpoint 2 among 2"):
            simulation.submit(0, 2)
        with pytest.raises(ValueError, match="endpoint 1 is not ready"):
            simulation.submit(0, 1)
        with pytest.raises(ValueError, match="there is no request 2 among 2"):
            simulation.submit(2, 0)
        with pytest.raises(ValueError, match="there is no request -1 among 2"):
            simulation.reject(-1)
        with pytest.raises(ValueError, match=r"request 1 arrives at 1.0 s, it is 0.0 s"):
            simulation.submit(1, 0)
        simulation.submit(0, 0)
        with pytest.raises(ValueError, match="request 0 has been decided already"):
            simulation.reject(0)
        with pytest.raises(ValueError, match=r"1 requests were neither .* the first is 1"):
            simulation.finish()
        simulation.advance(2.0)
        with pytest.raises(ValueError, match=r"it is 2.0 s already, time cannot go back to 1.0 s"):
            simulation.advance(1.0)
        with pytest.raises(ValueError, match="time cannot go back to nan"):
            simulation.advance(np.nan)
        with pytest.raises(ValueError, match="no token times were kept"):
            simulation.token_times(0)


class TestClone:
    def test_goes_its_own_way_and_leaves_the_first_alone(self, lab):
        scenario = lab.scenario(LONG, (0.5, 100, 50), (0.6, 100, 50), endpoints=2)
        straight = lab.play(Simulation(scenario), endpoints=[0, 0, 1]).finish()
        simulation = Simulation(scenario)
        simulation.submit(0, 0)
        simulation.advance(0.5)
        before = simulation.state.residents().output_tokens.copy()
        twin = simulation.clone()
        assert twin.state.residents().output_tokens.tolist() == before.tolist()
        twin.submit(1, 1)
        twin.advance(0.6)
        twin.reject(2)
        other = twin.finish()
        assert simulation.now_s == 0.5
        assert simulation.state.residents().output_tokens.tolist() == before.tolist()
        simulation.submit(1, 0)
        simulation.advance(0.6)
        simulation.submit(2, 1)
        got = simulation.finish()
        assert np.array_equal(got.finish_s, straight.finish_s)
        assert got.endpoint.tolist() == [0, 0, 1]
        assert other.endpoint.tolist() == [0, 1, REJECTED]
        assert other.finish_s[0] < got.finish_s[0]
