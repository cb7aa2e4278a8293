"""``pointsman bench ext-proc``: a decision as Envoy asks for it, over gRPC on loopback.

The policy server is a process of its own, as in production; the client is this process.
Both share the machine, so throughput is a lower bound of what the server alone can do.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import orjson
from aiohttp import web
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    HttpBody,
    HttpHeaders,
    ProcessingRequest,
    ProcessingResponse,
)
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointsman_cli.bench import site
from pointsman_cli.bench.report import Timing, row
from pointsman_core.resources import Algorithm
from pointsman_policy.child import ending_with_parent
from pointsman_policy.ext_proc import FILTER_KEY

START_TIMEOUT_S = 120.0
WARM_UP = 50
"""Requests before each measurement."""


@dataclass(frozen=True, slots=True)
class _Server:
    """The running policy server."""

    channel: grpc.aio.Channel
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time it has used so far, user and system; NaN where there is no /proc."""
        stat = Path(f"/proc/{self.pid}/stat")
        if not stat.exists():
            return float("nan")
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class BenchError(RuntimeError):
    """The measurement could not be made."""


async def run(
    *,
    endpoints: int,
    in_flight: int,
    requests: int,
    concurrency: Sequence[int],
    algorithms: Sequence[Algorithm],
) -> list[dict[str, object]]:
    """Measure every algorithm at every concurrency.

    Once as ever, of requests without an id, which enter no table; and once followed: with one,
    put into the in-flight table and taken out by the end of their answer.
    """
    runs = []
    async with _engines(endpoints) as addresses, _server(addresses, algorithms) as server:
        stub = ExternalProcessorStub(server.channel)
        for i in range(in_flight):
            body = _body(algorithms[0], f"resident {i}")
            await _ask(stub, body, request_id=f"resident-{i}")
        for algorithm in algorithms:
            bodies = [_body(algorithm, prompt) for prompt in site.prompts(16)]
            for clients, followed in itertools.product(concurrency, (False, True)):
                before = server.cpu_seconds()
                ask = _decide_and_follow if followed else _decide_only
                timing = await _measure(stub, bodies, ask, clients=clients, requests=requests)
                # The warm-up is in the CPU time as well.
                spent = (server.cpu_seconds() - before) / (timing.count + WARM_UP)
                labels = {
                    "decider": str(algorithm),
                    "concurrency": clients,
                    "endpoints": endpoints,
                    "in_flight": in_flight,
                    "followed": followed,
                }
                runs.append(row(labels, timing) | {"server_cpu_us": round(spent * 1e6, 1)})
    return runs


async def _decide_only(stub: ExternalProcessorStub, body: bytes) -> float:
    """Have one request decided that nobody can follow; seconds that it waited."""
    before = time.perf_counter()
    await _ask(stub, body, request_id=None)
    return time.perf_counter() - before


async def _decide_and_follow(stub: ExternalProcessorStub, body: bytes) -> float:
    """Have one request decided, and tell of its answer as Envoy's ``observe`` filter does.

    Returns the seconds that it waited; telling of the answer is not among them.
    """
    request_id = str(uuid.uuid4())
    before = time.perf_counter()
    observe = stub.Process(metadata=((FILTER_KEY, "observe"),))
    await observe.write(_headers(len(body), request_id))
    await _ask(stub, body, request_id=request_id)
    waited = time.perf_counter() - before
    for message in _answer():
        await observe.write(message)
    await observe.read()  # end of the stream
    return waited


async def _measure(
    stub: ExternalProcessorStub,
    bodies: Sequence[bytes],
    ask: Callable[[ExternalProcessorStub, bytes], Awaitable[float]],
    *,
    clients: int,
    requests: int,
) -> Timing:
    seconds: list[float] = []

    async def client(count: int) -> None:
        for i in range(count):
            waited = await ask(stub, bodies[i % len(bodies)])
            seconds.append(waited)  # at once: all clients' in one list

    share = max(1, requests // clients)
    await client(WARM_UP)
    seconds.clear()
    started = time.perf_counter()
    await asyncio.gather(*(client(share) for _ in range(clients)))
    return Timing.of(seconds, wall_s=time.perf_counter() - started)


async def _ask(stub: ExternalProcessorStub, body: bytes, *, request_id: str | None) -> None:
    """One HTTP request's worth of messages, as Envoy's BUFFERED mode sends them."""
    call = stub.Process()
    await call.write(_headers(len(body), request_id))
    await call.read()
    await call.write(ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True)))
    answer: ProcessingResponse = await call.read()
    if not answer.HasField("request_body"):
        raise BenchError(f"the policy server refused: {answer.immediate_response.body!r}")
    await call.done_writing()
    await call.read()  # end of the stream


def _answer() -> Iterator[ProcessingRequest]:
    """A whole answer, as it passes ``observe``."""
    named = {":status": "200", "content-type": "application/json"}
    values = [HeaderValue(key=key, raw_value=value.encode()) for key, value in named.items()]
    yield ProcessingRequest(response_headers=HttpHeaders(headers=HeaderMap(headers=values)))
    body = orjson.dumps({"choices": [], "usage": {"completion_tokens": 100}})
    yield ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=True))


def _headers(length: int, request_id: str | None) -> ProcessingRequest:
    headers = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        ":authority": "bench",
        "content-type": "application/json",
        "content-length": str(length),
        "user-agent": "pointsman-bench",
    }
    if request_id is not None:
        headers["x-request-id"] = request_id
    values = [HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()]
    return ProcessingRequest(request_headers=HttpHeaders(headers=HeaderMap(headers=values)))


def _body(algorithm: Algorithm, prompt: str) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    return orjson.dumps({"model": site.model_name(algorithm), "messages": messages})


@contextlib.asynccontextmanager
async def _engines(count: int) -> AsyncIterator[list[str]]:
    """So many addresses that answer a health probe, and nothing else."""

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        for sock in sockets:
            await web.SockSite(runner, sock).start()
        yield [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _server(
    addresses: Sequence[str], algorithms: Sequence[Algorithm]
) -> AsyncIterator[_Server]:
    with tempfile.TemporaryDirectory(prefix="pointsman-bench-") as folder:
        manifests = Path(folder) / "site.yaml"
        manifests.write_text(site.manifests(addresses, algorithms))
        target = f"unix://{folder}/policy.sock"
        command = [
            *(sys.executable, "-m", "pointsman_cli.main", "policy-server"),
            *("--manifests", str(manifests), "--grpc-address", target),
            *("--http-address", "127.0.0.1:0", "--log-level", "warning"),
            # When this process is killed, nobody is left to wait for.
            *("--drain-timeout", "0"),
        ]
        process = await asyncio.create_subprocess_exec(*ending_with_parent(command))
        try:
            async with grpc.aio.insecure_channel(target) as channel:
                await _wait_serving(channel, process)
                yield _Server(channel, process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _wait_serving(channel: grpc.aio.Channel, process: asyncio.subprocess.Process) -> None:
    async def serving() -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        async for answer in stub.Watch(request, wait_for_ready=True):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return

    tasks = [asyncio.create_task(serving()), asyncio.create_task(process.wait())]
    done, pending = await asyncio.wait(
        tasks, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
    )
    for task in pending:
        task.cancel()
    if tasks[0] not in done:
        raise BenchError("the policy server did not start; its messages are above")
    tasks[0].result()
