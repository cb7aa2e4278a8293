"""Tokens are counted right however the bytes are cut."""

import itertools

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_policy.answers import (
    MAX_EVENT_BYTES,
    TAIL_BYTES,
    StreamCounter,
    WholeCounter,
    counter_for,
)

DONE = b"data: [DONE]\n\n"


def sse(*documents, end=b"\n\n"):
    return b"".join(b"data: " + orjson.dumps(document) + end for document in documents)


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields}]}


def usage(tokens):
    return {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}


ROLE = delta(role="assistant", content="")
WORD = delta(content="word")
STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

STREAMS = [
    ("nothing", b"", 0, 0),
    ("words", sse(ROLE, WORD, WORD, STOP) + DONE, 2, 2),
    ("the role alone is no token", sse(ROLE), 0, 0),
    ("usage wins over what was counted", sse(WORD, WORD, usage(7)) + DONE, 2, 7),
    ("the last usage wins", sse(usage(1), WORD, usage(2), WORD), 2, 2),
    ("a null usage tells nothing", sse(WORD | {"usage": None}), 1, 1),
    ("an odd usage tells nothing", sse(WORD, WORD | {"usage": {"completion_tokens": "9"}}), 2, 2),
    ("a negative usage tells nothing", sse(WORD, usage(-5)), 1, 1),
    ("a usage of another shape tells nothing", sse(WORD | {"usage": [7]}), 1, 1),
    ("reasoning counts", sse(delta(reasoning_content="hm"), delta(reasoning="hm")), 2, 2),
    ("tool calls and refusals count", sse(delta(tool_calls=[{}]), delta(refusal="no")), 2, 2),
    ("completions have text", sse({"choices": [{"text": "a"}]}, {"choices": [{"text": ""}]}), 1, 1),
    ("several choices in one event are one", sse({"choices": [{"text": "a"}] * 2}), 1, 1),
    ("lines may end in CRLF", sse(WORD, WORD, end=b"\r\n\r\n") + DONE, 2, 2),
    ("a space after the colon is optional", b'data:{"choices":[{"text":"a"}]}\n', 1, 1),
    ("comments and other fields are passed over", b": ping\nevent: x\nid: 1\n" + sse(WORD), 1, 1),
    ("[DONE] is no token", DONE * 3, 0, 0),
    ("garbage is passed over", b"data: {oops\n\xff\xfe\ndata\n\n" + sse(WORD), 1, 1),
    ("JSON of other shapes is", sse([], 5, None, {"choices": 5}, {"choices": [5]}, {}), 0, 0),
    ("odd deltas are", sse({"choices": [{"delta": "x"}, {"delta": None}]}), 0, 0),
    ("an event without its end does not count yet", sse(WORD) + b'data: {"choices":', 1, 1),
]


@pytest.mark.parametrize(("desc", "stream", "events", "total"), STREAMS)
class TestStream:
    def test_at_once(self, desc, stream, events, total):
        counter = StreamCounter()
        assert counter.feed(stream) == events, desc
        assert counter.total == total, desc

    def test_byte_by_byte(self, desc, stream, events, total):
        counter = StreamCounter()
        new = sum(counter.feed(stream[i : i + 1]) for i in range(len(stream)))
        assert (new, counter.total) == (events, total), desc

    def test_split_once_at_every_position(self, desc, stream, events, total):
        for position in range(len(stream) + 1):
            counter = StreamCounter()
            new = counter.feed(stream[:position]) + counter.feed(stream[position:])
            assert (new, counter.total) == (events, total), (desc, position)


@given(cuts=st.lists(st.integers(0, 400), max_size=12), end=st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_any_cutting_gives_the_same_count(cuts, end):
    stream = sse(ROLE, WORD, delta(content="é\n\ndata: {}"), STOP, usage(3), end=end) + DONE
    counter = StreamCounter()
    edges = [0, *sorted(cuts), len(stream)]
    new = sum(counter.feed(stream[a:b]) for a, b in itertools.pairwise(edges))
    assert (new, counter.total) == (2, 3)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_no_bytes_make_it_fail(noise, position):
    for counter in (StreamCounter(), WholeCounter()):
        for chunk in (noise[:position], b"data: ", noise[position:], b"\ndata: ", noise, b"\n"):
            assert counter.feed(chunk) >= 0
        assert counter.total >= 0


@pytest.mark.parametrize(
    ("stream", "want"),
    [
        (sse(WORD, {"error": {"message": "boom", "code": 500}}) + DONE, True),
        (sse(WORD, {"error": "boom"}, WORD), True),
        (sse(WORD | {"error": None}, STOP) + DONE, False),
        (sse(WORD, usage(3)) + DONE, False),
    ],
)
def test_an_error_in_the_middle_is_noticed(stream, want):
    counter = StreamCounter()
    counter.feed(stream)
    assert counter.failed is want


def test_a_huge_event_is_dropped_and_the_next_one_counts():
    counter = StreamCounter()
    huge = sse(delta(content="x" * 2 * MAX_EVENT_BYTES))
    chunks = [huge[i : i + 16_384] for i in range(0, len(huge), 16_384)]
    kept = []
    for chunk in chunks:
        assert counter.feed(chunk) == 0
        kept.append(len(counter._rest))
    assert max(kept) <= MAX_EVENT_BYTES
    assert counter.feed(sse(WORD)) == 1


class TestWhole:
    @pytest.mark.parametrize(
        ("desc", "answer", "want"),
        [
            ("nothing yet", b"", 0),
            ("usage", orjson.dumps({"choices": [], "usage": {"completion_tokens": 42}}), 42),
            ("spaces", b'{"usage": {"completion_tokens" : 42 }}', 42),
            ("the last counts", b'{"completion_tokens":1,"usage":{"completion_tokens":2}}', 2),
            ("no usage", orjson.dumps({"choices": []}), 0),
            ("null", b'{"usage":{"completion_tokens":null}}', 0),
            ("an error", b'{"error":{"message":"no"}}', 0),
            ("details are no total", b'{"completion_tokens_details":{"x":1}}', 0),
            (
                "an answer that speaks of usage",
                orjson.dumps(
                    {
                        "usage": {"completion_tokens": 3},
                        "choices": [{"text": '"completion_tokens": 99'}],
                    }
                ),
                3,
            ),
        ],
    )
    def test_tokens_are_those_of_the_usage(self, desc, answer, want):
        for cut in range(len(answer) + 1):
            counter = WholeCounter()
            assert counter.feed(answer[:cut]) == counter.feed(answer[cut:]) == 0
            assert counter.total == want, (desc, cut)

    def test_only_the_tail_is_kept(self):
        counter = WholeCounter()
        for _ in range(100):
            counter.feed(b"x" * 10_000)
            assert len(counter._tail) <= TAIL_BYTES
        usage = b'"usage":{"completion_tokens":8},'
        counter.feed(usage)
        assert counter.total == 8
        counter.feed(b"x" * (TAIL_BYTES - len(usage)))
        assert counter.total == 8
        counter.feed(b"x" * len(usage))
        assert counter.total == 0


@pytest.mark.parametrize(
    ("content_type", "want"),
    [
        ("text/event-stream", StreamCounter),
        ("text/event-stream; charset=utf-8", StreamCounter),
        ("application/json", WholeCounter),
        ("", WholeCounter),
    ],
)
def test_the_counter_fits_the_content_type(content_type, want):
    assert isinstance(counter_for(content_type), want)
