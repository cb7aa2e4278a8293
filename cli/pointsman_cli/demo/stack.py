"""Everything behind one URL: simulated engines, policy server, Envoy."""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.live import ask_in_flight
from pointsman_cli.demo.processes import (
    START_TIMEOUT_S,
    Children,
    children,
    first_line,
    free_port,
    wait_for_http,
)
from pointsman_cli.demo.site import Site, is_loopback, manifests_of, to_yaml, with_addresses
from pointsman_core.resources import Algorithm, LLMExpert
from pointsman_policy.envoy import EnvoySettings, EnvoyStartError, running_envoy

POLL_S = 0.1
PATIENCE_MS = 10_000
"""Envoy's, with the policy server: an answer that nobody decided would compare no deciders.

Where the machine is so slow, the answer is late, and counts as such.
"""

Move = tuple[str, str, str]
"""Expert, declared address, address of its simulation."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A running site."""

    url: str
    """Where clients send requests."""
    in_flight_url: str
    """The policy server's look at its live state."""
    site: Site
    """With the addresses that are really used."""
    simulated: tuple[str, ...]
    """Experts whose engines are simulations."""
    processes: Children


@contextlib.asynccontextmanager
async def running_stack(
    site: Site,
    deciders: Sequence[Algorithm],
    session: aiohttp.ClientSession,
    *,
    log_folder: Path,
    seed: int,
) -> AsyncIterator[Stack]:
    """Run everything until the end of the block.

    ``log_folder`` exists. Raises DemoError, with the end of the log, when a part does not
    come up.
    """
    async with contextlib.AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pointsman-demo-")))
        processes = await stack.enter_async_context(children())
        moves = await _start_engines(processes, site, home, log_folder, seed)
        site = with_addresses(site, {(expert, old): new for expert, old, new in moves})
        grpc_address, debug_url = await _start_policy_server(
            processes, session, to_yaml(site, deciders), home, log_folder, seed
        )
        envoy_log = log_folder / "envoy.log"
        envoy_log.unlink(missing_ok=True)
        settings = EnvoySettings(
            listen_port=0,
            admin_port=0,
            policy_server_address=grpc_address,
            message_timeout_ms=PATIENCE_MS,
            policy_check_timeout_ms=PATIENCE_MS,
        )
        try:
            envoy = await stack.enter_async_context(running_envoy(settings, log_path=envoy_log))
        except (EnvoyStartError, FileNotFoundError) as error:
            raise DemoError(str(error)) from error
        simulated = tuple(dict.fromkeys(expert for expert, _, _ in moves))
        running = Stack(envoy.url, debug_url, site, simulated, processes)
        await _wait_until_routed(session, running, site.policy.spec.models[0])
        yield running


async def _start_engines(
    processes: Children, site: Site, home: Path, log_folder: Path, seed: int
) -> list[Move]:
    """Simulate every endpoint that is on this machine, each as its own process."""
    wanted = [
        (expert, address)
        for expert in site.experts
        for address in expert.spec.backend.addresses or ()
        if is_loopback(address)
    ]
    for expert in site.experts:
        _manifest(home, expert).write_text(manifests_of([expert]), encoding="utf-8")
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_start_engine(processes, expert, address, home, log_folder, seed))
                for expert, address in wanted
            ]
    except ExceptionGroup as failed:
        # The first one ended the others; what a person can act on is that one alone.
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _start_engine(
    processes: Children,
    expert: LLMExpert,
    address: str,
    home: Path,
    log_folder: Path,
    seed: int,
) -> Move:
    name = expert.metadata.name
    child = await processes.start(
        f"engine {name}",
        [
            *_pointsman("engine-sim"),
            *("--manifests", str(_manifest(home, expert)), "--expert", name),
            *("--port", "0", "--seed", str(seed)),
        ],
        log_path=log_folder / f"engine-{name}-{address.rpartition(':')[2]}.log",
        read_output=True,
    )
    announced = await first_line(child)
    return name, address, str(announced["url"]).partition("://")[2].strip("/")


def _manifest(home: Path, expert: LLMExpert) -> Path:
    return home / f"expert-{expert.metadata.name}.yaml"


async def _start_policy_server(
    processes: Children,
    session: aiohttp.ClientSession,
    manifests: str,
    home: Path,
    log_folder: Path,
    seed: int,
) -> tuple[str, str]:
    """Start it and wait; returns its gRPC address and the URL of its live state."""
    folder = home / "manifests"
    folder.mkdir()
    (folder / "demo.yaml").write_text(manifests, encoding="utf-8")
    grpc_address = f"unix://{home}/grpc.sock"
    http_address = f"127.0.0.1:{free_port()}"
    child = await processes.start(
        "policy server",
        [
            *_pointsman("policy-server"),
            *("--manifests", str(folder), "--seed", str(seed), "--drain-timeout", "1"),
            *("--grpc-address", grpc_address, "--http-address", http_address),
        ],
        log_path=log_folder / "policy-server.log",
    )
    await wait_for_http(session, child, f"http://{http_address}/readyz")
    return grpc_address, f"http://{http_address}/debug/in-flight"


def _pointsman(command: str) -> list[str]:
    return [sys.executable, "-m", "pointsman_cli.main", command]


async def _wait_until_routed(session: aiohttp.ClientSession, stack: Stack, model: str) -> None:
    """Wait until every engine is ready and a request gets through all parts."""
    last = "nothing was answered"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError, KeyError):
                    seen = await ask_in_flight(session, stack.in_flight_url)
                    last = f"not ready: {', '.join(seen.unready) or 'all endpoints'}"
                    if seen.all_ready:
                        last = await _try_request(session, stack.url, model)
                    if not last:
                        return
                await asyncio.sleep(POLL_S)
    ended = "; ".join(stack.processes.ended())
    raise DemoError(f"the site did not answer within {START_TIMEOUT_S:.0f} s: {ended or last}")


async def _try_request(session: aiohttp.ClientSession, url: str, model: str) -> str:
    """Send one tiny request; returns what went wrong, nothing if all is well."""
    body = orjson.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    )
    headers = {"content-type": "application/json"}
    async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as response:
        text = await response.text()
        return "" if response.status == 200 else f"HTTP {response.status}: {text[:200]}"
