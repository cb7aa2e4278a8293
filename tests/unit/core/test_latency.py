"""The forecast by hand, and what must never get better by more load.

The experts' profile has round numbers: an iteration takes 1 ms + max(1 ms per token,
2 ms + 1 us per token of context).
"""

import dataclasses
import heapq

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pointsman_core.latency import (
    LatencyForecast,
    _Load,
    _starts,
    drain_s,
    forecast,
)
from pointsman_core.state import EngineLoad

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
ROUNDING = 1e-9


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


def undisturbed(seen):
    """The forecast if no further requests come."""
    return forecast(seen, interference=0.0)


class TestByHand:
    def test_an_idle_endpoint(self, observed):
        got = forecast(observed())
        # Prefill of 100 tokens: 1 + 100 ms. A token: 1 + max(1, 2 + (100 + 10 / 2) / 1000).
        assert got.first_token_s == pytest.approx([0.101])
        assert got.per_token_s == pytest.approx([(0.101 + 9 * 0.003105) / 10])
        assert len(got.resident_before_s) == len(got.resident_after_s) == 0

    def test_time_that_the_request_has_waited_counts(self, observed):
        got = forecast(observed(arrival_s=0.5))
        assert got.first_token_s == pytest.approx([0.601])
        assert got.per_token_s == pytest.approx([(0.601 + 9 * 0.003105) / 10])

    def test_a_prompt_over_the_token_budget_is_prefilled_in_chunks(self, observed):
        # 768 tokens are one and a half iterations of 512, 513 ms each.
        assert forecast(observed(prompt_tokens=768)).first_token_s == pytest.approx([0.7695])

    def test_one_request_that_decodes(self, observed):
        # It has 50 tokens of prompt, 2 of its answer and half of the 10 that are to come.
        got = undisturbed(observed([(50, 12, 2)]))
        assert got.resident_before_s == pytest.approx([(1 + 10 * 0.003057) / 12])
        # Together: 162 tokens of context; 100 prefill tokens beside one decode.
        assert got.first_token_s == pytest.approx([0.102])
        assert got.per_token_s == pytest.approx([(0.102 + 9 * 0.003162) / 10])
        assert got.resident_after_s == pytest.approx([(1 + 0.102 + 9 * 0.003162) / 12])

    def test_the_new_request_is_in_the_way_only_as_long_as_it_runs(self, observed):
        got = undisturbed(observed([(50, 42, 2)]))
        # 72 tokens of context; with the new one 177, for its ten steps, the first with prefill.
        after = 1 + 0.102 + 9 * 0.003177 + 30 * 0.003072
        assert got.resident_after_s == pytest.approx([after / 42])

    def test_one_request_that_is_still_to_be_prefilled(self, observed):
        got = undisturbed(observed([(50, 12, 0)]))
        # 50 tokens beside one sequence: 1 + 51 ms; 11 tokens at 1 + 2 + (50 + 6) / 1000 ms.
        assert got.resident_before_s == pytest.approx([(1 + 0.052 + 11 * 0.003056) / 12])
        assert got.first_token_s == pytest.approx([0.152])

    def test_requests_that_will_come_slow_those_present_by_their_prefill(self, observed):
        got = forecast(observed([(50, 12, 2)]), interference=0.3)
        # One request in twelve steps, whose prompt of 50 makes an iteration 1 + 51 ms.
        step = 0.003057 + 0.3 / 12 * (0.052 - 0.003057)
        assert got.resident_before_s == pytest.approx([(1 + 10 * step) / 12])

    def test_a_full_batch_makes_the_request_wait_for_a_slot(self, observed):
        got = undisturbed(observed([(50, 12, 2)], expert={"limits": {"concurrency": 1}}))
        # Ten tokens of the other, then it runs alone.
        assert got.first_token_s == pytest.approx([10 * 0.003057 + 0.102])
        total = 10 * 0.003057 + 0.102 + 9 * 0.003105
        assert got.per_token_s == pytest.approx([total / 10])
        assert got.resident_after_s == got.resident_before_s

    def test_a_full_kv_cache_makes_the_request_wait_for_memory(self, observed):
        small = {"profile": {"kv_cache_gib": 0.125}, "limits": {"context_tokens": 128}}
        got = undisturbed(observed([(50, 12, 2)], expert=small))
        # Two of 81 tokens do not fit into 128.
        assert got.first_token_s == pytest.approx([10 * 0.003057 + 0.102])

    @pytest.mark.parametrize(
        ("desc", "present", "step"),
        [
            ("the first of two ends", [(50, 12, 2), (50, 32, 2)], 10),
            ("half of all work ahead, 60 tokens", [(50, 32, 2), (50, 32, 2), (50, 1, 0)], 30),
            ("the second of two ends", [(50, 12, 2), (50, 32, 2), (50, 81, 0)], 30),
            ("half of all work ahead, 80 tokens", [(50, 42, 2), (50, 42, 2), (50, 1, 0)], 40),
            ("half of all work ahead, 59 tokens", [(50, 12, 2), (50, 32, 2), (50, 20, 0)], 29.5),
        ],
    )
    def test_who_waits_starts_when(self, desc, present, step, observed):
        seen = observed(present, expert={"limits": {"concurrency": 2}})
        load = _Load.of(seen)
        started = seen.resident_output_tokens > 0
        got, _ = _starts(
            seen,
            load,
            seen.resident_expected_output - np.where(started, seen.resident_output_tokens, 1.0),
        )
        assert got == pytest.approx([step]), desc

    def test_foreign_requests_are_taken_to_be_like_ours(self, observed):
        slow_memory = {"profile": {"memory_bandwidth_gbps": 104.8576}}
        got = undisturbed(observed([(50, 12, 2)], foreign=2, expert=slow_memory))
        # Three of 57 tokens at 10 us each, and 20 ms for the weights; with the new one 276.
        assert got.resident_before_s == pytest.approx([(1 + 10 * 0.02271) / 12])
        assert got.per_token_s == pytest.approx([(0.104 + 9 * 0.02376) / 10])

    def test_foreign_requests_alone_are_taken_to_be_like_the_new_one(self, observed):
        slow_memory = {"profile": {"memory_bandwidth_gbps": 104.8576}}
        got = undisturbed(observed(foreign=2, expert=slow_memory))
        # Three of 105 tokens at 10 us each, and 20 ms for the weights.
        assert got.per_token_s == pytest.approx([(0.103 + 9 * (0.001 + 0.02315)) / 10])

    def test_foreign_requests_alone_that_fill_the_batch_are_waited_for(self, observed):
        got = undisturbed(observed(foreign=2, expert={"limits": {"concurrency": 2}}))
        # One too many, ten tokens each, two at once, with 210 tokens of context.
        assert got.first_token_s == pytest.approx([5 * 0.00321 + 0.103])


class TestQueue:
    @given(
        left=st.lists(st.integers(0, 60), min_size=1, max_size=20),
        batch=st.integers(1, 8),
    )
    def test_starts_are_not_before_those_of_the_exact_queue(self, left, batch, observed):
        # Nobody has started, so all are in order of arrival.
        present = [(1, tokens + 1, 0) for tokens in left]
        seen = observed(present, expert={"limits": {"concurrency": batch}})
        mine, others = _starts(seen, _Load.of(seen), np.array(left, np.float64))
        free = [0.0] * batch
        exact = []
        for tokens in [*left, 0]:
            exact.append(heapq.heappop(free))
            heapq.heappush(free, exact[-1] + tokens)
        got = np.concatenate([others, mine])
        assert (got >= np.array(exact) - ROUNDING).all()
        assert (np.diff(got) >= -ROUNDING).all()
        assert got[:batch].tolist() == [0.0] * min(batch, len(got))

    @given(
        present=st.lists(
            st.tuples(st.integers(1, 2000), st.integers(1, 500), st.integers(0, 9)), max_size=12
        ),
        batch=st.integers(1, 24),
        waited=st.floats(0, 9),
    )
    def test_terms_that_drop_out_while_nobody_waits_were_none(
        self, present, batch, waited, observed
    ):
        seen = observed(present, expert={"limits": {"concurrency": batch}}, arrival_s=1 - waited)
        got = forecast(seen)
        with pytest.MonkeyPatch.context() as patch:
            load = _Load.of(seen)
            patch.setattr(load, "overfull", True)
            patch.setattr(load, "running", np.minimum(load.present, load.slots))
            patch.setattr(_Load, "of", lambda _: load)
            whole = forecast(seen)
        for field in dataclasses.fields(got):
            np.testing.assert_array_equal(getattr(got, field.name), getattr(whole, field.name))


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

    def test_a_margin_multiplies_predictions(self, observed):
        seen = observed([(50, 12, 2)], first_token_limit_s=1.0)
        predicted = LatencyForecast(
            first_token_s=np.array([0.8]),
            per_token_s=np.array([0.05]),
            resident_before_s=np.array([0.04]),
            resident_after_s=np.array([0.05]),
        )
        kept = [predicted.keeps_limits(seen, margin=m)[0] for m in (1.0, 1.2, 1.21, 1.26)]
        assert kept == [True, True, False, False]

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


def everything(predicted: LatencyForecast) -> np.ndarray:
    return np.concatenate(
        [
            predicted.first_token_s,
            predicted.per_token_s,
            predicted.resident_before_s,
            predicted.resident_after_s,
        ]
    )


def roomy(batch: int) -> dict:
    """Memory is never scarce: else the mean size decides how many run."""
    return {"limits": {"concurrency": batch}, "profile": {"kv_cache_gib": 1000.0}}


def waits(seen) -> bool:
    """Whether the new request has to wait for others to end."""
    started = seen.resident_output_tokens > 0
    left = seen.resident_expected_output - np.where(started, seen.resident_output_tokens, 1.0)
    return bool(_starts(seen, _Load.of(seen), left)[0][0] > 0)


class TestMonotony:
    """As far as it goes: the docstring of the module tells where the forecast has none."""

    @given(present=residents, foreign=st.integers(0, 20), batch=batches)
    def test_all_times_are_finite_and_positive(self, present, foreign, batch, observed):
        seen = observed(present, foreign=foreign, expert={"limits": {"concurrency": batch}})
        times = np.concatenate([everything(forecast(seen)), drain_s(seen)])
        assert np.isfinite(times).all()
        assert (times >= 0).all()

    @given(present=residents, room=st.integers(1, 5))
    @example(present=[(2000, 500, 300)] * 12, room=1)
    def test_the_new_request_never_helps_a_present_one_where_all_fit(self, present, room, observed):
        predicted = forecast(observed(present, expert=roomy(len(present) + room)))
        assert (predicted.resident_after_s >= predicted.resident_before_s - ROUNDING).all()

    @given(present=residents, batch=batches)
    @example(present=[(1, 500, 0), (1, 500, 0)], batch=1)
    def test_nor_does_a_large_one_that_has_to_wait(self, present, batch, observed):
        # No present one ever holds as much as this one's prompt.
        seen = observed(present, expert=roomy(batch), prompt_tokens=2500)
        predicted = forecast(seen)
        assert (predicted.resident_after_s >= predicted.resident_before_s - ROUNDING).all()

    def test_a_small_one_that_takes_a_large_ones_place_may_help(self, observed):
        expert = roomy(2) | {"profile": {"kv_cache_gib": 1000.0, "memory_bandwidth_gbps": 105.0}}
        seen = observed([(2000, 100, 99), (2000, 500, 1)], expert=expert, prompt_tokens=1)
        predicted = forecast(seen)
        assert predicted.resident_after_s[1] < predicted.resident_before_s[1]

    @given(
        one=st.tuples(prompts, lengths, st.integers(0, 300)),
        few=st.integers(0, 12),
        more=st.integers(1, 12),
        batch=batches,
    )
    @example(one=(47, 2, 0), few=11, more=1, batch=12)
    def test_more_of_the_same_load_is_not_faster(self, one, few, more, batch, observed):
        less = observed([one] * few, expert=roomy(batch))
        most = observed([one] * (few + more), expert=roomy(batch))
        before, after = forecast(less), forecast(most)
        assert drain_s(most)[0] >= drain_s(less)[0] - ROUNDING
        assume(waits(less) == waits(most))
        assert after.first_token_s[0] >= before.first_token_s[0] - ROUNDING
        assert after.per_token_s[0] >= before.per_token_s[0] - ROUNDING

    @given(present=residents, few=st.integers(0, 5), more=st.integers(1, 10), batch=batches)
    @example(present=[(1, 1, 264)], few=5, more=10, batch=4)
    def test_foreign_load_is_not_faster(self, present, few, more, batch, observed):
        one = observed(present, foreign=few, expert=roomy(batch))
        other = observed(present, foreign=few + more, expert=roomy(batch))
        assume(waits(one) == waits(other))
        less, most = forecast(one), forecast(other)
        # A new request that has to wait does the present ones no harm, so that may shrink.
        for name in ("first_token_s", "per_token_s", "resident_before_s"):
            assert (getattr(most, name) >= getattr(less, name) - ROUNDING).all()

    @given(present=residents, short=prompts, more=st.integers(1, 1000), batch=batches)
    def test_a_longer_prompt_has_no_earlier_first_token(
        self, present, short, more, batch, observed
    ):
        less = forecast(observed(present, expert=roomy(batch), prompt_tokens=short))
        most = forecast(observed(present, expert=roomy(batch), prompt_tokens=short + more))
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
        assert drain_s(fast)[0] <= drain_s(slow)[0] + ROUNDING
        less, most = forecast(fast), forecast(slow)
        for name_of in ("first_token_s", "per_token_s", "resident_before_s"):
            assert (getattr(less, name_of) <= getattr(most, name_of) + ROUNDING).all()
        # Prefill that is under way when one has to wait counts twice where both overlap.
        assume(not waits(slow) or (slow.resident_output_tokens > 0).all())
        assert (less.resident_after_s <= most.resident_after_s + ROUNDING).all()


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
