"""Endpoints that answer nothing but errors are left alone, never all of a policy's."""

import pytest

from pointsman_policy.http_api import live_state, show_state
from pointsman_policy.outliers import (
    BASE_PAUSE_S,
    CONSECUTIVE_ERRORS,
    MAX_PAUSE_S,
    Outliers,
)

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


def fail(service, address=A, *, times=CONSECUTIVE_ERRORS):
    for _ in range(times):
        service.answered(address, status=500)


def chosen(service, build):
    return service.decide(service.router("auto"), build.request()).chosen.address


class TestRule:
    def test_only_errors_in_a_row_count(self):
        outliers = Outliers()
        for _ in range(3):
            said = [outliers.failed(A) for _ in range(CONSECUTIVE_ERRORS - 1)]
            assert not any(said)
            outliers.succeeded(A)
        said = [outliers.failed(A) for _ in range(CONSECUTIVE_ERRORS)]
        assert said == [False] * (CONSECUTIVE_ERRORS - 1) + [True]

    def test_pauses_grow_up_to_a_bound_while_it_does_not_mend(self):
        outliers, now, pauses = Outliers(), 0.0, []
        for _ in range(CONSECUTIVE_ERRORS):
            due = outliers.failed(A)
        for _ in range(15):
            assert due
            pauses.append(outliers.pause(A, now_s=now))
            assert outliers.due(now_s=now + pauses[-1] - 0.1) == []
            now += pauses[-1]
            assert outliers.due(now_s=now) == [A]
            assert outliers.due(now_s=now) == []
            due = outliers.failed(A)  # once is enough then
        assert pauses[:3] == [BASE_PAUSE_S, 2 * BASE_PAUSE_S, 3 * BASE_PAUSE_S]
        assert max(pauses) == pauses[-1] == MAX_PAUSE_S

    def test_what_was_under_way_changes_nothing_during_a_pause(self):
        outliers = Outliers()
        outliers.pause(A, now_s=0.0)
        outliers.succeeded(A)
        assert not outliers.failed(A)
        assert outliers.due(now_s=BASE_PAUSE_S) == [A]

    def test_one_good_answer_after_it_makes_a_new_start(self):
        outliers = Outliers()
        outliers.pause(A, now_s=0.0)
        outliers.due(now_s=BASE_PAUSE_S)
        outliers.succeeded(A)
        assert not outliers.failed(A)
        assert outliers.pause(A, now_s=0.0) == BASE_PAUSE_S

    def test_who_left_is_forgotten(self):
        outliers = Outliers()
        outliers.pause(A, now_s=0.0)
        outliers.retain([B])
        assert outliers.due(now_s=1e9) == []


class TestDecisions:
    def test_it_gets_none_for_a_while(self, service, build, counted):
        assert chosen(service, build) == A
        fail(service)
        assert chosen(service, build) == B
        assert counted(service, "pauses_total", expert="good") == 1
        service.clock.now += BASE_PAUSE_S - 0.1
        assert chosen(service, build) == B
        service.clock.now += 0.1
        assert chosen(service, build) == A

    def test_it_is_no_target_for_retries_either(self, service, build):
        fail(service, B)
        assert service.decide(service.router("auto"), build.request()).retry_on == ()

    @pytest.mark.parametrize("status", [400, 404, 429])
    def test_what_the_client_did_wrong_counts_neither_way(self, service, build, status):
        for _ in range(10):
            service.answered(A, status=status)
        assert chosen(service, build) == A
        fail(service, times=CONSECUTIVE_ERRORS - 1)
        service.answered(A, status=status)
        fail(service, times=1)
        assert chosen(service, build) == B

    def test_errors_of_no_engine_do_not_count(self, service, build):
        for _ in range(10):
            service.answered(None, status=503)
        assert chosen(service, build) == A

    def test_the_last_one_of_a_policy_stays(self, service, build):
        service.state.set_ready(B, ready=False)
        fail(service)
        assert chosen(service, build) == A
        service.state.set_ready(B, ready=True)
        fail(service)
        assert chosen(service, build) == B
        fail(service, B)
        assert chosen(service, build) == B

    def test_the_only_one_of_another_policy_stays(self, service, build):
        only = build.snapshot(build.expert("good", A), name="one", models=["one"])
        service.install([*service.snapshots, only])
        fail(service)
        assert chosen(service, build) == A

    def test_better_than_none_when_the_others_go(self, service, build):
        fail(service)
        service.state.set_ready(B, ready=False)
        assert chosen(service, build) == A

    def test_one_that_leaves_and_comes_back_starts_anew(self, service, build):
        both = service.snapshots
        fail(service)
        service.install([build.snapshot(build.expert("fast", B))])
        service.install(both)
        assert chosen(service, build) == A

    def test_one_that_stays_is_still_left_alone(self, service, build):
        fail(service)
        service.install(service.snapshots)
        assert chosen(service, build) == B

    def test_an_unknown_one_is_no_matter(self, service, build):
        fail(service, "10.9.9.9:1", times=20)
        assert chosen(service, build) == A

    def test_it_shows(self, service, counted):
        fail(service)
        show_state(service)
        assert counted(service, "endpoint_ready", endpoint=A, expert="good") == 0
        shown = live_state(service)["endpoints"]
        assert (shown[A]["ready"], shown[A]["paused"]) == (True, True)
        assert not shown[B]["paused"]
