import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pointsman_learning.simulator import (
    REJECTED,
    Availability,
    Change,
    Gauges,
    ScenarioError,
    simulate,
)
from pointsman_learning.simulator.environment import (
    BOUND,
    ENDPOINT_FEATURES,
    REQUEST_FEATURES,
    RESIDENT_FEATURES,
    UNKNOWN_USAGE,
    RoutingEnv,
)


def requests(count=30):
    return [(0.02 * i, 20 + i, 10 + i) for i in range(count)]


def column(padded, features, name):
    return padded[..., features.index(name)]


@pytest.fixture
def scenario(lab):
    return lab.scenario(*requests(), snapshot=lab.snapshot(3, algorithm="RoundRobin"))


@pytest.fixture
def strict(lab):
    snapshot = lab.snapshot(3, algorithm="RoundRobin", admission="Reject")
    return lab.scenario(*requests(), snapshot=snapshot)


def walk(environment, actions):
    observation, _ = environment.reset(seed=0)
    total = 0.0
    for action in actions:
        observation, reward, over, cut, _ = environment.step(np.int64(action))
        assert not cut
        total += reward
        if over:
            break
    return observation, total, over


@pytest.mark.parametrize("admission", ["BestEffort", "Reject"])
def test_passes_gymnasiums_own_checker(lab, admission):
    snapshot = lab.snapshot(3, admission=admission)
    scenario = lab.scenario(*requests(), snapshot=snapshot, gauges=Gauges(missing=frozenset({1})))
    check_env(RoutingEnv.of(scenario), skip_render_check=True)


class TestEpisode:
    def test_is_what_core_router_does_with_the_same_choices(self, scenario):
        environment = RoutingEnv.of(scenario)
        _, total, over = walk(environment, (i % 3 for i in range(30)))
        outcome = simulate(scenario)  # round robin
        assert over
        assert np.array_equal(environment.outcome.finish_s, outcome.finish_s)
        assert total == pytest.approx(outcome.qos.sum())
        assert 0 < total < scenario.score.sum()

    def test_rewards_sum_to_total_qos_under_all_limits(self, lab):
        scenario = lab.scenario(
            *requests(60),
            snapshot=lab.snapshot(2),
            limit_s=np.full(60, 0.03),
            first_token_limit_s=np.full(60, 0.06),
        )
        environment = RoutingEnv.of(scenario)
        _, total, _ = walk(environment, [0] * 60)
        waited = environment.outcome.first_token_s - scenario.arrival_s
        late = environment.outcome.latency_per_token_s > 0.03
        assert ((waited > 0.06) & ~late).any()
        assert 0 < environment.outcome.in_time.sum() < 60
        assert total == pytest.approx(environment.outcome.qos.sum())

    def test_ends_with_the_last_request(self, scenario):
        environment = RoutingEnv.of(scenario)
        observation, _, over = walk(environment, [0] * 30)
        assert over
        assert not observation["action_mask"].any()
        assert environment.observation_space.contains(observation)
        with pytest.raises(RuntimeError, match=r"the episode is over: call reset\(\)"):
            environment.step(np.int64(0))
        environment.reset()
        environment.step(np.int64(0))

    def test_another_reward_may_be_given(self, scenario):
        told = []

        def reward(simulation, finished, decided):
            told.append((decided, finished.tolist(), simulation.now_s))
            return 1.0

        _, total, _ = walk(RoutingEnv.of(scenario, reward=reward), [0] * 30)
        assert total == 30.0
        assert [decided for decided, *_ in told] == list(range(30))
        assert sorted(i for _, finished, _ in told for i in finished) == list(range(30))

    def test_scenarios_are_drawn_by_seed(self, lab):
        def draw(rng):
            count = int(rng.integers(5, 50))
            return lab.scenario(*requests(count), endpoints=int(rng.integers(1, 4)))

        environment = RoutingEnv(draw, endpoints=4, may_reject=True)
        sizes = []
        for seed in (1, 1, 2):
            environment.reset(seed=seed)
            sizes.append(len(environment.simulation.scenario))
        assert sizes[0] == sizes[1] != sizes[2]
        environment.reset()
        assert environment.action_space.n == 5

    def test_a_scenario_must_have_room(self, scenario):
        environment = RoutingEnv(lambda _: scenario, endpoints=2, may_reject=False)
        with pytest.raises(ValueError, match="has 3 endpoints, there are places for 2"):
            environment.reset()

    def test_a_wrong_scenario_is_told(self, lab):
        with pytest.raises(ScenarioError, match="limit_s"):
            RoutingEnv.of(lab.scenario((0.0, 1, 1), limit_s=np.zeros(1))).reset()


class TestActions:
    def test_rejection_is_the_last_one_where_the_policy_has_it(self, scenario, strict):
        assert RoutingEnv.of(scenario).action_space.n == 3
        environment = RoutingEnv.of(strict)
        assert environment.action_space.n == 4
        walk(environment, [3, 0] * 15)
        assert environment.outcome.endpoint.tolist() == [REJECTED, 0] * 15

    def test_an_invalid_one_turns_the_request_away(self, lab):
        changes = (Availability(0.0, 1, Change.LEAVE),)
        scenario = lab.scenario(*requests(3), endpoints=2, availability=changes)
        environment = RoutingEnv(lambda _: scenario, endpoints=4, may_reject=True)
        observation, _ = environment.reset()
        assert observation["action_mask"].tolist() == [1, 0, 0, 0, 1]
        walk(environment, [1, 2, 0])
        assert environment.outcome.endpoint.tolist() == [REJECTED, REJECTED, 0]

    def test_best_effort_never_turns_a_request_away_for_an_invalid_one(self, lab):
        changes = (Availability(0.0, 1, Change.LEAVE),)
        scenario = lab.scenario(*requests(5), endpoints=4, availability=changes)
        environment = RoutingEnv(lambda _: scenario, endpoints=6, may_reject=False)
        environment.reset()
        told = [environment.step(np.int64(a))[-1]["endpoint"] for a in (1, 4, 5, 3, 0)]
        assert told == environment.outcome.endpoint.tolist() == [2, 0, 0, 3, 0]

    def test_with_nothing_ready_best_effort_turns_requests_away(self, lab):
        changes = (Availability(0.02, 0, Change.LEAVE), Availability(0.05, 0, Change.JOIN))
        scenario = lab.scenario(*requests(4), endpoints=1, availability=changes)
        environment = RoutingEnv.of(scenario)
        environment.reset()
        observation, *_ = environment.step(np.int64(0))
        assert observation["action_mask"].tolist() == [0]
        walk(environment, [0] * 4)
        assert environment.outcome.endpoint.tolist() == [0, REJECTED, REJECTED, 0]
        outcome = simulate(scenario)
        assert outcome.endpoint.tolist() == [0, REJECTED, REJECTED, 0]


class TestObservation:
    def test_is_cores_padded(self, scenario):
        environment = RoutingEnv(lambda _: scenario, endpoints=5, may_reject=False, in_flight=16)
        environment.reset()
        for _ in range(9):
            padded, *_ = environment.step(np.int64(0))
        seen = environment.observed
        count = len(seen.resident_candidate)
        assert 2 < count < 16
        request = dict(zip(REQUEST_FEATURES, padded["request"].tolist(), strict=True))
        assert request["prompt_tokens"] == seen.prompt_tokens == 29
        assert (request["waited_s"], request["limit_s"]) == (0.0, 0.05)
        assert request["first_token_limit_s"] == BOUND
        endpoints = padded["endpoints"]
        for name in ("eligible", "quality", "output_tokens", "foreign", "kv_usage"):
            got = column(endpoints, ENDPOINT_FEATURES, name)
            assert got.tolist() == [*getattr(seen, name).astype(float), 0.0, 0.0], name
        bandwidth = column(endpoints, ENDPOINT_FEATURES, "context_s_per_token")
        assert bandwidth[:3].tolist() == seen.cost.context_s_per_token.tolist()
        residents = padded["residents"]
        for name in RESIDENT_FEATURES:
            got = column(residents, RESIDENT_FEATURES, name)
            assert got[:count].tolist() == getattr(seen, f"resident_{name}").tolist(), name
            assert not got[count:].any()
        assert padded["resident_endpoint"].tolist() == [0] * count + [-1] * (16 - count)

    def test_leaves_out_what_has_no_place_but_keeps_it_in_the_whole(self, scenario):
        environment = RoutingEnv.of(scenario, in_flight=2)
        environment.reset()
        for _ in range(9):
            padded, *_ = environment.step(np.int64(0))
            assert environment.observation_space.contains(padded)
        assert (padded["resident_endpoint"] == 0).all()
        assert len(environment.observed.resident_candidate) > 2

    def test_shows_unknown_memory_as_such(self, lab):
        scenario = lab.scenario((0.0, 1, 1), endpoints=2, gauges=Gauges(missing=frozenset({1})))
        padded, _ = RoutingEnv.of(scenario).reset()
        usage = column(padded["endpoints"], ENDPOINT_FEATURES, "kv_usage")
        assert usage.tolist() == [0.0, UNKNOWN_USAGE]
