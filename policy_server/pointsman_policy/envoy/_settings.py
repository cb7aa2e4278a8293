"""Settings of the data plane's Envoy."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pointsman_policy.addresses import MAX_PORT, SocketAddress
from pointsman_policy.settings import DEFAULT_BODY_LIMIT, MAX_BODY_BYTES


def _parsable(text: str) -> str:
    SocketAddress.parse(text)
    return text


Milliseconds = Annotated[int, Field(ge=1, le=600_000)]
Seconds = Annotated[int, Field(ge=1, le=86_400)]
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
UrlPath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._~/-]*$")]


class EnvoySettings(BaseModel):
    """What an operator may choose; everything else is fixed in the template."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    listen_address: str = "127.0.0.1"
    """IP address on which clients are served."""

    listen_port: Port = 8080
    """Port for clients; 0 takes any free one (`RunningEnvoy.url` tells which)."""

    admin_address: str = "127.0.0.1"
    """IP address of the admin interface. It can stop Envoy: keep it on loopback, or behind a
    network policy where Prometheus reads `/stats/prometheus`."""

    admin_port: Port = 9901
    """Port of the admin interface; 0 takes any free one."""

    policy_server_address: Annotated[str, AfterValidator(_parsable)] = "127.0.0.1:9002"
    """`ip:port` or `unix:///path` of the one policy server: it alone knows which requests are under
    way, so a second one would decide without seeing half of them."""

    node_id: Annotated[str, Field(min_length=1, max_length=253)] = "pointsman"
    """Name under which this Envoy asks for endpoints."""

    health_service: str = ""
    """Service name asked in the policy server's gRPC health check; empty asks for the server."""

    inference_paths: Annotated[tuple[UrlPath, ...], Field(min_length=1)] = (
        "/v1/chat/completions",
        "/v1/completions",
    )
    """Paths that are decided and forwarded, by POST only. `/v1/models` is the policy server's;
    any other path gets 404."""

    request_body_limit_bytes: Annotated[int, Field(ge=1024, le=MAX_BODY_BYTES)] = DEFAULT_BODY_LIMIT
    """Longest request body, also after the model was rewritten; a longer one gets 413. At most
    32 MiB, as both Envoy and the policy server hold it in memory. Give the policy server the same
    limit: its gRPC then accepts messages of 64 KiB above it. Above 16 MiB
    raise `message_timeout_ms`, too."""

    message_timeout_ms: Milliseconds = 1000
    """Longest wait for one answer of the policy server before the request goes on without it.
    Long enough for a burst of some hundred requests, which are decided one after the other."""

    fail_open: bool = True
    """Without the policy server: true sends requests to the least loaded endpoint, false answers
    503."""

    observe_close_delay_ms: Annotated[int, Field(ge=250, le=600_000)] = 1000
    """After a request ended its `observe` stream stays open this long, so that what was sent last
    still arrives: what the policy server has not read by then is lost. One that ended early (client
    gone, engine dead) is in its table as long; so no longer than a burst holds the policy server
    up. It takes a stream that ends within 200 ms of its last message as one whose connection was
    lost."""

    retries: Annotated[int, Field(ge=0, le=10)] = 2
    """Further attempts, each on another endpoint, when one fails before it answered."""

    min_retry_concurrency: Annotated[int, Field(ge=0, le=10_000)] = 32
    """Retries always allowed at the same time. Beyond, a fifth of the requests may be retries."""

    connect_timeout_ms: Milliseconds = 500
    """Longest wait for a connection, to endpoints and to the policy server."""

    health_check_interval_ms: Milliseconds = 250
    """Pace of the TCP checks of each endpoint; two failures in a row take it out, one success
    brings it back. Also the time limit of one check: a silent host is out after four intervals."""

    policy_check_interval_ms: Milliseconds = 250
    """Pace of the policy server's health check; two failures in a row take it out."""

    policy_check_timeout_ms: Milliseconds = 1000
    """Time limit of one health check of the policy server; no less than a burst holds it up."""

    stream_idle_timeout_s: Seconds = 300
    """Longest silence within a request, so also the longest wait for a first token."""

    client_idle_timeout_s: Seconds = 600
    """A client's connection without requests is closed after this time."""

    header_receive_timeout_s: Seconds = 10
    """Longest time that a client may take to send its request's headers."""

    request_receive_timeout_s: Seconds = 60
    """Longest time that a client may take to send its request."""

    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    """Requests in progress at all endpoints together; further ones get 503."""

    max_connections: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    """Connections of clients; further ones are refused."""
