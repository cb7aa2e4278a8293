"""What the ``decide`` filter is answered: one HTTP request, message by message.

A state machine apart from transport (`ext_proc`) and from deciding (`service`). It
speaks Envoy's BUFFERED body mode: an empty answer to the headers, then one answer to the
whole body with the rewritten model and the pick as dynamic metadata. Errors are immediate
responses in the API's own form.
"""

import gc
from collections.abc import Mapping
from urllib.parse import unquote

from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue, HeaderValueOption
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
)
from envoy.type.v3.http_status_pb2 import HttpStatus
from google.protobuf.struct_pb2 import Struct

from pointsman_core.router import Decision
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
        return ProcessingResponse(request_headers=HeadersResponse(response=CommonResponse()))

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
        return ProcessingResponse(
            immediate_response=ImmediateResponse(
                status=HttpStatus(code=status),
                headers=_set_headers([("content-type", "application/json"), *headers]),
                body=body,
                details="pointsman",
            )
        )

    def _refuse(self, error: ApiError) -> ProcessingResponse:
        return self._answer(error.status, error.body(), error.headers)


def header_dict(headers: HeaderMap) -> dict[str, str]:
    """Headers by lower-case name; Envoy sends ``raw_value``, older ones ``value``.

    Repeated ones become one list with commas (RFC 9110, 5.3), so that none wins unseen.
    """
    lines = [(h.key.lower(), _text(h)) for h in headers.headers]
    joined = dict(lines)
    if len(joined) < len(lines):
        for name in joined:
            joined[name] = ", ".join(text for key, text in lines if key == name)
    return joined


def _text(header: HeaderValue) -> str:
    raw: bytes = header.raw_value
    return raw.decode("utf-8", "replace") if raw else str(header.value)


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
    return ProcessingResponse(
        request_body=BodyResponse(
            response=CommonResponse(
                body_mutation=BodyMutation(body=body),
                header_mutation=_set_headers([("content-length", str(len(body)))]),
            )
        ),
        dynamic_metadata=_metadata(decision),
    )


def _metadata(decision: Decision) -> Struct:
    chosen = decision.chosen
    assert chosen is not None  # noqa: S101
    targets = ",".join(c.address for c in (chosen, *decision.retry_on))
    metadata = Struct()
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
    return metadata


def _set_headers(headers: list[tuple[str, str]]) -> HeaderMutation:
    return HeaderMutation(
        set_headers=[
            HeaderValueOption(
                header=HeaderValue(key=key, raw_value=value.encode()),
                append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for key, value in headers
        ]
    )
