import orjson
import pytest

from pointsman_cli.demo.stream import AnswerMeter, SseParser


def event(**fields) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def delta(content=None, *, finish=None, **fields) -> bytes:
    body = {} if content is None else {"content": content}
    return event(choices=[{"index": 0, "delta": body | fields, "finish_reason": finish}], model="m")


def usage(tokens: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": tokens})


DONE = b"data: [DONE]\n\n"


@pytest.fixture
def meter() -> AnswerMeter:
    return AnswerMeter()


def test_events_are_found_however_the_bytes_are_cut():
    stream = b": comment\r\ndata: one\r\n\r\nevent: x\ndata:two\n\ndata: three\n"
    for size in range(1, len(stream)):
        parser = SseParser()
        found = [
            data
            for start in range(0, len(stream), size)
            for data in parser.feed(stream[start : start + size])
        ]
        assert found == [b"one", b"two", b"three"]


def test_times_first_and_last_token_and_trusts_usage(meter):
    meter.feed(delta("", role="assistant"), 1.0)
    assert meter.first_token_s is None
    meter.feed(delta("Hello"), 2.0)
    meter.feed(delta("") + delta(" you"), 3.0)
    meter.feed(delta(finish="stop"), 4.0)
    assert meter.output_tokens == 3
    meter.feed(usage(5) + DONE, 5.0)
    assert (meter.first_token_s, meter.last_token_s) == (2.0, 3.0)
    assert meter.output_tokens == 5
    assert meter.finish_reason == "stop"
    assert meter.model == "m"
    assert meter.complete


def test_last_token_may_come_with_the_finish_reason(meter):
    meter.feed(delta("a") + delta("b", finish="length") + DONE, 2.0)
    assert meter.output_tokens == 2
    assert meter.complete


def test_plain_completions(meter):
    meter.feed(event(choices=[{"text": "a", "finish_reason": None}]), 1.0)
    meter.feed(event(choices=[{"text": "", "finish_reason": "stop"}]) + DONE, 2.0)
    assert meter.output_tokens == 1
    assert meter.complete


@pytest.mark.parametrize(
    "stream",
    [
        delta("a"),
        delta("a", finish="stop"),
        delta("a") + DONE,
        delta("a", finish="stop") + event(error={"message": "out of memory"}) + DONE,
    ],
    ids=["cut", "no done", "no finish reason", "error"],
)
def test_incomplete_answers(meter, stream):
    meter.feed(stream, 1.0)
    assert not meter.complete


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (event(error={"message": "out of memory"}), "out of memory"),
        (event(error="bad"), "bad"),
        (b"data: {\n", "not JSON in the stream: b'{'"),
        (b"data: [1]\n", "not an object in the stream: b'[1]'"),
    ],
)
def test_errors_inside_the_stream(meter, stream, error):
    meter.feed(stream, 1.0)
    assert meter.error == error


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": ["x", None, 1]},
        {"choices": "text"},
        {"choices": {"0": {}}},
        {"choices": [], "usage": [1]},
        {"choices": [], "usage": "many"},
        {"choices": [], "usage": {"completion_tokens": "7"}},
        {"choices": [], "usage": {"completion_tokens": -1}},
    ],
    ids=repr,
)
def test_parts_of_a_wrong_type_are_passed_over(meter, odd):
    meter.feed(delta("a") + event(**odd) + delta("b", finish="stop") + DONE, 1.0)
    assert meter.output_tokens == 2
    assert meter.complete
