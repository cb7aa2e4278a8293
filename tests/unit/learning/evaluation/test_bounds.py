"""Bounds on made-up sites where the best choice is known."""

from dataclasses import replace

import numpy as np
import pytest

from pointsman_core.deciders import ImpactGreedy
from pointsman_core.resources import Admission
from pointsman_learning.evaluation.bounds import BOUNDS, _qos, informed, lookahead
from pointsman_learning.simulator import REJECTED, Scenario, Simulation, simulate

CHAT, OTHER_CHAT, CODER = range(3)


@pytest.fixture
def misled(snapshot):
    """Twenty requests, all predicted to be best at the coder, in truth at one of the others."""
    count = 20
    rng = np.random.default_rng(0)
    score = np.full((count, 3), 0.1)
    best = rng.integers(0, 2, count)
    score[np.arange(count), best] = 1.0
    return Scenario(
        snapshot=snapshot,
        arrival_s=np.arange(count) * 3.0,
        prompt_tokens=np.full(count, 100),
        limit_s=np.full(count, 0.5),
        score=score,
        output_tokens=np.full((count, 3), 20),
        predicted_quality=np.tile([0.4, 0.4, 0.6], (count, 1)),
        predicted_output_tokens=np.full((count, 3), 100.0),
        description="made up",
    ), best


def test_a_router_goes_by_predictions(misled):
    scenario, _ = misled
    outcome = simulate(scenario, ImpactGreedy())
    assert (outcome.endpoint == CODER).all()


@pytest.mark.parametrize("name", ["bound:true-quality", "bound:true-both"])
def test_true_quality_finds_the_best(name, misled):
    scenario, best = misled
    outcome = BOUNDS[name](scenario, 0)
    assert outcome.endpoint.tolist() == best.tolist()
    assert outcome.qos.mean() == pytest.approx(1.0)


def test_true_lengths_alone_do_not(misled):
    outcome = informed(misled[0], quality=False, lengths=True)
    assert (outcome.endpoint == CODER).all()


def test_the_outcome_is_that_of_the_scenario_as_given(misled):
    scenario, _ = misled
    for name, bound in BOUNDS.items():
        assert bound(scenario, 0).scenario is scenario, name


def test_lookahead_with_true_quality_finds_the_best_too(misled):
    scenario, best = misled
    outcome = lookahead(scenario, quality=True, horizon=3)
    assert outcome.endpoint.tolist() == best.tolist()


def crowd(snapshot, admission=Admission.REJECT):
    """Bursts of requests with tight limits; one endpoint is clearly preferred."""
    count = 60
    rng = np.random.default_rng(3)
    return Scenario(
        snapshot=snapshot.model_copy(update={"admission": admission}),
        arrival_s=np.sort(rng.integers(0, 6, count) * 4.0 + rng.random(count) * 0.5),
        prompt_tokens=rng.integers(200, 900, count),
        limit_s=rng.choice([0.1, 0.2], count),
        score=np.tile([0.5, 0.5, 0.9], (count, 1)),
        output_tokens=np.tile(rng.integers(5, 120, count)[:, None], (1, 3)),
        predicted_quality=np.tile([0.5, 0.5, 0.9], (count, 1)),
        predicted_output_tokens=np.full((count, 3), 60.0),
        description="made up",
    )


def test_lookahead_is_better_where_bursts_come(snapshot):
    scenario = crowd(snapshot)
    usual = simulate(scenario, ImpactGreedy()).qos.mean()
    assert lookahead(scenario, quality=False, horizon=20).qos.mean() > usual


def test_lookahead_rejects_only_under_reject(snapshot):
    free = lookahead(crowd(snapshot), quality=False, horizon=10)
    bound = lookahead(crowd(snapshot, Admission.BEST_EFFORT), quality=False, horizon=10)
    assert (free.endpoint == REJECTED).any()
    assert not (bound.endpoint == REJECTED).any()


def test_lookahead_repeats_itself(snapshot):
    scenario = crowd(snapshot)
    first, again = (lookahead(scenario, quality=False, horizon=5) for _ in range(2))
    assert (first.endpoint == again.endpoint).all()
    assert (first.finish_s == again.finish_s).all()


def test_a_first_token_limit_counts(snapshot):
    scenario = replace(crowd(snapshot), first_token_limit_s=np.full(60, 1e-6))
    assert lookahead(scenario, quality=False, horizon=3).qos.sum() == 0


def test_without_limits_a_request_still_has_to_be_served(snapshot):
    # A rejected request would be in time for ever if its latency were compared alone.
    scenario = replace(crowd(snapshot), limit_s=np.full(60, np.inf))
    outcome = lookahead(scenario, quality=False, horizon=3)
    assert not (outcome.endpoint == REJECTED).any()
    assert outcome.qos.sum() > 0


def test_what_is_lost_is_worth_nothing_without_limits(snapshot):
    scenario = replace(crowd(snapshot), limit_s=np.full(60, np.inf))
    simulation = Simulation(scenario)
    for i, arrival in enumerate(scenario.arrival_s[:3].tolist()):
        simulation.advance(arrival)
        simulation.reject(i)
    assert _qos(scenario, simulation, 3).tolist() == [0.0, 0.0, 0.0]
