"""What the observe filter's messages do to the in-flight table."""

import pytest

from pointsman_policy.observe_stream import ObserveStream
from pointsman_policy.openai_api import parse_completion
from pointsman_policy.service import Limits
from pointsman_policy.tracker import End

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
GOOD = {"policy": "default/auto", "expert": "good"}
SSE = "text/event-stream"


@pytest.fixture
def observing(service, messages):
    """The stream of a request that came 200 ms ago and was sent to the expert ``good`` on A."""
    stream = ObserveStream(service)
    stream.handle(messages.request_headers())
    service.clock.now += 0.2
    completion = parse_completion(b'{"model": "auto", "prompt": "x", "stream": true}')
    arrival = service.tracker.arrival_s("r1", now_s=service.clock())
    service.route(completion, Limits(), request_id="r1", arrival_s=arrival)
    return stream


def test_a_whole_streamed_answer(observing, service, messages, event, counted):
    observing.handle(messages.response_headers(content_type=SSE, x_pointsman_endpoint=A))
    for _ in range(4):
        service.clock.now += 0.05
        observing.handle(messages.response_body(event()))
    assert service.state.residents().output_tokens.tolist() == [4]
    assert not observing.done
    observing.handle(messages.response_body(ends=True))
    assert observing.done
    observing.close()
    assert len(service.state) == len(service.tracker) == 0
    assert counted(service, "completions_total", **GOOD, outcome="ok") == 1
    # 200 ms until it was decided and 4 times 50 ms, over 4 tokens.
    name = "latency_per_token_seconds_sum"
    assert counted(service, name, **GOOD) == pytest.approx(0.1)
    assert counted(service, "time_to_first_token_seconds_sum", **GOOD) == pytest.approx(0.25)


def test_the_last_bytes_may_come_with_the_end(observing, service, messages, event, counted):
    observing.handle(messages.response_headers(content_type=SSE, x_pointsman_endpoint=A))
    observing.handle(messages.response_body(event(), ends=True))
    assert observing.done
    assert counted(service, "output_tokens_total", **GOOD) == 1


def test_a_stream_that_ends_early_was_aborted(observing, service, messages, event, counted):
    observing.handle(messages.response_headers(content_type=SSE, x_pointsman_endpoint=A))
    observing.handle(messages.response_body(event()))
    observing.close()
    assert len(service.state) == len(service.tracker) == 0
    assert counted(service, "completions_total", **GOOD, outcome="aborted") == 1


def test_a_stream_that_is_lost_tells_nothing(observing, service, messages, event, counted):
    observing.handle(messages.response_headers(content_type=SSE, x_pointsman_endpoint=A))
    observing.handle(messages.response_body(event()))
    observing.lose()
    assert len(service.state) == len(service.tracker) == 0
    assert counted(service, "completions_total", **GOOD, outcome="unknown") == 1
    assert counted(service, "qos_requests_total", policy="default/auto") == 0


def test_a_stream_that_is_lost_after_its_end_is_no_matter(observing, service, messages, counted):
    observing.handle(messages.response_headers(status="503", ends=True))
    observing.lose()
    assert counted(service, "completions_total", **GOOD, outcome="error") == 1
    assert counted(service, "completions_total", **GOOD, outcome="unknown") == 0


def test_an_answer_without_body_ends_with_its_headers(observing, service, messages, counted):
    observing.handle(messages.response_headers(status="503", ends=True))
    assert observing.done
    assert len(service.state) == 0
    assert counted(service, "completions_total", **GOOD, outcome="error") == 1


@pytest.mark.parametrize("status", ["", "²", "ok"])
def test_an_odd_status_is_none(status, observing, messages, service, counted):
    observing.handle(messages.response_headers(status=status, ends=True))
    assert counted(service, "completions_total", **GOOD, outcome="ok") == 1


def test_the_expert_that_really_served_is_told_by_the_headers(
    observing, service, messages, counted
):
    observing.handle(messages.response_headers(x_pointsman_endpoint=B, x_pointsman_expert="fast"))
    assert (service.state.in_flight(A), service.state.in_flight(B)) == (0, 1)
    observing.handle(messages.response_body(b"{}", ends=True))
    labels = {"policy": "default/auto", "expert": "fast", "outcome": "ok"}
    assert counted(service, "completions_total", **labels) == 1


class TestFailures:
    """What counts against an endpoint although it is not the one that answers."""

    @pytest.fixture
    def failed(self, service, monkeypatch):
        addresses = []
        monkeypatch.setattr(service, "failed", lambda address, **_: addresses.append(address))
        return addresses

    @pytest.mark.parametrize(
        ("status", "headers", "want"),
        [
            ("200", {"endpoint": B, "policy": "default/auto"}, [A]),
            ("404", {"endpoint": B, "policy": "default/auto"}, [A]),
            ("503", {"endpoint": B, "policy": "default/auto"}, [B, A]),
            ("503", {"endpoint": A, "policy": "default/auto"}, [A]),
            ("503", {"failed_endpoint": B, "policy": "default/auto"}, [B, A]),
            ("503", {"failed_endpoint": A, "policy": "default/auto"}, [A]),
            ("504", {"failed_endpoint": A, "policy": "default/auto"}, [A]),
            # The decision came too late, and Envoy chose.
            ("200", {"endpoint": B}, []),
            ("504", {"failed_endpoint": B}, [B]),
            # No endpoint was tried.
            ("504", {}, []),
            ("429", {}, []),
            ("200", {"endpoint": A, "policy": "default/auto"}, []),
            ("429", {"endpoint": A, "policy": "default/auto"}, []),
        ],
    )
    def test_are_told_by_the_answers_headers(
        self, status, headers, want, observing, messages, failed
    ):
        named = {f"x_pointsman_{name}": value for name, value in headers.items()}
        observing.handle(messages.response_headers(status=status, **named))
        assert failed == want

    def test_a_client_that_leaves_is_none(self, observing, failed):
        observing.close()
        assert failed == []

    def test_of_what_was_not_decided_nobody_was_passed_over(self, service, messages, failed):
        stream = ObserveStream(service)
        stream.handle(messages.request_headers(x_request_id="r2"))
        told = {"x_pointsman_endpoint": B, "x_pointsman_policy": "default/auto"}
        stream.handle(messages.response_headers(**told))
        assert failed == []


def test_a_request_that_is_refused_leaves_nothing(service, messages):
    stream = ObserveStream(service)
    stream.handle(messages.request_headers())
    assert len(service.tracker) == 1
    stream.handle(messages.response_headers(status="404"))
    stream.handle(messages.response_body(b"{}", ends=True))
    assert len(service.tracker) == 0


@pytest.mark.parametrize("known", ["without an id", "ended before"])
def test_a_request_that_cannot_be_followed_changes_nothing(known, service, messages, event):
    if known == "ended before":
        service.tracker.opened("r1", now_s=100.0)
        service.tracker.ended("r1", End.WHOLE, now_s=100.0)
    stream = ObserveStream(service)
    stream.handle(messages.request_headers(x_request_id=None if known == "without an id" else "r1"))
    stream.handle(messages.response_headers())
    stream.handle(messages.response_body(event(), ends=True))
    stream.close()
    assert len(service.tracker) == 0


def test_messages_before_the_headers_change_nothing(service, messages, event):
    stream = ObserveStream(service)
    stream.handle(messages.response_body(event(), ends=True))
    stream.close()
    assert len(service.tracker) == 0


def test_other_messages_change_nothing(observing, service, messages):
    observing.handle(messages.request_body({}))
    assert not observing.done
    assert len(service.state) == 1
