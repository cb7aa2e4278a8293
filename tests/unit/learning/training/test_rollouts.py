"""Labels by branch rollouts, and shards of them."""

from dataclasses import fields, replace

import numpy as np
import pytest

from pointsman_core.deciders import ImpactGreedy
from pointsman_core.observation import Observation
from pointsman_learning.simulator import REJECTED, Simulation
from pointsman_learning.training.config import LabelOptions
from pointsman_learning.training.dataset import Credit, LabelledStates
from pointsman_learning.training.domain import Domain
from pointsman_learning.training.labelling import run, tasks
from pointsman_learning.training.lockstep import by_decider
from pointsman_learning.training.rollouts import RolloutOptions, State, label
from pointsman_learning.training.shards import Shard, load_all

DOMAIN = Domain(processes={"poisson": 1.0}, most_endpoints=4, outage_share=0.0, site_share=0.0)
OPTIONS = RolloutOptions(horizon=10, requests=50, trunks=2, states_per_scenario=4, explore=0.0)


def labelled(**changes) -> list[State]:
    return list(label(DOMAIN, replace(OPTIONS, **changes), seed=3))


def equal(one: State, other: State) -> bool:
    names = ("own", "present", "later", "quiet_in_time", "quiet_present")
    return all(np.array_equal(getattr(one, n), getattr(other, n), equal_nan=True) for n in names)


def test_labels_depend_on_the_seed_only():
    one, again = labelled(), labelled()
    assert len(one) == 8
    assert all(map(equal, one, again))
    assert not all(map(equal, one, label(DOMAIN, OPTIONS, seed=4)))


def test_labels_do_not_depend_on_how_many_branches_are_played_at_once():
    together, apart = labelled(lanes_at_once=10_000), labelled(lanes_at_once=1)
    by_content = [sorted(states, key=lambda s: tuple(s.own)) for states in (together, apart)]
    assert all(map(equal, *by_content))


def test_parts_add_up_to_what_separate_simulations_come_to():
    """The label of every action, by clones of one simulation and core's decider."""
    domain = replace(DOMAIN, reject_share=1.0)
    options = replace(OPTIONS, trunks=1, states_per_scenario=3)
    for state in label(domain, options, seed=5):
        scenario = state.drawn.scenario
        start = int(np.flatnonzero(scenario.prompt_tokens == state.seen.prompt_tokens)[0])
        values = [_played_apart(scenario, start, a, options.horizon) for a in range(len(state.own))]
        expected = np.array(values) - values[-1]
        ours = state.own + state.present + state.later.sum(axis=1)
        known = np.isfinite(ours)
        np.testing.assert_allclose(ours[known], expected[known], atol=1e-9)


def _played_apart(scenario, start, action, horizon):
    from pointsman_core.observation import RoutingTable, observe
    from pointsman_learning.simulator import ReplayPredictor, core_request

    simulation = Simulation(scenario)
    table = RoutingTable(scenario.snapshot, simulation.state, ReplayPredictor(scenario))
    last = start + horizon
    for i in range(last + 1):
        simulation.advance(float(scenario.arrival_s[i]))
        seen = observe(table, simulation.state, core_request(scenario, i), now_s=simulation.now_s)
        scores = ImpactGreedy().score(seen)
        acceptable = (scores.acceptable & seen.eligible).any()
        best = int(np.where(seen.eligible, scores.values, -np.inf).argmax())
        chosen = best if acceptable else REJECTED
        if i == start:
            chosen = REJECTED if action == scenario.endpoints else action
        if chosen == REJECTED:
            simulation.reject(i)
        else:
            simulation.submit(i, chosen)
    simulation.advance(np.inf)
    rows = np.arange(last + 1)
    served = np.maximum(simulation.endpoint[rows], 0)
    took = (simulation.finish_s[rows] - scenario.arrival_s[rows]) / scenario.output_tokens[
        rows, served
    ]
    return scenario.predicted_quality[rows, served][took <= scenario.limit_s[rows]].sum()


def test_rejection_is_the_reference_and_hurts_nobody():
    for state in labelled():
        assert state.own[-1] == state.present[-1] == 0
        assert not state.later[-1].any()
        assert np.nanmax(state.quiet_present) <= 1.0
        assert set(np.unique(state.quiet_in_time)) <= {0.0, 1.0}


def test_a_branch_may_follow_another_policy_for_a_while():
    calls = []
    base = by_decider(ImpactGreedy())

    def counted(worlds, seen):
        calls.append(len(worlds))
        return base(worlds, seen)

    followed = list(label(DOMAIN, OPTIONS, seed=3, policy=counted, followed=4))
    assert all(map(equal, followed, labelled()))  # it is the same policy in the end
    assert len(calls) == OPTIONS.requests - OPTIONS.horizon + 4 * 1


def test_too_few_requests_are_refused():
    with pytest.raises(ValueError, match="50 requests are too few for 50 ahead"):
        labelled(horizon=50)


def test_shards_keep_states(tmp_path):
    states = labelled()
    file = tmp_path / "0.npz"
    Shard.of(states, OPTIONS.bins).save(file)
    (shard,) = load_all(tmp_path)
    assert len(shard) == len(states)
    assert shard.bins == (5, 10)
    for i, state in enumerate(states):
        seen = shard.observation(i)
        for name in (f.name for f in fields(Observation) if f.name != "cost"):
            np.testing.assert_allclose(getattr(seen, name), getattr(state.seen, name), rtol=1e-6)
        expected = np.column_stack((state.own, state.present, state.later))
        np.testing.assert_allclose(shard.labels_of(i), expected, rtol=1e-6)
        assert shard.quiet_of(i).shape == (len(state.seen.quality), 2)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_damaged_shards_are_named(tmp_path, content):
    (tmp_path / "1.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"1\.npz is no shard of labels"):
        list(load_all(tmp_path))


def test_only_missing_shards_are_made(tmp_path):
    options = LabelOptions(rollouts=replace(OPTIONS, trunks=1))
    todo = tasks(DOMAIN, options, tmp_path, seed=7, count=2)
    first = next(run(todo, jobs=1))
    assert first.states == 4
    assert first.labels > 4
    left = tasks(DOMAIN, options, tmp_path, seed=7, count=2)
    assert [task.file.name for task in left] == ["00000008.npz"]
    with pytest.raises(ValueError, match="made with other settings"):
        tasks(replace(DOMAIN, site_share=1.0), options, tmp_path, seed=7, count=2)


def test_a_process_makes_the_same_states(tmp_path):
    options = LabelOptions(rollouts=replace(OPTIONS, trunks=1, states_per_scenario=2))
    domain = replace(DOMAIN, predictors={"declared": 1.0})
    for name, jobs in (("one", 1), ("two", 2)):
        list(run(tasks(domain, options, tmp_path / name, seed=1, count=1), jobs=jobs))
    for one, two in zip(load_all(tmp_path / "one"), load_all(tmp_path / "two"), strict=True):
        np.testing.assert_array_equal(one.endpoint_start, two.endpoint_start)


def test_credit_weighs_the_parts():
    states = labelled()
    shard = Shard.of(states, OPTIONS.bins)
    credit = Credit(discount=0.9)
    data = LabelledStates([shard], credit)
    batch = data.batch(np.arange(len(data)))
    weights = np.array([1, 1, 0.9**3, 0.9**8])
    for i, state in enumerate(states):
        parts = np.column_stack((state.own, state.present, state.later))
        known = np.isfinite(state.own)
        size = len(state.own) - 1
        columns = [*range(size), batch.value.shape[1] - 1]
        ours = batch.value[i].numpy()[columns]
        np.testing.assert_allclose(ours[known], (parts @ weights)[known], atol=1e-5)
        assert batch.known[i].numpy()[columns].tolist() == known.tolist()
        last = batch.value.shape[1] - 1
        assert batch.chosen[i] == (last if state.chosen == size else state.chosen)
    assert Credit(own_only=True).weights(OPTIONS.bins).tolist() == [1, 0, 0, 0]
