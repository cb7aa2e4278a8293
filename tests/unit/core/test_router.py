"""From a request to a decision: choosing, admission, fallback."""

from collections import Counter

import numpy as np
import pytest

from pointsman_core.deciders import Scores
from pointsman_core.resources import Admission, Algorithm, QualityPriors
from pointsman_core.router import Rejection

A, B, C, D, E = (f"10.0.0.{i}:8000" for i in range(1, 6))


@pytest.fixture
def site(build):
    """Router and state of experts a, b and c with quality 0.2, 0.8 and 0.5."""

    def make(**policy):
        experts = [
            build.expert(name, address, quality=QualityPriors(default=quality))
            for name, address, quality in (("a", A, 0.2), ("b", B, 0.8), ("c", C, 0.5))
        ]
        return build.router(*experts, **policy)

    return make


class TestChoosing:
    def test_the_best_first_the_next_best_for_retries(self, site, build):
        router, _ = site(algorithm=Algorithm.QUALITY_GREEDY)
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.chosen.address == B
        assert [c.address for c in decision.retry_on] == [C, A]
        assert decision.algorithm is Algorithm.QUALITY_GREEDY
        assert decision.scores.tolist() == decision.quality.tolist() == [0.2, 0.8, 0.5]
        assert decision.eligible.all()
        assert decision.in_time is None
        assert decision.fallback_reason is None
        assert decision.snapshot is router.snapshot

    def test_at_most_two_for_retries(self, build):
        router, _ = build.router(build.expert("a", A, B, C, D))
        assert len(router.decide(build.request(), now_s=0.0).retry_on) == 2

    def test_never_one_that_is_not_ready(self, site, build):
        router, state = site(algorithm=Algorithm.QUALITY_GREEDY)
        state.set_ready(B, ready=False)
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.chosen.address == C
        assert [c.address for c in decision.retry_on] == [A]
        assert decision.eligible.tolist() == [True, False, True]

    def test_why_names_algorithm_score_quality_and_choice(self, site, build):
        router, state = site(algorithm=Algorithm.QUALITY_GREEDY)
        state.set_ready(A, ready=False)
        assert router.decide(build.request(), now_s=0.0).why == (
            "QualityGreedy: score 0.800, expected quality 0.80, 2 of 3 endpoints eligible"
        )

    def test_why_tells_how_many_are_in_time(self, site, build):
        router, state = site(algorithm=Algorithm.LATENCY_QUALITY_GREEDY)
        state.set_ready(A, ready=False)
        assert router.decide(build.request(), now_s=0.0).why == (
            "LatencyQualityGreedy: score 1.800, expected quality 0.80,"
            " 2 of 3 endpoints eligible, 2 in time"
        )

    def test_why_tells_what_the_score_is_made_of(self, site, build):
        router, _ = site(algorithm=Algorithm.IMPACT_GREEDY)
        decision = router.decide(build.request(limit_s=10.0), now_s=0.0)
        chance = decision.parts["chance in time"][1]
        assert decision.why == (
            f"ImpactGreedy: score {0.8 * chance:.3f}, expected quality 0.80, chance in time"
            f" {chance:.3f}, impact on others 0.000, 3 of 3 endpoints eligible, 3 in time"
        )

    def test_the_table_learns_what_is_known_of_the_request(self, site, build):
        router, _ = site(algorithm=Algorithm.QUALITY_GREEDY)
        request = build.request(
            arrival_s=3.0, prompt_tokens=7, limit_s=0.1, max_output_tokens=4, streams=False
        )
        assert router.decide(request, now_s=3.0).admitted == build.admitted(
            arrival_s=3.0,
            prompt_tokens=7.0,
            expected_output_tokens=4.0,
            limit_s=0.1,
            quality=0.8,
            streams=False,
        )

    def test_deciding_does_not_put_the_request_into_the_table(self, site, build):
        router, state = site()
        router.decide(build.request(), now_s=0.0)
        assert len(state) == 0


class TestTies:
    def test_are_drawn_by_lot_evenly(self, site, build):
        router, _ = site(algorithm=Algorithm.SHORTEST_QUEUE)
        picks = Counter(
            router.decide(build.request(), now_s=0.0).chosen.address for _ in range(900)
        )
        assert set(picks) == {A, B, C}
        assert max(abs(count - 300) for count in picks.values()) < 4 * np.sqrt(900 * 2 / 9)

    def test_only_the_best_take_part(self, site, build):
        router, state = site(algorithm=Algorithm.SHORTEST_QUEUE)
        state.begin("r", A, build.admitted())
        picks = {router.decide(build.request(), now_s=0.0).chosen.address for _ in range(50)}
        assert picks == {B, C}

    def test_the_one_drawn_is_not_named_again_for_retries(self, site, build):
        router, _ = site(algorithm=Algorithm.SHORTEST_QUEUE)
        for _ in range(30):
            decision = router.decide(build.request(), now_s=0.0)
            named = [decision.chosen, *decision.retry_on]
            assert sorted(c.address for c in named) == [A, B, C]

    def test_whichever_of_many_equals_is_drawn_two_others_are_named_for_retries(self, build):
        router, _ = build.router(
            build.expert("a", A, B, C, D, E), algorithm=Algorithm.SHORTEST_QUEUE
        )
        drawn = set()
        for _ in range(60):
            decision = router.decide(build.request(), now_s=0.0)
            named = [c.address for c in (decision.chosen, *decision.retry_on)]
            assert len(set(named)) == len(named) == 3
            drawn.add(decision.chosen.address)
        assert drawn == {A, B, C, D, E}

    def test_lots_are_those_that_numpy_would_draw(self, build):
        addresses = [f"10.0.0.{i}:8000" for i in range(1, 8)]
        router, _ = build.router(build.expert("x", *addresses), seed=5)
        rng = np.random.default_rng(5)
        for _ in range(50):
            chosen = router.decide(build.request(), now_s=0.0).chosen
            assert chosen.address == rng.choice([c.address for c in router.table.candidates])

    def test_the_same_seed_draws_the_same(self, site, build):
        def picks(seed):
            router, _ = site(algorithm=Algorithm.RANDOM, seed=seed)
            return [router.decide(build.request(), now_s=0.0).chosen.address for _ in range(20)]

        assert picks(1) == picks(1) != picks(2)


class TestNoEndpoint:
    @pytest.mark.parametrize("algorithm", list(Algorithm))
    def test_none_is_ready(self, algorithm, site, build):
        router, state = site(algorithm=algorithm)
        for address in (A, B, C):
            state.set_ready(address, ready=False)
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.chosen is decision.admitted is None
        assert decision.retry_on == ()
        assert decision.why == Rejection.NO_READY_ENDPOINT
        assert decision.scores.shape == (3,)

    @pytest.mark.parametrize("algorithm", list(Algorithm))
    def test_the_policy_has_none(self, algorithm, build):
        router, _ = build.router(algorithm=algorithm)
        decision = router.decide(build.request(), now_s=0.0)
        assert (decision.chosen, decision.why) == (None, Rejection.NO_READY_ENDPOINT)
        assert decision.fallback_reason is None
        assert len(decision.scores) == 0

    def test_round_robin_goes_on_where_it_was_afterwards(self, site, build):
        router, state = site(algorithm=Algorithm.ROUND_ROBIN)
        picks = []
        for ready in (True, True, False, True):
            for address in (A, B, C):
                state.set_ready(address, ready=ready)
            chosen = router.decide(build.request(), now_s=0.0).chosen
            picks.append(chosen and chosen.address)
        assert picks == [A, B, None, C]


class TestAdmission:
    @pytest.mark.parametrize(
        ("admission", "limit_s", "want"),
        [
            (Admission.BEST_EFFORT, 0.02, B),
            (Admission.BEST_EFFORT, 0.001, B),
            (Admission.REJECT, 0.02, B),
            (Admission.REJECT, 0.001, None),
        ],
    )
    def test_reject_refuses_what_no_endpoint_can_serve_in_time(
        self, admission, limit_s, want, site, build
    ):
        router, state = site(admission=admission)
        state.set_ready(A, ready=False)
        state.set_ready(C, ready=False)
        decision = router.decide(build.request(limit_s=limit_s), now_s=0.0)
        assert (decision.chosen and decision.chosen.address) == want
        if want is None:
            assert decision.why == Rejection.OVER_LIMIT
            assert decision.admitted is None
            assert decision.retry_on == ()

    @pytest.mark.parametrize(
        ("said", "rejected"),
        [
            (Scores(np.arange(3.0), np.zeros(3, np.bool_)), True),
            (Scores(np.arange(3.0), np.ones(3, np.bool_)), False),
            (Scores(np.arange(3.0), np.zeros(3, np.bool_), np.array([0, 0, 1], np.bool_)), False),
            (Scores(np.arange(3.0), acceptable=np.array([1, 1, 0], np.bool_)), True),
            (Scores(np.arange(3.0), np.array([1, 1, 0], np.bool_)), True),
            (Scores(np.arange(3.0), np.ones(3, np.bool_), np.zeros(3, np.bool_)), True),
            (Scores(np.arange(3.0), acceptable=np.zeros(3, np.bool_)), True),
        ],
    )
    def test_what_the_decider_says_of_admission_holds(
        self, said, rejected, site, build, fixed_scores
    ):
        router, _ = site(admission=Admission.REJECT)
        router.replace_decider(fixed_scores(said))
        decision = router.decide(build.request(limit_s=10.0), now_s=0.0)
        assert (decision.rejection is Rejection.OVER_LIMIT) == rejected
        assert (decision.chosen is None) == rejected
        assert decision.fallback_reason is None

    def test_nothing_is_refused_for_its_value_at_best_effort(self, site, build, fixed_scores):
        router, _ = site()
        router.replace_decider(fixed_scores(Scores(np.arange(3.0), acceptable=np.zeros(3, bool))))
        assert router.decide(build.request(), now_s=0.0).chosen.address == C

    def test_one_acceptable_candidate_that_is_not_ready_does_not_help(
        self, site, build, fixed_scores
    ):
        router, state = site(admission=Admission.REJECT)
        state.set_ready(B, ready=False)
        acceptable = np.array([False, True, False])
        router.replace_decider(fixed_scores(Scores(np.arange(3.0), acceptable=acceptable)))
        assert router.decide(build.request(), now_s=0.0).chosen is None

    def test_among_equals_one_that_is_acceptable_is_drawn(self, site, build, fixed_scores):
        router, _ = site(admission=Admission.REJECT)
        acceptable = np.array([True, False, True])
        router.replace_decider(fixed_scores(Scores(np.array([0.5, 0.5, 0.2]), None, acceptable)))
        decisions = [router.decide(build.request(), now_s=0.0) for _ in range(30)]
        assert {d.chosen and d.chosen.address for d in decisions} == {A}

    def test_the_common_check_looks_at_the_one_chosen(self, build):
        slow = build.expert(
            "slow", A, quality=QualityPriors(default=0.9), profile={"memory_bandwidth_gbps": 1.0}
        )
        router, _ = build.router(
            slow,
            build.expert("fast", B, quality=QualityPriors(default=0.5)),
            algorithm=Algorithm.QUALITY_GREEDY,
            admission=Admission.REJECT,
        )
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.rejection is Rejection.OVER_LIMIT
        assert dict(zip(decision.quality, decision.in_time, strict=True)) == {0.9: False, 0.5: True}

    @pytest.mark.parametrize("algorithm", Algorithm)
    def test_reject_is_the_same_for_all_algorithms(self, algorithm, site, build):
        router, _ = site(admission=Admission.REJECT, algorithm=algorithm)
        late = router.decide(build.request(limit_s=1e-9), now_s=0.0)
        assert late.chosen is None
        assert late.rejection is Rejection.OVER_LIMIT
        in_time = router.decide(build.request(limit_s=10.0), now_s=0.0)
        assert in_time.chosen is not None
        assert in_time.rejection is None

    def test_reject_holds_for_the_fallback_as_well(self, site, build, fixed_scores):
        router, _ = site(admission=Admission.REJECT, fallback=Algorithm.QUALITY_GREEDY)
        router.replace_decider(fixed_scores(RuntimeError("no model")))
        assert router.decide(build.request(limit_s=1e-9), now_s=0.0).chosen is None


FAILURES = [
    ("raises", RuntimeError("no\n model "), "RuntimeError: no model"),
    ("NaN", [0.1, np.nan, 0.3], "ValueError: a score is not a finite number"),
    ("infinite", [0.1, np.inf, 0.3], "ValueError: a score is not a finite number"),
    ("too few", [0.1], "ValueError: 1 scores for 3 candidates"),
    ("too many", [0.1] * 4, "ValueError: 4 scores for 3 candidates"),
    (
        "wrong shape of in_time",
        Scores(np.zeros(3), np.zeros(2, np.bool_)),
        "ValueError: in_time has the shape (2,)",
    ),
    (
        "wrong shape of acceptable",
        Scores(np.zeros(3), acceptable=np.zeros(4, np.bool_)),
        "ValueError: acceptable has the shape (4,)",
    ),
    (
        "wrong shape of a part",
        Scores(np.zeros(3), parts={"luck": np.zeros(1)}),
        "ValueError: 'luck' has the shape (1,)",
    ),
]


class TestFallback:
    @pytest.mark.parametrize(("desc", "said", "reason"), FAILURES)
    def test_decides_when_the_algorithm_fails(self, desc, said, reason, site, build, fixed_scores):
        router, _ = site(algorithm=Algorithm.RANDOM, fallback=Algorithm.QUALITY_GREEDY)
        router.replace_decider(fixed_scores(said))
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.chosen.address == B, desc
        assert decision.algorithm is Algorithm.QUALITY_GREEDY
        assert decision.fallback_reason == f"Random failed: {reason}"
        assert decision.scores.tolist() == [0.2, 0.8, 0.5]
        assert decision.why == (
            "QualityGreedy: score 0.800, expected quality 0.80, 3 of 3 endpoints eligible"
            f" (fallback: Random failed: {reason})"
        )

    @pytest.mark.parametrize("said", [np.float64(1.0), np.zeros((3, 1)), np.zeros((0,))])
    def test_decides_on_any_wrong_shape(self, said, site, build, fixed_scores):
        router, _ = site(fallback=Algorithm.QUALITY_GREEDY)
        router.replace_decider(fixed_scores(said))
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.chosen.address == B
        assert decision.fallback_reason is not None

    def test_is_not_asked_for_a_bad_score_of_one_that_cannot_be_chosen(
        self, site, build, fixed_scores
    ):
        router, state = site(algorithm=Algorithm.RANDOM)
        state.set_ready(B, ready=False)
        router.replace_decider(fixed_scores([0.1, np.nan, 0.3]))
        decision = router.decide(build.request(), now_s=0.0)
        assert decision.fallback_reason is None
        assert decision.chosen.address == C

    def test_may_reject_too(self, site, build, fixed_scores):
        router, _ = site(
            algorithm=Algorithm.RANDOM,
            fallback=Algorithm.LATENCY_QUALITY_GREEDY,
            admission=Admission.REJECT,
        )
        router.replace_decider(fixed_scores(RuntimeError("x")))
        decision = router.decide(build.request(limit_s=1e-9), now_s=0.0)
        assert decision.chosen is None
        assert decision.why.startswith(Rejection.OVER_LIMIT)
        assert decision.why.endswith("(fallback: Random failed: RuntimeError: x)")


class TestPreview:
    @pytest.mark.parametrize("algorithm", list(Algorithm))
    def test_tells_what_would_be_decided_and_changes_nothing(self, algorithm, site, build):
        router, state = site(algorithm=algorithm)
        for i in range(20):
            previews = [router.preview(build.request(), now_s=0.0) for _ in range(2)]
            decision = router.decide(build.request(), now_s=0.0)
            for preview in previews:
                assert preview.chosen == decision.chosen
                assert preview.retry_on == decision.retry_on
                assert preview.scores.tolist() == decision.scores.tolist()
            state.begin(f"r{i}", decision.chosen.address, decision.admitted)

    def test_leaves_the_fallback_where_it_was(self, site, build, fixed_scores):
        router, _ = site(fallback=Algorithm.ROUND_ROBIN)
        router.replace_decider(fixed_scores(RuntimeError("x")))
        picks = []
        for _ in range(4):
            router.preview(build.request(), now_s=0.0)
            picks.append(router.decide(build.request(), now_s=0.0).chosen.address)
        assert picks == [A, B, C, A]
