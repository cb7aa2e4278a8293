"""A whole site of real processes: simulated engines, policy server, Envoy."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import yaml

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

POINTSMAN = (sys.executable, "-m", "pointsman_cli.main")
PATIENCE_S = 90.0
UNHURRIED = {
    "message_timeout_ms": 60_000,
    "policy_check_timeout_ms": 60_000,
    "observe_close_delay_ms": 3000,
}
"""Settings of an Envoy that waits for the policy server however busy the machine is, also for it
to read how a request ended.

With its own settings it soon goes on without one that is slow, which is to be tested by itself.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@dataclass
class Site:
    """Everything behind one URL, and the means to break it."""

    folder: Path
    processes: Children
    session: aiohttp.ClientSession
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    engines: dict[str, Child] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    server: Child | None = None
    envoy: RunningEnvoy | None = None
    http_port: int = 0

    @property
    def grpc_address(self) -> str:
        return f"unix://{self.folder}/policy.sock"

    @property
    def url(self) -> str:
        assert self.envoy is not None
        return self.envoy.url

    @property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE_S
        )

    async def start_engine(self, name: str, *flags: str, port: int = 0, **spec: Any) -> None:
        """Start a simulated engine and declare it as an expert."""
        manifest = {
            "apiVersion": "pointsman.dev/v1alpha1",
            "kind": "LLMExpert",
            "metadata": {"name": name},
            "spec": {
                "model": f"{name}-model",
                "engine": {"type": "vllm", "metrics": {"intervalMs": 100}},
                # Far faster than any real board, so that tests do not wait for tokens.
                "profile": {
                    "iterationOverheadMs": 1.0,
                    "memoryBandwidthGBps": 5000,
                    "peakTflops": 5000,
                    "maxBatchedTokens": 8192,
                    "kvCacheGiB": 64,
                },
                "backend": {"addresses": ["127.0.0.1:1"]},
                **spec,
            },
        }
        path = self.folder / f"engine-{name}.yaml"
        path.write_text(yaml.safe_dump(manifest))
        child = await self.processes.start(
            f"engine {name}",
            [
                *(*POINTSMAN, "engine-sim", "--manifests", str(path)),
                *("--expert", name, "--port", str(port), *flags),
            ],
            log_path=self.folder / f"engine-{name}.log",
            read_output=True,
        )
        announced = await first_line(child)
        self.engines[name] = child
        self.addresses[name] = str(announced["url"]).partition("://")[2].strip("/")
        manifest["spec"]["backend"] = {"addresses": [self.addresses[name]]}
        self.experts[name] = manifest

    def declare_policy(self, name: str = "auto", **spec: Any) -> None:
        """Add or replace a policy that answers its own name."""
        self.policies[name] = {
            "apiVersion": "pointsman.dev/v1alpha1",
            "kind": "RoutingPolicy",
            "metadata": {"name": name},
            "spec": {
                "models": [name],
                "algorithm": "LeastLoad",
                "fallback": "ShortestQueue",
                "explainHeaders": True,
                **spec,
            },
        }

    def write_manifests(self) -> None:
        """Put the declared experts and policies where the server reads them, at once."""
        folder = self.folder / "manifests"
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump_all([*self.experts.values(), *self.policies.values()])
        draft = folder / ".draft"
        draft.write_text(text)
        draft.replace(folder / "site.yaml")

    async def start_server(self, *flags: str) -> None:
        self.http_port = self.http_port or free_port()
        self.server = await self.processes.start(
            "policy server",
            [
                *(*POINTSMAN, "policy-server", "--manifests", str(self.folder / "manifests")),
                *("--grpc-address", self.grpc_address),
                *("--http-address", f"127.0.0.1:{self.http_port}", *flags),
            ],
            log_path=self.folder / "policy-server.log",
        )
        await wait_for_http(self.session, self.server, f"{self.http_url}/readyz")

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    async def kill_server(self) -> None:
        assert self.server is not None
        await kill(self.server)

    async def live(self) -> dict[str, Any]:
        async with self.session.get(f"{self.http_url}/debug/in-flight") as response:
            return dict(await response.json())

    async def metric(self, name: str) -> dict[str, float]:
        """Samples of a metric by their labels as printed."""
        async with self.session.get(f"{self.http_url}/metrics") as response:
            text = await response.text()
        found = {}
        for line in text.splitlines():
            if line.startswith((name + "{", name + " ")):
                labels, _, value = line.removeprefix(name).rpartition(" ")
                found[labels.strip("{}")] = float(value)
        return found

    async def until(self, holds: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Wait until the live state is as wished."""
        seen: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    seen = await self.live()
                    if holds(seen):
                        return seen
                    await asyncio.sleep(0.02)
        pytest.fail(f"never {what}: {seen}")

    async def until_empty(self) -> None:
        await self.until(
            lambda s: s["in_flight"] == 0 and s["tracked"] == 0, "an empty in-flight table"
        )

    async def until_routed(self, model: str = "auto") -> None:
        """Wait until every engine that should be there is, and Envoy knows."""
        await self.until(lambda s: all(e["ready"] for e in s["endpoints"].values()), "all ready")
        status = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while status != 200:
                    status, headers, _ = await self.ask(model=model, max_tokens=1)
                    if status == 200 and "x-pointsman-policy" not in headers:
                        status = 0  # failed open: Envoy has not found the server yet
                    await asyncio.sleep(0.02)
        assert status == 200, "no request got through"
        await self.until_empty()

    async def until_connected(self) -> None:
        """Wait until all engines are ready and Envoy knows them and the server; asks for nothing.

        For engines that do not answer: `until_routed` would wait in vain.
        """
        await self.until(lambda s: all(e["ready"] for e in s["endpoints"].values()), "all ready")
        await self.until_stat("cluster.policy_server.membership_healthy", 1)
        await self.until_stat("cluster.experts.membership_healthy", len(self.engines))

    async def until_stat(self, name: str, wanted: int) -> None:
        """Wait until one of Envoy's counters or gauges has a value."""
        assert self.envoy is not None
        seen = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while (seen := (await self.envoy.stats()).get(name)) != wanted:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert seen == wanted, name

    async def until_announced(self, name: str, status: str) -> None:
        """Wait until Envoy was told this health of an engine, as EDS spells it."""
        assert self.envoy is not None
        seen: dict[str, str] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while seen.get(self.addresses[name]) != status:
                    seen = await self._announced()
                    await asyncio.sleep(0.02)
        assert seen.get(self.addresses[name]) == status

    async def _announced(self) -> dict[str, str]:
        assert self.envoy is not None
        async with self.session.get(f"{self.envoy.admin_url}/clusters?format=json") as response:
            clusters = (await response.json(content_type=None))["cluster_statuses"]
        (hosts,) = (c.get("host_statuses", []) for c in clusters if c["name"] == "experts")
        return {
            "{address}:{port_value}".format(**host["address"]["socket_address"]): host[
                "health_status"
            ].get("eds_health_status", "")
            for host in hosts
        }

    async def until_routed_again(self) -> None:
        """Wait until decisions come from the policy server once more."""
        await self._until_headers(lambda headers: "x-pointsman-policy" in headers, "routed again")

    async def until_answered_by(
        self, experts: set[str], *, why: str = "", any_of: bool = False
    ) -> None:
        """Wait until all (or any) of these experts answered, each decision for a reason."""
        missing = set(experts)

        def done(headers: dict[str, str]) -> bool:
            if headers.get("x-pointsman-why", "").startswith(why):
                missing.discard(headers.get("x-pointsman-expert", ""))
            return not missing or (any_of and missing != experts)

        await self._until_headers(done, f"answered by {experts}")

    async def _until_headers(self, done: Callable[[dict[str, str]], bool], what: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    status, headers, _ = await self.ask(max_tokens=1)
                    if status == 200 and done(headers):
                        return
                    await asyncio.sleep(0.01)
        pytest.fail(f"never {what}")

    async def ask(
        self, *, model: str = "auto", headers: dict[str, str] | None = None, **fields: Any
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        """One request: status, headers, JSON document."""
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8} | fields
        async with self.session.post(
            f"{self.url}/v1/chat/completions", json={"model": model, **body}, headers=headers
        ) as response:
            document = await response.json(content_type=None)
            return response.status, {k.lower(): v for k, v in response.headers.items()}, document


async def kill(child: Child) -> None:
    """SIGKILL, and wait for the end."""
    os.kill(child.process.pid, signal.SIGKILL)
    await child.process.wait()


@pytest.fixture
async def bare_site(tmp_path: Path) -> AsyncIterator[Site]:
    """A site with nothing started yet."""
    async with (
        aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=PATIENCE_S), connector=aiohttp.TCPConnector(limit=0)
        ) as session,
        children() as processes,
    ):
        yield Site(tmp_path, processes, session)


@contextlib.asynccontextmanager
async def front(
    site: Site,
    *,
    answers: bool = True,
    hurried: bool = False,
    flags: Sequence[str] = (),
    **settings: Any,
) -> AsyncIterator[Site]:
    """Put policy server and Envoy in front of the site's engines, which may answer nothing.

    A ``hurried`` Envoy goes on without a slow policy server as soon as users' do.
    """
    site.write_manifests()
    await site.start_server(*flags)
    ports = {"listen_port": 0, "admin_port": 0, "policy_server_address": site.grpc_address}
    settings = ({} if hurried else UNHURRIED) | ports | settings
    log = site.folder / "envoy.log"
    async with running_envoy(EnvoySettings(**settings), log_path=log) as envoy:
        site.envoy = envoy
        await (site.until_routed() if answers else site.until_connected())
        yield site


@pytest.fixture
async def site(bare_site: Site) -> AsyncIterator[Site]:
    """Three fast experts behind the policy ``auto``."""
    await asyncio.gather(*(bare_site.start_engine(name) for name in ("ant", "bee", "cow")))
    bare_site.declare_policy()
    async with front(bare_site) as running:
        yield running


@pytest.fixture
def in_front() -> Callable[..., contextlib.AbstractAsyncContextManager[Site]]:
    return front


@pytest.fixture
def kill_child() -> Callable[[Child], Any]:
    return kill
