"""The operator's side of the server: ``pointsman.v1.SnapshotService`` and snapshot files.

It is served on a port of its own, so that whoever reaches the data port can neither
publish nor read what the policies do.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NoReturn

import grpc
import structlog

from pointsman_core.snapshot import Snapshot, read_snapshot
from pointsman_policy.metrics import Metrics
from pointsman_policy.service import RoutingService
from pointsman_policy.settings import TlsFiles
from pointsman_policy.snapshots import (
    SnapshotBoard,
    SnapshotSetError,
    StaleSequenceError,
    read_snapshot_files,
)
from pointsman_policy.tls import ServerTls
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import (
    SnapshotServiceServicer,
    add_SnapshotServiceServicer_to_server,
)

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
MAX_REASON_CHARS: Final = 4000
"""Of a refusal that is told: gRPC carries it in a header, which holds 8 KiB."""

_GRPC_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Operators may look more often whether an idle connection still stands.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

_PublishContext = grpc.aio.ServicerContext[pb.PublishRequest, pb.PublishResponse]
_StatusContext = grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]

log = structlog.get_logger(__name__)


# --- taking snapshots in ---------------------------------------------------------------


class SnapshotIntake:
    """Feeds the board from requests and from files, one after the other."""

    def __init__(
        self,
        board: SnapshotBoard,
        metrics: Metrics,
        *,
        prepare: Callable[[Sequence[Snapshot]], None] = lambda _: None,
    ) -> None:
        """``prepare`` is called beside the event loop before snapshots are put in force."""
        self.board = board
        self._prepare = prepare
        self._metrics = metrics
        self._lock = asyncio.Lock()

    async def publish(self, request: pb.PublishRequest) -> None:
        """Put the published set in force, all or nothing.

        Raises:
            StaleSequenceError: its publisher has sent a later one.
            SnapshotSetError: it is wrong; with every reason.

        """
        async with self._lock:
            self.board.check_sequence(request.publisher, request.sequence)
            # In a thread: a large set takes long enough to be felt by requests.
            snapshots = await asyncio.to_thread(read_published, request)
            await asyncio.to_thread(self._prepare, snapshots)
            self.board.publish(request.publisher, request.sequence, snapshots)

    async def reload(self, paths: Sequence[Path]) -> None:
        """Take in what has changed in the files; what is wrong with them is logged."""
        async with self._lock:
            contents = await asyncio.to_thread(read_snapshot_files, paths)
            found = [one for one in contents.values() if isinstance(one, Snapshot)]
            await asyncio.to_thread(self._prepare, found)
            try:
                problems = self.board.take_files(contents)
            except SnapshotSetError as error:
                problems = list(error.reasons)
        self._metrics.reloads.labels("failed" if problems else "ok").inc()
        for problem in problems:
            log.warning("snapshot file refused, the previous snapshot stays", problem=problem)


def read_published(request: pb.PublishRequest) -> list[Snapshot]:
    """The snapshots of a request, each checked against what the request says of it.

    Raises:
        SnapshotSetError: with every reason.

    """
    snapshots, reasons = [], []
    if not request.publisher:
        reasons.append("publisher is required")
    if not request.snapshots and not request.allow_empty:
        reasons.append("the set is empty; allow_empty drops all policies")
    for published in request.snapshots:
        try:
            snapshots.append(_read_one(published))
        except ValueError as error:
            reasons.append(f"{published.namespace}/{published.policy}: {error}")
    if reasons:
        raise SnapshotSetError(reasons)
    return snapshots


def _read_one(published: pb.PublishedSnapshot) -> Snapshot:
    snapshot = read_snapshot(published.snapshot_json)
    for name in ("namespace", "policy", "generation", "version"):
        said, holds = getattr(published, name), getattr(snapshot, name)
        if said != holds:
            raise ValueError(f"{name} is {said!r}, but that of its JSON is {holds!r}")
    return snapshot


# --- the gRPC service ------------------------------------------------------------------


class SnapshotServicer(SnapshotServiceServicer):
    """Takes published sets and tells what is in force."""

    def __init__(self, service: RoutingService, intake: SnapshotIntake) -> None:
        self._service = service
        self._intake = intake
        self.instance_id = uuid.uuid4().hex

    async def Publish(  # noqa: N802 - gRPC's name
        self, request: pb.PublishRequest, context: _PublishContext
    ) -> pb.PublishResponse:
        """Put a set in force, or refuse it as a whole."""
        try:
            await self._intake.publish(request)
        except StaleSequenceError as error:
            self._count("stale")
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, [str(error)])
        except SnapshotSetError as error:
            self._count("refused")
            for reason in error.reasons:
                log.warning("publish refused", publisher=request.publisher, problem=reason)
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, error.reasons)
        self._count("ok")
        return pb.PublishResponse(applied=self._applied(), instance_id=self.instance_id)

    async def Status(  # noqa: N802 - gRPC's name
        self, request: pb.StatusRequest, context: _StatusContext
    ) -> pb.StatusResponse:
        """Tell what is in force, and how the policies did lately."""
        del request, context
        return pb.StatusResponse(
            instance_id=self.instance_id,
            applied=self._applied(),
            policies=map(self._policy_stats, self._intake.board.in_force),
            endpoints=endpoint_stats(self._service),
        )

    def _applied(self) -> list[pb.AppliedSnapshot]:
        return [self._applied_one(snapshot) for snapshot in self._intake.board.in_force]

    def _applied_one(self, snapshot: Snapshot) -> pb.AppliedSnapshot:
        model = self._service.model(snapshot.full_name)
        return pb.AppliedSnapshot(
            namespace=snapshot.namespace,
            policy=snapshot.policy,
            generation=snapshot.generation,
            version=snapshot.version,
            model_sha256=model.model.sha256 if model and model.model else "",
            model_error=model.error if model else "",
        )

    def _policy_stats(self, snapshot: Snapshot) -> pb.PolicyStats:
        statistics = self._service.statistics
        totals = statistics.totals(snapshot.full_name, now_s=self._service.clock())
        return pb.PolicyStats(
            namespace=snapshot.namespace,
            policy=snapshot.policy,
            requests=totals.requests,
            violations=totals.violations,
            rejected=totals.rejected,
            failed=totals.failed,
            predicted_qos_sum=totals.predicted_qos_sum,
            window_seconds=statistics.window_s,
        )

    def _count(self, result: str) -> None:
        self._service.metrics.publishes.labels(result).inc()


def endpoint_stats(service: RoutingService) -> list[pb.EndpointStats]:
    """All endpoints in force, and those that have left but still have requests; sorted."""
    state = service.state
    in_force = service.candidates()
    return [
        pb.EndpointStats(address=address, ready=state.is_ready(address), in_flight=in_flight)
        for address in sorted({*state.addresses, *in_force})
        if (in_flight := state.in_flight(address)) or address in in_force
    ]


async def _abort(
    context: _PublishContext, code: grpc.StatusCode, reasons: Iterable[str]
) -> NoReturn:
    # Names in it come from the request; a header cannot hold every character.
    message = "; ".join(reasons).encode("ascii", "backslashreplace").decode()
    if len(message) > MAX_REASON_CHARS:
        message = message[:MAX_REASON_CHARS] + " ... (the server's log has all)"
    await context.abort(code, message)
    raise AssertionError("abort() raises")


@contextlib.asynccontextmanager
async def control_server(
    servicer: SnapshotServicer, *, address: str, tls: TlsFiles | None, metrics: Metrics
) -> AsyncIterator[int]:
    """Serve the operator; yields the port that was bound.

    Raises:
        ValueError: the TLS files cannot be served with.
        OSError: the address cannot be bound.

    """
    server = grpc.aio.server(options=_GRPC_OPTIONS)
    add_SnapshotServiceServicer_to_server(servicer, server)
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            credentials = ServerTls(tls, on_reload=metrics.count_tls_reload).credentials()
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"--control-address: cannot listen on {address}: {error}") from None
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)
