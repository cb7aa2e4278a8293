"""The operator's side over real gRPC: mutual TLS, publishing, restarts, traffic meanwhile."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc
import pytest
from aiohttp import web
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from control_plane.certificates import Authority, Pair, write_key
from pointsman_core.resources import (
    Backend,
    LLMExpert,
    LLMExpertSpec,
    ObjectMeta,
    QualityPriors,
    RoutingPolicy,
    RoutingPolicySpec,
)
from pointsman_core.snapshot import (
    NO_VERSION,
    Snapshot,
    compile_snapshot,
    read_snapshot,
    snapshot_json,
)
from pointsman_policy.child import ending_with_parent
from pointsman_policy.control import SnapshotIntake, SnapshotServicer, control_server
from pointsman_policy.envoy import EnvoySettings, running_envoy
from pointsman_policy.metrics import Metrics
from pointsman_policy.service import RoutingService
from pointsman_policy.settings import TlsFiles
from pointsman_policy.snapshots import SnapshotBoard, write_snapshot_files
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import SnapshotServiceStub

pytestmark = pytest.mark.integration

POINTSMAN = (sys.executable, "-m", "pointsman_cli.main")
EXAMPLE = Path(__file__).parents[3] / "examples" / "edge-site"
PATIENCE_S = 90.0
NOWHERE = "127.0.0.1:1"


def snapshot(
    *addresses: str, name: str = "auto", models: tuple[str, ...] = ("auto",), generation: int = 1
) -> Snapshot:
    """A policy with an expert per address, each better than the one after it."""
    experts = [
        LLMExpert(
            metadata=ObjectMeta(name=f"expert-{i}"),
            spec=LLMExpertSpec(
                model=f"model-{i}",
                backend=Backend(addresses=[address]),
                quality=QualityPriors(default=0.9 / (i + 1)),
            ),
        )
        for i, address in enumerate(addresses)
    ]
    policy = RoutingPolicy(
        metadata=ObjectMeta(name=name, generation=generation),
        spec=RoutingPolicySpec(models=list(models), algorithm="QualityGreedy"),
    )
    where = {e.metadata.name: tuple(e.spec.backend.addresses) for e in experts}
    return compile_snapshot(policy, experts, where)


def by_an_older_release(snapshot: Snapshot) -> Snapshot:
    """As if fields had come later: content and version lack them."""
    content = json.loads(snapshot.model_dump_json()) | {"version": NO_VERSION}
    del content["model"]
    for candidate in content["candidates"]:
        del candidate["aliases"]
    text = json.dumps(content, separators=(",", ":"))
    version = hashlib.sha256(text.encode()).hexdigest()[:16]
    return read_snapshot(text.replace(NO_VERSION, version))


def request(
    *snapshots: Snapshot, publisher: str = "op", sequence: int = 1, allow_empty: bool = False
) -> pb.PublishRequest:
    return pb.PublishRequest(
        publisher=publisher,
        sequence=sequence,
        allow_empty=allow_empty,
        snapshots=[
            pb.PublishedSnapshot(
                namespace=one.namespace,
                policy=one.policy,
                generation=one.generation,
                version=one.version,
                snapshot_json=snapshot_json(one).encode(),
            )
            for one in snapshots
        ],
    )


# --- mutual TLS ------------------------------------------------------------------------


@dataclass
class Site:
    """A control port with TLS, and what its clients need."""

    authority: Authority
    server: Pair
    metrics: Metrics = field(default_factory=Metrics)
    port: int = 0

    def credentials(
        self, client: Pair | None, *, trusting: Authority | None = None
    ) -> grpc.ChannelCredentials:
        root = (trusting or self.authority).path.read_bytes()
        if client is None:
            return grpc.ssl_channel_credentials(root)
        return grpc.ssl_channel_credentials(
            root, client.key.read_bytes(), client.certificate.read_bytes()
        )

    async def publish(self, credentials: grpc.ChannelCredentials | None) -> pb.PublishResponse:
        """Publish over a connection of its own."""
        target = f"127.0.0.1:{self.port}"
        # Else channels share the connections of others with equal credentials.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        ) as channel:
            stub = SnapshotServiceStub(channel)
            return await stub.Publish(request(snapshot(NOWHERE)), timeout=PATIENCE_S)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    folder = tmp_path / "stranger"
    folder.mkdir()
    return Authority(folder)


@pytest.fixture
async def site(authority: Authority) -> AsyncIterator[Site]:
    site = Site(authority, authority.server("server", hosts=("127.0.0.1",)))
    files = TlsFiles(
        certificate=site.server.certificate, key=site.server.key, client_ca=authority.path
    )
    service = RoutingService(site.metrics)
    servicer = SnapshotServicer(service, SnapshotIntake(SnapshotBoard(service.install), Metrics()))
    async with control_server(
        servicer, address="127.0.0.1:0", tls=files, metrics=site.metrics
    ) as site.port:
        yield site


async def refused(call: Awaitable[object]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE, error.value.details()


async def test_who_has_a_certificate_may_publish(site: Site):
    answer = await site.publish(site.credentials(site.authority.client("operator")))
    assert [applied.policy for applied in answer.applied] == ["auto"]


async def test_nobody_else_may(site: Site, stranger: Authority):
    await refused(site.publish(site.credentials(None)))
    await refused(site.publish(None))
    await refused(site.publish(site.credentials(stranger.client("operator"))))
    # Such a one must not be usable, though the same authority signed it.
    server = site.authority.server("another-server", hosts=("127.0.0.1",))
    await refused(site.publish(site.credentials(server)))


async def test_nobody_publishes_to_a_server_of_another_authority(site: Site, stranger: Authority):
    client = site.authority.client("operator")
    await refused(site.publish(site.credentials(client, trusting=stranger)))


async def test_rotated_certificates_are_taken_and_bad_ones_are_not(site: Site, stranger: Authority):
    def reloads(result: str) -> float:
        labels = {"result": result}
        return site.metrics.registry.get_sample_value("pointsman_tls_reloads_total", labels) or 0

    old = site.credentials(site.authority.client("operator"))
    write_key(site.server.key)  # not the certificate's
    await site.publish(old)
    assert (reloads("ok"), reloads("failed")) == (0, 1)

    other = stranger.server("server", hosts=("127.0.0.1",))
    site.server.certificate.write_bytes(other.certificate.read_bytes())
    site.server.key.write_bytes(other.key.read_bytes())
    site.authority.path.write_bytes(stranger.path.read_bytes())
    new = site.credentials(stranger.client("operator"), trusting=stranger)
    await site.publish(new)
    await refused(site.publish(old))
    assert (reloads("ok"), reloads("failed")) == (1, 1)


async def test_an_address_that_is_taken(site: Site):
    servicer = SnapshotServicer(None, None)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{site.port}"):
        async with control_server(
            servicer, address=f"127.0.0.1:{site.port}", tls=None, metrics=site.metrics
        ):
            pass


# --- the server's process --------------------------------------------------------------


@dataclass
class Server:
    """A policy server that runs as a process."""

    process: asyncio.subprocess.Process
    folder: Path
    channel: grpc.aio.Channel
    data: grpc.aio.Channel
    http: aiohttp.ClientSession

    @property
    def control(self) -> SnapshotServiceStub:
        return SnapshotServiceStub(self.channel)

    async def publish(self, *snapshots: Snapshot, **fields: object) -> pb.PublishResponse:
        return await self.control.Publish(
            request(*snapshots, **fields), timeout=PATIENCE_S, wait_for_ready=True
        )

    async def status(self) -> pb.StatusResponse:
        return await self.control.Status(
            pb.StatusRequest(), timeout=PATIENCE_S, wait_for_ready=True
        )

    async def is_ready(self) -> bool:
        async with self.http.get("http://server/readyz") as response:
            return response.status == 200

    async def health(self, name: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=name)
        answer = await health_pb2_grpc.HealthStub(self.data).Check(
            request, timeout=PATIENCE_S, wait_for_ready=True
        )
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def until(self, holds: Callable[[pb.StatusResponse], bool]) -> pb.StatusResponse:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = await self.status()
                if holds(status):
                    return status
                await asyncio.sleep(0.02)

    async def until_ready(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if await self.is_ready():
                    return
                await asyncio.sleep(0.02)

    async def decide(self, request_id: str) -> tuple[str, int]:
        """Endpoint that was picked, or ``""``; and the status of an immediate answer, or 200."""
        call = ExternalProcessorStub(self.data).Process()
        headers = {":method": "POST", ":path": "/v1/completions", "x-request-id": request_id}
        values = [HeaderValue(key=k, raw_value=v.encode()) for k, v in headers.items()]
        await call.write(
            ext_proc.ProcessingRequest(
                request_headers=ext_proc.HttpHeaders(headers=HeaderMap(headers=values))
            )
        )
        await call.read()
        body = b'{"model": "auto", "prompt": "x"}'
        await call.write(
            ext_proc.ProcessingRequest(
                request_body=ext_proc.HttpBody(body=body, end_of_stream=True)
            )
        )
        answer = await call.read()
        await call.done_writing()
        if answer.HasField("immediate_response"):
            return "", answer.immediate_response.status.code
        return answer.dynamic_metadata["pointsman"]["endpoint"], 200


def versions(status: pb.StatusResponse | pb.PublishResponse) -> list[str]:
    return [applied.version for applied in status.applied]


@contextlib.asynccontextmanager
async def policy_server(folder: Path) -> AsyncIterator[Server]:
    """Run it over sockets in a folder, with snapshots from the folder within."""
    process = await asyncio.create_subprocess_exec(
        *ending_with_parent(
            [
                *(*POINTSMAN, "policy-server", "--snapshots", f"{folder}/snapshots"),
                *("--grpc-address", f"unix://{folder}/data.sock"),
                *("--http-address", f"unix://{folder}/http.sock"),
                *("--control-address", f"unix://{folder}/control.sock"),
            ]
        )
    )
    connector = aiohttp.UnixConnector(f"{folder}/http.sock")
    # A channel to where a killed server was would first wait before it tries again.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]
    async with (
        grpc.aio.insecure_channel(f"unix://{folder}/control.sock", options=options) as channel,
        grpc.aio.insecure_channel(f"unix://{folder}/data.sock", options=options) as data,
        aiohttp.ClientSession(connector=connector) as http,
    ):
        server = Server(process, folder, channel, data, http)
        try:
            await server.status()
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")  # a socket's path must be short


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[Server]:
    async with policy_server(folder) as server:
        yield server


@dataclass
class Engine:
    """An engine whose answers wait until they may end."""

    name: str
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    address: str = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": self.name}}]})
        await response.write(f"data: {chunk}\n\n".encode())
        await self.may_end.wait()
        await response.write(f"data: {chunk}\n\ndata: [DONE]\n\n".encode())
        return response


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/{path:.*}", engine.complete)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0]
    engine.address = f"{host}:{port}"
    try:
        yield engine
    finally:
        await runner.cleanup()


@pytest.fixture
async def engines() -> AsyncIterator[tuple[Engine, Engine]]:
    async with running(Engine("one")) as one, running(Engine("two")) as two:
        yield one, two


async def test_a_server_without_snapshots_waits_for_the_first(server: Server):
    assert not await server.is_ready()
    assert await server.health("liveness"), "waiting is no reason to be restarted"
    assert not await server.health("readiness")
    assert await server.decide("r1") == ("", 503)
    status = await server.status()
    assert (versions(status), list(status.policies), list(status.endpoints)) == ([], [], [])
    wanted = snapshot(NOWHERE)
    answer = await server.publish(wanted)
    assert versions(answer) == [wanted.version]
    assert answer.instance_id == status.instance_id
    await server.until_ready()
    assert await server.health("readiness")
    assert versions(await server.publish(sequence=2, allow_empty=True)) == []
    assert await server.is_ready(), "no policy is what the operator wants"


async def test_what_is_wrong_is_refused_and_changes_nothing(server: Server):
    wanted = snapshot(NOWHERE)
    await server.publish(wanted, sequence=5)
    broken = request(snapshot(NOWHERE, generation=2), sequence=6)
    broken.snapshots[0].snapshot_json = broken.snapshots[0].snapshot_json[:-1]
    conflicting = request(wanted, snapshot(NOWHERE, name="other"), sequence=6)
    bad = wanted.candidates[0].model_copy(update={"address": "engine:8000"})
    invalid = wanted.model_copy(update={"candidates": (bad,)})
    cases = [
        (broken, grpc.StatusCode.INVALID_ARGUMENT, "default/auto: is no snapshot: Invalid JSON"),
        (conflicting, grpc.StatusCode.INVALID_ARGUMENT, "model auto is answered by default/auto"),
        (request(invalid, sequence=6), grpc.StatusCode.INVALID_ARGUMENT, "its content has"),
        (request(sequence=6), grpc.StatusCode.INVALID_ARGUMENT, "the set is empty"),
        (request(wanted, sequence=4), grpc.StatusCode.FAILED_PRECONDITION, "older than 5"),
    ]
    for case, code, message in cases:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.control.Publish(case, timeout=PATIENCE_S)
        assert error.value.code() is code, message
        assert message in error.value.details()
        assert versions(await server.status()) == [wanted.version], message
    assert versions(await server.publish(wanted, sequence=5)) == [wanted.version]


async def test_the_data_port_takes_no_snapshots(server: Server):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await SnapshotServiceStub(server.data).Publish(request(snapshot(NOWHERE)), timeout=9)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_killed_server_starts_from_its_files(folder: Path):
    command = [*POINTSMAN, "snapshot", "--manifests", str(EXAMPLE)]
    output = ("--output", str(folder / "snapshots"))
    await asyncio.to_thread(subprocess.run, [*command, *output], check=True, capture_output=True)
    printed = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    (wanted,) = map(Snapshot.model_validate_json, printed.stdout.splitlines())
    async with policy_server(folder) as server:
        await server.until_ready()
        before = await server.status()
        os.kill(server.process.pid, signal.SIGKILL)
        await server.process.wait()
    async with policy_server(folder) as server:
        await server.until_ready()
        after = await server.status()
    assert versions(before) == versions(after) == [wanted.version]
    assert before.instance_id != after.instance_id


async def test_changed_files_are_taken_unless_a_publish_outranks_them(server: Server, folder: Path):
    def write(*snapshots: Snapshot) -> None:
        list(write_snapshot_files(folder / "snapshots", snapshots))

    first = snapshot(NOWHERE)
    write(first)
    await server.until(lambda status: versions(status) == [first.version])
    published = snapshot(NOWHERE, "127.0.0.1:2")
    await server.publish(published)
    other = snapshot(name="other", models=("other",))
    write(snapshot("127.0.0.1:3"), other)  # the first of the same generation as the published
    both = [published.version, other.version]
    await server.until(lambda status: versions(status) == both)
    (folder / "snapshots" / "default.other.json").write_text("{")
    later = snapshot(NOWHERE, generation=2)
    write(later)
    await server.until(lambda status: versions(status) == [later.version, other.version])


async def test_publishing_during_traffic_loses_no_decision(
    server: Server, engines: tuple[Engine, Engine]
):
    """An endpoint that is acknowledged to be gone gets no new decision, from that moment on."""
    one, two = (engine.address for engine in engines)
    sets = [(one, two), (one,), (two,)]
    allowed = {one, two}
    ended = asyncio.Event()
    decisions: asyncio.Queue[str] = asyncio.Queue()
    picked: set[str] = set()

    async def traffic(client: int) -> None:
        count = 0
        while not ended.is_set():
            count += 1
            before = set(allowed)
            endpoint, status = await server.decide(f"{client}-{count}")
            assert status == 200
            assert endpoint in before | allowed
            decisions.put_nowait(endpoint)

    await server.publish(snapshot(one, two), sequence=1)
    async with asyncio.TaskGroup() as clients:  # ends the test when a client fails
        for client in range(4):
            clients.create_task(traffic(client))
        for sequence in range(2, 42):
            addresses = sets[sequence % 3]
            allowed |= {*addresses}
            await server.publish(snapshot(*addresses), sequence=sequence)
            allowed &= {*addresses}
            picked |= {await decisions.get() for _ in range(8)}
        ended.set()
    assert picked == {one, two}


async def test_a_request_on_an_endpoint_that_leaves_is_answered_to_its_end(
    server: Server, engines: tuple[Engine, Engine], tmp_path: Path
):
    one, two = engines
    two.may_end.set()
    settings = EnvoySettings(
        listen_port=0,
        admin_port=0,
        policy_server_address=f"unix://{server.folder}/data.sock",
        # However busy the machine is, both requests are decided.
        message_timeout_ms=60_000,
        policy_check_timeout_ms=60_000,
    )
    await server.publish(snapshot(one.address, two.address), sequence=1)
    async with (
        running_envoy(settings, log_path=tmp_path / "envoy.log") as envoy,
        aiohttp.ClientSession() as client,
    ):
        body = {"model": "auto", "messages": [{"role": "user", "content": "x"}], "stream": True}

        def ask() -> aiohttp.client._RequestContextManager:
            return client.post(f"{envoy.url}/v1/chat/completions", json=body)

        async with ask() as slow:
            assert b"one" in await slow.content.readline()
            await server.publish(snapshot(two.address), sequence=2)
            async with ask() as quick:
                assert quick.status == 200
                assert (await quick.text()).count("two") == 2
            leaving = {e.address: (e.ready, e.in_flight) for e in (await server.status()).endpoints}
            assert leaving[one.address] == (False, 1)
            one.may_end.set()
            rest = await slow.text()
        assert rest.count("one") == 1
        assert rest.endswith("[DONE]\n\n")
    # How long the slow one took is not to be judged.
    status = await server.until(lambda status: status.policies[0].requests == 2)
    assert [e.address for e in status.endpoints] == [two.address]
    (policy,) = status.policies
    assert (policy.rejected, policy.failed, policy.window_seconds) == (0, 0, 300)


# --- starting wrongly ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --manifests DIR"),
        (["--control-address", "0.0.0.0:9443", "--snapshots", "x"], "can be reached from other"),
        (["--tls-cert", __file__, "--snapshots", "x"], "go together: give all"),
    ],
)
def test_the_command_refuses_what_cannot_be_served(flags: list[str], message: str, tmp_path: Path):
    done = started_wrongly(tmp_path, *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, "a message, no traceback"


def test_a_certificate_that_is_not_there_is_named_with_its_option(tmp_path: Path):
    files = ("--tls-cert", __file__, "--tls-key", "absent", "--tls-client-ca", __file__)
    done = started_wrongly(tmp_path, "--snapshots", "x", "--control-address", "127.0.0.1:0", *files)
    assert done.returncode == 2
    assert "'--tls-key': absent: there is no such file" in done.stderr


def started_wrongly(tmp_path: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    own = (f"unix://{tmp_path}/d", f"unix://{tmp_path}/h")
    addresses = ("--grpc-address", own[0], "--http-address", own[1], "--log-level", "error")
    return subprocess.run(
        [*POINTSMAN, "policy-server", *addresses, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


async def test_what_an_older_release_compiled_is_served_from_file_and_when_published(folder: Path):
    """After an update the ConfigMap is the older one's; the operator passes it on as it is."""
    today = snapshot(NOWHERE)
    old = by_an_older_release(today)
    assert old.version != today.version
    list(write_snapshot_files(folder / "snapshots", [old]))
    async with policy_server(folder) as server:
        await server.until_ready()
        status = await server.status()
        assert versions(status) == [old.version]
        assert [one.address for one in status.endpoints] == [NOWHERE]
        assert versions(await server.publish(old)) == [old.version]
        assert versions(await server.publish(today, sequence=2)) == [today.version]
