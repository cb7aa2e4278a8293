"""The scores of each decider on a site of three endpoints."""

import dataclasses

import numpy as np
import pytest

from pointsman_core.deciders import (
    ImpactGreedy,
    ImpactParameters,
    LatencyQualityGreedy,
    ScoreWeights,
    WeightedScore,
    expected_impact,
    make_decider,
)
from pointsman_core.latency import forecast
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
    looks = (Algorithm.LATENCY_QUALITY_GREEDY, Algorithm.IMPACT_GREEDY, Algorithm.HAN_DRL)
    assert (scores.in_time is not None) == (algorithm in looks)
    assert all(part.shape == (3,) for part in scores.parts.values())


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
    """An idle endpoint has 12.9 ms per token for a prompt of 100."""

    def scores(self, router, request):
        return LatencyQualityGreedy(margin=1.0).score(router.observe(request, now_s=0.0))

    def test_all_in_time_the_best_expert_first(self, site, build):
        got = self.scores(site[0], build.request(limit_s=0.02))
        assert got.in_time.all()
        assert got.values.tolist() == pytest.approx([1.2, 1.8, 1.5])

    def test_none_in_time_the_fastest_first(self, build):
        fast = build.expert("fast", A, quality=QualityPriors(default=0.0))
        slow = build.expert("slow", B, profile={"peak_tflops": 1.048576})
        got = self.scores(build.router(fast, slow)[0], build.request(limit_s=0.001))
        assert not got.in_time.any()
        assert got.values[0] == pytest.approx(1 / (1 + 12.8945))
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

    def test_a_margin_leaves_room(self, site, build):
        seen = site[0].observe(build.request(limit_s=0.02), now_s=0.0)
        kept = [LatencyQualityGreedy(m).score(seen).in_time.all() for m in (1.0, 1.5, 1.6)]
        assert kept == [True, True, False]

    def test_admission_has_a_margin_of_its_own(self, site, build):
        seen = site[0].observe(build.request(limit_s=0.02), now_s=0.0)
        got = LatencyQualityGreedy(1.6, 1.5).score(seen)
        assert not got.in_time.all()
        assert got.acceptable.all()

    @pytest.mark.parametrize("margin", [0.0, -1.0, float("nan")])
    def test_margins_are_positive(self, margin):
        with pytest.raises(ValueError, match=r"^margin must be positive, got"):
            LatencyQualityGreedy(margin)
        with pytest.raises(ValueError, match="admission_margin must be positive, got"):
            LatencyQualityGreedy(1.0, margin)


class TestBestExpert:
    def test_is_the_best_on_average_whatever_the_prompt(self, site, build):
        router, _ = site
        decider = make_decider(Algorithm.BEST_EXPERT, np.random.default_rng())
        qualities = [[0.2, 0.8, 0.5], [0.9, 0.6, 0.5], [0.9, 0.8, 0.5]]
        picks = []
        for quality in qualities:
            seen = router.observe(build.request(), now_s=0.0)
            seen = dataclasses.replace(seen, quality=np.array(quality))
            scores = decider.score(seen)
            picks.append(int(scores.values.argmax()))
        assert picks == [1, 1, 1]
        assert scores.values == pytest.approx([2 / 3, 2.2 / 3, 0.5])


class TestWeightedScore:
    def seen(self, site, build, **request):
        router, state = site
        state.begin("r", B, build.admitted(expected_output_tokens=500.0))
        state.add_tokens("r", 2)
        return router.observe(build.request(**request), now_s=0.0)

    @pytest.mark.parametrize(
        ("desc", "weights", "want"),
        [
            ("quality alone", ScoreWeights(1.0, 0.0, 0.0), [0.2, 0.8, 0.5]),
            ("load alone", ScoreWeights(0.0, 0.0, 1.0), [0.0, -1.0, 0.0]),
            ("both, weights normalised", ScoreWeights(3.0, 0.0, 1.0), [0.15, 0.35, 0.375]),
        ],
    )
    def test_weighs(self, desc, weights, want, site, build):
        got = WeightedScore(weights).score(self.seen(site, build))
        assert got.values == pytest.approx(want), desc
        assert got.in_time is None

    def test_latency_counts_as_a_share_of_the_limit_up_to_twice_of_it(self, site, build):
        weights = ScoreWeights(0.0, 1.0, 0.0)
        seen = self.seen(site, build, limit_s=0.02)
        got = WeightedScore(weights).score(seen).values
        assert got == pytest.approx(-forecast(seen).per_token_s / 0.02 / 2)
        late = dataclasses.replace(seen, limit_s=1e-6)
        assert WeightedScore(weights).score(late).values == pytest.approx([-1.0] * 3)

    def test_an_idle_site_has_no_load(self, site, build):
        seen = site[0].observe(build.request(), now_s=0.0)
        assert (WeightedScore(ScoreWeights(0.0, 0.0, 1.0)).score(seen).values == 0.0).all()

    @pytest.mark.parametrize(
        "weights", [(0.0, 0.0, 0.0), (1.0, -0.1, 0.0), (float("inf"), 1.0, 1.0)]
    )
    def test_weights_are_on_the_simplex(self, weights):
        with pytest.raises(ValueError, match="weights must be finite, not negative and not all 0"):
            WeightedScore(ScoreWeights(*weights))


class TestImpactGreedy:
    def scores(self, router, request, **parameters):
        seen = router.observe(request, now_s=0.0)
        return ImpactGreedy(ImpactParameters(**parameters)).score(seen), seen

    def test_value_is_own_qos_and_the_weighted_change_to_others(self, site, build):
        router, state = site
        state.begin("r1", B, build.admitted(quality=0.6, limit_s=0.02))
        state.begin("r2", B, build.admitted(quality=0.3, limit_s=0.03))
        got, seen = self.scores(
            router, build.request(limit_s=0.02), margin=1.1, softness=0.2, impact_weight=2.0
        )
        predicted = forecast(seen)

        def chance(per_token_s, limit_s):
            return 1 / (1 + np.exp((1.1 * per_token_s / limit_s - 1) / 0.2))

        own = chance(predicted.per_token_s, 0.02)
        before = chance(predicted.resident_before_s, np.array([0.02, 0.03]))
        after = chance(predicted.resident_after_s, np.array([0.02, 0.03]))
        others = (np.array([0.6, 0.3]) * (after - before)).sum()
        assert others < 0
        want = own * [0.2, 0.8, 0.5] + np.array([0.0, 2.0 * others, 0.0])
        assert got.values == pytest.approx(want)
        assert got.parts["chance in time"] == pytest.approx(own)
        assert got.parts["impact on others"] == pytest.approx([0.0, others, 0.0])

    def test_all_idle_the_best_expert_first(self, site, build):
        got, _ = self.scores(site[0], build.request(limit_s=0.1))
        assert got.values.argsort().tolist() == [0, 2, 1]
        assert got.in_time.all()
        assert got.acceptable.all()

    def test_goes_elsewhere_where_others_would_lose_more(self, site, build):
        router, state = site
        for i in range(3):
            state.begin(f"r{i}", B, build.admitted(quality=0.9, limit_s=0.02))
            state.add_tokens(f"r{i}", 2)
        request = build.request(limit_s=0.1, prompt_tokens=200)
        selfish, _ = self.scores(router, request, impact_weight=0.0)
        considerate, _ = self.scores(router, request, impact_weight=2.0)
        assert selfish.values.argmax() == 1
        assert considerate.values.argmax() == 2

    def test_refuses_what_is_worth_too_little(self, site, build):
        got, _ = self.scores(site[0], build.request(limit_s=0.1), least_value=0.4)
        assert got.acceptable.tolist() == [False, True, True]

    def test_the_limit_on_the_first_token_counts(self, site, build):
        request = build.request(limit_s=0.1, first_token_limit_s=0.1)
        got, _ = self.scores(site[0], request, margin=1.0, softness=0.1)
        # 101 ms to the first token.
        assert got.parts["chance in time"] == pytest.approx(1 / (1 + np.exp(0.1)))
        assert not got.in_time.any()

    def test_in_time_is_an_even_chance(self, site, build):
        request = build.request(limit_s=0.0128945)  # what an idle endpoint needs
        assert self.scores(site[0], request, margin=0.999)[0].in_time.all()
        assert not self.scores(site[0], request, margin=1.001)[0].in_time.any()

    def test_hopeless_ones_still_have_an_order(self, build):
        fast = build.expert("fast", A)
        slow = build.expert("slow", B, profile={"peak_tflops": 1.048576})
        got, _ = self.scores(build.router(fast, slow)[0], build.request(limit_s=1e-3))
        assert got.values[0] > got.values[1] > 0

    def test_a_limit_out_of_reach_is_no_overflow(self, site, build):
        with np.errstate(all="raise", under="ignore"):
            got, _ = self.scores(site[0], build.request(limit_s=1e-12))
        assert np.isfinite(got.values).all()

    def test_there_is_no_impact_where_nobody_is(self, site, build):
        seen = site[0].observe(build.request(), now_s=0.0)
        assert (expected_impact(seen).others == 0).all()

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"margin": 0.0}, "margin and softness must be positive, got 0.0 and"),
            ({"softness": -0.1}, "margin and softness must be positive"),
            ({"least_value": float("nan")}, "ImpactParameters must be finite"),
        ],
    )
    def test_bad_parameters(self, parameters, message):
        with pytest.raises(ValueError, match=message):
            ImpactParameters(**parameters)
