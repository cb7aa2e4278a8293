import asyncio
import copy
import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from aiohttp import web

from pointsman_operator.cluster import PATHS
from pointsman_operator.observed import Kind, Observed, ServerState, read_object
from pointsman_operator.reconcile import Outcome, Previous, reconcile

CREATED = "2026-01-01T00:00:00Z"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

TABLES = {
    Kind.EXPERT: "experts",
    Kind.POLICY: "policies",
    Kind.SERVICE: "services",
    Kind.SLICE: "slices",
    Kind.POD: "pods",
    Kind.POOL: "pools",
}


class Api:
    """Objects as the API server gives them; whatever is not given is plain."""

    @staticmethod
    def _object(kind: Kind, name: str, content: dict[str, Any], **meta: Any) -> dict[str, Any]:
        metadata = {
            "name": name,
            "namespace": "default",
            "uid": f"uid-{kind}-{name}",
            "resourceVersion": "1",
            "generation": 1,
            "creationTimestamp": CREATED,
        } | meta
        return {"kind": str(kind), "metadata": metadata} | content

    @classmethod
    def expert(cls, name="coder", *, status=None, meta=None, spec=None, **backend):
        backend = backend or {"addresses": ["10.0.0.1:8000"]}
        content = {"spec": {"model": f"{name}-model", "backend": backend} | (spec or {})}
        if status is not None:
            content["status"] = status
        return cls._object(Kind.EXPERT, name, content, **(meta or {}))

    @classmethod
    def policy(cls, name="auto", *, status=None, meta=None, **spec):
        content = {"spec": {"models": [name]} | spec}
        if status is not None:
            content["status"] = status
        return cls._object(Kind.POLICY, name, content, **(meta or {}))

    @classmethod
    def service(cls, name="engine", *, port=80, port_name="http", meta=None, **spec):
        ports = [{"port": port, "name": port_name, "protocol": "TCP", "targetPort": 8000}]
        return cls._object(Kind.SERVICE, name, {"spec": {"ports": ports} | spec}, **(meta or {}))

    @classmethod
    def slice(
        cls, service="engine", *ips, name=None, family="IPv4", port=8000, meta=None, **condition
    ):
        endpoints = [{"addresses": [ip], "conditions": dict(condition)} for ip in ips]
        content = {
            "addressType": family,
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
            "endpoints": endpoints,
        }
        labels = {"kubernetes.io/service-name": service}
        meta = {"labels": labels} | (meta or {})
        return cls._object(Kind.SLICE, name or f"{service}-1", content, **meta)

    @classmethod
    def pod(cls, name="pod", ip="10.0.1.1", *, ready=True, phase="Running", meta=None):
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        content = {"status": {"phase": phase, "podIP": ip, "conditions": conditions}}
        return cls._object(Kind.POD, name, content, **{"labels": {"app": "llm"}, **(meta or {})})

    @classmethod
    def pool(cls, name="pool", *ports, labels=None, meta=None):
        spec = {
            "selector": {"matchLabels": labels or {"app": "llm"}},
            "targetPorts": [{"number": port} for port in ports or (8000,)],
        }
        return cls._object(Kind.POOL, name, {"spec": spec}, **(meta or {}))

    @staticmethod
    def observe(*bodies: dict[str, Any], **others: Any) -> Observed:
        tables: dict[str, dict[Any, Any]] = {name: {} for name in TABLES.values()}
        for body in bodies:
            kind = Kind(body["kind"])
            found = read_object(kind, body)
            assert found is not None
            tables[TABLES[kind]][found.meta.key] = found
        return Observed(**tables, **others)

    @staticmethod
    def reconcile(observed: Observed, previous: Previous | None = None, now=NOW) -> Outcome:
        return reconcile(observed, previous or Previous(), now)

    @staticmethod
    def acknowledging(outcome: Outcome, **others: Any) -> ServerState:
        """A policy server that has everything of the outcome in force."""
        applied = {key: (s.generation, s.version) for key, s in outcome.next.snapshots.items()}
        return ServerState(**({"applied": applied} | others))

    @staticmethod
    def conditions(outcome: Outcome, name: str) -> dict[str, tuple[str, str]]:
        """Status and reason of each condition that is to be written for an object."""
        (write,) = (one for one in outcome.statuses if one.ref.key.name == name)
        return {c["type"]: (c["status"], c["reason"]) for c in write.status["conditions"]}

    @staticmethod
    def message(outcome: Outcome, name: str, condition: str) -> str:
        (write,) = (one for one in outcome.statuses if one.ref.key.name == name)
        (found,) = (c for c in write.status["conditions"] if c["type"] == condition)
        return found["message"]

    @staticmethod
    def addresses(outcome: Outcome, policy: str = "auto") -> list[str]:
        (snapshot,) = (one for one in outcome.snapshots if one.policy == policy)
        return [candidate.address for candidate in snapshot.candidates]


@pytest.fixture(scope="session")
def api() -> type[Api]:
    return Api


_CRD = "CustomResourceDefinition"
DISCOVERY = {
    "/api/v1": [("namespaces", "Namespace")],
    "/apis/apiextensions.k8s.io/v1": [("customresourcedefinitions", _CRD)],
}
"""What kopf itself needs to find."""


class FakeApiServer:
    """As much of the Kubernetes API as the operator uses, over HTTP, with faults on demand."""

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[Kind, dict[str, dict[str, Any]]] = {kind: {} for kind in Kind}
        self.missing: set[Kind] = {Kind.POOL}
        """Kinds whose CRD is not installed."""
        self.page_size = 0
        """Overrides the client's limit, so that lists come in pages."""
        self.fail: Any = None
        """Called with each request; what it returns is the answer."""
        self.reviews: Any = lambda _asked: True
        """Called with the attributes of each access review; whether it is allowed."""
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.watches: dict[Kind, list[asyncio.Queue[Any]]] = {kind: [] for kind in Kind}
        self.watched = asyncio.Event()
        """Set at each start of a watch."""
        self.written = asyncio.Event()
        """Set at each write."""
        self.crd_events: asyncio.Queue[Any] = asyncio.Queue()
        self._version = 100

    def put(self, body: dict[str, Any], *, told: bool = True) -> None:
        """Create or change an object; ``told`` is whether watches hear of it."""
        kind, meta = Kind(body["kind"]), body["metadata"]
        body = copy.deepcopy(body)
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        known = meta["name"] in self.objects[kind]
        self.objects[kind][meta["name"]] = body
        if told:
            self._tell(kind, {"type": "MODIFIED" if known else "ADDED", "object": body})

    def remove(self, kind: Kind, name: str, *, told: bool = True) -> None:
        """Delete an object."""
        body = self.objects[kind].pop(name)
        if told:
            self._tell(kind, {"type": "DELETED", "object": body})

    def end_watches(self, kind: Kind, event: Any = None) -> None:
        """End all watches of a kind, with a last event."""
        for queue in self.watches[kind]:
            queue.put_nowait(event)
            queue.put_nowait(None)

    def _tell(self, kind: Kind, event: Any) -> None:
        for queue in self.watches[kind]:
            queue.put_nowait(event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.path, dict(request.query), body))
        failed = self.fail(request) if self.fail is not None else None
        if failed is not None:
            return failed
        if request.path.endswith("/selfsubjectaccessreviews"):
            allowed = self.reviews(body["spec"]["resourceAttributes"])
            return web.json_response({"status": {"allowed": allowed}}, status=201)
        if request.path in ("/api", "/apis") or request.path in self._versions():
            return web.json_response(self._discovery(request.path))
        if request.path.endswith("/customresourcedefinitions"):
            return await self._answer_crds(request)
        for kind, path in PATHS.items():
            prefix, _, rest = request.path.partition(path.plural)
            if prefix.startswith(path.root + "/") and request.path.endswith(path.plural + rest):
                return await self._answer_kind(kind, rest.strip("/"), request, body)
        self.written.set()
        return web.json_response({}, status=201 if request.method == "POST" else 404)

    def _versions(self) -> set[str]:
        return {path.root for path in PATHS.values()} | DISCOVERY.keys()

    async def _answer_crds(self, request: web.Request) -> web.StreamResponse:
        if not request.query.get("watch"):
            return web.json_response({"metadata": {"resourceVersion": "1"}, "items": []})
        response = web.StreamResponse()
        await response.prepare(request)
        while (event := await self.crd_events.get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response

    def announce(self, group: str) -> None:
        """Tell watches of CRDs that the kinds of a group have changed."""
        body = {"metadata": {"name": f"x.{group}", "uid": group}, "spec": {"group": group}}
        self.crd_events.put_nowait({"type": "MODIFIED", "object": body})

    def _discovery(self, path: str) -> dict[str, Any]:
        if path == "/api":
            return {"versions": ["v1"]}
        if path == "/apis":
            groups = {}
            for version in self._versions() - {"/api/v1"}:
                _, _, group, name = version.split("/")
                entry = {"groupVersion": f"{group}/{name}", "version": name}
                groups[group] = {"name": group, "preferredVersion": entry, "versions": [entry]}
            return {"groups": list(groups.values())}
        kinds = [
            (w.plural, str(k)) for k, w in PATHS.items() if w.root == path and k not in self.missing
        ]
        return {
            "resources": [
                {
                    "name": plural,
                    "kind": kind,
                    "singularName": kind.lower(),
                    "namespaced": True,
                    "verbs": ["list", "watch", "patch"],
                }
                for plural, kind in kinds + DISCOVERY.get(path, [])
            ]
        }

    async def _answer_kind(
        self, kind: Kind, rest: str, request: web.Request, body: Any
    ) -> web.StreamResponse:
        if kind in self.missing:
            return web.json_response({"message": "page not found"}, status=404)
        if request.query.get("watch"):
            return await self._watch(kind, request)
        if request.method == "GET":
            return self._list(kind, request)
        name = rest.split("/")[0]
        self.written.set()
        if request.method == "DELETE":
            found = self.objects[kind].pop(name, None)
            return web.json_response({}, status=200 if found else 404)
        if rest.endswith("/status"):
            if name not in self.objects[kind]:
                return web.json_response({"message": "not found"}, status=404)
            self.put(self.objects[kind][name] | {"status": body["status"]})
        else:
            self.put(body)
        return web.json_response(self.objects[kind][name])

    def _list(self, kind: Kind, request: web.Request) -> web.Response:
        items = list(self.objects[kind].values())
        start = int(request.query.get("continue", 0))
        size = self.page_size if "limit" in request.query else 0
        page = items[start : start + size] if size else items
        more = start + size if size and start + size < len(items) else ""
        meta = {"resourceVersion": str(self._version), "continue": str(more)}
        return web.json_response({"metadata": meta, "items": page})

    async def _watch(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        since = int(request.query.get("resourceVersion") or 0)
        for one in self.objects[kind].values():
            if int(one["metadata"]["resourceVersion"]) > since:
                queue.put_nowait({"type": "MODIFIED", "object": one})
        self.watches[kind].append(queue)
        response = web.StreamResponse()
        try:
            await response.prepare(request)
            self.watched.set()
            while (event := await queue.get()) is not None:
                await response.write(json.dumps(event).encode() + b"\n")
        finally:
            self.watches[kind].remove(queue)
        return response


@pytest.fixture
async def api_server(tmp_path, monkeypatch):
    """A fake API server that the official client and kopf find by their kubeconfig."""
    server = FakeApiServer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    kubeconfig = tmp_path / "kubeconfig"
    config = {
        "clusters": [{"name": "fake", "cluster": {"server": server.url}}],
        "users": [{"name": "fake", "user": {"token": "secret"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        "current-context": "fake",
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    # Read by the client when it is first imported, not when it is used.
    place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(place, str(kubeconfig))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    yield server
    for kind in Kind:
        server.end_watches(kind)
    server.crd_events.put_nowait(None)
    await runner.cleanup()
