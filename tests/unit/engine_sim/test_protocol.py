import json
from http import HTTPStatus

import pytest
from pydantic import TypeAdapter, ValidationError

from pointsman_engine_sim.answers import Answer
from pointsman_engine_sim.protocol import (
    CHAT,
    COMPLETION,
    APIError,
    ChatRequest,
    CompletionRequest,
    Reply,
    describe,
    parse,
)

MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return parse(ChatRequest, json.dumps({"messages": MESSAGES, **fields}).encode())


def completion(**fields):
    return parse(CompletionRequest, json.dumps({"prompt": "hello", **fields}).encode())


def make_reply(dialect=CHAT, **fields):
    values = {
        "dialect": dialect,
        "request_id": "1",
        "model": "tiny",
        "created": 5,
        "answer": Answer(model="tiny", prompt="hello", seed=0),
        "prompt_tokens": 2,
        "output_tokens": 7,
        "finish_reason": "stop",
    }
    return Reply(**(values | fields))


def events(raw: bytes):
    lines = raw.split(b"\n\n")
    assert lines.pop() == b""
    return [line.removeprefix(b"data: ") for line in lines]


class TestRequests:
    def test_text_of_all_messages_counts(self):
        parts = [{"type": "text", "text": "cd"}, {"type": "text", "text": "efg"}]
        request = chat(
            messages=[
                {"role": "system", "content": "ab"},
                {"role": "user", "content": parts},
                {"role": "assistant", "content": None},
            ]
        )
        assert request.prompt_text == "abcdefg"
        assert request.prompt_tokens == 2

    @pytest.mark.parametrize(
        ("given", "want"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), ([], ())]
    )
    def test_stop_is_a_text_or_several(self, given, want):
        assert chat(stop=given).stop == want

    @pytest.mark.parametrize(
        "fields",
        [
            {"logprobs": True},
            {"logprobs": 0},
            {"top_logprobs": 2},
            {"echo": True},
            {"best_of": 2},
            {"suffix": "x"},
            {"tool_choice": "required"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"response_format": {"type": "json_object"}},
        ],
        ids=repr,
    )
    def test_what_is_not_simulated_is_refused(self, fields):
        with pytest.raises(APIError) as refused:
            completion(**fields)
        (name,) = fields
        assert refused.value.status == HTTPStatus.BAD_REQUEST
        assert f"Not supported by the simulated engine: {name}." in refused.value.message

    def test_what_asks_for_nothing_is_taken(self):
        chat(
            logprobs=False,
            top_logprobs=None,
            echo=False,
            best_of=1,
            suffix="",
            tools=[{"type": "function"}],
            tool_choice="auto",
            response_format={"type": "text"},
        )

    @pytest.mark.parametrize(
        ("prompt", "tokens"),
        [("abcde", 2), (["abcde"], 2), ([1, 2, 3], 3), ([[1, 2, 3]], 3)],
    )
    def test_prompt_may_be_text_or_token_ids(self, prompt, tokens):
        assert completion(prompt=prompt).prompt_tokens == tokens

    def test_limits(self):
        assert chat().limit is None
        assert chat(max_tokens=5).limit == 5
        assert chat(max_tokens=5, max_completion_tokens=4).limit == 4
        assert completion().limit == 16
        assert completion(max_tokens=5).limit == 5

    def test_unknown_fields_are_ignored(self):
        assert chat(temperature=0.5, tools=[]).model is None

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"messages": []}, "messages"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
            ({"model": 5}, "model"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_completion_tokens": -1}, "max_completion_tokens"),
            ({"n": 2}, "n"),
            ({"stream_options": {"include_usage": True}}, "stream=True"),
        ],
    )
    def test_wrong_chat_is_refused_by_the_name_of_the_field(self, fields, field):
        with pytest.raises(APIError) as caught:
            chat(**fields)
        assert caught.value.status == HTTPStatus.BAD_REQUEST
        assert field in caught.value.message

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: completion(prompt=["a"] * 100_000),
            lambda: chat(messages=[1] * 100_000),
            lambda: chat(messages=[{"role": "user", "content": [1] * 100_000}]),
        ],
        ids=["prompt", "messages", "parts"],
    )
    def test_a_long_list_of_wrong_items_gets_a_short_answer(self, wrong):
        with pytest.raises(APIError) as caught:
            wrong()
        assert len(caught.value.message) < 1000

    @pytest.mark.parametrize("prompt", [None, [], [[]], ["a", "b"], [[1], [2]], 5])
    def test_wrong_prompt_is_refused(self, prompt):
        with pytest.raises(APIError, match="prompt"):
            completion(prompt=prompt)

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff"])
    def test_wrong_json_is_refused(self, body):
        with pytest.raises(APIError):
            parse(ChatRequest, body)


def test_a_message_lists_ten_errors_at_most():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python(["a"] * 13)
    text = describe(caught.value)
    assert text.count("valid integer") == 10
    assert text.endswith("; and 3 more")


def test_error_object():
    error = APIError(HTTPStatus.NOT_FOUND, "The model `x` does not exist.", param="model")
    assert json.loads(error.body()) == {
        "error": {
            "message": "The model `x` does not exist.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }
    }


class TestReplies:
    def test_chat_body(self):
        body = json.loads(make_reply().body())
        (choice,) = body["choices"]
        assert body["id"] == "chatcmpl-1"
        assert body["object"] == "chat.completion"
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"].startswith("Simulated answer of tiny: ")
        assert choice["finish_reason"] == "stop"
        assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}

    def test_completion_body(self):
        body = json.loads(make_reply(COMPLETION).body())
        assert body["object"] == "text_completion"
        assert body["choices"][0]["text"].startswith("Simulated")

    @pytest.mark.parametrize("split", range(8))
    def test_chat_chunks_are_the_body_in_pieces(self, split):
        reply = make_reply()
        raw = reply.opening() + reply.tokens(0, split) + reply.tokens(split, 7)
        chunks = [json.loads(event) for event in events(raw)]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        text = json.loads(reply.body())["choices"][0]["message"]["content"]
        assert "".join(delta["content"] for delta in deltas) == text
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * 7 + ["stop"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}

    def test_completion_chunks(self):
        reply = make_reply(COMPLETION)
        chunks = [json.loads(event) for event in events(reply.opening() + reply.tokens(0, 7))]
        assert len(chunks) == 7
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == reply.answer.text(7)

    def test_end_of_stream(self):
        assert events(make_reply().closing(include_usage=False)) == [b"[DONE]"]
        usage, done = events(make_reply().closing(include_usage=True))
        assert done == b"[DONE]"
        assert json.loads(usage)["choices"] == []
        assert json.loads(usage)["usage"]["completion_tokens"] == 7
