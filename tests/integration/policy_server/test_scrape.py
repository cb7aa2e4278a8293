"""Scraping real HTTP servers on loopback that come, go, stall and talk nonsense."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from pointsman_core.resources import EngineMetrics, EngineType
from pointsman_policy.engines import EngineLoad
from pointsman_policy.engines.probe import MAX_PAGE_BYTES, ScrapeError
from pointsman_policy.scrape import Scraper, ScrapeSettings, Target

pytestmark = pytest.mark.integration

PAGE = "vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Engine:
    """An engine whose answers a test can change while it runs."""

    answers: dict[str, Handler] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0
    runner: web.AppRunner | None = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        handler = self.answers.get(request.path)
        return web.Response(status=404) if handler is None else await handler(request)

    async def start(self) -> None:
        self.runner = web.AppRunner(
            web.Application(), shutdown_timeout=0.0, handler_cancellation=True
        )
        self.runner.app.router.add_get("/{path:.*}", self._handle)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    def target(
        self, engine_type: EngineType = EngineType.VLLM, **metrics: bool | int | str
    ) -> Target:
        settings = EngineMetrics(**{"interval_ms": 50, **metrics})
        return Target(f"127.0.0.1:{self.port}", engine_type, settings)


@dataclass
class Seen:
    """What the scraper reported, to be awaited."""

    loads: asyncio.Queue[tuple[str, EngineLoad, float]] = field(default_factory=asyncio.Queue)
    health: asyncio.Queue[tuple[str, bool, str]] = field(default_factory=asyncio.Queue)
    errors: asyncio.Queue[tuple[str, ScrapeError]] = field(default_factory=asyncio.Queue)

    async def next_health(self) -> tuple[bool, str]:
        _, ready, reason = await self.health.get()
        return ready, reason


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine({"/metrics": text(PAGE)})
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@asynccontextmanager
async def scraping(
    seen: Seen, targets: Mapping[str, Target], *, timeout_seconds: float = 5.0
) -> AsyncIterator[Scraper]:
    scraper = Scraper(
        on_load=lambda *load: seen.loads.put_nowait(load),
        on_health=lambda *health: seen.health.put_nowait(health),
        on_error=lambda *error: seen.errors.put_nowait(error),
        settings=ScrapeSettings(timeout_seconds=timeout_seconds),
        clock=lambda: 42.0,
    )
    async with scraper:
        scraper.update(targets)
        yield scraper


def by_address(*targets: Target) -> dict[str, Target]:
    return {target.address: target for target in targets}


def text(body: str | bytes, status: int = 200) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        payload = body.encode() if isinstance(body, str) else body
        return web.Response(body=payload, status=status)

    return handle


async def stall(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def test_loads_and_health_are_reported(engine: Engine, seen: Seen):
    target = engine.target()
    async with scraping(seen, by_address(target)):
        assert await seen.loads.get() == (target.address, EngineLoad(3, 1), 42.0)
        await seen.loads.get()
    assert await seen.next_health() == (True, "")
    assert seen.health.empty()
    assert seen.errors.empty()


async def test_another_path_and_engine(engine: Engine, seen: Seen):
    engine.answers = {"/m": text("llamacpp:requests_processing 2\nllamacpp:requests_deferred 0\n")}
    target = engine.target(EngineType.LLAMACPP, path="/m")
    async with scraping(seen, by_address(target)):
        _, load, _ = await seen.loads.get()
    assert load == EngineLoad(2, 0)


async def test_a_dead_engine_is_unready_and_back_after_its_restart(engine: Engine, seen: Seen):
    target = engine.target()
    async with scraping(seen, by_address(target)):
        assert await seen.next_health() == (True, "")
        await engine.stop()
        assert await seen.next_health() == (False, "connection failed: ECONNREFUSED")
        assert await seen.errors.get() == (target.address, ScrapeError.CONNECTION)
        await engine.start()
        assert await seen.next_health() == (True, "")


async def test_an_engine_that_was_never_there(engine: Engine, seen: Seen):
    await engine.stop()
    async with scraping(seen, by_address(engine.target())):
        ready, _ = await seen.next_health()
    assert not ready
    assert seen.errors.qsize() == 1, "the immediate second try is no error of its own"


async def test_one_dropped_connection_is_forgiven(seen: Seen):
    """A keep-alive connection may be cut just when it is used."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections > 1:
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(PAGE)}\r\nconnection: close\r\n\r\n"
            writer.write((head + PAGE).encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        metrics = EngineMetrics(interval_ms=50)
        target = Target(f"127.0.0.1:{port}", EngineType.VLLM, metrics)
        async with scraping(seen, by_address(target)):
            await seen.loads.get()
    assert await seen.next_health() == (True, "")
    assert seen.errors.empty()


async def test_a_stalled_engine_is_unready_after_three_time_outs(engine: Engine, seen: Seen):
    async with scraping(seen, by_address(engine.target()), timeout_seconds=0.2):
        assert await seen.next_health() == (True, "")
        while not seen.loads.empty():
            seen.loads.get_nowait()
        await seen.loads.get()  # a good look just ended, however many this busy process missed
        engine.answers["/metrics"] = stall
        seen.errors = asyncio.Queue()
        assert await seen.next_health() == (False, "timed out")
        errors = [seen.errors.get_nowait()[1] for _ in range(seen.errors.qsize())]
        assert errors == [ScrapeError.TIMEOUT] * 3
        engine.answers["/metrics"] = text(PAGE)
        assert await seen.next_health() == (True, "")


async def test_server_errors_count_like_time_outs(engine: Engine, seen: Seen):
    engine.answers["/metrics"] = text("loading", status=503)
    async with scraping(seen, by_address(engine.target())):
        assert await seen.next_health() == (False, "GET /metrics answered 503")
    assert seen.errors.qsize() == 3


@pytest.mark.parametrize("status", [404, 401, 302, 501])
async def test_no_metrics_page_keeps_the_endpoint_ready(engine: Engine, seen: Seen, status: int):
    engine.answers = {"/metrics": text("", status=status), "/health": text("")}
    target = engine.target()
    async with scraping(seen, by_address(target)):
        reason = f"no metrics: GET /metrics answered {status}"
        assert await seen.next_health() == (True, reason)
        assert await seen.errors.get() == (target.address, ScrapeError.METRICS_MISSING)
        engine.answers["/metrics"] = text(PAGE)
        assert await seen.next_health() == (True, "")


async def test_no_metrics_page_and_a_sick_engine(engine: Engine, seen: Seen):
    engine.answers = {"/health": text("", status=500)}
    async with scraping(seen, by_address(engine.target())):
        assert await seen.next_health() == (False, "GET /health answered 500")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"\xff\xfe nonsense", ScrapeError.METRICS_MALFORMED),
        (b"#" * (MAX_PAGE_BYTES + 1), ScrapeError.METRICS_TOO_LARGE),
    ],
    ids=["nonsense", "too large"],
)
async def test_a_bad_page_keeps_the_endpoint_ready(
    engine: Engine, seen: Seen, body: bytes, error: ScrapeError
):
    engine.answers["/metrics"] = text(body)
    async with scraping(seen, by_address(engine.target())):
        ready, reason = await seen.next_health()
        assert (await seen.errors.get())[1] is error
    assert ready
    assert reason.startswith("metrics ")
    assert seen.loads.empty()


async def test_something_that_speaks_no_http(seen: Seen):
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-nope\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        target = Target(f"127.0.0.1:{port}", EngineType.OPENAI, EngineMetrics(interval_ms=50))
        async with scraping(seen, by_address(target)):
            ready, reason = await seen.next_health()
    assert not ready
    assert reason.startswith("not understood")
    assert (await seen.errors.get())[1] is ScrapeError.PROTOCOL


@pytest.mark.parametrize("engine_type", [EngineType.OPENAI, EngineType.OLLAMA])
async def test_engines_without_metrics_are_probed_by_their_health_page(
    engine: Engine, seen: Seen, engine_type: EngineType
):
    engine.answers = {"/health": text("")}
    async with scraping(seen, by_address(engine.target(engine_type))):
        assert await seen.next_health() == (True, "")
    assert set(engine.asked) == {"/health"}


async def test_engines_without_a_health_page_are_asked_for_their_models(engine: Engine, seen: Seen):
    engine.answers = {"/v1/models": text("{}")}
    async with scraping(seen, by_address(engine.target(EngineType.OPENAI))):
        assert await seen.next_health() == (True, "")
        engine.answers["/v1/models"] = text("", status=500)
        assert await seen.next_health() == (False, "GET /v1/models answered 500")
    assert engine.asked.count("/health") == 1


async def test_metrics_can_be_switched_off(engine: Engine, seen: Seen):
    engine.answers["/health"] = text("")
    async with scraping(seen, by_address(engine.target(enabled=False))):
        assert await seen.next_health() == (True, "")
    assert "/metrics" not in engine.asked


async def test_update_leaves_unchanged_endpoints_alone(engine: Engine, seen: Seen):
    other = Engine({"/metrics": text(PAGE)})
    await other.start()
    try:
        first, second = engine.target(), other.target()
        async with scraping(seen, by_address(first)) as scraper:
            _, task = scraper._tasks[first.address]
            scraper.update(by_address(first, second))
            assert scraper._tasks[first.address][1] is task
            while (await seen.loads.get())[0] != second.address:
                pass
            scraper.update(by_address(second))
            await asyncio.wait([task])
            seen.loads = asyncio.Queue()
            assert {(await seen.loads.get())[0] for _ in range(3)} == {second.address}
    finally:
        await other.stop()


async def test_a_changed_endpoint_is_scraped_the_new_way(engine: Engine, seen: Seen):
    async with scraping(seen, by_address(engine.target())) as scraper:
        await seen.loads.get()
        engine.answers["/new"] = text(PAGE.replace("3", "7"))
        scraper.update(by_address(engine.target(path="/new")))
        while (await seen.loads.get())[1].running != 7:
            pass


async def test_bad_targets_change_nothing(engine: Engine, seen: Seen):
    async with scraping(seen, by_address(engine.target())) as scraper:
        bad = Target("127.0.0.1:99999", EngineType.VLLM, EngineMetrics())
        with pytest.raises(ValueError, match=r"(?i)port"):
            scraper.update(by_address(bad))
        assert list(scraper._tasks) == [engine.target().address]


async def test_a_failing_callback_does_not_end_the_scraping(engine: Engine):
    calls: asyncio.Queue[int] = asyncio.Queue()

    def on_load(*_: object) -> None:
        calls.put_nowait(1)
        raise LookupError("a bug")

    async with Scraper(on_load=on_load) as scraper:
        scraper.update(by_address(engine.target()))
        for _ in range(3):
            await calls.get()


async def test_leaving_the_context_ends_all_tasks(engine: Engine, seen: Seen):
    engine.answers["/metrics"] = stall
    async with scraping(seen, by_address(engine.target())) as scraper:
        tasks = [task for _, task in scraper._tasks.values()]
    assert all(task.done() for task in tasks)
    assert not scraper._ending
