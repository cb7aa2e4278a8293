"""The forecast by hand, and what must never get better by more load.

The experts' profile has round numbers: an iteration takes 1 ms + max(1 ms per token,
2 ms + 1 us per token of context).
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core.latency import LatencyForecast, drain_s, forecast
from pointsman_core.state import EngineLoad

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


@pytest.fixture(scope="session")
def observed(build):
    """Observation of one endpoint with these requests on it, and so many foreign ones."""

    def make(residents=(), *, foreign=0, expert=None, now_s=1.0, **request):
        router, state = build.router(build.expert("x", A, **(expert or {})))
        for i, (prompt, expected, tokens) in enumerate(residents):
            resident = build.admitted(
                prompt_tokens=float(prompt), expected_output_tokens=float(expected)
            )
            state.begin(f"r{i}", A, resident)
            state.add_tokens(f"r{i}", tokens)
        for _ in range(2):
            load = EngineLoad(running=len(residents) + foreign, waiting=0)
            state.set_load(A, load, now_s=now_s)
        return router.observe(build.request(**({"arrival_s": now_s} | request)), now_s=now_s)

    return make


class TestByHand:
    def test_an_idle_endpoint(self, observed):
        got = forecast(observed())
        # Prefill of 100 tokens: 1 + 100 ms. A token: 1 + max(1, 2 + (100 + 10 / 2) / 1000).
        assert got.first_token_s == pytest.approx([0.101])
        assert got.per_token_s == pytest.approx([(0.101 + 10 * 0.003105) / 10])
        assert len(got.resident_before_s) == len(got.resident_after_s) == 0

    def test_time_that_the_request_has_waited_counts(self, observed):
        got = forecast(observed(arrival_s=0.5))
        assert got.first_token_s == pytest.approx([0.601])
        assert got.per_token_s == pytest.approx([(0.601 + 10 * 0.003105) / 10])

    def test_a_prompt_over_the_token_budget_is_prefilled_in_chunks(self, observed):
        # 768 tokens are one and a half iterations of 512, 513 ms each.
        assert forecast(observed(prompt_tokens=768)).first_token_s == pytest.approx([0.7695])

    def test_one_request_that_decodes(self, observed):
        # It holds 52 tokens and 10 / 2 more to come.
        got = forecast(observed([(50, 12, 2)]))
        assert got.resident_before_s == pytest.approx([(1 + 10 * 0.003057) / 12])
        # Together: 162 tokens of context; 100 prefill tokens beside one decode.
        assert got.first_token_s == pytest.approx([0.102])
        assert got.per_token_s == pytest.approx([(0.102 + 10 * 0.003162) / 10])
        assert got.resident_after_s == pytest.approx([(1 + 0.102 + 10 * 0.003162) / 12])

    def test_one_request_that_is_still_to_be_prefilled(self, observed):
        got = forecast(observed([(50, 12, 0)]))
        # 50 tokens beside one sequence: 1 + 51 ms; 12 tokens at 1 + 2 + (50 + 6) / 1000 ms.
        assert got.resident_before_s == pytest.approx([(1 + 0.052 + 12 * 0.003056) / 12])
        assert got.first_token_s == pytest.approx([0.152])

    def test_a_full_batch_makes_the_request_wait_for_a_slot(self, observed):
        got = forecast(observed([(50, 12, 2)], expert={"limits": {"concurrency": 1}}))
        # One sequence too many, 10 tokens left of it at 1 + 2.162 ms each, one served at once.
        assert got.first_token_s == pytest.approx([0.102 + 0.03162])

    def test_a_full_kv_cache_makes_the_request_wait_for_memory(self, observed):
        small = {"profile": {"kv_cache_gib": 0.125}, "limits": {"context_tokens": 128}}
        got = forecast(observed([(50, 12, 2)], expert=small))
        # 34 of 162 tokens do not fit into 128: 34 / 81 of a request, 10 tokens of
        # 1 + max(2, 2 + 128 / 1000) ms, two served at once.
        assert got.first_token_s == pytest.approx([0.102 + 34 / 81 * 10 * 0.003128 / 2])

    def test_foreign_requests_are_taken_to_be_like_ours(self, observed):
        slow_memory = {"profile": {"memory_bandwidth_gbps": 104.8576}}
        got = forecast(observed([(50, 12, 2)], foreign=2, expert=slow_memory))
        # Three of 57 tokens at 10 us each, and 20 ms for the weights; with the new one 276.
        assert got.resident_before_s == pytest.approx([(1 + 10 * 0.02271) / 12])
        assert got.per_token_s == pytest.approx([(0.104 + 10 * 0.02376) / 10])

    def test_foreign_requests_alone_are_taken_to_be_like_the_new_one(self, observed):
        slow_memory = {"profile": {"memory_bandwidth_gbps": 104.8576}}
        got = forecast(observed(foreign=2, expert=slow_memory))
        # Three of 105 tokens at 10 us each, and 20 ms for the weights.
        assert got.per_token_s == pytest.approx([(0.103 + 10 * (0.001 + 0.02315)) / 10])


class TestLimits:
    @pytest.mark.parametrize(
        ("desc", "own", "first", "before", "after", "want"),
        [
            ("all is kept", 0.05, 0.5, 0.01, 0.02, True),
            ("exactly", 0.06, 1.0, 0.01, 0.06, True),
            ("own latency per token", 0.061, 0.5, 0.01, 0.02, False),
            ("own first token", 0.05, 1.1, 0.01, 0.02, False),
            ("a present request would lose its own", 0.05, 0.5, 0.01, 0.061, False),
            ("one that is late anyway does not matter", 0.05, 0.5, 0.07, 0.08, True),
        ],
    )
    def test_are_kept(self, desc, own, first, before, after, want, observed):
        seen = observed([(50, 12, 2)], first_token_limit_s=1.0)
        predicted = LatencyForecast(
            first_token_s=np.array([first]),
            per_token_s=np.array([own]),
            resident_before_s=np.array([before]),
            resident_after_s=np.array([after]),
        )
        assert predicted.keeps_limits(seen).tolist() == [want], desc

    def test_harm_counts_only_where_it_is_done(self, build):
        router, state = build.router(build.expert("x", A), build.expert("y", B))
        state.begin("r", B, build.admitted())
        seen = router.observe(build.request(), now_s=0.0)
        predicted = LatencyForecast(
            first_token_s=np.zeros(2),
            per_token_s=np.zeros(2),
            resident_before_s=np.array([0.01]),
            resident_after_s=np.array([0.07]),
        )
        assert predicted.keeps_limits(seen).tolist() == [True, False]


prompts = st.integers(1, 2000)
lengths = st.integers(1, 500)
residents = st.lists(st.tuples(prompts, lengths, st.integers(0, 300)), max_size=12)
batches = st.integers(1, 12)
ROUNDING = 1e-9


def everything(predicted: LatencyForecast) -> np.ndarray:
    return np.concatenate(
        [
            predicted.first_token_s,
            predicted.per_token_s,
            predicted.resident_before_s,
            predicted.resident_after_s,
        ]
    )


class TestMonotony:
    @given(present=residents, foreign=st.integers(0, 20), batch=batches)
    def test_all_times_are_finite_and_positive(self, present, foreign, batch, observed):
        seen = observed(present, foreign=foreign, expert={"limits": {"concurrency": batch}})
        times = np.concatenate([everything(forecast(seen)), drain_s(seen)])
        assert np.isfinite(times).all()
        assert (times >= 0).all()

    @given(present=residents, batch=batches)
    def test_the_new_request_never_helps_a_present_one(self, present, batch, observed):
        predicted = forecast(observed(present, expert={"limits": {"concurrency": batch}}))
        assert (predicted.resident_after_s >= predicted.resident_before_s - ROUNDING).all()

    @given(
        one=st.tuples(prompts, lengths, st.integers(0, 300)),
        few=st.integers(0, 12),
        more=st.integers(1, 12),
        batch=batches,
    )
    def test_more_of_the_same_load_is_not_faster(self, one, few, more, batch, observed):
        expert = {"limits": {"concurrency": batch}}
        less = observed([one] * few, expert=expert)
        most = observed([one] * (few + more), expert=expert)
        before, after = forecast(less), forecast(most)
        assert after.first_token_s[0] >= before.first_token_s[0] - ROUNDING
        assert after.per_token_s[0] >= before.per_token_s[0] - ROUNDING
        assert drain_s(most)[0] >= drain_s(less)[0] - ROUNDING

    @given(present=residents, few=st.integers(0, 5), more=st.integers(1, 10), batch=batches)
    def test_foreign_load_is_not_faster(self, present, few, more, batch, observed):
        expert = {"limits": {"concurrency": batch}}
        less = observed(present, foreign=few, expert=expert)
        most = observed(present, foreign=few + more, expert=expert)
        assert (everything(forecast(most)) >= everything(forecast(less)) - ROUNDING).all()

    @given(present=residents, short=prompts, more=st.integers(1, 1000), batch=batches)
    def test_a_longer_prompt_has_no_earlier_first_token(
        self, present, short, more, batch, observed
    ):
        expert = {"limits": {"concurrency": batch}}
        less = forecast(observed(present, expert=expert, prompt_tokens=short))
        most = forecast(observed(present, expert=expert, prompt_tokens=short + more))
        assert most.first_token_s[0] >= less.first_token_s[0] - ROUNDING

    @given(short=prompts, more=st.integers(1, 1000))
    def test_a_longer_prompt_has_a_later_first_token_on_an_idle_endpoint(
        self, short, more, observed
    ):
        less = forecast(observed(prompt_tokens=short))
        most = forecast(observed(prompt_tokens=short + more))
        assert most.first_token_s[0] > less.first_token_s[0]

    @given(
        present=residents,
        batch=batches,
        name=st.sampled_from(["peak_tflops", "memory_bandwidth_gbps"]),
        factor=st.floats(1.0, 20.0),
    )
    def test_faster_hardware_is_not_slower(self, present, batch, name, factor, observed, build):
        speed = getattr(build.expert("x", A).spec.profile, name) * factor
        limits = {"concurrency": batch}
        slow = observed(present, expert={"limits": limits})
        fast = observed(present, expert={"limits": limits, "profile": {name: speed}})
        assert (everything(forecast(fast)) <= everything(forecast(slow)) + ROUNDING).all()
        assert drain_s(fast)[0] <= drain_s(slow)[0] + ROUNDING


class TestDrain:
    @pytest.mark.parametrize(
        ("desc", "present", "foreign", "batch", "want_ms"),
        [
            ("idle", [], 0, 4, 0),
            # 10 tokens at 1 + 2 + 52 / 1000 ms.
            ("one decodes", [(50, 12, 2)], 0, 4, 10 * 3.052),
            # 50 prompt tokens beside one sequence, then 12 tokens.
            ("one waits", [(50, 12, 0)], 0, 4, 52 + 12 * 3.05),
            # 20 tokens, two at a time.
            ("two decode", [(50, 12, 2)] * 2, 0, 4, 10 * 3.104),
            # The long one's 100 tokens, at the pace of two.
            ("a short one beside a long one", [(50, 102, 2), (50, 3, 2)], 0, 4, 100 * 3.104),
            ("two, one at a time", [(50, 12, 2)] * 2, 0, 1, 20 * 3.104),
            # A foreign request has the length that the new one is expected to have.
            ("one is foreign", [], 1, 4, 10 * 3),
        ],
    )
    def test_is_tokens_over_speed(self, desc, present, foreign, batch, want_ms, observed):
        seen = observed(present, foreign=foreign, expert={"limits": {"concurrency": batch}})
        assert drain_s(seen) * 1e3 == pytest.approx([want_ms]), desc

    def test_does_not_depend_on_the_new_requests_prompt(self, observed):
        seen = observed([(50, 12, 2)])
        assert drain_s(dataclasses.replace(seen, prompt_tokens=9e9)) == drain_s(seen)

    @given(present=residents, another=residents, batch=batches)
    def test_more_requests_of_any_kind_do_not_drain_sooner(self, present, another, batch, observed):
        expert = {"limits": {"concurrency": batch}}
        less, more = observed(present, expert=expert), observed(present + another, expert=expert)
        assert drain_s(more)[0] >= drain_s(less)[0] - ROUNDING
