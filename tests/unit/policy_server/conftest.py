import orjson
import pytest
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    HttpBody,
    HttpHeaders,
    ProcessingRequest,
)

from pointsman_core.resources import QualityPriors
from pointsman_policy.metrics import Metrics
from pointsman_policy.service import RoutingService

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Messages:
    """What Envoy sends for one HTTP request."""

    @staticmethod
    def _headers(headers, ends):
        values = [HeaderValue(key=k, raw_value=v.encode()) for k, v in headers.items()]
        return HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=ends)

    @classmethod
    def request_headers(cls, *, ends=False, **headers):
        known = {
            ":method": "POST",
            ":path": "/v1/chat/completions",
            "x-request-id": "r1",
        }
        named = {_header_name(name): value for name, value in headers.items()}
        given = {k: v for k, v in (known | named).items() if v is not None}
        return ProcessingRequest(request_headers=cls._headers(given, ends))

    @staticmethod
    def request_body(document, *, ends=True):
        body = document if isinstance(document, bytes) else orjson.dumps(document)
        return ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=ends))

    @classmethod
    def response_headers(cls, *, status="200", ends=False, **headers):
        named = {_header_name(name): value for name, value in headers.items()}
        return ProcessingRequest(response_headers=cls._headers({":status": status} | named, ends))

    @staticmethod
    def response_body(body=b"", *, ends=False):
        return ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=ends))


def _header_name(name):
    """``method`` is ``:method``, ``x_request_id`` is ``x-request-id``."""
    return f":{name}" if name in {"method", "path"} else name.replace("_", "-")


@pytest.fixture(scope="session")
def messages() -> type[Messages]:
    return Messages


@pytest.fixture(scope="session")
def make_service(build):
    """A service with one policy ``auto`` over the expert ``good`` on A and ``fast`` on B.

    Its clock is a `Clock`, which stands at 100 s.
    """

    def make(**policy):
        service = RoutingService(Metrics(), clock=Clock(), seed=0)
        good = build.expert("good", A, quality=QualityPriors(default=0.9))
        fast = build.expert("fast", B, quality=QualityPriors(default=0.4))
        spec = {"algorithm": "QualityGreedy"} | policy
        service.install([build.snapshot(good, fast, **spec)])
        return service

    return make


@pytest.fixture
def service(make_service) -> RoutingService:
    return make_service()


@pytest.fixture(scope="session")
def counted():
    """The value of a metric of a service, by name and labels; 0 where it never counted."""

    def value(service, name, **labels):
        found = service.metrics.registry.get_sample_value(f"pointsman_{name}", labels)
        return 0.0 if found is None else found

    return value


@pytest.fixture(scope="session")
def event():
    """One server-sent event with a piece of an answer, as engines send it."""

    def make(text="x", **fields):
        chunk = {"choices": [{"index": 0, "delta": {"content": text}}]} | fields
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    return make
