"""The policy server's process: wiring, start, reload, drain."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import grpc
import structlog
import uvloop
from aiohttp import web
from envoy.service.endpoint.v3.eds_pb2_grpc import add_EndpointDiscoveryServiceServicer_to_server
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import (
    add_ExternalProcessorServicer_to_server,
)
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pointsman_core.manifests import CompiledManifests, ManifestErrors, compile_manifests
from pointsman_core.snapshot import Candidate, Snapshot
from pointsman_core.state import EngineLoad
from pointsman_policy.addresses import SocketAddress
from pointsman_policy.control import SnapshotIntake, SnapshotServicer, control_server
from pointsman_policy.eds import EdsEndpoint, EdsServer
from pointsman_policy.engines.probe import ScrapeError
from pointsman_policy.ext_proc import ExtProcServicer
from pointsman_policy.http_api import Health, build_app
from pointsman_policy.manifest_files import read_manifest_files
from pointsman_policy.metrics import Metrics
from pointsman_policy.models import ModelStore
from pointsman_policy.policy_api import PolicyServicer
from pointsman_policy.predictor_file import load_predictor
from pointsman_policy.scrape import Scraper, Target
from pointsman_policy.service import RoutingService
from pointsman_policy.settings import ServerSettings
from pointsman_policy.snapshots import SUFFIXES, SnapshotBoard
from pointsman_policy.watch import MANIFESTS, file_contents, watch_files
from pointsman_proto.v1 import pointsman_pb2
from pointsman_proto.v1.pointsman_pb2_grpc import add_PolicyServiceServicer_to_server

EXPIRY_INTERVAL_S = 5.0

MAX_ANSWER_PIECE_BYTES = 4 * 1024 * 1024
"""Of an answer, `observe` gets what Envoy read at once: up to its buffer limit of 1 MiB."""

HEALTH_SERVICES = (
    "",
    "readiness",
    "envoy.service.ext_proc.v3.ExternalProcessor",
    "inference-extension",
    "pointsman.v1.PolicyService",
)
"""Names under which probes may ask for readiness: gRPC's own, those of the endpoint-picker
protocol, and those of the services."""

LIVENESS_SERVICE = "liveness"
"""The endpoint-picker protocol's name under which probes ask whether the process is well."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

PING_AFTER_S = 30.0
"""A connection that is silent for so long is asked whether somebody is there."""
PING_TIMEOUT_S = 20.0
"""And closed with all its streams without an answer within this time."""

log = structlog.get_logger(__name__)


def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ManifestErrors: the manifests cannot be compiled at start.
        ValueError: the TLS files cannot be served with.
        OSError: an address cannot be bound.

    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(PolicyServer(settings).serve())


class PolicyServer:
    """All parts of one process round one `RoutingService`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self.service = RoutingService(
            self._metrics,
            seed=settings.seed,
            stats_window_s=settings.stats_window_s,
            artefact=load_predictor(settings.predictor),
            models=ModelStore(settings.models),
        )
        self._installed = asyncio.Event()
        self._intake = SnapshotIntake(
            SnapshotBoard(self._install), self._metrics, prepare=self.service.model_store.prepare
        )
        self._health = Health()
        self._grpc_health = health.aio.HealthServicer()
        self._eds = EdsServer(on_nack=lambda _version, _message: self._metrics.eds_nacks.inc())
        self._scraper = Scraper(
            on_load=self._on_load, on_health=self._on_health, on_error=self._on_scrape_error
        )

    async def serve(self) -> None:
        """Start, serve, drain."""
        stop = asyncio.Event()
        _on_signals(stop.set)
        folder = self._settings.models
        if folder is not None and not folder.is_dir():  # it may still come, as mounts do
            log.warning("the folder of models is not there", option="--models", path=str(folder))
        paths, suffixes = self._watched()
        known = file_contents(paths, suffixes=suffixes)
        async with self._scraper, self._http(), self._grpc():
            await self._set_serving(ready=False)
            await self._load()
            # Start-up objects live for ever: keep them out of the collector's way.
            gc.collect()
            gc.freeze()
            async with self._control():
                watch = watch_files(paths, self._reload, suffixes=suffixes, known=known)
                tasks = [asyncio.create_task(t) for t in (watch, self._expire(), self._announce())]
                settings = self._settings
                log.info("serving", grpc=settings.grpc_address, http=settings.http_address)
                await stop.wait()
                log.info("draining", in_flight=len(self.service.state))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._set_serving(ready=False)
        log.info("stopped", in_flight=len(self.service.state))

    # --- snapshots ---------------------------------------------------------------------

    def _watched(self) -> tuple[tuple[Path, ...], frozenset[str]]:
        if self._settings.manifests:
            return self._settings.manifests, MANIFESTS
        return self._settings.snapshots, SUFFIXES

    async def _load(self) -> None:
        """Read the files and put what they hold in force.

        Raises:
            ManifestErrors: some manifests are wrong; what was in force stays.

        """
        if self._settings.manifests:
            await self._load_manifests()
        else:
            await self._intake.reload(self._settings.snapshots)

    async def _load_manifests(self) -> None:
        # In a thread: a large site takes long enough to be felt by requests.
        compiled = await asyncio.to_thread(_compile, self._settings.manifests)
        await asyncio.to_thread(self.service.model_store.prepare, compiled.snapshots)
        self._install(compiled.snapshots)
        self._metrics.reloads.labels("ok").inc()
        for warning in compiled.warnings:
            log.warning("manifest", problem=str(warning))

    async def _reload(self) -> None:
        try:
            await self._load()
        except ManifestErrors as errors:
            self._metrics.reloads.labels("failed").inc()
            for error in errors.errors:
                log.warning("manifest refused, the previous snapshot stays", problem=str(error))

    def _install(self, snapshots: Sequence[Snapshot]) -> None:
        """Put snapshots in force everywhere: decisions, scraping, Envoy."""
        before = {snapshot.full_name: snapshot.version for snapshot in self.service.snapshots}
        self.service.install(snapshots)
        self._scraper.update(
            {address: _target(found[0]) for address, found in self.service.candidates().items()}
        )
        self._metrics.forget_endpoints(keep=self.service.candidates())
        self._publish_endpoints()
        self._installed.set()
        for snapshot in snapshots:
            name = snapshot.full_name
            if before.pop(name, None) != snapshot.version:
                log.info(
                    "snapshot in force",
                    policy=name,
                    version=snapshot.version,
                    generation=snapshot.generation,
                    candidates=len(snapshot.candidates),
                )
            model = self.service.model(name)
            if model is not None and model.error:
                log.warning("model not in force", policy=name, problem=model.error)
        for name in before:
            log.info("policy dropped", policy=name)

    async def _announce(self) -> None:
        """Become ready with the first snapshots."""
        if not self._installed.is_set():
            paths = [str(path) for path in self._settings.snapshots]
            log.warning("not ready before the first snapshot", looked_in=paths)
        await self._installed.wait()
        await self._set_serving(ready=True)

    def _publish_endpoints(self) -> None:
        policies = self.service.policies()
        self._eds.set_endpoints(
            [
                EdsEndpoint(
                    address=address,
                    served_models=candidate.served_models,
                    expert=candidate.expert,
                    policies=policies[address],
                    ready=self.service.state.is_ready(address),
                )
                for address, found in self.service.candidates().items()
                for candidate in found
            ]
        )

    # --- engines -----------------------------------------------------------------------

    def _on_load(self, address: str, load: EngineLoad, at_s: float) -> None:
        self.service.state.set_load(address, load, now_s=at_s)

    def _on_health(self, address: str, ready: bool, reason: str) -> None:
        del reason  # the scraper logs it
        if self.service.state.set_ready(address, ready=ready):
            self._publish_endpoints()

    def _on_scrape_error(self, address: str, kind: ScrapeError) -> None:
        self._metrics.scrape_errors.labels(address, str(kind)).inc()

    # --- serving -----------------------------------------------------------------------

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_INTERVAL_S)
            try:
                self._drop_missed_ends()
            except Exception:  # the next round may do better; without any, entries would pile up
                log.exception("in-flight entries not looked at")

    def _drop_missed_ends(self) -> None:
        now, tracker = self.service.clock(), self.service.tracker
        dropped = tracker.reconcile(now_s=now)
        dropped += tracker.expire(before_s=now - self._settings.request_ttl_s)
        if dropped:
            log.warning("in-flight entries expired", count=dropped)

    async def _set_serving(self, *, ready: bool) -> None:
        self._health.ready = ready
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if ready
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in HEALTH_SERVICES:
            await self._grpc_health.set(name, status)
        # Waiting for a snapshot, or for the last requests, is no reason to be restarted.
        await self._grpc_health.set(LIVENESS_SERVICE, health_pb2.HealthCheckResponse.SERVING)

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        address = SocketAddress.parse(self._settings.http_address)
        runner = web.AppRunner(build_app(self.service, self._health), access_log=None)
        await runner.setup()
        try:
            site: web.BaseSite = (
                web.UnixSite(runner, address.pipe)
                if address.pipe
                else web.TCPSite(runner, address.host, address.port)
            )
            try:
                await site.start()
            except OSError as error:
                where, why = self._settings.http_address, os.strerror(error.errno or 0).lower()
                raise OSError(f"--http-address: cannot listen on {where}: {why}") from None
            yield
        finally:
            await runner.cleanup()

    @contextlib.asynccontextmanager
    async def _grpc(self) -> AsyncIterator[None]:
        server = grpc.aio.server(options=grpc_options(self._settings.body_limit_bytes))
        ext_proc = ExtProcServicer(self.service, body_limit_bytes=self._settings.body_limit_bytes)
        add_ExternalProcessorServicer_to_server(ext_proc, server)
        add_EndpointDiscoveryServiceServicer_to_server(self._eds, server)
        add_PolicyServiceServicer_to_server(PolicyServicer(self.service), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._grpc_health, server)
        services = [pointsman_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name]
        reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)
        try:
            server.add_insecure_port(self._settings.grpc_address)
        except RuntimeError as error:
            where = self._settings.grpc_address
            raise OSError(f"--grpc-address: cannot listen on {where}: {error}") from None
        await server.start()
        try:
            yield
        finally:
            self._eds.close()
            await server.stop(self._settings.drain_timeout_s)

    @contextlib.asynccontextmanager
    async def _control(self) -> AsyncIterator[None]:
        address = self._settings.control_address
        if address is None:
            yield
            return
        servicer = SnapshotServicer(self.service, self._intake)
        tls, metrics = self._settings.tls, self._metrics
        async with control_server(servicer, address=address, tls=tls, metrics=metrics) as port:
            log.info("operators may publish", address=address, port=port, tls=tls is not None)
            yield


def grpc_options(
    body_limit_bytes: int,
    *,
    ping_after_s: float = PING_AFTER_S,
    ping_timeout_s: float = PING_TIMEOUT_S,
) -> list[tuple[str, int]]:
    """Options of the gRPC server that Envoy talks to."""
    # The longest body of a request or piece of an answer, and room for the rest of its message.
    longest = max(body_limit_bytes, MAX_ANSWER_PIECE_BYTES) + 65_536
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", 65_536),
        ("grpc.max_receive_message_length", longest),
        # A host that vanishes closes nothing: its streams would wait for ever.
        ("grpc.keepalive_time_ms", round(ping_after_s * 1e3)),
        ("grpc.keepalive_timeout_ms", round(ping_timeout_s * 1e3)),
        # The one that is obeyed: grpcio 1.85 waits 60 s without it.
        ("grpc.http2.ping_timeout_ms", round(ping_timeout_s * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Also where an answer is silent for long, and so nothing is sent in between.
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _compile(paths: Iterable[Path]) -> CompiledManifests:
    return compile_manifests(read_manifest_files(paths))


def _target(candidate: Candidate) -> Target:
    return Target(
        address=candidate.address,
        engine_type=candidate.engine.type,
        metrics=candidate.engine.metrics,
    )


def _on_signals(callback: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def first() -> None:
        for name in _SIGNALS:  # a second one ends the process at once
            loop.remove_signal_handler(name)
            signal.signal(name, signal.SIG_DFL)
        callback()

    for name in _SIGNALS:
        loop.add_signal_handler(name, first)
