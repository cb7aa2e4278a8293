"""Snapshots to policy servers, by gRPC with acknowledgement.

Every server always gets the complete set: when it changed, when the server is new or has
restarted, and when it says that it has something else in force. One task per server, so
that a slow one delays nobody.
"""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Protocol

import grpc
import structlog

from pointsman_core.snapshot import Snapshot, snapshot_json
from pointsman_operator.metrics import Metrics
from pointsman_operator.observed import Key, ServerState
from pointsman_operator.settings import TlsFiles, is_loopback
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import SnapshotServiceStub

RPC_TIMEOUT_S: Final = 5.0
FIRST_BACKOFF_S: Final = 0.1
LAST_BACKOFF_S: Final = 10.0
WINDOW_S: Final = 300.0
"""Of what policy servers count; older counts say nothing any more."""
MAX_DOUBLINGS: Final = 4
"""Of the time between two looks, while somebody else publishes too."""

_CHANNEL_OPTIONS: Final[list[tuple[str, int | str]]] = [
    # gRPC's own pauses between connection attempts; by default they grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # Else HTTP_PROXY would take even plaintext for loopback to another machine.
    ("grpc.enable_http_proxy", 0),
]

log = structlog.get_logger(__name__)

Applied = Mapping[Key, tuple[int, str]]
"""Generation and version in force, by policy."""

Models = Mapping[Key, tuple[str, str]]
"""SHA-256 of the model in force, and why the one wanted is not; of policies that need one."""


@dataclass(frozen=True, slots=True)
class SnapshotSet:
    """One complete set, ready to be sent."""

    sequence: int
    snapshots: tuple[pb.PublishedSnapshot, ...]
    applied: Applied
    """What a server has in force once it took the set."""

    @classmethod
    def of(cls, sequence: int, snapshots: Iterable[Snapshot]) -> "SnapshotSet":
        """Serialise once for all servers."""
        items = tuple(
            pb.PublishedSnapshot(
                namespace=one.namespace,
                policy=one.policy,
                generation=one.generation,
                version=one.version,
                snapshot_json=snapshot_json(one).encode(),
            )
            for one in snapshots
        )
        applied = {Key(i.namespace, i.policy): (i.generation, i.version) for i in items}
        return cls(sequence, items, applied)


@dataclass(frozen=True, slots=True)
class PolicyCounts:
    """What one server counted for one policy over its sliding window."""

    requests: int
    violations: int
    predicted_qos_sum: float


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What one server says of itself."""

    instance_id: str
    applied: Applied
    counts: Mapping[Key, PolicyCounts] | None = None
    """``None`` when it was not asked for them."""
    models: Models = field(default_factory=dict)


class ServerClient(Protocol):
    """One policy server's control side. Errors are `grpc.RpcError`."""

    async def publish(self, publisher: str, what: SnapshotSet) -> ServerReport:
        """Send a complete set."""

    async def status(self) -> ServerReport:
        """Ask what is in force."""

    async def close(self) -> None:
        """Let the connection go."""


class Publisher:
    """Keeps all policy servers at the last set.

    ``connect`` makes the client of an address; it may raise ValueError or OSError.
    ``on_change`` is called whenever `states` would say something else.
    """

    def __init__(
        self,
        connect: Callable[[str], ServerClient],
        *,
        identity: str,
        on_change: Callable[[], None],
        metrics: Metrics,
        poll_interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connect = connect
        self.clock = clock
        self.identity = identity
        self.metrics = metrics
        self.poll_interval_s = poll_interval_s
        self._on_change = on_change
        self._links: dict[str, _Link] = {}
        self._servers_known = False
        self._sequence = 0
        self.wanted: SnapshotSet | None = None
        """The last set; ``None`` before the first, when nothing may be sent."""
        self.up_to_date = True
        """The set is of what the API server says now. If not, somebody else's may be newer."""

    def publish(self, snapshots: Iterable[Snapshot]) -> bool:
        """Make this the set of all servers; tells whether it is another one."""
        draft = SnapshotSet.of(self._sequence + 1, snapshots)
        if self.wanted is not None and self.wanted.applied == draft.applied:
            return False
        self._sequence += 1
        self.wanted = draft
        for link in self._links.values():
            link.wake()
        return True

    def renumber(self) -> None:
        """A later sequence for the same set, after a server has called it stale."""
        if self.wanted is not None:
            self._sequence += 1
            wanted = self.wanted
            self.wanted = SnapshotSet(self._sequence, wanted.snapshots, wanted.applied)

    async def set_servers(self, servers: Mapping[str, bool]) -> None:
        """Which servers there are, by address, and whether each is ready."""
        self._servers_known = True
        left = self._links.keys() - servers.keys()
        gone = [self._links.pop(address) for address in left]
        for address, counted in servers.items():
            link = self._links.get(address)
            if link is None:
                link = self._links[address] = _Link(self, address)
            if link.counted != counted:
                link.counted = counted
                self.changed()
        if gone:
            self.changed()
            await asyncio.gather(*(link.close() for link in gone))
        for address in left:
            self.metrics.forget_server(address)

    def states(self) -> dict[str, ServerState]:
        """All servers by address."""
        return {
            address: ServerState(link.counted, link.applied, link.error, link.refused, link.models)
            for address, link in sorted(self._links.items())
        }

    def counts(self) -> list[Mapping[Key, PolicyCounts]]:
        """What every server counted, as last read, unless that is longer ago than its window."""
        oldest = self.clock() - WINDOW_S
        return [
            (link.counts or {}) if link.counted_at > oldest else {} for link in self._links.values()
        ]

    @property
    def asked(self) -> bool:
        """Whether each server was asked for its counts, or cannot be; not before `set_servers`."""
        links = self._links.values()
        return self._servers_known and all(one.counts is not None or one.error for one in links)

    @property
    def settled(self) -> bool:
        """Whether each server has taken the set, or failed to."""
        return all(link.settled for link in self._links.values())

    def changed(self) -> None:
        """Tell the owner."""
        self._on_change()

    async def close(self) -> None:
        """Stop all tasks and close all connections; the servers keep what they have."""
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))


class _Link:
    """One server and the task that keeps it at the last set."""

    def __init__(self, owner: Publisher, address: str) -> None:
        self.counted = False
        self.applied: Applied = {}
        self.error = ""
        self.refused = False
        self.counts: Mapping[Key, PolicyCounts] | None = None
        self.counted_at = 0.0
        self.models: Models = {}
        self._owner = owner
        self._address = address
        self._instance = ""
        self._tried = 0
        """Sequence of the last set that was tried."""
        self._failures = 0
        self._foreign = 0
        """Times in a row that somebody else's set was in force."""
        self._wake = asyncio.Event()
        self._client: ServerClient | None = None
        self._task = asyncio.create_task(self._run(), name=f"policy server {address}")

    def wake(self) -> None:
        self._wake.set()

    @property
    def settled(self) -> bool:
        wanted = self._owner.wanted
        return wanted is None or self._tried == wanted.sequence

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._client is not None:
            await self._client.close()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._round()
            except Exception:
                # A bug must not end the task: this server would silently stay behind.
                log.exception("policy server not served", server=self._address)
                self._failures += 1
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it may swallow a cancellation.
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()

    def _pause(self) -> float:
        if self._failures:
            pause = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(self._failures - 1, 16))
        else:
            # Two operators with different views take turns; they should do so slowly.
            pause = self._owner.poll_interval_s * 2.0 ** min(self._foreign, MAX_DOUBLINGS)
        return pause * random.uniform(0.8, 1.2)

    async def _round(self) -> None:
        """One exchange: send the set if it is due, else ask and compare."""
        wanted = self._owner.wanted
        try:
            if self._client is None:
                self._client = self._owner.connect(self._address)
            due = wanted is not None and (self._tried != wanted.sequence or self.error)
            if wanted is not None and due:
                await self._send(self._client, wanted)
                return
            report = await self._client.status()
            if wanted is not None and self._is_behind(report, wanted):
                await self._send(self._client, wanted)
            else:
                self._foreign = 0
                self._take(report)
        except (grpc.RpcError, OSError, ValueError) as error:
            self._failed(error, wanted)

    def _is_behind(self, report: ServerReport, wanted: SnapshotSet) -> bool:
        if report.applied == wanted.applied:
            return False
        if report.instance_id == self._instance:
            # It took our set and has another one now.
            if not self._owner.up_to_date:
                return False
            self._foreign += 1
            self._owner.metrics.foreign_publishes.labels(self._address).inc()
            log.warning("somebody else publishes to the policy server", server=self._address)
        else:
            log.info("policy server has restarted", server=self._address)
        return True

    async def _send(self, client: ServerClient, wanted: SnapshotSet) -> None:
        started, metrics = time.perf_counter(), self._owner.metrics
        try:
            report = await client.publish(self._owner.identity, wanted)
        except Exception:
            metrics.pushes.labels(self._address, "failed").inc()
            raise
        metrics.push_seconds.observe(time.perf_counter() - started)
        metrics.pushes.labels(self._address, "ok").inc()
        self._tried = wanted.sequence
        self._take(report)
        log.info("set in force", server=self._address, sequence=wanted.sequence)

    def _take(self, report: ServerReport) -> None:
        self._instance = report.instance_id
        self._failures = 0
        if report.counts is not None:
            self.counts, self.counted_at = report.counts, self._owner.clock()
        self._show(report.applied, "", refused=False, models=report.models)

    def _failed(self, error: Exception, wanted: SnapshotSet | None) -> None:
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
        text = describe(error)
        self._failures += 1
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            self._owner.renumber()
        elif wanted is not None:
            self._tried = wanted.sequence
        if text != self.error:
            log.warning("policy server not updated", server=self._address, error=text)
        refused = code is grpc.StatusCode.INVALID_ARGUMENT
        self._show(self.applied, text, refused=refused, models=self.models)

    def _show(self, applied: Applied, error: str, *, refused: bool, models: Models) -> None:
        before = (self.applied, self.error, self.refused, self.models)
        self.applied, self.error, self.refused, self.models = applied, error, refused, models
        if before != (applied, error, refused, models):
            self._owner.changed()


def describe(error: Exception) -> str:
    """An error in one line that does not change from try to try."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return str(error)
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(error.details() or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {RPC_TIMEOUT_S:g} s"
    return error.details() or code.name


_TLS_FAULTS: Final = (
    ("Hostname Verification", "its certificate is for another name: see --tls-server-name"),
    ("security handshaker", "--tls-cert, --tls-key and --tls-ca cannot be used together"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS"),
    (
        "Socket closed",
        "it closes the connection: with TLS, it may not trust --tls-cert, or find it expired",
    ),
    # Another authority would not mend these; OpenSSL says the same of one in between.
    ("certificate has expired", "its certificate, or its authority's, has expired"),
    ("certificate is not yet valid", "its certificate, or its authority's, is not valid yet"),
)
_UNTRUSTED: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([a-z -]+)")


def _unavailable(details: str) -> str:
    """What can be mended is named; the rest of the details are attempts and times."""
    if text := next((text for sign, text in _TLS_FAULTS if sign in details), ""):
        return text
    if found := _UNTRUSTED.search(details):
        return f"its certificate is not trusted: {found[1].strip()} (--tls-ca)"
    return "cannot be reached"


# --- gRPC ------------------------------------------------------------------------------


class GrpcServerClient:
    """A policy server by gRPC; certificates are read again when their files change."""

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        if tls is None and not is_loopback(address):
            raise ValueError("plaintext is only for loopback: give --tls-cert, --tls-key, --tls-ca")
        self._address = address
        self._tls = tls
        self._digest = b""
        self._fault = ""
        """Why changed files are not used."""
        self._channel: grpc.aio.Channel | None = None

    async def publish(self, publisher: str, what: SnapshotSet) -> ServerReport:
        """Send a complete set."""
        stub = SnapshotServiceStub(await self._connected())
        answer = await stub.Publish(
            pb.PublishRequest(
                publisher=publisher,
                sequence=what.sequence,
                snapshots=what.snapshots,
                # Only what was listed in full is published: none means that there is none.
                allow_empty=not what.snapshots,
            ),
            timeout=RPC_TIMEOUT_S,
        )
        applied = answer.applied
        return ServerReport(answer.instance_id, _applied(applied), models=_models(applied))

    async def status(self) -> ServerReport:
        """Ask what is in force."""
        stub = SnapshotServiceStub(await self._connected())
        answer = await stub.Status(pb.StatusRequest(), timeout=RPC_TIMEOUT_S)
        counts = {
            Key(one.namespace, one.policy): PolicyCounts(
                one.requests, one.violations, one.predicted_qos_sum
            )
            for one in answer.policies
        }
        applied = answer.applied
        return ServerReport(answer.instance_id, _applied(applied), counts, _models(applied))

    async def close(self) -> None:
        """Let the connection go."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def _connected(self) -> grpc.aio.Channel:
        if self._tls is None:
            if self._channel is None:
                self._channel = grpc.aio.insecure_channel(self._address, _CHANNEL_OPTIONS)
            return self._channel
        if self._channel is not None and not self._has_other_files(self._tls):
            return self._channel
        ca, key, cert = self._tls.read()
        await self.close()
        options = [*_CHANNEL_OPTIONS]
        if self._tls.server_name:
            # Policy servers are dialled by address; certificates name their Service.
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
        self._channel = grpc.aio.secure_channel(self._address, credentials, options)
        self._digest = _digest(ca, key, cert)
        return self._channel

    def _has_other_files(self, tls: TlsFiles) -> bool:
        """Whether there are other certificates, and good ones: they may be just being replaced."""
        try:
            if other := _digest(*tls.read()) != self._digest:
                tls.check()
            fault = ""
        except (OSError, ValueError) as error:
            other, fault = False, str(error)
        if fault and fault != self._fault:
            log.warning("certificates not read again, the former stay", reason=fault)
        self._fault = fault
        return other


def _digest(*contents: bytes) -> bytes:
    return sha256(b"\0".join(contents)).digest()


def _applied(items: Iterable[pb.AppliedSnapshot]) -> Applied:
    return {Key(i.namespace, i.policy): (i.generation, i.version) for i in items}


def _models(items: Iterable[pb.AppliedSnapshot]) -> Models:
    return {
        Key(i.namespace, i.policy): (i.model_sha256, i.model_error)
        for i in items
        if i.model_sha256 or i.model_error
    }
