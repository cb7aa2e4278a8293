"""How the policies did lately: what counts, for how long, and as what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_policy.openai_api import ApiError, parse_completion
from pointsman_policy.service import Limits
from pointsman_policy.stats import PolicyStatistics, SlidingWindow, Totals
from pointsman_policy.tracker import End

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
AUTO = "default/auto"


class TestWindow:
    def test_starts_with_zeros(self):
        assert SlidingWindow().totals(now_s=5.0) == Totals()

    def test_adds_up_what_is_within(self):
        window = SlidingWindow(window_s=300, buckets=60)
        for now in (0.0, 3.0, 150.0, 299.0):
            window.bucket(now_s=now).requests += 1
        assert window.totals(now_s=299.9).requests == 4
        assert window.totals(now_s=300.0).requests == 2
        assert window.totals(now_s=450.0).requests == 1
        assert window.totals(now_s=600.0) == Totals()

    @given(
        steps=st.lists(st.floats(0, 20), max_size=80),
        window_s=st.sampled_from([1.0, 7.0, 60.0]),
        buckets=st.integers(1, 10),
    )
    def test_is_right_to_within_one_bucket(self, steps, window_s, buckets):
        window = SlidingWindow(window_s=window_s, buckets=buckets)
        now, times = 0.0, []
        for step in steps:
            now += step
            times.append(now)
            window.bucket(now_s=now).requests += 1
            seen = window.totals(now_s=now).requests
            surely = sum(t > now - window_s + window_s / buckets + 1e-6 for t in times)
            perhaps = sum(t > now - window_s - 1e-6 for t in times)
            assert surely <= seen <= perhaps
            assert len(window._buckets) <= buckets


class TestPolicies:
    def test_each_has_its_own(self):
        statistics = PolicyStatistics()
        statistics.completed("a", quality=0.75, in_time=True, now_s=1.0)
        statistics.completed("a", quality=0.5, in_time=True, now_s=2.0)
        statistics.completed("a", quality=0.9, in_time=False, now_s=2.0)
        statistics.rejected("a", now_s=3.0)
        statistics.failed("b", now_s=3.0)
        assert statistics.totals("a", now_s=4.0) == Totals(
            requests=4, violations=1, rejected=1, failed=0, predicted_qos_sum=1.25
        )
        assert statistics.totals("b", now_s=4.0) == Totals(requests=1, failed=1)
        assert statistics.totals("c", now_s=4.0) == Totals()

    def test_those_that_are_gone_are_forgotten(self):
        statistics = PolicyStatistics()
        for name in ("a", "b"):
            statistics.failed(name, now_s=1.0)
        statistics.retain({"b", "c"})
        assert statistics.totals("a", now_s=1.0) == Totals()
        assert statistics.totals("b", now_s=1.0).failed == 1


class TestRequests:
    @pytest.fixture
    def totals(self):
        return lambda service: service.statistics.totals(AUTO, now_s=service.clock())

    @staticmethod
    def send(service, request_id="r1", **limits):
        completion = parse_completion(b'{"model": "auto", "prompt": "x", "stream": true}')
        service.tracker.opened(request_id, now_s=100.0)
        service.route(completion, Limits(**limits), request_id=request_id, arrival_s=100.0)

    @staticmethod
    def answer(service, chunk, request_id="r1", *, status=200, served_by=A, expert="good", at=100):
        service.tracker.responded(
            request_id,
            status=status,
            content_type="text/event-stream",
            served_by=served_by,
            expert=expert,
        )
        service.tracker.received(request_id, chunk, now_s=at)
        service.tracker.ended(request_id, End.WHOLE, now_s=at)

    def test_under_way_do_not_count(self, service, totals):
        self.send(service)
        assert totals(service) == Totals()

    @pytest.mark.parametrize(
        ("at", "want"),
        [
            (100.05, Totals(requests=1, predicted_qos_sum=0.9)),
            (100.07, Totals(requests=1, violations=1)),
        ],
    )
    def test_completed_count_by_their_limit(self, at, want, service, totals, event):
        self.send(service)
        self.answer(service, event(), at=at)
        assert totals(service) == want

    def test_their_own_limit_counts(self, service, totals, event):
        self.send(service, latency_per_token_ms=10.0)
        self.answer(service, event(), at=100.05)
        assert totals(service).violations == 1

    @pytest.mark.parametrize(
        ("served_by", "expert", "quality"),
        [(B, "fast", 0.4), (B, "x,fast", 0.4), (B, "other", 0.9), ("10.9.9.9:1", "fast", 0.9)],
    )
    def test_retried_count_with_the_quality_of_who_served(
        self, served_by, expert, quality, service, totals, event
    ):
        self.send(service)
        self.answer(service, event(), served_by=served_by, expert=expert)
        assert totals(service).predicted_qos_sum == quality

    def test_errors_and_broken_ones_failed(self, service, totals, event):
        self.send(service)
        self.answer(service, b"", status=500)
        self.send(service, "r2")
        service.tracker.received("r2", event(), now_s=100.0)
        service.tracker.ended("r2", End.EARLY, now_s=100.0)
        assert totals(service) == Totals(requests=2, failed=2)

    def test_without_tokens_are_left_out(self, service, totals):
        self.send(service)
        self.answer(service, b"data: [DONE]\n\n")
        assert totals(service) == Totals()

    def test_without_an_endpoint_are_rejected(self, make_service, totals):
        service = make_service(algorithm="LatencyQualityGreedy", admission="Reject")
        with pytest.raises(ApiError, match="Rejected"):
            self.send(service, latency_per_token_ms=0.001)
        service.state.set_ready(A, ready=False)
        service.state.set_ready(B, ready=False)
        with pytest.raises(ApiError, match="no endpoint"):
            self.send(service, "r2")
        assert totals(service) == Totals(requests=2, rejected=2)

    def test_of_a_policy_that_comes_again_start_from_zero(self, service, totals):
        kept = service.snapshots
        self.send(service)
        self.answer(service, b"", status=500)
        service.install(kept)
        assert totals(service).failed == 1
        service.install([])
        service.install(kept)
        assert totals(service) == Totals()
