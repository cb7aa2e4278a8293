"""A real Envoy between a toy policy server and toy engines, all on loopback."""

import asyncio
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pointsman_policy.envoy import EnvoySettings, RunningEnvoy, running_envoy

TOY_PATH = Path(__file__).with_name("toy_policy.py")
PATIENCE_S = 60.0


def _load_toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("envoy_toy_policy", TOY_PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


toy_policy = _load_toy()


@dataclass
class Received:
    """One request as an engine got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def model(self) -> Any:
        return json.loads(self.body)["model"]


@dataclass
class Engine:
    """A toy engine: remembers what it got and answers with `reply`."""

    expert: str
    models: tuple[str, ...]
    address: str = ""
    received: list[Received] = field(default_factory=list)
    reply: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    runner: web.AppRunner | None = None

    @property
    def target(self) -> Any:
        return toy_policy.Target(self.address, self.models, self.expert)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.received.append(Received(request.method, request.path, headers, body))
        if self.reply is not None:
            return await self.reply(request)
        return web.json_response({"served_by": self.expert})

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", int(self.address.rpartition(":")[2] or 0))
        await site.start()
        host, port = self.runner.addresses[0]
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None


@dataclass
class Site:
    """Two engines, the policy server and Envoy, ready to serve."""

    policy: Any
    maths: Engine
    code: Engine
    envoy: RunningEnvoy
    client: aiohttp.ClientSession

    async def chat(self, body: Any = None, **kwargs: Any) -> tuple[int, Any, Any]:
        """POST a chat request; return status, headers and the decoded answer."""
        if body is None:
            body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | kwargs.pop("headers", {})
        url = self.envoy.url + kwargs.pop("path", "/v1/chat/completions")
        # As a file: aiohttp warns of long bytes.
        data = io.BytesIO(data) if data else data
        async with self.client.post(url, data=data, headers=headers, **kwargs) as response:
            text = await response.text()
            return response.status, response.headers, json.loads(text) if text else None

    async def healthy(self, count: int) -> None:
        """Wait until Envoy holds exactly `count` healthy endpoints."""
        await self.stat("cluster.experts.membership_healthy", lambda value: value == count)

    async def stat(self, name: str, condition: Callable[[int], bool]) -> int:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(value := (await self.envoy.stats()).get(name, 0)):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # Envoy's admin has nothing to await
        return value

    async def policy_gone(self) -> None:
        await self.stat("cluster.policy_server.membership_healthy", lambda value: value == 0)

    async def access_log(self, count: int) -> list[dict[str, Any]]:
        """Wait until the log has `count` entries and return them."""
        async with asyncio.timeout(PATIENCE_S):
            while len(entries := self._entries()) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return entries

    def _entries(self) -> list[dict[str, Any]]:
        lines = self.envoy.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


@pytest.fixture
def toy() -> ModuleType:
    """The module of the toy policy server."""
    return toy_policy


@pytest.fixture
def toy_path() -> Path:
    return TOY_PATH


@pytest.fixture
async def policy() -> AsyncIterator[Any]:
    server = toy_policy.ToyPolicy()
    await server.start()
    yield server
    await server.stop()


@contextlib.asynccontextmanager
async def _engine(expert: str, models: tuple[str, ...]) -> AsyncIterator[Engine]:
    engine = Engine(expert, models)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture
async def maths() -> AsyncIterator[Engine]:
    async with _engine("maths", ("maths-model", "maths-alias")) as engine:
        yield engine


@pytest.fixture
async def code() -> AsyncIterator[Engine]:
    async with _engine("code", ("a-much-longer-code-model",)) as engine:
        yield engine


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


@pytest.fixture
def settings(policy: Any) -> EnvoySettings:
    """Settings of the `site`; a test module or a test overrides this fixture to change them.

    However busy the machine is, Envoy waits for decisions.
    """
    return EnvoySettings(
        listen_port=0,
        admin_port=0,
        policy_server_address=policy.address,
        message_timeout_ms=60_000,
        policy_check_timeout_ms=60_000,
    )


@pytest.fixture
async def site(
    *,
    policy: Any,
    maths: Engine,
    code: Engine,
    settings: EnvoySettings,
    client: aiohttp.ClientSession,
    tmp_path: Path,
) -> AsyncIterator[Site]:
    await policy.announce([maths.target, code.target])
    policy.decision = toy_policy.Decision(model=maths.models[0], picks=(maths.address,))
    async with running_envoy(settings, log_path=tmp_path / "envoy.log") as envoy:
        site = Site(policy, maths, code, envoy, client)
        await site.healthy(2)
        yield site
