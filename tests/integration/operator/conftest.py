"""The operator as a process of its own, in front of a real API server and real policy servers.

Each of them can be broken. `Site` is one namespace of one control plane, which is shared by
the tests of a module; what a test breaks is mended before the next one.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web

from control_plane.cluster import ControlPlane, control_plane
from control_plane.daemons import Daemon, free_port
from control_plane.fixtures import install_crds
from pointsman_cli.demo.processes import Child, Children, children, wait_for_http
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import PolicyServiceStub, SnapshotServiceStub

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

REPOSITORY = Path(__file__).parents[3]
RBAC = REPOSITORY / "operator" / "manifests" / "rbac.yaml"
POINTSMAN = (sys.executable, "-m", "pointsman_cli.main")
API_VERSION = "pointsman.dev/v1alpha1"
PATIENCE_S = 90.0
POLL_S = 0.05
OWN_KINDS = "llmexperts.pointsman.dev,routingpolicies.pointsman.dev"
PLURALS = {"llmexpert": "llmexperts", "routingpolicy": "routingpolicies"}
COLLECTIONS = (
    f"/apis/{API_VERSION}/llmexperts",
    f"/apis/{API_VERSION}/routingpolicies",
    "/apis/discovery.k8s.io/v1/endpointslices",
    "/api/v1/services",
    "/api/v1/pods",
    "/api/v1/configmaps",
)
UNAUTHORIZED = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "message": "Unauthorized",
    "reason": "Unauthorized",
    "code": 401,
}
EXPIRED = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "message": "too old resource version: 1 (2)",
    "reason": "Expired",
    "code": 410,
}


async def eventually(
    check: Callable[[], Awaitable[Any]],
    *,
    equals: Any = None,
    patience_s: float = PATIENCE_S,
    pause_s: float = POLL_S,
) -> Any:
    """Ask until the answer is true, or equal to ``equals``; fails with the last answer."""
    found: Any = None
    try:
        async with asyncio.timeout(patience_s):
            while True:
                found = await check()
                if found == equals if equals is not None else found:
                    return found
                await asyncio.sleep(pause_s)
    except TimeoutError:
        if equals is not None:
            assert found == equals
        raise AssertionError(f"not within {patience_s:g} s; the last answer: {found!r}") from None


# --- between the operator and the API server -------------------------------------------


@dataclass(eq=False)
class Stream:
    """One watch that is under way."""

    plural: str
    last_words: asyncio.Future[bytes]
    stalled: bool = False


@dataclass
class Hold:
    """Requests that must wait."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def at_the_door(self) -> bool:
        """Whether one is waiting."""
        return self.arrived.is_set()


class ApiProxy:
    """Plain HTTP in front of the API server, which misbehaves for its one client only."""

    def __init__(self, upstream: str, authority: Path) -> None:
        self.url = ""
        self.requests: Counter[tuple[str, str]] = Counter()
        """By verb (get, list, watch, create, patch, delete) and plural."""
        self.refusing = False
        """Every connection is broken off."""
        self.unauthorized = False
        """Everything is answered by HTTP 401, as when a token has expired."""
        self.gone: Counter[str] = Counter()
        """How many watches of a plural are answered by HTTP 410."""
        self.lost: Counter[str] = Counter()
        """Events that stalled watches kept, by plural."""
        self.expired: Counter[str] = Counter()
        """How often the API server itself called a version too old, by plural."""
        self._holds: dict[tuple[str, str], Hold] = {}
        self._streams: set[Stream] = set()
        self._upstream = upstream
        self._context = ssl.create_default_context(cafile=str(authority))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["ApiProxy"]:
        """Serve on a loopback port."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=4 * 1024 * 1024
        ) as self._session:
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield self
            finally:
                self.refuse()
                await runner.cleanup()

    def refuse(self) -> None:
        """Break off all connections, and every new one."""
        self.refusing = True
        self._say_last(self._streams, b"")

    def admit(self) -> None:
        """The end of `refuse`."""
        self.refusing = False

    def stall(self, *plurals: str) -> None:
        """Let watches stay open and say nothing, like connections that died unseen."""
        for one in self._streams:
            one.stalled = one.stalled or one.plural in plurals

    def expire(self, *plurals: str) -> None:
        """End watches as the API server does when their version is too old."""
        event = json.dumps({"type": "ERROR", "object": EXPIRED}).encode() + b"\n"
        self._say_last({one for one in self._streams if one.plural in plurals}, event)

    def end(self, *plurals: str) -> None:
        """End watches without a word, as the API server does after some minutes."""
        self._say_last({one for one in self._streams if one.plural in plurals}, b"")

    def hold(self, verb: str, plural: str) -> Hold:
        """Let such requests wait until they are released."""
        self._holds[verb, plural] = found = Hold()
        return found

    def release(self) -> None:
        """The end of every `hold`."""
        for one in self._holds.values():
            one.released.set()
        self._holds.clear()

    def watched(self) -> set[str]:
        """Plurals of which a watch would tell."""
        return {one.plural for one in self._streams if not one.stalled}

    @staticmethod
    def _say_last(streams: set[Stream], words: bytes) -> None:
        for one in streams:
            if not one.last_words.done():
                one.last_words.set_result(words)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        verb, plural = _what(request)
        self.requests[verb, plural] += 1
        if hold := self._holds.get((verb, plural)):
            hold.arrived.set()
            await hold.released.wait()
        if verb == "watch" and self.gone[plural]:
            self.gone[plural] -= 1
            return web.json_response(EXPIRED, status=410)
        if self.refusing or request.transport is None or request.transport.is_closing():
            return _abort(request)
        if self.unauthorized:
            return web.json_response(UNAUTHORIZED, status=401)
        drop = {"host", "accept-encoding", "connection", "content-length", "transfer-encoding"}
        headers = {k: v for k, v in request.headers.items() if k.lower() not in drop}
        body = await request.read()
        try:
            async with self._session.request(
                request.method,
                self._upstream + request.raw_path,
                headers=headers,
                data=body or None,
            ) as answer:
                self.expired[plural] += answer.status == 410
                if verb == "watch" and answer.status == 200:
                    return await self._stream(request, plural, answer)
                return web.Response(
                    status=answer.status,
                    body=await answer.read(),
                    headers={"content-type": answer.headers.get("content-type", "")},
                )
        except (aiohttp.ClientError, ConnectionError):
            return _abort(request)

    async def _stream(
        self, request: web.Request, plural: str, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        stream = Stream(plural, loop.create_future())
        self._streams.add(stream)
        try:
            while True:
                line = asyncio.ensure_future(answer.content.readline())
                await asyncio.wait({line, stream.last_words}, return_when="FIRST_COMPLETED")
                if stream.last_words.done():
                    line.cancel()
                    await asyncio.wait({line})
                    if self.refusing:
                        return _abort(request)
                    await response.write(stream.last_words.result())
                    break
                if not line.result():
                    break
                if stream.stalled:
                    self.lost[plural] += 1
                    continue
                self.expired[plural] += b'"code":410' in line.result()
                await response.write(line.result())
        finally:
            self._streams.discard(stream)
        await response.write_eof()
        return response


def _abort(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _what(request: web.Request) -> tuple[str, str]:
    """Verb and plural of a request."""
    root, *rest = request.path.strip("/").split("/")
    rest = rest[2:] if root == "apis" else rest[1:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    if request.method == "GET":
        verb = "get" if len(rest) > 1 else "list"
        return "watch" if "watch" in request.query else verb, rest[0] if rest else "discovery"
    return "create" if request.method == "POST" else request.method.lower(), "/".join(
        part for at, part in enumerate(rest) if at != 1
    )


# --- the data plane --------------------------------------------------------------------


@dataclass
class InForce:
    """What a policy server routes by."""

    generations: Mapping[str, int]
    """By policy."""
    addresses: frozenset[str]


@dataclass
class PolicyServer:
    """One policy server and the means to break it."""

    site: "Site"
    name: str
    control_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    child: Child | None = None
    _channel: grpc.aio.Channel | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.control_port}"

    @property
    def grpc_address(self) -> str:
        return f"unix://{self.site.folder}/{self.name}.sock"

    async def start(self) -> None:
        """Start with nothing, and wait until it listens."""
        snapshots = self.site.folder / f"{self.name}-snapshots"
        snapshots.mkdir(exist_ok=True)
        self.child = await self.site.processes.start(
            f"policy server {self.name}",
            [
                *(*POINTSMAN, "policy-server", "--snapshots", str(snapshots)),
                *("--control-address", self.address, "--grpc-address", self.grpc_address),
                *("--http-address", f"127.0.0.1:{self.http_port}"),
            ],
            log_path=self.site.folder / f"{self.name}.log",
        )
        await wait_for_http(
            self.site.session, self.child, f"http://127.0.0.1:{self.http_port}/healthz"
        )

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.child is not None
        self.child.process.kill()
        await self.child.process.wait()

    def freeze(self) -> None:
        """SIGSTOP, until `thaw`."""
        assert self.child is not None
        self.child.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self.child is not None
        self.child.process.send_signal(signal.SIGCONT)

    async def status(self) -> pb.StatusResponse:
        """What it says of itself."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            return await SnapshotServiceStub(channel).Status(
                pb.StatusRequest(), timeout=PATIENCE_S, wait_for_ready=True
            )

    async def in_force(self) -> InForce:
        """What it routes by in the site's namespace."""
        status = await self.status()
        mine = [one for one in status.applied if one.namespace == self.site.namespace]
        return InForce(
            {one.policy: one.generation for one in mine},
            frozenset(one.address for one in status.endpoints),
        )

    async def version(self, policy: str = "auto") -> str:
        """Version in force of one policy; empty if it has none."""
        found = (one for one in (await self.status()).applied if one.policy == policy)
        return next((one.version for one in found), "")

    async def decide(self, model: str) -> pb.Decision:
        """Which endpoint a request would get now."""
        async with grpc.aio.insecure_channel(self.grpc_address) as channel:
            return await PolicyServiceStub(channel).Decide(
                pb.DecideRequest(model=model, prompt="hello"), timeout=PATIENCE_S
            )

    @contextlib.asynccontextmanager
    async def history(self, policy: str = "auto") -> AsyncIterator[list[str]]:
        """Versions that were in force one after the other, the first one included."""
        seen: list[str] = []

        async def look(channel: grpc.aio.Channel) -> None:
            stub = SnapshotServiceStub(channel)
            while True:
                status = await stub.Status(pb.StatusRequest(), timeout=PATIENCE_S)
                found = [one.version for one in status.applied if one.policy == policy]
                if seen[-1:] != (found or [""]):
                    seen.extend(found or [""])
                await asyncio.sleep(POLL_S)

        async with grpc.aio.insecure_channel(self.address) as channel:
            task = asyncio.create_task(look(channel))
            try:
                yield seen
                await asyncio.sleep(2 * POLL_S)  # the last look comes after the last change
                assert not task.done(), "the policy server stopped answering"
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


# --- the operator ----------------------------------------------------------------------


@dataclass
class OperatorProcess:
    """One operator."""

    site: "Site"
    child: Child
    http_port: int

    @property
    def log(self) -> str:
        return self.child.log_path.read_text(encoding="utf-8", errors="replace")

    def errors(self) -> list[str]:
        """Lines of the log that tell of a bug; kopf tells of each try in this level."""
        lines = self.log.splitlines()
        return [one for one in lines if '"level": "error"' in one and "will retry" not in one]

    @property
    def running(self) -> bool:
        return self.child.ended() is None

    async def kill(self) -> None:
        """SIGKILL."""
        self.child.process.kill()
        await self.child.process.wait()

    async def stop(self) -> int:
        """SIGTERM; tells the exit status."""
        self.child.process.send_signal(signal.SIGTERM)
        return await self.child.process.wait()

    async def page(self, path: str) -> tuple[int, str]:
        """Status and text of one of its pages."""
        async with self.site.session.get(f"http://127.0.0.1:{self.http_port}{path}") as answer:
            return answer.status, await answer.text()

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        _, text = await self.page("/metrics")
        total = 0.0
        for line in text.splitlines():
            matched = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if matched and matched[1] == name:
                has = dict(re.findall(r'(\w+)="([^"]*)"', matched[2] or ""))
                if labels.items() <= has.items():
                    total += float(matched[3])
        return total

    def memory_mib(self, field: str = "VmRSS") -> float:
        """Resident memory, now (VmRSS) or at most (VmHWM)."""
        status = Path(f"/proc/{self.child.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024

    def cpu_s(self) -> float:
        """CPU time so far."""
        stat = Path(f"/proc/{self.child.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


# --- what is declared ------------------------------------------------------------------

BEFORE = InForce(
    {"auto": 1, "doomed": 1},
    frozenset(
        {
            *("127.0.0.1:1", "127.0.0.1:2", "239.0.0.1:9", "239.0.0.2:9"),
            *("127.0.1.1:9", "127.0.1.2:9"),
        }
    ),
)
AFTER = InForce({"auto": 2}, frozenset({"127.0.0.1:3", "239.0.0.1:9", "127.0.1.1:9"}))


def policy(name: str, **spec: Any) -> dict[str, Any]:
    """A policy that answers its own name."""
    return {
        "apiVersion": API_VERSION,
        "kind": "RoutingPolicy",
        "metadata": {"name": name},
        "spec": {"models": [name], **spec},
    }


def expert(name: str, **backend: Any) -> dict[str, Any]:
    """An expert; nobody listens where it says, unless a test sees to it."""
    return {
        "apiVersion": API_VERSION,
        "kind": "LLMExpert",
        "metadata": {"name": name},
        "spec": {
            "model": f"{name}-model",
            "backend": backend,
            "engine": {"metrics": {"intervalMs": 1000}},
        },
    }


def endpoint_slice(name: str, *ips: str) -> dict[str, Any]:
    """Endpoints of the Service ``engines``.

    The API server refuses loopback; a multicast address is refused by the kernel at once,
    so that no packet leaves the machine.
    """
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "engines"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 9, "protocol": "TCP"}],
        "endpoints": [{"addresses": [ip], "conditions": {"ready": True}} for ip in ips],
    }


def pod(name: str) -> dict[str, Any]:
    """A pod of an engine."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "engine"}},
        "spec": {"containers": [{"name": "engine", "image": "engine"}]},
    }


def ready(ip: str) -> dict[str, Any]:
    """The status of a pod that serves."""
    return {
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }
    }


def shipped(kind: str) -> dict[str, Any]:
    """The object of a kind in the operator's manifests."""
    (found,) = (one for one in yaml.safe_load_all(RBAC.read_text()) if one["kind"] == kind)
    return dict(found)


# --- all of it -------------------------------------------------------------------------


@dataclass
class Site:
    """One namespace, and who serves it."""

    plane: ControlPlane
    namespace: str
    folder: Path
    kubeconfig: Path
    """Of the operator's service account."""
    processes: Children
    session: aiohttp.ClientSession
    proxy: ApiProxy
    client: "ApiClient"
    """Of the administrator."""
    servers: list[PolicyServer] = field(default_factory=list)

    # Tests cannot import from here.
    before: ClassVar = BEFORE
    """In force when the scene is set."""
    after: ClassVar = AFTER
    """In force when the scene was changed."""
    eventually = staticmethod(eventually)
    policy = staticmethod(policy)
    expert = staticmethod(expert)
    endpoint_slice = staticmethod(endpoint_slice)
    in_force = InForce
    shipped = staticmethod(shipped)
    install_crds = staticmethod(install_crds)

    @staticmethod
    async def start(daemon: Daemon) -> None:
        """Start etcd or the API server."""
        # By this thread, with which it would end; others may wait.
        daemon.launch()
        await asyncio.to_thread(daemon.wait_until_ready)

    @property
    def server(self) -> PolicyServer:
        """The first policy server."""
        return self.servers[0]

    async def start_server(self) -> PolicyServer:
        """One more policy server; operators started later know of it."""
        server = PolicyServer(self, f"policy-server-{len(self.servers)}")
        await server.start()
        self.servers.append(server)
        return server

    async def start_operator(
        self, *flags: str, proxied: bool = False, resync_s: float = 2.0, synced: bool = True
    ) -> OperatorProcess:
        """One operator, by default with its first full list done."""
        port = free_port()
        return await self._start_operator(
            [
                *(*POINTSMAN, "operator", "--http-address", f"127.0.0.1:{port}"),
                *(f"--policy-server-address={server.address}" for server in self.servers),
                *(f"--resync-interval={resync_s}", *flags),
            ],
            {"KUBECONFIG": str(self._through_proxy() if proxied else self.kubeconfig)},
            port=port,
            path="readyz" if synced else "healthz",
        )

    async def start_kopf(self, *flags: str) -> OperatorProcess:
        """One operator as kopf's own command starts it."""
        port = free_port()
        return await self._start_operator(
            [sys.executable, "-m", "kopf", "run", "-m", "pointsman_operator.main", *flags],
            {
                "KUBECONFIG": str(self.kubeconfig),
                "POINTSMAN_HTTP_ADDRESS": f"127.0.0.1:{port}",
                "POINTSMAN_POLICY_SERVER_ADDRESS": " ".join(one.address for one in self.servers),
            },
            port=port,
            path="readyz",
        )

    async def _start_operator(
        self, command: Sequence[str], environment: Mapping[str, str], *, port: int, path: str
    ) -> OperatorProcess:
        variables = (f"{name}={value}" for name, value in environment.items())
        child = await self.processes.start(
            "operator",
            [str(shutil.which("env")), *variables, *command],
            log_path=self.folder / f"operator-{uuid.uuid4().hex[:4]}.log",
        )
        await wait_for_http(self.session, child, f"http://127.0.0.1:{port}/{path}")
        return OperatorProcess(self, child, port)

    def _through_proxy(self) -> Path:
        document = yaml.safe_load(self.kubeconfig.read_text())
        document["clusters"][0]["cluster"] = {"server": self.proxy.url}
        path = self.folder / "proxy.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path

    async def kubectl(self, *arguments: str, **options: Any) -> str:
        """kubectl in the site's namespace, as the administrator."""
        done = await asyncio.to_thread(
            self.plane.kubectl, f"--namespace={self.namespace}", *arguments, **options
        )
        return str(done.stdout)

    async def get(self, *arguments: str) -> Any:
        """What ``kubectl get … -o json`` prints, parsed."""
        return json.loads(await self.kubectl("get", *arguments, "-o", "json"))

    async def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects in the site's namespace."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        flags = ("--server-side", "--force-conflicts")
        await self.kubectl("apply", *flags, "-f", "-", stdin=text)

    async def apply_status(self, *objects: Mapping[str, Any]) -> None:
        """Apply what nobody but a kubelet writes."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        flags = ("--server-side", "--force-conflicts", "--subresource=status")
        await self.kubectl("apply", *flags, "-f", "-", stdin=text)

    async def call(self, method: str, kind: str, name: str = "", body: object = None) -> Any:
        """One request as the administrator; takes far less time than a kubectl."""
        while True:
            status, data = await asyncio.to_thread(self._call, method, kind, name, body)
            if status < 300:
                return json.loads(data)
            # After its start the API server asks for patience: it has not found its CRDs yet.
            assert status == 503, f"{method} {kind} {name}: {status}: {data!r}"
            await asyncio.sleep(POLL_S)

    def _call(self, method: str, kind: str, name: str, body: object) -> tuple[int, bytes]:
        root = f"/apis/{API_VERSION}" if kind in PLURALS.values() else "/api/v1"
        query = [("labelSelector", "pointsman.dev/snapshot=true")] if kind == "configmaps" else []
        response = self.client.call_api(
            *self.client.param_serialize(
                method,
                f"{root}/namespaces/{self.namespace}/{kind}/{name}".rstrip("/"),
                query_params=query,
                header_params={"Content-Type": "application/merge-patch+json"},
                body=body,
            )
        )
        return response.status, response.read()

    async def patch(self, kind: str, name: str, spec: Mapping[str, Any]) -> None:
        """Change parts of a spec."""
        await self.call("PATCH", PLURALS[kind], name, {"spec": spec})

    async def limit(self, milliseconds: int, policy: str = "auto") -> None:
        """Change the limit of a policy: the smallest change that has a new generation."""
        await self.patch("routingpolicy", policy, {"qos": {"latencyPerTokenMs": milliseconds}})

    async def condition(self, kind: str, name: str, type_: str) -> Mapping[str, Any]:
        """One condition; empty if it is not there."""
        found = await self.call("GET", PLURALS[kind], name)
        status = found.get("status", {})
        return next((c for c in status.get("conditions", ()) if c["type"] == type_), {})

    # A scene in which each kind has something to lose.

    async def set_the_scene(self) -> None:
        """Two policies, and experts with each kind of backend."""
        await self.apply(
            {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": "default"}}
        )
        await self.apply(
            policy("auto"),
            policy("doomed"),
            expert("fixed", addresses=["127.0.0.1:1"]),
            expert("doomed", addresses=["127.0.0.1:2"]),
            expert("served", service={"name": "engines", "port": 9}),
            expert("selected", podSelector={"matchLabels": {"app": "engine"}, "port": 9}),
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "engines"},
                "spec": {"ports": [{"port": 9}]},
            },
            *(endpoint_slice(f"engines-{at}", f"239.0.0.{at}") for at in (1, 2)),
            *(pod(f"engine-{at}") for at in (1, 2)),
        )
        await self.apply_status(*(pod(f"engine-{at}") | ready(f"127.0.1.{at}") for at in (1, 2)))

    async def change_the_scene(self) -> None:
        """One of each kind goes, another one changes."""
        # An API server that has just started is ready before it serves what CRDs define.
        await eventually(lambda: self.kubectl("get", OWN_KINDS, "-o", "name", check=False))
        await asyncio.gather(
            self.kubectl("delete", OWN_KINDS, "doomed"),
            self.kubectl("delete", "endpointslice/engines-2"),
            self.kubectl("delete", "pod/engine-2", "--force", "--grace-period=0"),
            self.patch("llmexpert", "fixed", {"backend": {"addresses": ["127.0.0.1:3"]}}),
            self.limit(70),
        )

    async def converged(self, expected: InForce) -> None:
        """Wait until policy servers, ConfigMaps and statuses all say the same."""
        for server in self.servers:
            await eventually(server.in_force, equals=expected)
        versions = {
            one.policy: one.version
            for one in (await self.server.status()).applied
            if one.namespace == self.namespace
        }
        await eventually(self._stored_versions, equals=versions)
        for name, generation in expected.generations.items():
            await eventually(lambda name=name: self.programmed(name), equals=("True", generation))

    async def _stored_versions(self) -> dict[str, str]:
        maps = await self.call("GET", "configmaps")
        contents = [json.loads(one["data"]["snapshot.json"]) for one in maps["items"]]
        return {one["policy"]: one["version"] for one in contents}

    async def programmed(self, name: str) -> tuple[str, int]:
        """Status and generation of a policy's condition Programmed."""
        found = await self.condition("routingpolicy", name, "Programmed")
        return found.get("status", ""), found.get("observedGeneration", 0)


# --- fixtures --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plane(programs: None) -> Iterator[ControlPlane]:  # noqa: ARG001
    """A control plane with our kinds and the operator's account, which tests may break."""
    with control_plane() as plane:
        install_crds(plane)
        plane.kubectl("create", "namespace", shipped("ServiceAccount")["metadata"]["namespace"])
        plane.kubectl("apply", "--server-side", "-f", str(RBAC))
        yield plane


@pytest.fixture(scope="module")
def account(plane: ControlPlane) -> Path:
    """A kubeconfig of the operator's service account."""
    meta = shipped("ServiceAccount")["metadata"]
    return plane.kubeconfig_of(meta["name"], namespace=meta["namespace"])


@pytest.fixture
async def site(plane: ControlPlane, account: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """An empty namespace, and one policy server that has nothing yet."""
    await _mend(plane)
    name = f"test-{uuid.uuid4().hex[:8]}"
    await asyncio.to_thread(plane.kubectl, "create", "namespace", name)
    async with (
        contextlib.AsyncExitStack() as stack,
        children() as processes,
        aiohttp.ClientSession() as session,
        ApiProxy(plane.url, plane.authority.path).running() as proxy,
    ):
        client = stack.enter_context(plane.api_client())
        site = Site(plane, name, tmp_path, account, processes, session, proxy, client)
        await site.start_server()
        yield site
    await _mend(plane)
    # There are no controllers that would empty the namespace; in one request per kind,
    # because kubectl would delete a large site one by one, and slowly.
    for collection in COLLECTIONS:
        root, _, plural = collection.rpartition("/")
        path = f"{root}/namespaces/{name}/{plural}?gracePeriodSeconds=0"
        await asyncio.to_thread(plane.kubectl, "delete", "--raw", path, check=False)
    await asyncio.to_thread(plane.kubectl, "delete", "namespace", name, "--wait=false")


async def _mend(plane: ControlPlane) -> None:
    for daemon in (plane.etcd, plane.api_server):
        if daemon.running:
            daemon.thaw()
        await Site.start(daemon)


@pytest.fixture
async def engine() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Start a stand-in of an engine that serves these models; gives its address."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*models: str) -> str:
            async def listed(_: web.Request) -> web.Response:
                return web.json_response({"data": [{"id": model} for model in models]})

            async def healthy(_: web.Request) -> web.Response:
                return web.Response(text="")

            app = web.Application()
            app.add_routes([web.get("/v1/models", listed), web.get("/health", healthy)])
            app.router.add_get("/metrics", healthy)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"127.0.0.1:{runner.addresses[0][1]}"

        yield start
