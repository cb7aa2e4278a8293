"""Discrete soft actor-critic: sums over valid actions, exact credit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pointsman_learning.han import HanConfig, HanNetwork
from pointsman_learning.training.lockstep import Lockstep
from pointsman_learning.training.policy import by_network
from pointsman_learning.training.sac import (
    Experience,
    Learner,
    Replay,
    advantages,
    collect,
    policy_of,
    soft_value,
    target_entropy,
)

VALID = torch.tensor([[True, True, False], [True, False, False]])


@pytest.fixture
def network() -> HanNetwork:
    torch.manual_seed(0)
    return HanNetwork(HanConfig(width=8, heads=2, layers=1, hidden=8))


def test_soft_value_is_the_expectation_over_valid_actions():
    values = torch.tensor([[1.0, 3.0, 99.0], [2.0, -50.0, 7.0]])
    logits = torch.tensor([[0.0, 0.0, 60.0], [-5.0, 3.0, 60.0]])
    found = soft_value(values, logits, VALID, torch.tensor(0.5))
    assert found.tolist() == pytest.approx([2.0 + 0.5 * np.log(2), 2.0])


def test_soft_value_has_finite_gradients_where_actions_are_not_valid():
    logits = torch.zeros(2, 3, requires_grad=True)
    soft_value(torch.zeros(2, 3), logits, VALID, torch.tensor(0.1)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[:, 2].tolist() == [0.0, 0.0]


def test_an_error_of_the_level_moves_no_difference_between_actions(network, config):
    """On average over what the policy does, which is what would ruin a warm start."""
    one = collect(network, config.domain, config.sac, round_number=0, seed=0)
    now = one.graphs.batch(np.arange(8))
    out = network(now)
    p, _ = policy_of(out.logits.detach(), out.valid)

    def pull(values):
        """On the values, by an error that is the same whatever was done."""
        return torch.autograd.grad((p * values).sum(), out.twin_q, retain_graph=True)[0]

    assert pull(out.twin_q).abs().max() > 0.1
    assert pull(advantages(out.twin_q, p)).abs().max() < 1e-6


def test_advantages_have_no_mean_under_the_policy():
    q = torch.tensor([[[1.0, 3.0, 9.0]], [[0.0, 2.0, 5.0]]])
    found = advantages(q, torch.tensor([[0.5, 0.5, 0.0]]))
    assert found.tolist() == [[[-1.0, 1.0, 7.0]], [[-1.0, 1.0, 4.0]]]


def test_target_entropy_follows_the_number_of_valid_actions():
    assert target_entropy(VALID, 0.5).tolist() == pytest.approx([0.5 * np.log(2), 0.0])


def test_rewards_sum_to_the_qos_of_all_requests(network, config):
    """The tailored reward telescopes; the plain one is each request's own QoS."""
    sums = []
    for own_only in (False, True):
        one = collect(network, config.domain, config.sac, round_number=1, seed=0, own_only=own_only)
        sums.append(one.reward.reshape(-1, one.worlds).sum(axis=0))
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-9)
    assert (sums[0] > 0).all()


def test_collecting_depends_on_seed_and_round_only(network, config):
    def rewards(number):
        return collect(network, config.domain, config.sac, round_number=number, seed=0).reward

    np.testing.assert_array_equal(rewards(0), rewards(0))
    assert not np.array_equal(rewards(0), rewards(1))


def test_experience_is_kept_on_disk(network, config, tmp_path):
    one = collect(network, config.domain, config.sac, round_number=0, seed=0)
    one.save(tmp_path / "0.npz")
    again = Experience.load(tmp_path / "0.npz")
    np.testing.assert_array_equal(again.reward, one.reward)
    np.testing.assert_array_equal(again.graphs.endpoint, one.graphs.endpoint)
    assert len(again) == (config.sac.requests - 1) * config.sac.worlds


def test_the_next_decision_is_of_the_same_world(network, config):
    one = collect(network, config.domain, config.sac, round_number=0, seed=0)
    numbers = np.arange(len(one))
    endpoints = np.diff(one.graphs.starts[0])
    np.testing.assert_array_equal(endpoints[numbers], endpoints[numbers + one.worlds])


def test_replay_forgets_the_oldest(network, config):
    one = collect(network, config.domain, config.sac, round_number=0, seed=0)
    replay = Replay(2 * len(one))
    for _ in range(3):
        replay.add(one)
    assert len(replay) == 2 * len(one)


def test_updates_learn_the_value_of_the_only_thing_there_is(network, config):
    """With no discount the critic becomes the mean reward of what was done."""
    options = replace_options(config, discount=0.0, learning_rate=1e-2, temperature=1e-4)
    one = collect(network, config.domain, options, round_number=0, seed=0)
    replay, learner, rng = Replay(10_000), Learner(network, options), np.random.default_rng(0)
    replay.add(one)
    first = [float(learner.update(replay.draw(rng, 32)).critic.detach()) for _ in range(60)]
    assert np.mean(first[-10:]) < 0.8 * np.mean(first[:5])


def replace_options(config, **changes):
    return config.sac.model_copy(update=changes)


def test_an_untrained_network_decides_as_impact_greedy(config):
    from pointsman_core.deciders import ImpactGreedy
    from pointsman_learning.training.lockstep import by_decider, play

    drawn = [config.domain.draw(seed, requests=40).scenario for seed in range(3)]
    choices = []
    for policy in (by_network(HanNetwork(HanConfig())), by_decider(ImpactGreedy())):
        worlds = Lockstep.of(drawn)
        play(worlds, policy, 40)
        choices.append(worlds.choice(np.arange(120)))
    np.testing.assert_array_equal(*choices)


def test_where_nothing_is_ready_the_network_rejects(config):
    from pointsman_learning.simulator import REJECTED, Availability, Change

    one = config.domain.draw(0, requests=40).scenario
    gone = tuple(Availability(0.0, e, Change.LEAVE) for e in range(one.endpoints))
    worlds = Lockstep.of([replace(one, availability=gone, detection_s=0.0)])
    worlds.advance_to_arrivals()
    chosen = by_network(HanNetwork(HanConfig()))(worlds, worlds.observe())
    assert chosen.tolist() == [REJECTED]
