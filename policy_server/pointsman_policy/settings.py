"""Settings of the policy server."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from pointsman_policy.addresses import SocketAddress

DEFAULT_BODY_LIMIT = 4 * 1024 * 1024
"""Bytes of a request body; images in prompts make them long."""

BUILTIN_PREDICTOR = "builtin"
NO_PREDICTOR = "none"

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Beyond it a decision takes longer than Envoy waits, and Python's one loop too long for others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of mutual TLS."""

    certificate: Path
    """The server's certificate, followed by its intermediate ones."""
    key: Path
    """Its private key, not encrypted."""
    client_ca: Path
    """Authorities whose client certificates are let in."""

    @classmethod
    def of(
        cls, *, certificate: Path | None, key: Path | None, client_ca: Path | None
    ) -> "TlsFiles | None":
        """All three, or None without any of them.

        Raises:
            ValueError: some are given and some are not.

        """
        if certificate is None and key is None and client_ca is None:
            return None
        if certificate is None or key is None or client_ca is None:
            raise ValueError("--tls-cert, --tls-key and --tls-client-ca go together: give all")
        return cls(certificate=certificate, key=key, client_ca=client_ca)

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        """All three."""
        return (self.certificate, self.key, self.client_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `serve` needs to know. Either `manifests` or `snapshots` is given."""

    manifests: tuple[Path, ...] = ()
    """Files and folders with LLMExpert and RoutingPolicy manifests."""
    snapshots: tuple[Path, ...] = ()
    """Files and folders with snapshots as an operator writes them; they may be absent."""
    grpc_address: str = "127.0.0.1:9002"
    """``ip:port`` or ``unix:///path`` for ext_proc, EDS, pointsman.v1 and health."""
    http_address: str = "127.0.0.1:9090"
    """``ip:port`` for metrics and probes."""
    control_address: str | None = None
    """``ip:port`` or ``unix:///path`` for the operator; None: nobody can publish."""
    tls: TlsFiles | None = None
    """Of the control address; without it that must be local."""
    body_limit_bytes: int = DEFAULT_BODY_LIMIT
    """Largest request body; keep it equal to Envoy's limit."""
    request_ttl_s: float = 1800.0
    """An in-flight entry whose end was missed is dropped after this long."""
    drain_timeout_s: float = 30.0
    """How long SIGTERM waits for requests that are under way."""
    stats_window_s: float = 300.0
    """Over which time the operator is told how the policies did."""
    predictor: str = BUILTIN_PREDICTOR
    """``builtin``, ``none``, or the file of a predictor of quality."""
    models: Path | None = None
    """Folder of the models that policies name."""
    seed: int | None = None
    """Seed of random choices; None draws one."""

    def __post_init__(self) -> None:
        """Refuse what does not go together, by ValueError."""
        self._check_addresses()
        if bool(self.manifests) == bool(self.snapshots):
            raise ValueError(
                "give either --manifests DIR (files decide, no cluster) or --snapshots PATH"
                " (an operator decides)"
            )
        if self.control_address is None:
            if self.tls is not None:
                raise ValueError("--tls-cert, --tls-key and --tls-client-ca need --control-address")
            return
        if self.manifests:
            raise ValueError(
                "--control-address goes with --snapshots: with --manifests the files decide"
            )
        if self.tls is None and not is_local(self.control_address):
            raise ValueError(
                f"--control-address {self.control_address} can be reached from other machines:"
                " give --tls-cert, --tls-key and --tls-client-ca, or a loopback or unix address"
            )

    def _check_addresses(self) -> None:
        # Left to gRPC, port 99999 would become 34463, without a word.
        for option, address in (
            ("--grpc-address", self.grpc_address),
            ("--http-address", self.http_address),
            ("--control-address", self.control_address or "127.0.0.1:0"),
        ):
            try:
                SocketAddress.parse(address)
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from None


def is_local(address: str) -> bool:
    """Whether only this machine can reach an address.

    Raises:
        ValueError: it is neither ``ip:port`` nor ``unix:///path``.

    """
    parsed = SocketAddress.parse(address)
    return bool(parsed.pipe) or ipaddress.ip_address(parsed.host).is_loopback
