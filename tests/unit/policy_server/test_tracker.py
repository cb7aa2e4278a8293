"""Two streams tell of one request; whatever their order, no entry stays behind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_core.state import EngineLoad
from pointsman_policy.tracker import REMEMBERED_ENDS, End

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
GOOD = {"policy": "default/auto", "expert": "good"}
FAST = {"policy": "default/auto", "expert": "fast"}


def play(service, decision, event, letter, request_id, *, now_s, served_by, expert):
    """One of the things that may happen to a request, as in ``ODRCEXU``."""
    tracker = service.tracker
    match letter:
        case "O":
            tracker.opened(request_id, now_s=now_s)
        case "D":
            tracker.decided(request_id, decision)
        case "R":
            tracker.responded(
                request_id,
                status=200,
                content_type="text/event-stream",
                served_by=served_by,
                expert=expert,
            )
        case "C":
            tracker.received(request_id, event(), now_s=now_s)
        case "E" | "X" | "U":
            ends = {"E": End.WHOLE, "X": End.EARLY, "U": End.UNSEEN}
            tracker.ended(request_id, ends[letter], now_s=now_s)


@pytest.fixture(scope="session")
def steps_of(build, event):
    """A service's steps; its policy sends requests to A, with a limit of 60 ms per token."""

    def bind(service):
        decision = service.router("auto").decide(build.request(arrival_s=100.0), now_s=100.0)

        def step(letter, request_id="r1", *, now_s=101.0, served_by=A, expert="good"):
            told = {"now_s": now_s, "served_by": served_by, "expert": expert}
            play(service, decision, event, letter, request_id, **told)

        return step

    return bind


@pytest.fixture
def steps(service, steps_of):
    return steps_of(service)


@pytest.fixture
def decision(service, build):
    return service.router("auto").decide(build.request(arrival_s=100.0), now_s=100.0)


@pytest.mark.parametrize(
    ("order", "in_flight", "completions", "tokens"),
    [
        ("ODRC", 1, 0, 0),
        ("ODRCE", 0, 1, 1),
        ("DORCE", 0, 1, 1),
        ("ODE", 0, 1, 0),
        ("ORDCE", 0, 1, 1),
        ("ORCDE", 0, 1, 1),
        ("ORCED", 0, 0, 0),
        ("ORCE", 0, 0, 0),
        ("OED", 0, 0, 0),
        ("OEDO", 0, 0, 0),
        ("ODRCEE", 0, 1, 1),
        ("ODRCERCDO", 0, 1, 1),
        ("D", 1, 0, 0),
        ("RCE", 0, 0, 0),
        ("OODDRRCCEE", 0, 1, 2),
    ],
)
def test_any_order(order, in_flight, completions, tokens, service, steps, counted):
    for letter in order:
        steps(letter)
    assert len(service.state) == in_flight
    assert len(service.tracker) == in_flight
    assert counted(service, "completions_total", **GOOD, outcome="ok") == completions
    assert counted(service, "output_tokens_total", **GOOD) == tokens


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from("ODRCEXU"),
            st.sampled_from(["r1", "r2", "r3"]),
            st.sampled_from([A, B, "10.9.9.9:1", "", None]),
        ),
        max_size=40,
    )
)
def test_no_entry_is_ever_left_without_one_who_will_end_it(calls, make_service, steps_of):
    service = make_service()
    step = steps_of(service)
    for letter, request_id, served_by in calls:
        step(letter, request_id, served_by=served_by)
        assert all(i in service.tracker._tracked for i in service.state._ids)
    for request_id in ("r1", "r2", "r3"):
        step("X", request_id)
    assert len(service.state) == len(service.tracker) == 0


class TestArrival:
    def test_is_when_the_headers_came(self, service, steps):
        steps("O", now_s=100.2)
        assert service.tracker.arrival_s("r1", now_s=100.9) == 100.2

    @pytest.mark.parametrize("request_id", ["unknown", None])
    def test_is_now_as_far_as_nothing_is_known(self, request_id, service):
        assert service.tracker.arrival_s(request_id, now_s=100.9) == 100.9

    @pytest.mark.parametrize(("opened", "want"), [(99.5, 99.5), (100.5, 100.0)])
    def test_is_the_earlier_one_when_the_decision_came_first(self, opened, want, service, steps):
        steps("D")
        steps("O", now_s=opened)
        assert service.tracker.arrival_s("r1", now_s=101.0) == want


class TestLatency:
    def test_is_from_arrival_to_last_token_over_tokens(self, service, steps, counted):
        steps("O", now_s=100.0)
        steps("D")
        steps("R")
        for now in (100.3, 100.4, 100.5):
            steps("C", now_s=now)
        steps("E", now_s=109.0)
        name = "latency_per_token_seconds"
        assert counted(service, f"{name}_sum", **GOOD) == pytest.approx(0.5 / 3)
        assert counted(service, "time_to_first_token_seconds_sum", **GOOD) == pytest.approx(0.3)
        assert counted(service, "output_tokens_total", **GOOD) == 3

    @pytest.mark.parametrize(("last", "violations"), [(100.119, 0), (100.121, 1)])
    def test_over_the_limit_is_a_violation(self, last, violations, service, steps, counted):
        for letter in "ODR":
            steps(letter, now_s=100.0)
        steps("C", now_s=100.1)
        steps("C", now_s=last)
        steps("E", now_s=last)
        assert counted(service, "latency_violations_total", **GOOD) == violations

    def test_of_a_whole_answer_is_up_to_its_end(self, service, steps, counted):
        steps("O", now_s=100.0)
        steps("D")
        service.tracker.responded(
            "r1", status=200, content_type="application/json", served_by=A, expert="good"
        )
        service.tracker.received("r1", b'{"usage":{"completion_tokens":4}}', now_s=100.1)
        steps("E", now_s=100.2)
        assert counted(service, "latency_per_token_seconds_sum", **GOOD) == pytest.approx(0.05)
        assert counted(service, "time_to_first_token_seconds_count", **GOOD) == 0
        assert counted(service, "latency_violations_total", **GOOD) == 0

    def test_of_an_answer_without_tokens_is_none(self, service, steps, counted):
        for letter in "ODRE":
            steps(letter)
        assert counted(service, "completions_total", **GOOD, outcome="ok") == 1
        assert counted(service, "latency_per_token_seconds_count", **GOOD) == 0


class TestOutcome:
    @pytest.mark.parametrize(
        ("status", "end", "want"),
        [
            (200, End.WHOLE, "ok"),
            (0, End.WHOLE, "ok"),
            (400, End.WHOLE, "error"),
            (500, End.WHOLE, "error"),
            (200, End.EARLY, "aborted"),
            (500, End.EARLY, "aborted"),
            (200, End.UNSEEN, "unknown"),
            (500, End.UNSEEN, "unknown"),
        ],
    )
    def test_is_counted(self, status, end, want, service, steps, counted):
        steps("O")
        steps("D")
        service.tracker.responded(
            "r1", status=status, content_type="text/event-stream", served_by=A, expert="good"
        )
        steps("C")
        service.tracker.ended("r1", end, now_s=101.0)
        assert counted(service, "completions_total", **GOOD, outcome=want) == 1
        # Latency means something only for whole good answers.
        latencies = counted(service, "latency_per_token_seconds_count", **GOOD)
        assert latencies == (1 if want == "ok" else 0)
        assert len(service.state) == 0

    def test_an_error_in_the_middle_of_a_stream_is_one(self, service, steps, counted):
        for step in "ODR":
            steps(step)
        steps("C")
        service.tracker.received("r1", b'data: {"error": {"message": "boom"}}\n\n', now_s=100.5)
        service.tracker.ended("r1", End.WHOLE, now_s=101.0)
        assert counted(service, "completions_total", **GOOD, outcome="error") == 1
        assert counted(service, "latency_per_token_seconds_count", **GOOD) == 0
        assert counted(service, "predicted_qos_total", policy="default/auto") == 0


class TestRetried:
    def test_is_counted_where_it_is_served(self, service, steps, counted):
        steps("O")
        steps("D")
        steps("R", served_by=B, expert="fast")
        assert (service.state.in_flight(A), service.state.in_flight(B)) == (0, 1)
        steps("C")
        steps("E")
        assert len(service.state) == 0
        assert counted(service, "completions_total", **FAST, outcome="ok") == 1
        assert counted(service, "completions_total", **GOOD, outcome="ok") == 0
        assert counted(service, "rerouted_total", policy="default/auto") == 1

    def test_also_when_the_decision_came_after_the_answer(self, service, steps, counted):
        steps("O")
        steps("R", served_by=B, expert="fast")
        steps("C")
        steps("C")
        steps("D")
        assert (service.state.in_flight(A), service.state.in_flight(B)) == (0, 1)
        assert service.state.residents().output_tokens.tolist() == [2]
        steps("E")
        assert counted(service, "completions_total", **FAST, outcome="ok") == 1
        assert counted(service, "rerouted_total", policy="default/auto") == 1

    @pytest.mark.parametrize("served_by", ["", None, A])
    def test_not_where_nothing_else_was_told(self, served_by, service, steps, counted):
        steps("O")
        steps("D")
        steps("R", served_by=served_by, expert="good")
        assert service.state.in_flight(A) == 1
        assert counted(service, "rerouted_total", policy="default/auto") == 0

    def test_to_an_unknown_endpoint_keeps_its_place_until_its_end(self, service, steps):
        steps("O")
        steps("D")
        steps("R", served_by="10.9.9.9:1", expert=None)
        assert service.state.in_flight(A) == 1
        steps("X")
        assert len(service.state) == 0


class TestUntracked:
    def test_without_an_id(self, service, decision, counted):
        service.tracker.decided(None, decision)
        assert len(service.state) == len(service.tracker) == 0
        assert counted(service, "untracked_total") == 1

    def test_a_second_decision_of_the_same_id(self, service, steps, counted):
        steps("D")
        steps("D")
        assert service.state.in_flight(A) == 1
        assert counted(service, "untracked_total") == 1

    def test_a_rejection(self, make_service, build):
        service = make_service()
        service.state.set_ready(A, ready=False)
        service.state.set_ready(B, ready=False)
        rejected = service.router("auto").decide(build.request(), now_s=100.0)
        service.tracker.decided("r1", rejected)
        assert len(service.state) == len(service.tracker) == 0


class TestOpened:
    def test_tells_whether_the_request_is_still_to_come(self, service, steps):
        assert service.tracker.opened("r1", now_s=100.0)
        assert service.tracker.opened("r1", now_s=100.0)
        steps("E")
        assert not service.tracker.opened("r1", now_s=101.0)

    def test_ends_are_remembered_for_a_while_only(self, service):
        for i in range(REMEMBERED_ENDS + 1):
            service.tracker.opened(f"r{i}", now_s=100.0)
            service.tracker.ended(f"r{i}", End.WHOLE, now_s=100.0)
        assert service.tracker.opened("r0", now_s=101.0)
        assert not service.tracker.opened("r1", now_s=101.0)


def test_what_nobody_ended_expires(service, steps, counted):
    steps("O", "old", now_s=50.0)
    steps("D", "decided-at-100")
    steps("O", "young", now_s=100.5)
    assert service.tracker.expire(before_s=60.0) == 1
    assert service.tracker.expire(before_s=100.5) == 1
    assert len(service.tracker) == 1
    assert len(service.state) == 0
    assert counted(service, "expired_total", reason="too_old") == 2


class TestReconcile:
    """An end that was missed: the engine's gauges tell in time that the request is gone."""

    @pytest.fixture
    def scrape(self, service):
        def at(now_s, running):
            service.state.set_load(A, EngineLoad(running=running, waiting=0), now_s=now_s)

        return at

    def test_takes_out_the_oldest_quiet_requests_that_the_engine_long_lacks(
        self, service, steps, scrape, counted
    ):
        steps("O", "older", now_s=99.0)
        steps("D", "older")
        steps("D", "newer")
        for now_s in (102.0, 110.0, 117.0):
            scrape(now_s, running=1)
        assert service.tracker.reconcile(now_s=117.5) == 1
        assert "older" not in service.state
        assert "newer" in service.state
        assert counted(service, "expired_total", reason="not_at_engine") == 1

    @pytest.mark.parametrize(
        ("desc", "scrapes", "now_s"),
        [
            ("not for long yet", [(102.0, 0), (110.0, 0)], 110.5),
            ("the gauges agree in between", [(102.0, 0), (110.0, 2), (117.0, 0)], 117.5),
            ("the gauges are stale", [(102.0, 0), (110.0, 0)], 130.0),
            ("no gauges", [], 200.0),
        ],
    )
    def test_believes_the_table_otherwise(self, desc, scrapes, now_s, service, steps, scrape):
        steps("D", "one", now_s=100.0)
        steps("D", "two", now_s=100.0)
        for at, running in scrapes:
            scrape(at, running)
        assert service.tracker.reconcile(now_s=now_s) == 0, desc
        assert len(service.state) == 2

    def test_leaves_requests_alone_that_were_heard_of_lately(self, service, steps, scrape):
        steps("O", "one", now_s=100.0)
        steps("D", "one", now_s=100.0)
        for now_s in (102.0, 110.0, 117.0):
            scrape(now_s, running=0)
        service.tracker.responded(
            "one", status=200, content_type="text/event-stream", served_by=A, expert="a"
        )
        token = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
        service.tracker.received("one", token, now_s=117.0)
        assert service.tracker.reconcile(now_s=117.5) == 0


def test_what_was_served_without_a_decision_is_counted(service, steps, counted):
    steps("O", "r1", now_s=100.0)
    service.tracker.responded("r1", status=200, content_type="", served_by=A, expert="a")
    service.tracker.ended("r1", End.WHOLE, now_s=101.0)
    assert counted(service, "undecided_total") == 1
    steps("O", "refused", now_s=100.0)
    service.tracker.responded("refused", status=404, content_type="", served_by=None, expert=None)
    service.tracker.ended("refused", End.WHOLE, now_s=101.0)
    assert counted(service, "undecided_total") == 1
