"""Bodies good and bad, and the words that a user sees."""

import contextlib
import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_policy import openai_api
from pointsman_policy.openai_api import (
    ApiError,
    model_object,
    models_list,
    parse_completion,
    unknown_model,
)

MESSAGES = [{"role": "user", "content": "hello"}]
PARTS = [
    {"type": "text", "text": "first"},
    {"type": "image_url", "image_url": {"url": "data:…"}},
    {"type": "text", "text": None},
    "no part",
    {"type": "text", "text": "second"},
]


def body(**fields):
    document = {"model": "auto", "messages": MESSAGES} | fields
    return orjson.dumps({k: v for k, v in document.items() if v is not ...})


def nested(depth):
    return b'{"model": "auto", "prompt": "x", "x": ' + b"[" * depth + b"]" * depth + b"}"


def wrong(field, wanted):
    return "invalid_type", f"Invalid type for `{field}`: expected {wanted}.", field


def small(field):
    return (
        "invalid_value",
        f"Invalid value for `{field}`: expected an integer of at least 1.",
        field,
    )


NOT_AN_OBJECT = "The request body must be a JSON object, not a {}."
MISSING_MODEL = ("missing_model", "You must provide a `model`.", "model")
MISSING_PROMPT = ("missing_prompt", "You must provide `messages` or a `prompt`.", "messages")
TOO_DEEP = ("invalid_json", "The request body is nested too deeply.", None)
MESSAGES_TYPE = wrong("messages", "an array of objects")
CONTENT_TYPE = wrong("messages[0].content", "a string or an array of parts")
PROMPT_TYPE = wrong("prompt", "a string or an array")
MAX_TOKENS_TYPE = wrong("max_tokens", "an integer of at least 1")

NOT_JSON = [
    ("empty", b""),
    ("cut off", b'{"model":'),
    ("text", b"hello"),
    ("text after it", b"{} x"),
    ("single quotes", b"{'model': 'auto'}"),
    ("NaN", b'{"a": NaN}'),
    ("infinity", b'{"a": -Infinity}'),
    ("a number too large", b'{"a": 1e400}'),
    ("lone surrogate", b'{"a": "\\ud800"}'),
    ("not UTF-8", b'{"a": "\xff"}'),
    ("deeper than JSON can be read", nested(2000)),
]


@pytest.mark.parametrize(("desc", "given_body"), NOT_JSON)
def test_what_is_not_json_is_refused_with_the_place(desc, given_body):
    with pytest.raises(ApiError) as refused:
        parse_completion(given_body)
    error = refused.value
    assert (error.status, error.code, error.param) == (400, "invalid_json", None), desc
    assert re.fullmatch(
        r"The request body is not valid JSON: .+: line 1 column \d+ \(char \d+\)\.", error.message
    )


BAD_BODIES = [
    ("deeper than JSON can be written", nested(300), TOO_DEEP),
    ("array", b"[]", ("invalid_json", NOT_AN_OBJECT.format("list"), None)),
    ("string", b'"x"', ("invalid_json", NOT_AN_OBJECT.format("str"), None)),
    ("null", b"null", ("invalid_json", NOT_AN_OBJECT.format("NoneType"), None)),
    ("no model", body(model=...), MISSING_MODEL),
    ("null model", body(model=None), MISSING_MODEL),
    ("model of the wrong type", body(model=5), wrong("model", "a string")),
    ("no prompt at all", body(messages=...), MISSING_PROMPT),
    ("null messages", body(messages=None), MESSAGES_TYPE),
    ("messages an object", body(messages={}), MESSAGES_TYPE),
    ("messages a string", body(messages="hi"), MESSAGES_TYPE),
    ("message a string", body(messages=[{}, "hi"]), wrong("messages[1]", "an object")),
    ("content a number", body(messages=[{"content": 5}]), CONTENT_TYPE),
    ("content an object", body(messages=[{"content": {}}]), CONTENT_TYPE),
    ("prompt null", body(messages=..., prompt=None), PROMPT_TYPE),
    ("prompt an object", body(messages=..., prompt={}), PROMPT_TYPE),
    ("stream a string", body(stream="yes"), wrong("stream", "a boolean")),
    ("stream an empty string", body(stream=""), wrong("stream", "a boolean")),
    ("stream a number", body(stream=0), wrong("stream", "a boolean")),
    ("max_tokens zero", body(max_tokens=0), small("max_tokens")),
    ("max_tokens negative", body(max_tokens=-1), small("max_tokens")),
    (
        "too many messages",
        body(messages=[{}] * 10_001),
        ("invalid_value", "`messages` has 10001 entries; at most 10000 are accepted.", "messages"),
    ),
    (
        "too many parts",
        body(messages=[{"content": [{}] * 6_000}, {"content": "x"}, {"content": [{}] * 4_001}]),
        ("invalid_value", "`messages` has 10001 parts; at most 10000 are accepted.", "messages"),
    ),
    (
        "too many prompts",
        body(messages=..., prompt=["x"] * 10_001),
        ("invalid_value", "`prompt` has 10001 entries; at most 10000 are accepted.", "prompt"),
    ),
    ("max_tokens a fraction", body(max_tokens=1.5), MAX_TOKENS_TYPE),
    ("max_tokens true", body(max_tokens=True), MAX_TOKENS_TYPE),
    ("max_tokens a string", body(max_tokens="9"), MAX_TOKENS_TYPE),
    ("max_tokens over 64 bit", body(max_tokens=1.8446744073709552e19), MAX_TOKENS_TYPE),
    (
        "max_completion_tokens zero",
        body(max_completion_tokens=0),
        small("max_completion_tokens"),
    ),
]


@pytest.mark.parametrize(("desc", "given_body", "want"), BAD_BODIES)
def test_a_bad_body_is_refused_in_words(desc, given_body, want):
    with pytest.raises(ApiError) as refused:
        parse_completion(given_body)
    error = refused.value
    assert (error.code, error.message, error.param) == want, desc
    assert (error.status, error.type) == (400, "invalid_request_error")


PROMPTS = [
    ("a string", {"messages": [{"content": "hello"}]}, "hello", 1),
    ("four characters are a token", {"prompt": "x" * 400}, "x" * 400, 100),
    ("no messages: the engine judges", {"messages": []}, "", 1),
    ("several messages", {"messages": [{"content": "a"}, {"content": "b"}]}, "a\nb", 1),
    ("a tool call has no content", {"messages": [{"content": None}, {}]}, "\n", 1),
    ("content parts", {"messages": [{"content": PARTS}]}, "first\nsecond", 3),
    ("messages go before prompt", {"messages": [], "prompt": "x"}, "", 1),
    ("a list of prompts", {"prompt": ["a" * 20, "b" * 19]}, "a" * 20 + "\n" + "b" * 19, 10),
    ("token ids", {"prompt": [1, 2, 3]}, "", 3),
    ("many token ids", {"prompt": [1] * 20_000}, "", 20_000),
    ("lists of token ids", {"prompt": [[1, 2, 3], [4]]}, "", 4),
    ("no prompt in the list", {"prompt": []}, "", 1),
    ("an empty prompt", {"prompt": ""}, "", 1),
    ("characters, not bytes", {"prompt": "é" * 8}, "é" * 8, 2),
]


@pytest.mark.parametrize(("desc", "fields", "text", "tokens"), PROMPTS)
def test_the_prompt_is_read(desc, fields, text, tokens):
    got = parse_completion(orjson.dumps({"model": "auto"} | fields))
    assert (got.prompt, got.prompt_tokens) == (text, tokens), desc


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 2**64 - 1}, 2**64 - 1),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"max_completion_tokens": None, "max_tokens": 5}, 5),
    ],
)
def test_the_longest_answer_is_read(fields, want):
    assert parse_completion(body(**fields)).max_output_tokens == want


@pytest.mark.parametrize(
    ("fields", "want"), [({}, False), ({"stream": None}, False), ({"stream": True}, True)]
)
def test_whether_it_streams_is_read(fields, want):
    assert parse_completion(body(**fields)).streams is want


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class TestWithModel:
    @given(rest=st.dictionaries(st.text(), json_values, max_size=5), served=st.text(min_size=1))
    def test_everything_else_is_kept(self, rest, served):
        document = rest | {"model": "auto", "messages": MESSAGES, "stream": True, "max_tokens": 3}
        rewritten = parse_completion(orjson.dumps(document)).with_model(served)
        assert orjson.loads(rewritten) == document | {"model": served}

    def test_fields_stay_in_order(self):
        got = parse_completion(b'{"a": 1, "model": "auto", "prompt": "x"}').with_model("m")
        assert got == b'{"a": 1, "model": "m", "prompt": "x"}'

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b'"seed": 18446744073709551616', b'"seed": 18446744073709551616'),
            (b'"t": 1.10,  "u":1e2', b'"t": 1.10,  "u":1e2'),
            (b'"prompt": "say \\"model\\": \\"x\\""', b'"prompt": "say \\"model\\": \\"x\\""'),
            # Of several models the bytes do not tell the right one: written anew, values kept.
            (
                b'"o": {"model": "auto"}, "seed": 18446744073709551616, "t": 1.10',
                b'"o":{"model":"auto"},"seed":18446744073709551616,"t":1.1',
            ),
        ],
    )
    def test_no_value_changes(self, before, after):
        request = parse_completion(b'{"model": "auto", "prompt": "x", ' + before + b"}")
        assert after in request.with_model("m")
        assert orjson.loads(request.with_model("m"))["model"] == "m"

    def test_of_a_repeated_model_the_last_counts_and_one_is_left(self):
        got = parse_completion(b'{"model": "first", "model": "last", "prompt": "x"}')
        assert got.model == "last"
        assert got.with_model("m") == b'{"model":"m","prompt":"x"}'

    @pytest.mark.parametrize(
        "nested", [b'{"model": "auto"}', b'{"x\\"model": "auto"}', b'[{"a": {"model" : "x"}}]']
    )
    @pytest.mark.parametrize("key", [b"\\u006dodel", b"m\\u006Fdel", b"mode\\u006c"])
    def test_a_nested_one_stays_when_the_key_is_escaped(self, key, nested):
        request = parse_completion(b'{"' + key + b'": "auto", "prompt": "x", "n": ' + nested + b"}")
        assert orjson.loads(request.with_model("m")) == {
            "model": "m",
            "prompt": "x",
            "n": orjson.loads(nested),
        }

    def test_the_request_itself_does_not_change(self):
        request = parse_completion(body())
        request.with_model("other")
        assert request.model == "auto"
        assert request.body == body()

    @pytest.mark.parametrize("depth", [240, 251, 252, 253, 254, 255, 1000])
    def test_whatever_was_accepted_can_be_written(self, depth):
        try:
            request = parse_completion(nested(depth))
        except ApiError:
            assert depth > 250
        else:
            assert orjson.loads(request.with_model("m"))["model"] == "m"

    def test_a_long_conversation_is_not_a_deep_one(self):
        assert parse_completion(body(messages=MESSAGES * 1000)).with_model("m")


class TestLongBody:
    """Python's own parser and writer would hold up all other requests for seconds."""

    @pytest.fixture(autouse=True)
    def no_slow_parser(self, monkeypatch):
        monkeypatch.setattr(openai_api, "json", None)

    @staticmethod
    def long(members):
        text = b'{"prompt": "x", %s, "y": [' % members
        return text + b",".join([b"0"] * (openai_api.LONG_BODY_BYTES // 2)) + b"]}"

    @pytest.mark.parametrize(
        "members",
        [
            b'"model": "auto"',
            b'"model": "auto", "metadata": {"model": "mine"}',
            b'"metadata": [{"model": "0"}], "model": "auto", "z": {"model": "1"}',
            b'"user": "\\u006d", "model": "auto"',
            b'"model": "old", "model": "auto"',
            b'"model": "auto", "big": 12345678901234567890123',
        ],
    )
    def test_its_own_model_is_replaced_and_all_else_stays(self, members):
        body = self.long(members)
        request = parse_completion(body)
        assert request.model == "auto"
        assert request.with_model("m") == body.replace(b'"auto"', b'"m"')

    @pytest.mark.parametrize(
        "members",
        [
            b'"mod\\u0065l": "auto"',
            b'"model": "old", "mod\\u0065l": "auto"',
            b'"z": [%s], "model": "auto"' % b",".join([b'{"model": "x"}'] * 1_000),
        ],
        ids=["escaped", "repeated with escapes", "many"],
    )
    def test_one_whose_model_is_hidden_is_refused(self, members):
        with pytest.raises(ApiError) as refused:
            parse_completion(self.long(members))
        assert (refused.value.status, refused.value.param) == (400, "model")
        assert refused.value.message == (
            "In a body of 256 KiB and more `model` must be written without escapes, and be the"
            " key of at most 1000 members."
        )


@given(st.binary() | json_values.map(orjson.dumps))
def test_any_body_is_parsed_or_refused(given_body):
    with contextlib.suppress(ApiError):
        assert orjson.loads(parse_completion(given_body).with_model("m"))["model"] == "m"


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "want"),
        [
            (400, "invalid_request_error"),
            (404, "invalid_request_error"),
            (413, "invalid_request_error"),
            (429, "rate_limit_error"),
            (500, "server_error"),
            (503, "server_error"),
        ],
    )
    def test_have_the_apis_type_for_their_status(self, status, want):
        assert ApiError(status, "x", "y").type == want

    def test_have_the_apis_form(self):
        assert orjson.loads(ApiError(400, "some_code", 'a "message"', param="model").body()) == {
            "error": {
                "message": 'a "message"',
                "type": "invalid_request_error",
                "param": "model",
                "code": "some_code",
            }
        }

    @pytest.mark.parametrize(
        ("name", "available", "want"),
        [
            ("x", ["a", "b"], "The model `x` does not exist. Available models: a, b."),
            ("", [], "The model `` does not exist. Available models: none."),
            (
                "x" * 101,
                ["a"],
                f"The model `{'x' * 100}…` does not exist. Available models: a.",
            ),
        ],
    )
    def test_an_unknown_model_is_told_with_those_that_exist(self, name, available, want):
        error = unknown_model(name, available)
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert error.message == want


def test_models_are_listed_in_the_apis_form():
    model = {"id": "auto", "object": "model", "created": 0, "owned_by": "pointsman"}
    assert orjson.loads(models_list(["auto"])) == {"object": "list", "data": [model]}
    assert orjson.loads(models_list([])) == {"object": "list", "data": []}
    assert orjson.loads(model_object("auto")) == model
