"""What the ``decide`` filter is answered: one HTTP request, message by message.

A state machine apart from transport (`ext_proc`) and from deciding (`service`). It
speaks Envoy's BUFFERED body mode: an empty answer to the headers, then one answer to the
whole body with the rewritten model and the pick as dynamic metadata. Errors are immediate
responses in the API's own form.
"""

import gc
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValueOption
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    ProcessingRequest,
    ProcessingResponse,
)
from google.protobuf.struct_pb2 import Struct

from pointsman_core.router import Decision
from pointsman_core.snapshot import Candidate
from pointsman_policy.eds import LB_NAMESPACE, POLICY_KEY
from pointsman_policy.openai_api import (
    COMPLETION_PATHS,
    LONG_BODY_BYTES,
    MODELS_PATH,
    ApiError,
    CompletionRequest,
    model_object,
    models_list,
    parse_completion,
    unknown_model,
)
from pointsman_policy.service import Limits, RoutingService, parse_limits

PICK_NAMESPACE = LB_NAMESPACE
PICK_KEY = "x-gateway-destination-endpoint"
"""Where Envoy's override_host policy reads the pick: the endpoint-picker protocol's names."""
DECISION_NAMESPACE = "pointsman"

REQUEST_ID = "x-request-id"

_GO_ON = ProcessingResponse(request_headers=HeadersResponse(response=CommonResponse()))
"""The answer to headers: nothing to change. One for all; nobody writes to it."""


class DecideStream:
    """The answers to one HTTP request; `done` tells when the stream may end."""

    def __init__(self, service: RoutingService, *, body_limit_bytes: int) -> None:
        self._service = service
        self._body_limit = body_limit_bytes
        self._arrived_s = service.clock()
        self._request_id: str | None = None
        self._limits = Limits()
        self.done = False

    def handle(self, message: ProcessingRequest) -> ProcessingResponse | None:
        """Answer one message; None where the protocol wants no answer."""
        kind = message.WhichOneof("request")
        try:
            if kind == "request_headers":
                headers = header_dict(message.request_headers.headers)
                return self._on_headers(headers, ends=message.request_headers.end_of_stream)
            if kind == "request_body":
                return self._on_body(message.request_body.body)
        except ApiError as error:
            self._service.metrics.refusals.labels(error.code).inc()
            return self._refuse(error)
        return None

    def _on_headers(self, headers: Mapping[str, str], *, ends: bool) -> ProcessingResponse:
        self._request_id = headers.get(REQUEST_ID)
        method, path = headers.get(":method", ""), headers.get(":path", "").partition("?")[0]
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            _require_method(method, ("GET", "HEAD"), path)
            return self._answer(200, self._models(path))
        if path not in COMPLETION_PATHS:
            known = ", ".join([*sorted(COMPLETION_PATHS), MODELS_PATH])
            raise ApiError(
                404, "unknown_url", f"Unknown request URL: {method} {path[:200]}. Known: {known}."
            )
        _require_method(method, ("POST",), path)
        self._limits = parse_limits(headers)
        self._check_body(headers, ends=ends)
        return _GO_ON

    def _models(self, path: str) -> bytes:
        names = self._service.models
        wanted = unquote(path.removeprefix(MODELS_PATH).removeprefix("/"))
        if not wanted:
            return models_list(names)
        if wanted not in names:
            raise unknown_model(wanted, names)
        return model_object(wanted)

    def _check_body(self, headers: Mapping[str, str], *, ends: bool) -> None:
        if ends:
            raise ApiError(400, "missing_body", "The request has no body.")
        encoding = headers.get("content-encoding", "").lower() or "identity"
        if encoding != "identity":
            raise ApiError(
                415, "unsupported_encoding", f"Content-Encoding {encoding[:40]} is not supported."
            )
        length = headers.get("content-length", "0")
        if length.isdecimal():
            self._check_length(int(length))

    def _check_length(self, length: int) -> None:
        if length > self._body_limit:
            raise ApiError(
                413,
                "request_too_large",
                f"The request body has {length} bytes; at most {self._body_limit} are accepted.",
            )

    def _on_body(self, body: bytes) -> ProcessingResponse:
        self._check_length(len(body))
        if len(body) < LONG_BODY_BYTES:
            return self._decide(body)
        # It would look time and again at what a document of a million empty lists holds, where
        # there can be no cycles.
        gc.disable()
        try:
            return self._decide(body)
        finally:
            gc.enable()

    def _decide(self, body: bytes) -> ProcessingResponse:
        completion = parse_completion(body)
        now = self._service.clock()
        arrival = self._service.tracker.arrival_s(self._request_id, now_s=min(self._arrived_s, now))
        decision = self._service.route(
            completion, self._limits, request_id=self._request_id, arrival_s=arrival
        )
        self.done = True
        return _routed(completion, decision)

    def _answer(
        self, status: int, body: bytes, headers: tuple[tuple[str, str], ...] = ()
    ) -> ProcessingResponse:
        self.done = True
        answer = ProcessingResponse()
        response = answer.immediate_response
        response.status.code = status
        _set_headers(response.headers, [("content-type", "application/json"), *headers])
        response.body = body
        response.details = "pointsman"
        return answer

    def _refuse(self, error: ApiError) -> ProcessingResponse:
        return self._answer(error.status, error.body(), error.headers)


def header_dict(headers: HeaderMap) -> dict[str, str]:
    """Headers by lower-case name; Envoy sends ``raw_value``, older ones ``value``.

    Repeated ones become one list with commas (RFC 9110, 5.3), so that none wins unseen.
    """
    found: dict[str, str] = {}
    for header in headers.headers:
        raw, name = header.raw_value, header.key.lower()
        text = raw.decode("utf-8", "replace") if raw else header.value
        found[name] = f"{found[name]}, {text}" if name in found else text
    return found


def _require_method(method: str, allowed: tuple[str, ...], path: str) -> None:
    if method not in allowed:
        raise ApiError(
            405,
            "method_not_allowed",
            f"{method} is not allowed for {path}; use {allowed[0]}.",
            headers=(("allow", ", ".join(allowed)),),
        )


def _routed(completion: CompletionRequest, decision: Decision) -> ProcessingResponse:
    chosen = decision.chosen
    assert chosen is not None, "route() raises where nothing was chosen"  # noqa: S101
    body = completion.with_model(chosen.model)
    # Built in place: each message that is handed to another's constructor is copied.
    answer = ProcessingResponse()
    common = answer.request_body.response
    common.body_mutation.body = body
    _set_headers(common.header_mutation, [("content-length", str(len(body)))])
    _tell(answer.dynamic_metadata, decision, chosen)
    return answer


def _tell(metadata: Struct, decision: Decision, chosen: Candidate) -> None:
    targets = ",".join([c.address for c in (chosen, *decision.retry_on)])
    # Field by field: Struct.update() is Python and three times as slow.
    balancing = metadata.fields[PICK_NAMESPACE].struct_value.fields
    balancing[PICK_KEY].string_value = targets
    balancing[POLICY_KEY].string_value = decision.snapshot.full_name
    decided = metadata.fields[DECISION_NAMESPACE].struct_value.fields
    decided["policy"].string_value = decision.snapshot.full_name
    decided["expert"].string_value = chosen.expert
    decided["endpoint"].string_value = chosen.address
    decided["algorithm"].string_value = decision.algorithm
    decided["why"].string_value = decision.why
    decided["snapshot"].string_value = decision.snapshot.version
    decided["explain"].bool_value = decision.snapshot.explain_headers


def _set_headers(mutation: HeaderMutation, headers: Iterable[tuple[str, str]]) -> None:
    for key, value in headers:
        option = mutation.set_headers.add()
        option.append_action = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
        option.header.key, option.header.raw_value = key, value.encode()
