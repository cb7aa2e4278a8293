import asyncio
import io
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console
from rich.text import Text

from pointsman_cli.demo import live
from pointsman_cli.demo.live import DemoView, ask_in_flight, render, status_line
from pointsman_cli.demo.load import Ending, Outcome, Progress
from pointsman_cli.demo.results import HostLoad, RunResult, summarise

LIMIT_MS = 60.0

PAGE = {
    "in_flight": 5,
    "endpoints": {
        "127.0.0.1:1": {
            "expert": "small",
            "in_flight": 5,
            "running": 3,
            "waiting": 2,
            "kv_usage": 0.5,
            "ready": True,
        },
        "127.0.0.1:2": {
            "expert": "large",
            "in_flight": 0,
            "running": None,
            "waiting": None,
            "kv_usage": None,
            "ready": False,
        },
    },
}


@pytest.fixture
async def in_flight_url():
    async def page(_):
        return web.json_response(PAGE)

    app = web.Application()
    app.router.add_get("/debug/in-flight", page)
    async with TestServer(app) as server:
        yield str(server.make_url("/debug/in-flight"))


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def progress() -> Progress:
    done = Outcome(index=0, arrival_s=0.0, ending=Ending.ANSWERED, output_tokens=10)
    done.last_token_s = 0.5
    progress = Progress(total=8, sent=6)
    progress.finished.append(done)
    progress.endings[Ending.ANSWERED] += 1
    return progress


class Screen(io.StringIO):
    """Tells when a text has been shown."""

    def __init__(self, awaited: str) -> None:
        super().__init__()
        self._awaited = awaited
        self.shown = asyncio.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._awaited in self.getvalue():
            self.shown.set()
        return written


@pytest.fixture
def screen() -> Screen:
    return Screen("6 of 8 sent")


async def test_reads_the_in_flight_page(session, in_flight_url):
    seen = await ask_in_flight(session, in_flight_url)
    assert seen.total == 5
    assert seen.endpoints["127.0.0.1:1"].waiting == 2
    assert seen.endpoints["127.0.0.1:2"].waiting == 0
    assert seen.unready == ["large"]
    assert not seen.all_ready


async def test_picture_of_a_run(session, in_flight_url, progress, screen):
    seen = await ask_in_flight(session, in_flight_url)
    picture = render("Random", progress, seen, [], limit_ms=LIMIT_MS)
    Console(file=screen, width=120).print(picture)
    text = screen.getvalue()
    assert "Random" in text
    assert "6 of 8 sent, 5 in flight, 1 answered, 0 failed" in text
    assert "5 ███░░" in text
    assert "0  not ready" in text
    assert "QoS" not in text


def test_running_percentiles_are_labelled_as_such(progress):
    assert status_line(progress, limit_ms=LIMIT_MS).endswith("p50 50, p99 50 ms/token so far")
    assert "ms/token" not in status_line(Progress(total=1), limit_ms=LIMIT_MS)


def test_share_in_time_so_far_is_labelled_as_early(progress):
    progress.finished.append(Outcome(index=1, arrival_s=0.0, ending=Ending.FAILED))
    early = "in time so far (early: quick answers come first)"
    assert f"; 50% {early}" in status_line(progress, limit_ms=50.0)
    assert f"; 0% {early}" in status_line(progress, limit_ms=49.0)
    assert "in time" not in status_line(Progress(total=1), limit_ms=50.0)


def finished(decider: str, score: float) -> RunResult:
    answers = [
        Outcome(
            index=index,
            arrival_s=0.0,
            ending=Ending.ANSWERED,
            expert="small",
            last_token_s=0.5 * (index + 1),
            output_tokens=10,
        )
        for index in range(2)
    ]
    grader = Mock(score=Mock(return_value=(score, True)))
    host = HostLoad(loop_lag_p99_ms=0.0, cpu_busy=None)
    return summarise(decider, answers, grader, limit_ms=50.0, in_flight_at_end=0, host=host)


async def test_picture_has_the_qos_of_the_runs_that_are_over(
    session, in_flight_url, progress, screen
):
    console = Console(file=screen, force_terminal=True, width=100)
    view = DemoView(console, session, in_flight_url, limit_ms=LIMIT_MS)
    view.finished(finished("Random", 0.5))
    view.finished(finished("LeastLoad", 1.0))
    async with view.run("RoundRobin", progress):
        await screen.shown.wait()
    lines = Text.from_ansi(screen.getvalue()).plain.splitlines()
    # The picture may have been drawn several times.
    (least,) = {line for line in lines if "LeastLoad" in line and "█" in line}
    (random,) = {line for line in lines if "Random" in line and "█" in line}
    assert "QoS 0.250±" in random
    assert "50% late" in random
    assert (random.count("█"), least.count("█")) == (10, 20)


@pytest.mark.parametrize("terminal", [False, True])
async def test_shows_while_the_block_runs(
    session, in_flight_url, progress, screen, monkeypatch, terminal
):
    monkeypatch.setattr(live, "PLAIN_LINE_EVERY_S", 0.0)
    console = Console(file=screen, force_terminal=terminal, width=100)
    view = DemoView(console, session, in_flight_url, limit_ms=LIMIT_MS)
    async with view.run("Random", progress):
        await screen.shown.wait()
    assert view.in_flight.total == 5


async def test_a_silent_server_does_not_stop_a_run(session, progress, screen, monkeypatch):
    monkeypatch.setattr(live, "PLAIN_LINE_EVERY_S", 0.0)
    url = "http://127.0.0.1:9/debug/in-flight"
    view = DemoView(Console(file=screen), session, url, limit_ms=LIMIT_MS)
    async with view.run("Random", progress):
        await screen.shown.wait()
    assert view.in_flight.total == 0
