"""Worlds in lockstep are exactly what separate simulations are."""

from dataclasses import fields

import numpy as np
import pytest

from pointsman_core.deciders import ImpactGreedy
from pointsman_core.observation import Observation, RoutingTable, observe
from pointsman_core.resources import Admission
from pointsman_learning.simulator import (
    REJECTED,
    ReplayPredictor,
    Scenario,
    Simulation,
    core_request,
    simulate,
)
from pointsman_learning.training.lockstep import Lockstep, by_decider, join, play
from pointsman_learning.workloads import make_scenario, outages, random_pool, synthetic_corpus

REQUESTS = 60


def scenario(seed: int, *, endpoints: int = 4, load: float = 0.9, mishaps: bool = True) -> Scenario:
    rng = np.random.default_rng(seed)
    return make_scenario(
        pool_snapshot=random_pool(rng, endpoints),
        process="on-off",
        load=load,
        limits="mixed",
        split="train",
        requests=REQUESTS,
        seed=seed,
        corpus=synthetic_corpus("train"),
        mishaps=outages if mishaps else None,
        admission=[Admission.REJECT, Admission.BEST_EFFORT][seed % 2],
    )


def same(one: Observation, other: Observation) -> None:
    for name in (f.name for f in fields(Observation)):
        left, right = getattr(one, name), getattr(other, name)
        if name == "cost":
            for column in fields(left):
                np.testing.assert_array_equal(
                    getattr(left, column.name), getattr(right, column.name)
                )
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)


class Separate:
    """One simulation with core's own observe and decider, as the bounds have it."""

    def __init__(self, scenario: Scenario, simulation: Simulation | None = None) -> None:
        self.scenario = scenario
        self.simulation = simulation or Simulation(scenario)
        self.table = RoutingTable(
            scenario.snapshot, self.simulation.state, ReplayPredictor(scenario)
        )

    def look(self, i: int) -> Observation:
        self.simulation.advance(float(self.scenario.arrival_s[i]))
        return observe(
            self.table,
            self.simulation.state,
            core_request(self.scenario, i),
            now_s=self.simulation.now_s,
        )

    def choose(self, seen: Observation) -> int:
        scores = ImpactGreedy().score(seen)
        acceptable = scores.acceptable & seen.eligible
        rejects = self.scenario.snapshot.admission is Admission.REJECT
        if not seen.eligible.any() or (rejects and not acceptable.any()):
            return REJECTED
        return int(np.where(seen.eligible, scores.values, -np.inf).argmax())

    def apply(self, i: int, action: int) -> None:
        if action == REJECTED:
            self.simulation.reject(i)
        else:
            self.simulation.submit(i, action)


def test_observations_and_choices_equal_those_of_separate_simulations():
    scenarios = [scenario(seed, endpoints=2 + seed, load=0.5 + 0.3 * seed) for seed in range(4)]
    worlds, policy = Lockstep.of(scenarios), by_decider(ImpactGreedy())
    separate = [Separate(one) for one in scenarios]
    for i in range(REQUESTS):
        worlds.advance_to_arrivals()
        seen = worlds.observe()
        chosen = policy(worlds, seen)
        for world, own in enumerate(separate):
            expected = own.look(i)
            same(worlds.one(seen, world), expected)
            assert chosen[world] == own.choose(expected)
            own.apply(i, int(chosen[world]))
        worlds.apply(chosen)
    worlds.drain()
    for world, own in enumerate(separate):
        outcome = own.simulation.finish()
        slots = world * REQUESTS + np.arange(REQUESTS)
        np.testing.assert_array_equal(worlds.choice(slots), outcome.endpoint)
        np.testing.assert_array_equal(worlds.qos(slots, actual=True), outcome.qos)
        np.testing.assert_array_equal(worlds.in_time(slots), outcome.in_time)


def test_a_whole_run_is_what_simulate_makes_of_it():
    one = scenario(2)
    worlds = Lockstep.of([one])
    play(worlds, by_decider(ImpactGreedy()), REQUESTS)
    worlds.drain()
    outcome = simulate(one, ImpactGreedy())
    np.testing.assert_array_equal(worlds.qos(np.arange(REQUESTS), actual=True), outcome.qos)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_branches_go_on_exactly_like_clones(seed):
    one, start, ahead = scenario(seed, load=1.2), 25, 20
    worlds, policy = Lockstep.of([scenario(9), one]), by_decider(ImpactGreedy())
    play(worlds, policy, start)
    worlds.advance_to_arrivals()
    actions = [*np.flatnonzero(worlds.one(worlds.observe(), 1).eligible).tolist(), REJECTED]
    branches = join([worlds.take(1, ahead)], [len(actions)])
    first = branches.slot.copy()
    branches.apply(np.array(actions))
    play(branches, policy, ahead - 1)
    branches.drain()

    own = Separate(one)
    for i in range(start):
        own.apply(i, own.choose(own.look(i)))
    own.look(start)
    present = worlds.slots.number[worlds.residents(1)]
    for branch, action in enumerate(actions):
        clone = Separate(one, own.simulation.clone())
        clone.apply(start, action)
        for i in range(start + 1, start + ahead):
            clone.apply(i, clone.choose(clone.look(i)))
        clone.simulation.advance(np.inf)
        slots = first[branch] + np.arange(-len(present), ahead)
        numbers = np.concatenate((present, np.arange(start, start + ahead)))
        np.testing.assert_array_equal(branches.choice(slots), clone.simulation.endpoint[numbers])
        np.testing.assert_array_equal(
            branches.slots.times[slots, 1], clone.simulation.finish_s[numbers]
        )


def test_worlds_must_fit_together():
    with pytest.raises(ValueError, match="equally many requests"):
        Lockstep.of([scenario(0), make_short()])
    one = Lockstep.of([scenario(0)])
    one.advance_to_arrivals()
    with pytest.raises(ValueError, match="equally many decisions"):
        join([one.take(0, 3), one.take(0, 4)], [1, 1])


def make_short() -> Scenario:
    return make_scenario(
        pool_snapshot=random_pool(np.random.default_rng(0), 2),
        process="poisson",
        load=0.5,
        split="train",
        requests=10,
        seed=0,
        corpus=synthetic_corpus("train"),
    )
