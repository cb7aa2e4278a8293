import asyncio
import io

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from pointsman_cli.demo import live
from pointsman_cli.demo.live import DemoView, ask_in_flight, render, status_line
from pointsman_cli.demo.load import Ending, Outcome, Progress

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
    Console(file=screen, width=100).print(
        render("Random", progress, await ask_in_flight(session, in_flight_url))
    )
    text = screen.getvalue()
    assert "Random" in text
    assert "6 of 8 sent, 5 in flight, 1 answered, 0 failed" in text
    assert "5 ███░░" in text
    assert "0  not ready" in text
    assert "QoS" not in text


def test_running_percentiles_are_labelled_as_such(progress):
    assert status_line(progress).endswith("p50 50, p99 50 ms/token so far")
    assert "ms/token" not in status_line(Progress(total=1))


@pytest.mark.parametrize("terminal", [False, True])
async def test_shows_while_the_block_runs(
    session, in_flight_url, progress, screen, monkeypatch, terminal
):
    monkeypatch.setattr(live, "PLAIN_LINE_EVERY_S", 0.0)
    console = Console(file=screen, force_terminal=terminal, width=100)
    view = DemoView(console, session, in_flight_url)
    async with view.run("Random", progress):
        await screen.shown.wait()
    assert view.in_flight.total == 5


async def test_a_silent_server_does_not_stop_a_run(session, progress, screen, monkeypatch):
    monkeypatch.setattr(live, "PLAIN_LINE_EVERY_S", 0.0)
    view = DemoView(Console(file=screen), session, "http://127.0.0.1:9/debug/in-flight")
    async with view.run("Random", progress):
        await screen.shown.wait()
    assert view.in_flight.total == 0
