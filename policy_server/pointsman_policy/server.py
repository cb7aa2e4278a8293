"""The policy server's process: wiring, start, reload, drain."""

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable, Iterable
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
from pointsman_core.snapshot import Candidate
from pointsman_core.state import EngineLoad
from pointsman_policy.addresses import SocketAddress
from pointsman_policy.eds import EdsEndpoint, EdsServer
from pointsman_policy.engines.probe import ScrapeError
from pointsman_policy.ext_proc import ExtProcServicer
from pointsman_policy.http_api import Health, build_app
from pointsman_policy.manifest_files import read_manifest_files
from pointsman_policy.metrics import Metrics
from pointsman_policy.policy_api import PolicyServicer
from pointsman_policy.scrape import Scraper, Target
from pointsman_policy.service import RoutingService
from pointsman_policy.settings import ServerSettings
from pointsman_policy.watch import manifest_contents, watch_manifests
from pointsman_proto.v1 import pointsman_pb2
from pointsman_proto.v1.pointsman_pb2_grpc import add_PolicyServiceServicer_to_server

EXPIRY_INTERVAL_S = 5.0

HEALTH_SERVICES = (
    "",
    "liveness",
    "readiness",
    "envoy.service.ext_proc.v3.ExternalProcessor",
    "inference-extension",
    "pointsman.v1.PolicyService",
)
"""Names under which probes may ask: gRPC's own, and those of the endpoint-picker protocol."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_GRPC_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 65_536),
]

log = structlog.get_logger(__name__)


def run(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ManifestErrors: the manifests cannot be compiled at start.
        OSError: an address cannot be bound.

    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(PolicyServer(settings).serve())


class PolicyServer:
    """All parts of one process round one `RoutingService`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self.service = RoutingService(self._metrics, seed=settings.seed)
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
        known = manifest_contents(self._settings.manifests)
        async with self._scraper, self._http(), self._grpc():
            await self._reload()
            await self._set_serving(ready=True)
            # Start-up objects live for ever: keep them out of the collector's way.
            gc.collect()
            gc.freeze()
            watch = watch_manifests(self._settings.manifests, self._reload_quietly, known=known)
            tasks = [asyncio.create_task(watch), asyncio.create_task(self._expire())]
            log.info("serving", grpc=self._settings.grpc_address, http=self._settings.http_address)
            await stop.wait()
            log.info("draining", in_flight=len(self.service.state))
            await self._set_serving(ready=False)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        log.info("stopped", in_flight=len(self.service.state))

    # --- manifests ---------------------------------------------------------------------

    async def _reload(self) -> None:
        """Compile the manifests and put them in force, all or nothing.

        Raises:
            ManifestErrors: some are wrong; what was in force stays.

        """
        # In a thread: a large site takes long enough to be felt by requests.
        compiled = await asyncio.to_thread(_compile, self._settings.manifests)
        self.service.install(compiled.snapshots)
        self._scraper.update(
            {address: _target(found[0]) for address, found in self.service.candidates().items()}
        )
        self._publish_endpoints()
        self._metrics.reloads.labels("ok").inc()
        for warning in compiled.warnings:
            log.warning("manifest", problem=str(warning))
        for snapshot in compiled.snapshots:
            log.info(
                "snapshot in force",
                policy=snapshot.full_name,
                version=snapshot.version,
                candidates=len(snapshot.candidates),
            )

    async def _reload_quietly(self) -> None:
        try:
            await self._reload()
        except ManifestErrors as errors:
            self._metrics.reloads.labels("failed").inc()
            for error in errors.errors:
                log.warning("manifest refused, the previous snapshot stays", problem=str(error))

    def _publish_endpoints(self) -> None:
        self._eds.set_endpoints(
            [
                EdsEndpoint(
                    address=address,
                    served_models=candidate.served_models,
                    expert=candidate.expert,
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
            await site.start()
            yield
        finally:
            await runner.cleanup()

    @contextlib.asynccontextmanager
    async def _grpc(self) -> AsyncIterator[None]:
        # The body, and room for the rest of its message.
        longest = ("grpc.max_receive_message_length", self._settings.body_limit_bytes + 65_536)
        server = grpc.aio.server(options=[*_GRPC_OPTIONS, longest])
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
            raise OSError(f"cannot listen on {self._settings.grpc_address}: {error}") from None
        await server.start()
        try:
            yield
        finally:
            self._eds.close()
            await server.stop(self._settings.drain_timeout_s)


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
