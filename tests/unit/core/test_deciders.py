"""The scores of each decider on a site of three endpoints."""

import numpy as np
import pytest

from pointsman_core.deciders import make_decider
from pointsman_core.resources import Algorithm, QualityPriors
from pointsman_core.state import EngineLoad

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"


@pytest.fixture
def site(build):
    """Router and state of experts a, b and c, the best one being b."""
    experts = [
        build.expert(name, address, quality=QualityPriors(default=quality))
        for name, address, quality in (("a", A, 0.2), ("b", B, 0.8), ("c", C, 0.5))
    ]
    return build.router(*experts)


def score(algorithm, seen, seed=0):
    return make_decider(algorithm, np.random.default_rng(seed)).score(seen)


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("busy", [False, True])
def test_every_algorithm_scores_every_candidate(algorithm, busy, site, build):
    router, state = site
    if busy:
        state.begin("r", A, build.admitted())
        state.set_ready(B, ready=False)
    scores = score(algorithm, router.observe(build.request(), now_s=0.0))
    assert scores.values.shape == (3,)
    assert np.isfinite(scores.values).all()
    assert (scores.in_time is not None) == (algorithm is Algorithm.LATENCY_QUALITY_GREEDY)


class TestRandom:
    def test_is_fair(self, site, build):
        router, _ = site
        seen = router.observe(build.request(), now_s=0.0)
        decider = make_decider(Algorithm.RANDOM, np.random.default_rng(7))
        picks = np.bincount([np.argmax(decider.score(seen).values) for _ in range(3000)])
        # Four standard deviations of a binomial of 3000 x 1/3.
        assert abs(picks - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)

    def test_repeats_itself_with_the_same_seed_only(self, site, build):
        router, _ = site
        seen = router.observe(build.request(), now_s=0.0)
        first, again, other = (score(Algorithm.RANDOM, seen, seed).values for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).all()


class TestRoundRobin:
    @pytest.mark.parametrize(
        ("unready", "want"),
        [((), "abcabca"), ((A,), "bcbcbcb"), ((B,), "acacaca"), ((A, C), "bbbbbbb")],
    )
    def test_takes_each_eligible_one_in_turn(self, unready, want, site, build):
        router, state = site
        for address in unready:
            state.set_ready(address, ready=False)
        decider = make_decider(Algorithm.ROUND_ROBIN, np.random.default_rng())
        picks = ""
        for _ in want:
            seen = router.observe(build.request(), now_s=0.0)
            best = np.where(seen.eligible, decider.score(seen).values, -np.inf).argmax()
            picks += "abc"[best]
        assert picks == want

    def test_goes_on_after_one_that_was_away(self, site, build):
        router, state = site
        decider = make_decider(Algorithm.ROUND_ROBIN, np.random.default_rng())
        picks = ""
        for ready in (True, False, False, True, True):
            state.set_ready(B, ready=ready)
            seen = router.observe(build.request(), now_s=0.0)
            best = np.where(seen.eligible, decider.score(seen).values, -np.inf).argmax()
            picks += "abc"[best]
        assert picks == "acabc"


class TestShortestQueue:
    def test_counts_requests_ours_and_foreign(self, site, build):
        router, state = site
        state.begin("r1", A, build.admitted())
        state.begin("r2", A, build.admitted())
        state.begin("r3", B, build.admitted(expected_output_tokens=9e9))
        for _ in range(2):
            state.set_load(C, EngineLoad(running=2, waiting=1), now_s=0.0)
        seen = router.observe(build.request(), now_s=0.0)
        assert score(Algorithm.SHORTEST_QUEUE, seen).values.tolist() == [-2, -1, -3]


class TestLeastLoad:
    def test_prefers_the_shortest_drain_time_not_the_shortest_queue(self, site, build):
        router, state = site
        for i in range(2):
            state.begin(f"short-{i}", A, build.admitted(expected_output_tokens=5.0))
        state.begin("long", B, build.admitted(expected_output_tokens=500.0))
        state.begin("longer", C, build.admitted(expected_output_tokens=501.0))
        for request_id in ("short-0", "short-1", "long", "longer"):
            state.add_tokens(request_id, 1)
        values = score(Algorithm.LEAST_LOAD, router.observe(build.request(), now_s=0.0)).values
        assert values.argsort().tolist() == [2, 1, 0]

    def test_knows_that_hardware_differs(self, build):
        fast = build.expert("fast", A)
        slow = build.expert("slow", B, profile={"memory_bandwidth_gbps": 100.0})
        router, state = build.router(fast, slow)
        for i, address in enumerate((A, B)):
            state.begin(f"r{i}", address, build.admitted())
        values = score(Algorithm.LEAST_LOAD, router.observe(build.request(), now_s=0.0)).values
        assert values[0] > values[1]


def test_quality_greedy_scores_by_expected_quality_alone(site, build):
    router, state = site
    for i in range(50):
        state.begin(f"r{i}", B, build.admitted())
    seen = router.observe(build.request(), now_s=0.0)
    assert score(Algorithm.QUALITY_GREEDY, seen).values.tolist() == [0.2, 0.8, 0.5]


class TestLatencyQualityGreedy:
    """An idle endpoint has 13.2 ms per token for a prompt of 100."""

    def scores(self, router, request):
        seen = router.observe(request, now_s=0.0)
        return score(Algorithm.LATENCY_QUALITY_GREEDY, seen)

    def test_all_in_time_the_best_expert_first(self, site, build):
        got = self.scores(site[0], build.request(limit_s=0.02))
        assert got.in_time.all()
        assert got.values.tolist() == pytest.approx([1.2, 1.8, 1.5])

    def test_none_in_time_the_fastest_first(self, build):
        fast = build.expert("fast", A, quality=QualityPriors(default=0.0))
        slow = build.expert("slow", B, profile={"peak_tflops": 1.048576})
        got = self.scores(build.router(fast, slow)[0], build.request(limit_s=0.001))
        assert not got.in_time.any()
        assert got.values[0] == pytest.approx(1 / (1 + 13.205))
        assert 0 < got.values[1] < got.values[0] < 1

    def test_the_best_expert_is_passed_over_where_it_would_be_late(self, site, build):
        router, state = site
        for i in range(8):
            resident = build.admitted(prompt_tokens=500.0, expected_output_tokens=200.0)
            state.begin(f"r{i}", B, resident)
        got = self.scores(router, build.request(limit_s=0.02))
        assert got.in_time.tolist() == [True, False, True]
        assert got.values.argmax() == 2

    def test_the_best_expert_is_passed_over_where_it_would_make_others_late(self, site, build):
        router, state = site
        # 3.057 ms per token alone; the new prompt would cost it 102 ms.
        state.begin("r", B, build.admitted(limit_s=0.004))
        state.add_tokens("r", 2)
        got = self.scores(router, build.request(limit_s=0.02))
        assert got.in_time.tolist() == [True, False, True]

    def test_the_limit_on_the_first_token_counts(self, site, build):
        request = build.request(limit_s=0.02, first_token_limit_s=0.1)
        assert not self.scores(site[0], request).in_time.any()
        request = build.request(limit_s=0.02, first_token_limit_s=0.102)
        assert self.scores(site[0], request).in_time.all()

    def test_an_expert_of_no_quality_in_time_goes_before_any_late_one(self, build):
        slow = build.expert("good", A, profile={"peak_tflops": 0.2})
        none = build.expert("none", B, quality=QualityPriors(default=0.0))
        got = self.scores(build.router(slow, none)[0], build.request(limit_s=0.02))
        assert got.values.argmax() == 1
