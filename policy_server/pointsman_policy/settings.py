"""Settings of the policy server."""

from dataclasses import dataclass
from pathlib import Path

DEFAULT_BODY_LIMIT = 4 * 1024 * 1024
"""Bytes of a request body; images in prompts make them long."""

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Beyond it a decision takes longer than Envoy waits, and Python's one loop too long for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `serve` needs to know."""

    manifests: tuple[Path, ...]
    """Files and folders with LLMExpert and RoutingPolicy manifests."""
    grpc_address: str = "127.0.0.1:9002"
    """``ip:port`` or ``unix:///path`` for ext_proc, EDS, pointsman.v1 and health."""
    http_address: str = "127.0.0.1:9090"
    """``ip:port`` for metrics and probes."""
    body_limit_bytes: int = DEFAULT_BODY_LIMIT
    """Largest request body; keep it equal to Envoy's limit."""
    request_ttl_s: float = 1800.0
    """An in-flight entry whose end was missed is dropped after this long."""
    drain_timeout_s: float = 30.0
    """How long SIGTERM waits for requests that are under way."""
    seed: int | None = None
    """Seed of random choices; None draws one."""
