"""The whole product on a real API server: operator, policy server, Envoy, engines.

One operator, policy server and Envoy serve the session; every test has a namespace, engines
and model names of its own. Endpoints are on the machine's own address, as EndpointSlices
refuse loopback.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from control_plane.certificates import Authority
from control_plane.cluster import Cluster
from pointsman_cli.demo.processes import (
    Child,
    Children,
    children,
    first_line,
    free_port,
    wait_for_http,
)
from pointsman_policy.envoy import EnvoySettings
from pointsman_policy.envoy.process import RunningEnvoy, running_envoy
from pointsman_proto.v1 import pointsman_pb2 as pb
from pointsman_proto.v1.pointsman_pb2_grpc import PolicyServiceStub

POINTSMAN = (sys.executable, "-m", "pointsman_cli.main")
RBAC = Path(__file__).parents[3] / "operator" / "manifests" / "rbac.yaml"
API_VERSION = "pointsman.dev/v1alpha1"
SERVICE = "pointsman-policy"
PATIENCE_S = 90.0

FAST = {
    # Far faster than any real board, so that tests do not wait for tokens.
    "iteration-overhead-ms": 1,
    "memory-bandwidth-gbps": 5000,
    "peak-tflops": 5000,
    "max-batched-tokens": 8192,
    "kv-cache-gib": 64,
}

Json = dict[str, Any]


async def until(
    what: str, read: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool], *, pause_s=0.03
) -> Any:
    """Look again and again until it is as wished; fails with what was seen last."""
    seen: Any = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                seen = await read()
                if holds(seen):
                    return seen
                await asyncio.sleep(pause_s)
    shown = seen if isinstance(seen, str) else json.dumps(seen, indent=1, default=str)
    pytest.fail(f"never {what}; last seen:\n{shown}")


# --- the API server --------------------------------------------------------------------


class Api:
    """The API server as the administrator sees it, without blocking the event loop."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._client = cluster.api_client()

    def close(self) -> None:
        self._client.close()

    async def kubectl(self, *arguments: str, **options: Any) -> str:
        done = await asyncio.to_thread(self.cluster.kubectl, *arguments, **options)
        return str(done.stdout)

    async def apply(self, *objects: Mapping[str, Any]) -> None:
        """As ``kubectl apply --server-side`` does."""
        await asyncio.to_thread(self.cluster.apply, *objects)

    async def call(self, method: str, path: str, body: object = None) -> Json:
        """One request; faster than kubectl. A PATCH is a merge patch; 404 brings {}."""
        return await asyncio.to_thread(self._call, method, path, body)

    def _call(self, method: str, path: str, body: object) -> Json:
        content = "application/merge-patch+json" if method == "PATCH" else "application/json"
        response = self._client.call_api(
            *self._client.param_serialize(
                method,
                path,
                header_params={"Accept": "application/json", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
            )
        )
        data = response.read()
        if response.status == 404:
            return {}
        assert response.status < 300, f"{method} {path}: {response.status}: {data!r}"
        return dict(json.loads(data))


# --- the shared part -------------------------------------------------------------------


@dataclass
class Plant:
    """What runs once for all tests."""

    api: Api
    folder: Path
    session: aiohttp.ClientSession
    processes: Children
    host: str
    """The machine's own address."""
    authority: Authority
    rbac: Path = RBAC
    operator_namespace: str = ""
    service_account: str = ""
    operator_kubeconfig: Path = Path()
    operator: Child | None = None
    server: Child | None = None
    envoy: RunningEnvoy | None = None
    ports: dict[str, int] = field(default_factory=dict)
    policy_api: PolicyServiceStub | None = None

    @property
    def grpc_address(self) -> str:
        return f"unix://{self.folder}/policy.sock"

    @property
    def models(self) -> Path:
        """The policy server's folder of models."""
        return self.folder / "models"

    @property
    def url(self) -> str:
        assert self.envoy is not None
        return self.envoy.url

    async def second(self, folder: Path, *, namespace: str, processes: Children) -> "Plant":
        """Another operator and policy server, for one namespace and with the RBAC for that."""
        text = (RBAC.parent / "namespaced.yaml").read_text()
        text = text.replace(f"namespace: {self.operator_namespace}", f"namespace: {namespace}")
        rbac = folder / "rbac.yaml"
        rbac.write_text(text)
        await self.api.kubectl("apply", "--server-side", "-f", str(rbac))
        found = Plant(self.api, folder, self.session, processes, self.host, Authority(folder), rbac)
        found.operator_namespace, found.service_account = namespace, self.service_account
        found.operator_kubeconfig = await asyncio.to_thread(
            self.api.cluster.kubeconfig_of, self.service_account, namespace=namespace
        )
        await asyncio.gather(found.start_server(), found.start_operator("--namespace", namespace))
        return found

    def problems(self) -> list[Json]:
        """What the operator's log tells of bugs and of lacking permissions."""
        return [line for line in self.operator_log() if is_bad(line)]

    def operator_log(self) -> list[Json]:
        assert self.operator is not None
        lines = self.operator.log_path.read_text().splitlines()
        return [json.loads(line) if line.startswith("{") else {"event": line} for line in lines]

    async def start_server(self) -> None:
        """A policy server without any snapshot, and a Service by which it is found."""
        pair = self.authority.server(
            "policy-server", hosts=(f"{SERVICE}.{self.operator_namespace}.svc",)
        )
        self.ports |= {"control": free_port(), "http": free_port()}
        snapshots = self.folder / "snapshots"
        snapshots.mkdir()
        self.models.mkdir()
        self.server = await self.processes.start(
            "policy server",
            [
                *(*POINTSMAN, "policy-server", "--snapshots", str(snapshots)),
                *("--models", str(self.models), "--grpc-address", self.grpc_address),
                *("--http-address", f"127.0.0.1:{self.ports['http']}"),
                *("--control-address", f"{self.host}:{self.ports['control']}"),
                *("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key)),
                *("--tls-client-ca", str(self.authority.path)),
            ],
            log_path=self.folder / "policy-server.log",
        )
        await wait_for_http(self.session, self.server, f"{self.http_url}/healthz")
        address = f"{self.host}:{self.ports['control']}"
        await self.api.apply(*service_of(self.operator_namespace, address))

    async def start_operator(self, *flags: str) -> None:
        """Under its own service account, with what the shipped RBAC allows."""
        pair = self.authority.client("operator")
        self.ports["operator"] = free_port()
        self.operator = await self.processes.start(
            "operator",
            [
                *("/usr/bin/env", f"KUBECONFIG={self.operator_kubeconfig}"),
                *(*POINTSMAN, "operator"),
                *("--policy-servers", f"{self.operator_namespace}/{SERVICE}:9003"),
                *("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key)),
                *("--tls-ca", str(self.authority.path)),
                *("--http-address", f"127.0.0.1:{self.ports['operator']}"),
                *("--probe-interval", "1", "--stats-interval", "1", *flags),
            ],
            log_path=self.folder / "operator.log",
        )
        url = f"http://127.0.0.1:{self.ports['operator']}/readyz"
        await wait_for_http(self.session, self.operator, url)

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    async def live(self) -> Json:
        """What the policy server has in force."""
        async with self.session.get(f"{self.http_url}/debug/in-flight") as response:
            return dict(await response.json())


def service(name: str, namespace: str, **spec: Any) -> Json:
    port = spec.pop("port")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"clusterIP": "None", "ports": [{"port": port}], **spec},
    }


def endpoint_slice(
    service_name: str, namespace: str, endpoints: Mapping[str, bool | str], *, suffix: str = "0"
) -> Json:
    """Endpoints of one port, ready or not; ``terminating`` is ready but on its way out."""
    port = next(iter(endpoints)).rpartition(":")[2]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-{suffix}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": int(port), "protocol": "TCP"}],
        "endpoints": [
            {
                "addresses": [address.rpartition(":")[0]],
                "conditions": {"ready": state is True, "terminating": state == "terminating"},
            }
            for address, state in endpoints.items()
        ],
    }


def service_of(namespace: str, address: str) -> tuple[Json, Json]:
    """The Service of the policy servers."""
    endpoints = endpoint_slice(SERVICE, namespace, {address: True})
    return service(SERVICE, namespace, port=9003), endpoints


def is_bad(line: Json) -> bool:
    """Whether a line of the operator's log tells of a bug or of a lacking permission."""
    if re.search(r"\b403\b|forbidden", json.dumps(line), re.IGNORECASE):
        return True
    # kopf tells of each try in this level, also of the API server's "again in a second".
    return line.get("level") in ("error", "critical") and "will retry" not in line["event"]


def own_address() -> str:
    """An address of this machine that an EndpointSlice may hold."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has only loopback, which EndpointSlices refuse")
        return str(probe.getsockname()[0])


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def plant(
    controllers: Cluster, crds: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Plant]:
    """Everything but engines; the policy server starts empty."""
    del crds  # the same cluster
    folder = tmp_path_factory.mktemp("plant")
    host, api = own_address(), Api(controllers)
    rbac = [one for one in yaml.safe_load_all(RBAC.read_text()) if one]
    (account,) = (one["metadata"] for one in rbac if one["kind"] == "ServiceAccount")
    namespace = account["namespace"]
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(api.close)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=PATIENCE_S),
                connector=aiohttp.TCPConnector(limit=0),
            )
        )
        processes = await stack.enter_async_context(children())
        found = Plant(api, folder, session, processes, host, Authority(folder))
        found.operator_namespace, found.service_account = namespace, account["name"]
        whole = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        # Of a cluster where somebody has installed Pointsman nothing of theirs may go.
        ours = await asyncio.to_thread(
            controllers.missing, *service_of(namespace, f"{host}:1"), *rbac, whole
        )
        await api.apply(whole)
        await api.kubectl("apply", "--server-side", "-f", str(RBAC))
        found.operator_kubeconfig = await asyncio.to_thread(
            controllers.kubeconfig_of, account["name"], namespace=namespace
        )
        await asyncio.gather(found.start_server(), found.start_operator())
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(found.grpc_address))
        found.policy_api = PolicyServiceStub(channel)
        settings = EnvoySettings(
            listen_port=0,
            admin_port=0,
            policy_server_address=found.grpc_address,
            # However busy the machine is, no request goes on without a decision, and how each
            # one ended is seen.
            message_timeout_ms=60_000,
            policy_check_timeout_ms=60_000,
            observe_close_delay_ms=3000,
        )
        found.envoy = await stack.enter_async_context(
            running_envoy(settings, log_path=folder / "envoy.log")
        )
        yield found
        problems = found.problems()
        await asyncio.to_thread(controllers.delete, *ours, wait=False)
        assert problems == [], "the operator's log of the whole session"


# --- one test's part -------------------------------------------------------------------


@dataclass
class Engine:
    """A simulated engine."""

    child: Child
    address: str

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        os.kill(self.child.process.pid, signal.SIGKILL)
        await self.child.process.wait()


class HeldEngine:
    """An engine whose streamed answers go on only when the test says so."""

    FIRST = 4
    """Tokens that come at once."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.address = ""
        self.running = 0
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let all answers go on to their end."""
        self._released.set()

    @contextlib.asynccontextmanager
    async def serving(self, host: str) -> AsyncIterator["HeldEngine"]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, 0).start()
            self.address = "{}:{}".format(*runner.addresses[0][:2])
            yield self
        finally:
            self.release()
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        lines = (
            f"vllm:num_requests_running {self.running}",
            "vllm:num_requests_waiting 0",
            "vllm:kv_cache_usage_perc 0",
        )
        return web.Response(text="\n".join(lines) + "\n")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if not asked.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "x"}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            return web.json_response({"choices": [choice], "usage": usage})
        self.running += 1
        try:
            return await self._stream(request, int(asked["max_tokens"]))
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, tokens: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        event = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
        token = f"data: {json.dumps(event)}\n\n".encode()
        await response.write(token * self.FIRST)
        await self._released.wait()
        for _ in range(tokens - self.FIRST):
            await response.write(token)
        await response.write(b"data: [DONE]\n\n")
        return response


class Stream:
    """A streamed answer on its way."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.expert = response.headers.get("x-pointsman-expert", "")
        self.endpoint = response.headers.get("x-pointsman-endpoint", "")
        self.tokens = 0
        self.done = False
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for line in self.response.content:
            text = line.decode().strip().removeprefix("data: ")
            if text == "[DONE]":
                self.done = True
            elif text and any(c["delta"].get("content") for c in json.loads(text)["choices"]):
                self.tokens += 1

    async def end(self) -> int:
        """Wait for the end; how many tokens came."""
        await self._task
        return self.tokens


@dataclass
class Place:
    """A namespace, and everything that a test does in it."""

    plant: Plant
    namespace: str
    processes: Children
    engines_here: contextlib.AsyncExitStack
    """Engines in this process."""

    @property
    def api(self) -> Api:
        return self.plant.api

    @property
    def model(self) -> str:
        """A model name that no other test uses."""
        return f"auto.{self.namespace}"

    # engines

    async def engine(
        self, model: str, *flags: str, host: str = "", port: int = 0, **profile: float
    ) -> Engine:
        """Start a simulated engine that serves ``model``."""
        profile = FAST | {name.replace("_", "-"): value for name, value in profile.items()}
        child = await self.processes.start(
            f"engine {model}",
            [
                *(*POINTSMAN, "engine-sim", "--model", model),
                *("--host", host or self.plant.host, "--port", str(port)),
                *(text for name, value in profile.items() for text in (f"--{name}", str(value))),
                *flags,
            ],
            log_path=self.plant.folder / f"{self.namespace}-{model}-{time.monotonic_ns()}.log",
            read_output=True,
        )
        announced = await first_line(child)
        return Engine(child, str(announced["url"]).partition("://")[2])

    async def engines(self, *models: str) -> list[Engine]:
        return list(await asyncio.gather(*map(self.engine, models)))

    async def held_engine(self, model: str) -> HeldEngine:
        """Start an engine whose streamed answers last until they are released."""
        return await self.engines_here.enter_async_context(
            HeldEngine(model).serving(self.plant.host)
        )

    # objects

    def expert(self, name: str, *, model: str = "", quality: float = 0.5, **spec: Any) -> Json:
        """An LLMExpert; give ``backend``, or ``addresses`` for short."""
        if addresses := spec.pop("addresses", None):
            spec["backend"] = {"addresses": addresses}
        return {
            "apiVersion": API_VERSION,
            "kind": "LLMExpert",
            "metadata": {"name": name, "namespace": self.namespace, **spec.pop("metadata", {})},
            "spec": {
                "model": model or name,
                "engine": {"type": "vllm", "metrics": {"intervalMs": 100}},
                "quality": {"default": quality},
                **spec,
            },
        }

    def policy(self, name: str = "auto", **spec: Any) -> Json:
        """A RoutingPolicy; the expert of the highest quality gets every request."""
        return {
            "apiVersion": API_VERSION,
            "kind": "RoutingPolicy",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {
                "models": [self.model],
                "algorithm": "QualityGreedy",
                "explainHeaders": True,
                **spec,
            },
        }

    def service(self, name: str, **spec: Any) -> Json:
        return service(name, self.namespace, **spec)

    def slice(self, name: str, endpoints: Mapping[str, bool | str], *, suffix: str = "0") -> Json:
        return endpoint_slice(name, self.namespace, endpoints, suffix=suffix)

    async def pod(
        self,
        name: str,
        *,
        ip: str,
        labels: Mapping[str, str],
        ready: bool = True,
        node: str = "",
        port: int = 8000,
    ) -> None:
        """A pod that no kubelet knows; its status is written by hand."""
        ports = [{"name": "http", "containerPort": port}]
        binding = {"nodeName": node} if node else {"schedulerName": "nobody"}
        await self.kubectl("wait", "serviceaccount/default", "--for=create", "--timeout=30s")
        await self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": self.namespace, "labels": labels},
                "spec": {
                    "containers": [{"name": "engine", "image": "none", "ports": ports}],
                    **binding,
                },
            }
        )
        await self.set_pod(name, ip=ip, ready=ready)

    async def set_pod(self, name: str, *, ip: str, ready: bool) -> None:
        status = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        await self.patch("pods", name, {"status": status}, sub="/status")

    async def apply(self, *objects: Mapping[str, Any]) -> None:
        await self.api.apply(*objects)

    async def delete(self, kind: str, name: str) -> None:
        await self.kubectl("delete", kind, name)

    async def kubectl(self, *arguments: str, **options: Any) -> str:
        return await self.api.kubectl(f"--namespace={self.namespace}", *arguments, **options)

    def path(self, kind: str, name: str) -> str:
        """Where an object is served."""
        roots = {
            "llmexperts": f"/apis/{API_VERSION}",
            "routingpolicies": f"/apis/{API_VERSION}",
            "endpointslices": "/apis/discovery.k8s.io/v1",
        }
        return f"{roots.get(kind, '/api/v1')}/namespaces/{self.namespace}/{kind}/{name}"

    async def get(self, kind: str, name: str) -> Json:
        return await self.api.call("GET", self.path(kind, name))

    async def patch(self, kind: str, name: str, body: object, *, sub: str = "") -> Json:
        return await self.api.call("PATCH", self.path(kind, name) + sub, body)

    async def until_expert(
        self, name: str, *, endpoints: tuple[int, int] | None = None, **wanted: str
    ) -> Json:
        """Wait for conditions, such as ``Ready="True"`` or ``Ready="False/NoEndpoints"``.

        ``endpoints`` is how many are ready, of how many: conditions may hold before it does.
        """
        fields = {}
        if endpoints is not None:
            fields["endpoints"] = dict(zip(("ready", "total"), endpoints, strict=True))
        return await self._until_status("llmexperts", name, wanted, fields)

    async def until_policy(
        self, name: str = "auto", *, experts: int | None = None, **wanted: str
    ) -> Json:
        """As `until_expert`; ``experts`` is how many it has."""
        fields = {} if experts is None else {"experts": experts}
        return await self._until_status("routingpolicies", name, wanted, fields)

    async def _until_status(
        self, kind: str, name: str, wanted: Mapping[str, str], fields: Json
    ) -> Json:
        def holds(found: Json) -> bool:
            shown = summary(found)
            generation = found.get("metadata", {}).get("generation")
            return (
                fields.items() <= found.get("status", {}).items()
                and all(
                    wish == text or wish == text.partition("/")[0]
                    for type_, wish in wanted.items()
                    for text in [shown.get(type_, "")]
                )
                and all(
                    one["observedGeneration"] == generation
                    for one in found.get("status", {}).get("conditions", [])
                )
            )

        return await until(f"{name} {wanted} {fields}", lambda: self.get(kind, name), holds)

    # requests

    async def ask(self, *, model: str = "", **fields: Any) -> tuple[int, dict[str, str], Json]:
        """One request through Envoy: status, headers, JSON document."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4} | fields
        url = f"{self.plant.url}/v1/chat/completions"
        body["model"] = model or self.model
        async with self.plant.session.post(url, json=body) as response:
            document = await response.json(content_type=None)
            return response.status, {k.lower(): v for k, v in response.headers.items()}, document

    async def stream(self, tokens: int) -> Stream:
        """Begin a streamed request of so many tokens."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        url = f"{self.plant.url}/v1/chat/completions"
        response = await self.plant.session.post(url, json=body)
        assert response.status == 200, await response.text()
        return Stream(response)

    async def answer(self) -> str:
        """One request: the expert that answered, or the status."""
        status, headers, _ = await self.ask()
        return headers.get("x-pointsman-expert", "nobody told") if status == 200 else str(status)

    async def until_answered_by(self, expert: str) -> None:
        """Wait until the expert answers; or for a status such as ``"503"``."""
        await until(f"answered by {expert}", self.answer, lambda found: found == expert)

    async def until_endpoint(self, address: str) -> None:
        async def answered() -> str:
            status, headers, _ = await self.ask()
            return headers.get("x-pointsman-endpoint", "") if status == 200 else str(status)

        await until(f"answered by {address}", answered, lambda found: found == address)

    async def decide(self) -> str:
        """The endpoint that a request would get now; empty if none."""
        try:
            return str((await self.decision()).endpoint)
        except grpc.aio.AioRpcError as error:
            return error.code().name

    async def decision(self) -> pb.Decision:
        """What would be decided of a request now."""
        stub = self.plant.policy_api
        assert stub is not None
        return await stub.Decide(pb.DecideRequest(model=self.model, prompt="Hello"))

    @contextlib.asynccontextmanager
    async def load(self, *, clients: int = 4) -> AsyncIterator[list[int | str]]:
        """Requests by so many clients until the end of the block; their statuses."""
        found: list[int | str] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                try:
                    status, _, document = await self.ask(max_tokens=20)
                    found.append(status if document.get("choices") else f"{status} {document}")
                except aiohttp.ClientError as error:
                    found.append(repr(error))

        tasks = [asyncio.create_task(client()) for _ in range(clients)]
        try:
            yield found
        finally:
            stop.set()
            await asyncio.gather(*tasks)

    async def until_in_flight(self, count: int) -> None:
        await until(f"{count} in flight", self.plant.live, lambda s: s["in_flight"] == count)


def summary(found: Json) -> dict[str, str]:
    """Conditions as ``status/reason`` by type."""
    conditions = found.get("status", {}).get("conditions", [])
    return {one["type"]: f"{one['status']}/{one['reason']}" for one in conditions}


@pytest_asyncio.fixture(loop_scope="session")
async def place(plant: Plant, namespace: str) -> AsyncIterator[Place]:
    """A namespace of the running cluster; its policies and engines end with the test."""
    async with children() as processes, contextlib.AsyncExitStack() as engines_here:
        found = Place(plant, namespace, processes, engines_here)
        yield found
        await found.kubectl("delete", "llmexperts,routingpolicies", "--all", "--wait=false")


@pytest.fixture
def eventually() -> Callable[..., Awaitable[Any]]:
    return until
