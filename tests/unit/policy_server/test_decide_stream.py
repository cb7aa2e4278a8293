"""What Envoy is answered, message by message."""

import gc

import orjson
import pytest
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue, HeaderValueOption
from google.protobuf.json_format import MessageToDict

from pointsman_policy import decide_stream
from pointsman_policy.decide_stream import DecideStream, header_dict
from pointsman_policy.openai_api import parse_completion

A, B = "10.0.0.1:8000", "10.0.0.2:8000"
LIMIT = 1000
BODY = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5}
KNOWN = "Known: /v1/chat/completions, /v1/completions, /v1/models."


def stream(service):
    return DecideStream(service, body_limit_bytes=LIMIT)


def immediate(answer):
    """Status, headers and JSON of an immediate response."""
    assert answer.WhichOneof("response") == "immediate_response"
    response = answer.immediate_response
    return response.status.code, set_headers(response.headers), orjson.loads(response.body)


def set_headers(mutation):
    overwrite = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    assert all(option.append_action == overwrite for option in mutation.set_headers)
    return {o.header.key: o.header.raw_value.decode() for o in mutation.set_headers}


def error_of(answer):
    """Status, code and message of an error answer."""
    status, headers, document = immediate(answer)
    assert headers["content-type"] == "application/json"
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return status, document["error"]["code"], document["error"]["message"]


@pytest.mark.parametrize("body", [BODY, {"model": "auto"}])
@pytest.mark.parametrize(("least", "collects"), [(1, False), (10_000, True)])
def test_cycles_are_not_looked_for_while_a_long_body_is_read(
    service, messages, monkeypatch, body, least, collects
):
    """Accepted or refused; else a document of many empty lists takes seconds."""
    seen = []

    def spy(document):
        seen.append(gc.isenabled())
        return parse_completion(document)

    monkeypatch.setattr(decide_stream, "LONG_BODY_BYTES", least)
    monkeypatch.setattr(decide_stream, "parse_completion", spy)
    stream(service).handle(messages.request_body(body))
    assert seen == [collects]
    assert gc.isenabled()


class TestRouted:
    @pytest.fixture
    def answer(self, service, messages):
        self.stream = stream(service)
        first = self.stream.handle(messages.request_headers())
        assert first.WhichOneof("response") == "request_headers"
        assert not first.request_headers.response.ByteSize()
        assert not self.stream.done
        return self.stream.handle(messages.request_body(BODY))

    def test_the_body_names_the_served_model_and_keeps_the_rest(self, answer):
        body = answer.request_body.response.body_mutation.body
        assert orjson.loads(body) == BODY | {"model": "good-model"}
        assert self.stream.done

    def test_the_content_length_is_that_of_the_new_body(self, answer):
        response = answer.request_body.response
        want = {"content-length": str(len(response.body_mutation.body))}
        assert set_headers(response.header_mutation) == want

    def test_the_pick_and_its_reasons_are_dynamic_metadata(self, answer, service):
        assert MessageToDict(answer.dynamic_metadata) == {
            "envoy.lb": {
                "x-gateway-destination-endpoint": f"{A},{B}",
                "pointsman-policy": "default/auto",
            },
            "pointsman": {
                "policy": "default/auto",
                "expert": "good",
                "endpoint": A,
                "algorithm": "QualityGreedy",
                "why": "QualityGreedy: score 0.900, expected quality 0.90,"
                " 2 of 2 endpoints eligible",
                "snapshot": service.snapshots[0].version,
                "explain": False,
            },
        }

    def test_the_request_is_in_flight(self, answer, service):  # noqa: ARG002
        assert service.state.in_flight(A) == 1
        assert "r1" in service.state

    @pytest.mark.parametrize("explain", [True, False])
    def test_the_explain_flag_is_the_policys(self, explain, make_service, messages):
        deciding = stream(make_service(explain_headers=explain))
        deciding.handle(messages.request_headers())
        answer = deciding.handle(messages.request_body(BODY))
        assert answer.dynamic_metadata["pointsman"]["explain"] is explain

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions?api-version=1"])
    def test_on_all_completion_paths(self, path, service, messages):
        deciding = stream(service)
        deciding.handle(messages.request_headers(path=path))
        answer = deciding.handle(messages.request_body({"model": "auto", "prompt": "x"}))
        assert answer.WhichOneof("response") == "request_body"

    def test_without_a_request_id_too(self, service, messages, counted):
        deciding = stream(service)
        deciding.handle(messages.request_headers(x_request_id=None))
        answer = deciding.handle(messages.request_body(BODY))
        assert answer.WhichOneof("response") == "request_body"
        assert len(service.state) == 0
        assert counted(service, "untracked_total") == 1

    def test_the_limits_of_the_headers_hold(self, service, messages):
        deciding = stream(service)
        deciding.handle(messages.request_headers(x_slo_tpot_ms="20"))
        deciding.handle(messages.request_body(BODY))
        assert service.state.residents().limit_s.tolist() == [0.02]

    @pytest.mark.parametrize(
        ("desc", "opened_at", "want"), [("observe saw it first", 99.0, 99.0), ("not", None, 100.0)]
    )
    def test_it_arrived_when_its_headers_did(self, desc, opened_at, want, service, messages):
        if opened_at is not None:
            service.tracker.opened("r1", now_s=opened_at)
        deciding = stream(service)
        deciding.handle(messages.request_headers())
        service.clock.now += 7  # a slow upload
        deciding.handle(messages.request_body(BODY))
        assert service.state.residents().arrival_s.tolist() == [want], desc


class TestHeaders:
    @pytest.mark.parametrize(
        ("headers", "want"),
        [
            (
                {"path": "/v2/chat"},
                (404, "unknown_url", f"Unknown request URL: POST /v2/chat. {KNOWN}"),
            ),
            ({"path": "/"}, (404, "unknown_url", f"Unknown request URL: POST /. {KNOWN}")),
            ({"path": None}, (404, "unknown_url", f"Unknown request URL: POST . {KNOWN}")),
            (
                {"path": "/v1/embeddings"},
                (404, "unknown_url", f"Unknown request URL: POST /v1/embeddings. {KNOWN}"),
            ),
            (
                {"path": "/" + "x" * 5000},
                (404, "unknown_url", f"Unknown request URL: POST /{'x' * 199}. {KNOWN}"),
            ),
            (
                {"path": "/v1/modelsx"},
                (404, "unknown_url", f"Unknown request URL: POST /v1/modelsx. {KNOWN}"),
            ),
            (
                {"method": "GET"},
                (
                    405,
                    "method_not_allowed",
                    "GET is not allowed for /v1/chat/completions; use POST.",
                ),
            ),
            (
                {"path": "/v1/models"},
                (405, "method_not_allowed", "POST is not allowed for /v1/models; use GET."),
            ),
            (
                {"content_encoding": "gzip"},
                (415, "unsupported_encoding", "Content-Encoding gzip is not supported."),
            ),
            (
                {"content_length": "1001"},
                (
                    413,
                    "request_too_large",
                    "The request body has 1001 bytes; at most 1000 are accepted.",
                ),
            ),
            (
                {"x_slo_tpot_ms": "soon"},
                (
                    400,
                    "invalid_limit",
                    "The header x-slo-tpot-ms must be a number of milliseconds above 0 and at"
                    " most 600000, not 'soon'.",
                ),
            ),
        ],
    )
    def test_bad_ones_are_answered_at_once_and_counted(
        self, headers, want, service, messages, counted
    ):
        deciding = stream(service)
        assert error_of(deciding.handle(messages.request_headers(**headers))) == want
        assert deciding.done
        assert len(service.state) == 0
        assert counted(service, "refusals_total", code=want[1]) == 1

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_a_request_without_a_body_is_refused(self, path, service, messages):
        answer = stream(service).handle(messages.request_headers(path=path, ends=True))
        assert error_of(answer) == (400, "missing_body", "The request has no body.")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [("DELETE", "/v1/models", "GET, HEAD"), ("PUT", "/v1/completions", "POST")],
    )
    def test_a_wrong_method_is_told_the_right_ones(self, method, path, allowed, service, messages):
        answer = stream(service).handle(messages.request_headers(method=method, path=path))
        assert immediate(answer)[1]["allow"] == allowed

    @pytest.mark.parametrize(
        "headers",
        [
            {"content_length": "1000"},
            {"content_length": "0"},
            {"content_length": "²"},
            {"content_length": "-5"},
            {"content_encoding": "identity"},
            {"content_encoding": ""},
            {"accept_encoding": "gzip"},
        ],
    )
    def test_others_pass(self, headers, service, messages):
        answer = stream(service).handle(messages.request_headers(**headers))
        assert answer.WhichOneof("response") == "request_headers"

    def test_are_read_by_lower_case_name_from_either_field(self):
        headers = HeaderMap(
            headers=[
                HeaderValue(key="X-Raw", raw_value=b"caf\xc3\xa9"),
                HeaderValue(key="x-old", value="old"),
                HeaderValue(key="x-odd", raw_value=b"\xff"),
                HeaderValue(key="x-empty"),
            ]
        )
        want = {"x-raw": "café", "x-old": "old", "x-odd": "�", "x-empty": ""}
        assert header_dict(headers) == want

    def test_repeated_ones_are_one_list(self):
        lines = [
            HeaderValue(key=k, raw_value=v) for k, v in [("A", b"1"), ("b", b"2"), ("a", b"3")]
        ]
        assert header_dict(HeaderMap(headers=lines)) == {"a": "1, 3", "b": "2"}


class TestModels:
    MODEL = {"id": "auto", "object": "model", "created": 0, "owned_by": "pointsman"}  # noqa: RUF012

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    @pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models?limit=1"])
    def test_are_listed(self, method, path, service, messages):
        deciding = stream(service)
        answer = deciding.handle(messages.request_headers(method=method, path=path, ends=True))
        want = {"object": "list", "data": [self.MODEL]}
        assert immediate(answer) == (200, {"content-type": "application/json"}, want)
        assert deciding.done

    @pytest.mark.parametrize("name", ["team/auto:1", "team%2Fauto%3A1"])
    def test_one_is_shown_by_its_name(self, name, make_service, messages):
        service = make_service(models=["team/auto:1"])
        headers = messages.request_headers(method="GET", path=f"/v1/models/{name}", ends=True)
        status, _, document = immediate(stream(service).handle(headers))
        assert (status, document["id"]) == (200, "team/auto:1")

    def test_an_unknown_one_is_not_found(self, service, messages, counted):
        headers = messages.request_headers(method="GET", path="/v1/models/gpt-9", ends=True)
        assert error_of(stream(service).handle(headers)) == (
            404,
            "model_not_found",
            "The model `gpt-9` does not exist. Available models: auto.",
        )
        assert counted(service, "refusals_total", code="model_not_found") == 1


class TestBody:
    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (b"", 400, "invalid_json"),
            (b"{", 400, "invalid_json"),
            (b"[]", 400, "invalid_json"),
            (b'{"x":' + b"[" * 300 + b"]" * 300 + b"}", 400, "invalid_json"),
            ({"messages": []}, 400, "missing_model"),
            ({"model": "auto"}, 400, "missing_prompt"),
            ({"model": 5, "prompt": "x"}, 400, "invalid_type"),
            ({"model": "gpt-9", "prompt": "x"}, 404, "model_not_found"),
        ],
    )
    def test_a_bad_one_is_answered_at_once_and_counted(
        self, body, status, code, service, messages, counted
    ):
        deciding = stream(service)
        deciding.handle(messages.request_headers())
        assert error_of(deciding.handle(messages.request_body(body)))[:2] == (status, code)
        assert deciding.done
        assert len(service.state) == len(service.tracker) == 0
        assert counted(service, "refusals_total", code=code) == 1

    def test_a_field_in_error_is_named(self, service, messages):
        deciding = stream(service)
        deciding.handle(messages.request_headers())
        answer = deciding.handle(messages.request_body({"model": "auto", "messages": 5}))
        assert immediate(answer)[2]["error"] == {
            "message": "Invalid type for `messages`: expected an array of objects.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "invalid_type",
        }

    def test_no_ready_endpoint_is_unavailable(self, service, messages):
        for address in (A, B):
            service.state.set_ready(address, ready=False)
        deciding = stream(service)
        deciding.handle(messages.request_headers())
        status, code, _ = error_of(deciding.handle(messages.request_body(BODY)))
        assert (status, code) == (503, "no_ready_endpoint")

    def test_a_rejection_tells_when_to_come_again(self, make_service, messages):
        deciding = stream(make_service(algorithm="LatencyQualityGreedy", admission="Reject"))
        deciding.handle(messages.request_headers(x_slo_tpot_ms="0.001"))
        status, headers, document = immediate(deciding.handle(messages.request_body(BODY)))
        assert (status, headers["retry-after"]) == (429, "1")
        assert document["error"]["type"] == "rate_limit_error"


def test_other_messages_need_no_answer(service, messages):
    deciding = stream(service)
    assert deciding.handle(messages.response_headers()) is None
    assert deciding.handle(messages.response_body(b"x")) is None
    assert not deciding.done
