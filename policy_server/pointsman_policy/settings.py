"""Settings of the policy server."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `serve` needs to know."""

    manifests: tuple[Path, ...]
    """Files and folders with LLMExpert and RoutingPolicy manifests."""
    grpc_address: str = "127.0.0.1:9002"
    """``ip:port`` or ``unix:///path`` for ext_proc, EDS, pointsman.v1 and health."""
    http_address: str = "127.0.0.1:9090"
    """``ip:port`` for metrics and probes."""
    body_limit_bytes: int = 4 * 1024 * 1024
    """Largest request body; keep it equal to Envoy's limit."""
    request_ttl_s: float = 1800.0
    """An in-flight entry whose end was missed is dropped after this long."""
    drain_timeout_s: float = 30.0
    """How long SIGTERM waits for requests that are under way."""
    seed: int | None = None
    """Seed of random choices; None draws one."""
