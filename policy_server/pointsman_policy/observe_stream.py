"""What the ``observe`` filter tells of one HTTP request, fed into the tracker.

The filter runs in observability mode: Envoy waits for nothing and ignores answers. A
stream that Envoy closes before the answer's end of stream means that the client went away or
the engine died. One that is lost means nothing: the answer may well go on unseen.
"""

from collections.abc import Mapping

from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest

from pointsman_policy.decide_stream import REQUEST_ID, header_dict
from pointsman_policy.service import RoutingService
from pointsman_policy.tracker import End

FAILED_ENDPOINT = "x-pointsman-failed-endpoint"
"""Header by which Envoy tells, in an error of its own, which endpoint was tried last."""

SILENT_BEFORE_CLOSE_S = 0.2
"""Envoy lets more time than this pass between the end of a request and its closing a stream
(`observe_close_delay_ms` of `pointsman_policy.envoy`)."""


class ObserveStream:
    """Follows one HTTP request from its headers to its end."""

    def __init__(self, service: RoutingService) -> None:
        self._service = service
        self._request_id: str | None = None
        self._heard_s = service.clock()
        self.done = False
        self.was_speaking = False
        """Whether it was cut right after a message: Envoy itself never ends one so."""

    def handle(self, message: ProcessingRequest) -> None:
        """Take in one message."""
        self._heard_s = self._service.clock()
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            self._on_request_headers(message)
        elif self._request_id is None:
            return
        elif kind == "response_headers":
            self._on_response_headers(message, self._request_id)
        elif kind == "response_body":
            self._on_response_body(message, self._request_id)

    def cut(self) -> None:
        """The stream ended before the request did; `close` or `lose` tells what that means."""
        self.was_speaking = self._service.clock() - self._heard_s < SILENT_BEFORE_CLOSE_S

    def close(self) -> None:
        """Envoy closed the stream, after the answer or before."""
        self._end(End.EARLY)

    def lose(self) -> None:
        """The stream was lost, and with it what it would have told; nothing if it has ended."""
        self._end(End.UNSEEN)

    def _on_request_headers(self, message: ProcessingRequest) -> None:
        request_id = header_dict(message.request_headers.headers).get(REQUEST_ID)
        now = self._service.clock()
        if request_id is not None and self._service.tracker.opened(request_id, now_s=now):
            self._request_id = request_id

    def _on_response_headers(self, message: ProcessingRequest, request_id: str) -> None:
        headers = header_dict(message.response_headers.headers)
        told = headers.get(":status", "0")
        status = int(told) if told.isdecimal() else 0
        served_by = headers.get("x-pointsman-endpoint")
        self._service.tracker.responded(
            request_id,
            status=status,
            content_type=headers.get("content-type", ""),
            served_by=served_by,
            expert=headers.get("x-pointsman-expert"),
        )
        self._judge_endpoints(request_id, headers, status)
        if message.response_headers.end_of_stream:
            self._end(End.WHOLE)

    def _judge_endpoints(self, request_id: str, headers: Mapping[str, str], status: int) -> None:
        """Who answered, and who should have and did not."""
        served_by, failed = headers.get("x-pointsman-endpoint"), headers.get(FAILED_ENDPOINT)
        self._service.answered(served_by, status=status)
        if failed is not None:
            self._service.failed(failed, why=f"no answer ({status})")
        # A decision that came too late for Envoy is known here, and yet nobody was passed over.
        in_force = "x-pointsman-policy" in headers
        chosen = self._service.tracker.chosen(request_id)
        if in_force and chosen not in (None, served_by, failed):
            self._service.failed(chosen, why="another one had to serve")

    def _on_response_body(self, message: ProcessingRequest, request_id: str) -> None:
        body = message.response_body
        if body.body:
            self._service.tracker.received(request_id, body.body, now_s=self._service.clock())
        if body.end_of_stream:
            self._end(End.WHOLE)

    def _end(self, end: End) -> None:
        self.done = True
        if self._request_id is not None:
            now = self._service.clock()
            self._service.tracker.ended(self._request_id, end, now_s=now)
