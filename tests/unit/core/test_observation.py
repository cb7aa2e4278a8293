"""What a decider sees, entry by entry."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core.cost import CostModel
from pointsman_core.observation import RoutingTable
from pointsman_core.state import EngineLoad, LiveState

A, B, C, D = (f"10.0.0.{i}:8000" for i in range(1, 5))
ADDRESSES = [A, B, C, D]


class TestRequest:
    def test_the_request_is_seen_as_it_came(self, build):
        router, _ = build.router(build.expert("x", A))
        request = build.request(
            arrival_s=5.0, prompt_tokens=7, limit_s=0.03, first_token_limit_s=0.4
        )
        seen = router.observe(request, now_s=5.5)
        assert (seen.prompt_tokens, seen.waited_s) == (7.0, 0.5)
        assert (seen.limit_s, seen.first_token_limit_s) == (0.03, 0.4)

    @pytest.mark.parametrize(
        ("most", "want"), [(None, [20, 90]), (1, [1, 1]), (50, [20, 50]), (2**64 - 1, [20, 90])]
    )
    def test_the_predicted_length_is_at_most_what_the_request_allows(self, most, want, build):
        router, _ = build.router(
            build.expert("x", A, expected_output_tokens=20),
            build.expert("y", B, expected_output_tokens=90),
        )
        seen = router.observe(build.request(max_output_tokens=most), now_s=0.0)
        assert seen.output_tokens.tolist() == want

    def test_observing_changes_nothing(self, build):
        router, state = build.router(build.expert("x", A))
        state.begin("r", A, build.admitted(streams=False))
        state.set_load(A, EngineLoad(running=3, waiting=0), now_s=0.0)
        before = [array.tolist() for _, array in state.residents().columns()]
        first = router.observe(build.request(), now_s=9.0)
        second = router.observe(build.request(), now_s=9.0)
        assert [array.tolist() for _, array in state.residents().columns()] == before
        assert first.resident_output_tokens.tolist() == second.resident_output_tokens.tolist()


class TestEligible:
    @pytest.mark.parametrize(
        ("desc", "unready", "prompt", "most", "want"),
        [
            ("all fit", (), 90, None, [True, True, True]),
            ("one token of answer must fit", (), 100, None, [False, True, True]),
            ("the answer's limit must fit too", (), 90, 11, [False, True, True]),
            ("just fits", (), 90, 10, [True, True, True]),
            ("not the unready", (B,), 90, None, [True, False, True]),
            ("fits nowhere: the roomiest", (), 5000, None, [False, False, True]),
            ("fits nowhere: the roomiest of the ready", (C,), 5000, None, [False, True, False]),
            ("fits only where it is not ready", (C,), 450, None, [False, True, False]),
            ("an absurd limit", (), 1, 2**64 - 1, [False, False, True]),
            ("none is ready", (A, B, C), 1, None, [False, False, False]),
        ],
    )
    def test_ready_and_roomy_endpoints_are(self, desc, unready, prompt, most, want, build):
        experts = [
            build.expert(name, address, limits={"context_tokens": room})
            for name, address, room in (("x", A, 100), ("y", B, 400), ("z", C, 500))
        ]
        router, state = build.router(*experts)
        for address in unready:
            state.set_ready(address, ready=False)
        request = build.request(prompt_tokens=prompt, max_output_tokens=most)
        assert router.observe(request, now_s=0.0).eligible.tolist() == want, desc

    def test_roomiest_endpoints_that_are_equal_stay_eligible_together(self, build):
        router, state = build.router(build.expert("x", A, B, C))
        state.set_ready(B, ready=False)
        seen = router.observe(build.request(prompt_tokens=10**6), now_s=0.0)
        assert seen.eligible.tolist() == [True, False, True]


class TestResidents:
    def test_each_is_seen_on_its_candidate(self, build):
        router, state = build.router(build.expert("x", B), build.expert("y", A))
        state.begin("r1", A, build.admitted(arrival_s=1.0, prompt_tokens=50.0))
        state.begin("r2", B, build.admitted(arrival_s=2.0, limit_s=0.5, quality=0.9))
        state.add_tokens("r1", 3)
        seen = router.observe(build.request(), now_s=4.0)
        assert seen.resident_candidate.tolist() == [1, 0]
        assert seen.resident_elapsed_s.tolist() == [3.0, 2.0]
        assert seen.resident_prompt_tokens.tolist() == [50.0, 50.0]
        assert seen.resident_output_tokens.tolist() == [3.0, 0.0]
        assert seen.resident_limit_s.tolist() == [0.06, 0.5]
        assert seen.resident_quality.tolist() == [0.5, 0.9]

    @pytest.mark.parametrize(("tokens", "want"), [(0, 12), (11, 12), (12, 13), (40, 41)])
    def test_at_least_one_more_token_is_expected(self, tokens, want, build):
        router, state = build.router(build.expert("x", A))
        state.begin("r", A, build.admitted(expected_output_tokens=12.0))
        state.add_tokens("r", tokens)
        seen = router.observe(build.request(), now_s=0.0)
        assert seen.resident_expected_output.tolist() == [want]

    def test_one_on_a_shared_endpoint_counts_for_every_expert_there(self, build):
        router, state = build.router(
            build.expert("x", A), build.expert("y", A, B), build.expert("z", A)
        )
        state.begin("r1", A, build.admitted())
        state.begin("r2", B, build.admitted())
        seen = router.observe(build.request(), now_s=0.0)
        present = seen.per_candidate(np.ones_like(seen.resident_limit_s))
        want = {"x": 1, "y": 1, "z": 1}
        shared = [c.address == A for c in router.table.candidates]
        assert [c.expert for c in router.table.candidates if c.address == A] == list(want)
        assert present[shared].tolist() == [1, 1, 1]
        assert present[~np.array(shared)].tolist() == [1]

    def test_those_on_other_policies_endpoints_are_not_seen(self, build):
        snapshot = build.snapshot(build.expert("x", B))
        state = LiveState()
        state.set_endpoints([A, B, C])
        for i, address in enumerate((A, B, C)):
            state.begin(f"r{i}", address, build.admitted(prompt_tokens=float(i)))
        entry, candidate = RoutingTable(snapshot, state).residents_of(state.residents().row)
        assert (entry.tolist(), candidate.tolist()) == ([1], [0])

    @given(
        serving=st.lists(st.sampled_from(ADDRESSES), max_size=6),
        where=st.lists(st.sampled_from(ADDRESSES), max_size=10),
    )
    def test_matching_them_equals_comparing_all_pairs(self, serving, where, build):
        snapshot = build.snapshot(*(build.expert(f"x{i}", a) for i, a in enumerate(serving)))
        state = LiveState()
        state.set_endpoints(ADDRESSES)
        for i, address in enumerate(where):
            state.begin(f"r{i}", address, build.admitted())
        entry, candidate = RoutingTable(snapshot, state).residents_of(state.residents().row)
        pairs = [
            (r, c)
            for r, address in enumerate(where)
            for c, found in enumerate(snapshot.candidates)
            if found.address == address
        ]
        assert sorted(zip(entry.tolist(), candidate.tolist(), strict=True)) == pairs


class TestWholeAnswers:
    """Tokens so far of answers that are not streamed."""

    # One request with 50 prompt tokens: 50 ms of prefill, then 1 + 2 + 0.05 ms per token.
    @pytest.mark.parametrize(
        ("desc", "elapsed", "want"),
        [
            ("nothing during prefill", 0.049, 0),
            ("nothing before the first iteration ends", 0.053, 0),
            ("then one per iteration", 0.0531, 1),
            ("and the next", 0.0593, 3),
            ("never its whole expected length", 5.0, 11),
        ],
    )
    def test_are_estimated_from_time(self, desc, elapsed, want, build):
        router, state = build.router(build.expert("x", A))
        state.begin("r", A, build.admitted(streams=False))
        seen = router.observe(build.request(arrival_s=elapsed), now_s=elapsed)
        assert seen.resident_output_tokens.tolist() == [want], desc
        assert seen.resident_expected_output.tolist() == [12]

    def test_are_counted_where_tokens_were_seen_and_never_guessed_for_streams(self, build):
        router, state = build.router(build.expert("x", A))
        state.begin("streamed", A, build.admitted(streams=True))
        state.begin("told", A, build.admitted(streams=False))
        state.add_tokens("told", 2)
        state.begin("whole", A, build.admitted(streams=False))
        seen = router.observe(build.request(arrival_s=9.0), now_s=9.0)
        assert seen.resident_output_tokens.tolist() == [0, 2, 11]

    def test_are_paced_by_everything_on_their_endpoint(self, build):
        router, state = build.router(build.expert("x", A), build.expert("y", B))
        state.begin("whole", A, build.admitted(streams=False))
        for i in range(3):
            state.begin(f"beside-{i}", A, build.admitted(prompt_tokens=100.0))
            state.begin(f"elsewhere-{i}", B, build.admitted(prompt_tokens=100.0))
        # A batch of 4 takes 1 + max(4, 2.35) ms: 20 ms after prefill make 4 tokens.
        seen = router.observe(build.request(), now_s=0.0705)
        assert seen.resident_output_tokens[0] == 4


class TestGauges:
    def test_are_seen_per_candidate(self, build):
        router, state = build.router(build.expert("x", B), build.expert("y", A))
        for _ in range(2):
            state.set_load(A, EngineLoad(running=2, waiting=1, kv_usage=0.25), now_s=0.0)
        seen = router.observe(build.request(), now_s=1.0)
        assert seen.foreign.tolist() == [0, 3]
        assert seen.kv_usage.tolist() == pytest.approx([np.nan, 0.25], nan_ok=True)

    def test_stale_ones_are_not(self, build):
        router, state = build.router(build.expert("x", A))
        for _ in range(2):
            state.set_load(A, EngineLoad(running=2, waiting=1, kv_usage=0.25), now_s=0.0)
        seen = router.observe(build.request(), now_s=60.0)
        assert seen.foreign.tolist() == [0]
        assert np.isnan(seen.kv_usage).all()


def test_a_policy_without_endpoints_is_seen_as_such(build):
    router, state = build.router()
    state.set_endpoints([A])
    state.begin("r", A, build.admitted())
    seen = router.observe(build.request(), now_s=0.0)
    assert len(seen.eligible) == len(seen.quality) == len(seen.resident_candidate) == 0
    assert len(seen.per_candidate(seen.resident_limit_s)) == 0


@given(
    tokens=st.integers(1, 5000),
    context=st.integers(0, 100_000),
    bandwidth=st.floats(1, 5000),
    overhead=st.floats(0, 100),
)
def test_columns_cost_what_the_engine_simulator_is_charged(
    tokens, context, bandwidth, overhead, build
):
    profile = {"memory_bandwidth_gbps": bandwidth, "iteration_overhead_ms": overhead}
    router, _ = build.router(build.expert("x", A, profile=profile), build.expert("y", B))
    columns = router.table.cost.iteration_s(
        tokens=np.full(2, float(tokens)), context_tokens=np.full(2, float(context))
    )
    models = [CostModel.from_profile(c.profile, c.limits) for c in router.table.candidates]
    want = [
        model.iteration_seconds(prefill_tokens=0, decode_sequences=tokens, context_tokens=context)
        for model in models
    ]
    assert columns.tolist() == pytest.approx(want)
