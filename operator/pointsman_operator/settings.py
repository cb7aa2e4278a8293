"""Settings of the operator, from flags or from the environment."""

import math
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from pointsman_core.resources import DNS_LABEL_PATTERN
from pointsman_operator.observed import Key

ENVIRONMENT_PREFIX: Final = "POINTSMAN_"
SHORTEST_INTERVAL_S: Final = 1.0
_MAX_PORT: Final = 65535
_GIVE_TLS: Final = "give --tls-cert, --tls-key and --tls-ca"


@dataclass(frozen=True, slots=True)
class ServiceRef:
    """A port of a Service: ``namespace/name:port``, the port by number or name."""

    service: Key
    port: str

    @classmethod
    def parse(cls, text: str) -> "ServiceRef":
        """Read ``namespace/name:port``; raises ValueError for anything else."""
        path, _, port = text.rpartition(":")
        namespace, _, name = path.partition("/")
        if not (namespace and name and port) or "/" in name:
            raise ValueError(f"--policy-servers: {text!r} is not namespace/name:port")
        return cls(Key(namespace, name), port)

    @property
    def host_name(self) -> str:
        """The name that a server certificate should have."""
        return f"{self.service.name}.{self.service.namespace}.svc"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Certificates of the channel to the policy servers, as PEM files."""

    cert: Path
    key: Path
    ca: Path
    server_name: str = ""
    """Expected in the server's certificate; empty: its address."""

    def read(self) -> tuple[bytes, bytes, bytes]:
        """CA, key and certificate, as gRPC wants them; raises OSError."""
        return self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes()

    def check(self) -> None:
        """Raise ValueError for files that cannot be read, or not be used."""
        for what, path in (("certificate", self.cert), ("key", self.key), ("CA", self.ca)):
            try:
                path.read_bytes()
            except OSError as error:
                text = f"the {what} for policy servers cannot be read: {path}: {error.strerror}"
                raise ValueError(text) from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError:
            text = f"{self.cert} and {self.key} are not a certificate and its private key in PEM"
            raise ValueError(f"{text}, without password: see --tls-cert, --tls-key") from None
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError:
            raise ValueError(f"--tls-ca: {self.ca} holds no certificate in PEM") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """What the operator needs to know.

    Raises:
        ValueError: settings that contradict each other, or that are unsafe.

    """

    namespaces: tuple[str, ...] = ()
    """Only these; none means the whole cluster."""
    policy_servers: ServiceRef | None = None
    """Service of the policy servers' control port."""
    policy_server_addresses: tuple[str, ...] = ()
    """Further ones, by ``ip:port`` or ``unix:///path``."""
    tls: TlsFiles | None = None
    prometheus_url: str = ""
    """Where averages are read; empty: from the policy servers themselves."""
    http_address: str = "127.0.0.1:8080"
    """``ip:port`` of metrics and probes."""
    resync_interval_s: float = 60.0
    """Between two full lists of everything."""
    probe_interval_s: float = 30.0
    """Between two looks at one endpoint."""
    stats_interval_s: float = 60.0
    """Between two updates of averages in statuses."""
    status_poll_interval_s: float = 5.0
    """Between two questions to a policy server what it has in force."""
    debounce_s: float = 0.05
    """Changes within this time are reconciled together."""
    write_pause_s: float = 1.0
    """Between two rounds of writes to the API server; policy servers do not wait for it."""
    identity: str = field(default_factory=lambda: f"pointsman-operator/{os.urandom(6).hex()}")
    """Names this process to the policy servers."""

    def __post_init__(self) -> None:
        for namespace in self.namespaces:
            if not re.fullmatch(DNS_LABEL_PATTERN, namespace):
                raise ValueError(f"--namespace: {namespace!r} is not the name of a namespace")
        servers = self.policy_servers
        if servers and self.namespaces and servers.service.namespace not in self.namespaces:
            raise ValueError(
                f"the policy servers' namespace {servers.service.namespace} must be among the "
                f"namespaces watched: add --namespace {servers.service.namespace}"
            )
        self._check_addresses()
        if self.prometheus_url and not self.prometheus_url.startswith(("http://", "https://")):
            raise ValueError(
                f"--prometheus-url: {self.prometheus_url!r} is not an http:// or https:// URL"
            )
        for one in fields(self):
            if one.name.endswith("_interval_s") and not 0 < getattr(self, one.name) < math.inf:
                raise ValueError(f"{one.name} must be positive and finite")

    def _check_addresses(self) -> None:
        if not _is_address(self.http_address):
            raise ValueError(f"--http-address: {self.http_address!r} is not ip:port")
        for address in self.policy_server_addresses:
            if not address.startswith("unix:") and not _is_address(address, host=True):
                raise ValueError(
                    f"--policy-server-address: {address!r} is neither ip:port nor unix:///path"
                )
        if self.tls is None:
            for address in self.policy_server_addresses:
                if not is_loopback(address):
                    raise ValueError(
                        "--policy-server-address: plaintext is only for loopback, not for "
                        f"{address}: {_GIVE_TLS}"
                    )


def _is_address(text: str, *, host: bool = False) -> bool:
    """Whether it is ``ip:port``; without ``host`` the part before the port may be empty."""
    where, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > _MAX_PORT:
        return False
    if ":" in where and not (where.startswith("[") and where.endswith("]")):
        return False
    return bool(where) or not host


def is_loopback(address: str) -> bool:
    """Whether ``ip:port`` or ``unix:…`` stays on this machine; host names never do."""
    if address.startswith("unix:"):
        return True
    try:
        return ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False


def make_tls(cert: str, key: str, ca: str, server_name: str) -> TlsFiles | None:
    """All three files or none; raises ValueError for some."""
    given = [bool(cert), bool(key), bool(ca)]
    if not any(given):
        return None
    if not all(given):
        raise ValueError("--tls-cert, --tls-key and --tls-ca go together")
    return TlsFiles(cert=Path(cert), key=Path(key), ca=Path(ca), server_name=server_name)


def make_settings(
    *,
    policy_servers: str = "",
    tls_cert: str = "",
    tls_key: str = "",
    tls_ca: str = "",
    tls_server_name: str = "",
    **others: Any,  # noqa: ANN401 - further fields of `OperatorSettings`
) -> OperatorSettings:
    """Settings from texts; raises ValueError with what to write instead."""
    servers = ServiceRef.parse(policy_servers) if policy_servers else None
    name = tls_server_name or (servers.host_name if servers else "")
    tls = make_tls(tls_cert, tls_key, tls_ca, name)
    if servers is not None and tls is None:  # no EndpointSlice holds a loopback address
        raise ValueError(f"--policy-servers: plaintext is only for loopback: {_GIVE_TLS}")
    return OperatorSettings(policy_servers=servers, tls=tls, **others)


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> OperatorSettings:
    """Settings for ``kopf run``, whose command line is kopf's own.

    Variables are named like the flags, such as POINTSMAN_POLICY_SERVERS; lists are
    separated by blanks. Raises ValueError with what to write instead.
    """

    def text(name: str) -> str:
        return environment.get(ENVIRONMENT_PREFIX + name, "")

    others: dict[str, Any] = {
        "namespaces": tuple(text("NAMESPACE").split()),
        "policy_server_addresses": tuple(text("POLICY_SERVER_ADDRESS").split()),
        "prometheus_url": text("PROMETHEUS_URL"),
    }
    if text("HTTP_ADDRESS"):
        others["http_address"] = text("HTTP_ADDRESS")
    for name in ("RESYNC_INTERVAL", "PROBE_INTERVAL", "STATS_INTERVAL"):
        if text(name):
            others[f"{name.lower()}_s"] = _seconds(ENVIRONMENT_PREFIX + name, text(name))
    return make_settings(
        policy_servers=text("POLICY_SERVERS"),
        tls_cert=text("TLS_CERT"),
        tls_key=text("TLS_KEY"),
        tls_ca=text("TLS_CA"),
        tls_server_name=text("TLS_SERVER_NAME"),
        **others,
    )


def log_settings_from_environment(
    environment: Mapping[str, str] = os.environ,
) -> tuple[str, str]:
    """Level and format of the logs of ``kopf run``."""
    level = environment.get(f"{ENVIRONMENT_PREFIX}LOG_LEVEL") or "info"
    return level, environment.get(f"{ENVIRONMENT_PREFIX}LOG_FORMAT") or "json"


def _seconds(name: str, text: str) -> float:
    """Raises ValueError that names the variable."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not SHORTEST_INTERVAL_S <= seconds < math.inf:
        raise ValueError(
            f"{name}: {text!r} is not a number of seconds, at least {SHORTEST_INTERVAL_S:g}"
        )
    return seconds
