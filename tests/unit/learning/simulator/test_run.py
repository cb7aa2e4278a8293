from dataclasses import replace

import numpy as np
import pytest

from pointsman_core.observation import RoutingTable, observe
from pointsman_core.router import Router
from pointsman_learning.simulator import (
    REJECTED,
    Availability,
    Change,
    DeciderFailedError,
    ReplayPredictor,
    Simulation,
    core_request,
    simulate,
)


@pytest.fixture
def scenario(lab):
    snapshot = lab.snapshot(3, algorithm="RoundRobin")
    requests = ((0.01 * i, 20 + i, 10 + i) for i in range(40))
    return lab.scenario(*requests, snapshot=snapshot)


class TestRequest:
    def test_has_what_a_router_knows(self, scenario):
        request = core_request(scenario, 7)
        assert (request.arrival_s, request.prompt_tokens) == (0.07, 27)
        assert (request.limit_s, request.first_token_limit_s) == (0.05, np.inf)
        assert request.streams
        assert request.max_output_tokens is None

    def test_has_its_limit_of_the_first_token(self, scenario):
        limited = replace(scenario, first_token_limit_s=np.linspace(1.0, 2.0, 40))
        assert core_request(limited, 39).first_token_limit_s == 2.0

    def test_gets_its_own_predictions(self, scenario):
        predicted = ReplayPredictor(scenario).predict(core_request(scenario, 7).prompt)
        assert predicted.quality.tolist() == scenario.predicted_quality[7].tolist()
        assert predicted.output_tokens.tolist() == scenario.predicted_output_tokens[7].tolist()
        assert predicted.learned.all()

    def test_a_decider_cannot_write_to_predictions(self, scenario):
        predicted = ReplayPredictor(scenario).predict("0")
        with pytest.raises(ValueError, match="read-only"):
            predicted.quality[0] = 1.0


class TestSimulate:
    def test_lets_the_snapshots_algorithm_decide(self, scenario):
        outcome = simulate(scenario)
        assert outcome.endpoint.tolist() == [i % 3 for i in range(40)]
        assert np.isfinite(outcome.finish_s).all()

    def test_lets_the_given_decider_decide(self, scenario, fixed_scores):
        outcome = simulate(scenario, fixed_scores([0.0, 0.0, 1.0]))
        assert outcome.endpoint.tolist() == [2] * 40

    def test_the_same_seed_gives_the_same_run(self, lab, scenario):
        drawn = replace(scenario, snapshot=lab.snapshot(3, algorithm="Random"))
        a, b, c = (simulate(drawn, seed=seed) for seed in (1, 1, 2))
        assert np.array_equal(a.endpoint, b.endpoint)
        assert np.array_equal(a.finish_s, b.finish_s)
        assert not np.array_equal(a.endpoint, c.endpoint)

    def test_rejects_as_the_snapshots_admission_says(self, lab, scenario):
        strict = lab.snapshot(3, algorithm="RoundRobin", admission="Reject")
        hopeless = replace(scenario, limit_s=np.full(40, 1e-6))
        assert (simulate(replace(hopeless, snapshot=strict)).endpoint == REJECTED).all()
        assert (simulate(hopeless).endpoint >= 0).all()

    def test_rejects_while_nothing_is_ready(self, scenario):
        changes = [Availability(0.1, e, Change.LEAVE) for e in range(3)]
        outcome = simulate(replace(scenario, availability=tuple(changes)))
        assert (outcome.endpoint[:10] >= 0).all()
        assert (outcome.endpoint[10:] == REJECTED).all()

    def test_tells_of_each_decision_before_it_takes_effect(self, scenario):
        told = []

        def note(simulation, request, decision):
            told.append((request, simulation.now_s, decision.chosen.address))
            assert simulation.scenario is scenario
            assert len(simulation.finished) + simulation.in_flight == request

        simulate(scenario, on_decision=note)
        assert [request for request, *_ in told] == list(range(40))
        assert told[1] == (1, 0.01, "10.0.0.2:8000")

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            (RuntimeError("broken"), "at request 0: RoundRobin failed: RuntimeError: broken"),
            ([np.nan] * 3, "a score is not a finite number"),
            ([1.0], "1 scores for 3 candidates"),
        ],
    )
    def test_does_not_judge_the_fallback_in_a_broken_deciders_name(
        self, scenario, fixed_scores, said, why
    ):
        with pytest.raises(DeciderFailedError, match=why):
            simulate(scenario, fixed_scores(said))


def test_a_router_on_a_clone_sees_what_one_on_the_first_sees(scenario):
    simulation = Simulation(scenario)
    predictor = ReplayPredictor(scenario)
    table = RoutingTable(scenario.snapshot, simulation.state, predictor)
    for i in range(10):
        simulation.advance(scenario.arrival_s[i])
        simulation.submit(i, i % 3)
    simulation.advance(scenario.arrival_s[10])
    request, now = core_request(scenario, 10), simulation.now_s
    twin = simulation.clone()
    first = observe(table, simulation.state, request, now_s=now)
    router = Router(scenario.snapshot, twin.state, predictor=predictor)
    second = router.observe(request, now_s=now)
    third = observe(table, twin.state, request, now_s=now)
    for other in (second, third):
        assert other.resident_output_tokens.tolist() == first.resident_output_tokens.tolist()
        assert other.resident_candidate.tolist() == first.resident_candidate.tolist()
        assert other.kv_usage.tolist() == first.kv_usage.tolist()
