"""Looking at engines over real HTTP."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

from pointsman_operator import probe
from pointsman_operator.observed import Probe
from pointsman_operator.probe import Prober, look

LIST = {"object": "list", "data": [{"id": "b"}, {"id": "a"}, {"id": 1}, "x"]}


class Engine:
    """Answers ``/v1/models`` as told."""

    def __init__(self):
        self.status, self.body, self.asked = 200, LIST, 0
        self.address = ""

    async def answer(self, _request):
        self.asked += 1
        if isinstance(self.body, asyncio.Event):
            await self.body.wait()
        if isinstance(self.body, bytes):
            return web.Response(status=self.status, body=self.body)
        headers = {"location": "http://127.0.0.1:1/"} if self.status == 302 else {}
        return web.json_response(self.body, status=self.status, headers=headers)


@pytest.fixture
async def engine():
    made = Engine()
    app = web.Application()
    app.router.add_get("/v1/models", made.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.address = f"127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as made:
        yield made


ANSWERS = {
    "list": (200, LIST, Probe(answers=True, models=("a", "b"))),
    "locked": (401, {}, Probe(answers=True, error="/v1/models answered 401")),
    "redirect": (302, {}, Probe(answers=True, error="/v1/models answered 302")),
    "server error": (503, {}, Probe(answers=False, error="answered 503")),
    "no JSON": (200, b"<html>", Probe(answers=True, error="/v1/models is not a list of models")),
    "no list": (200, {"data": 1}, Probe(answers=True, error="/v1/models is not a list of models")),
    "array": (200, [], Probe(answers=True, error="/v1/models is not a list of models")),
    "huge": (
        200,
        b" " * (probe.MAX_BYTES + 1),
        Probe(answers=True, error="/v1/models is not a list of models"),
    ),
}


@pytest.mark.parametrize(("status", "body", "found"), ANSWERS.values(), ids=ANSWERS)
async def test_what_an_engine_answers(engine, session, status, body, found):
    engine.status, engine.body = status, body
    assert await look(session, engine.address) == found


async def test_nobody_listens(session):
    found = await look(session, "127.0.0.1:1")
    assert found == Probe(answers=False, error="connection failed (ECONNREFUSED)")


async def test_no_answer_in_time(engine):
    engine.body = asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=0.05)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        assert (await look(session, engine.address)).error == "no answer within 5 s"
    engine.body.set()


async def test_something_else_than_http(session):
    async def speak(_reader, writer):
        writer.write(b"220 mail.example.org\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    found = await look(session, f"127.0.0.1:{port}")
    assert not found.answers
    assert found.error.startswith("no HTTP")
    server.close()
    await server.wait_closed()


@pytest.fixture
async def prober():
    changed = asyncio.Event()
    made = Prober(interval_s=0.01, on_change=changed.set)

    async def until(holds):
        async with asyncio.timeout(10):
            while not holds(made.results()):
                changed.clear()
                await changed.wait()

    made.until = until
    yield made
    await made.close()


async def test_new_addresses_are_probed_and_old_ones_forgotten(engine, prober):
    prober.set_addresses({engine.address})
    prober.set_addresses({engine.address})
    await prober.until(lambda found: engine.address in found)
    assert prober.results()[engine.address].models == ("a", "b")
    prober.set_addresses(set())
    assert prober.results() == {}


async def test_a_change_is_told(engine, prober):
    prober.set_addresses({engine.address})
    await prober.until(lambda found: engine.address in found)
    engine.body = {"data": [{"id": "c"}]}
    await prober.until(lambda found: found[engine.address].models == ("c",))


async def test_one_failure_may_be_chance(engine, prober):
    prober.set_addresses({engine.address})
    await prober.until(lambda found: engine.address in found)
    engine.status = 500
    asked = engine.asked
    await prober.until(lambda found: not found[engine.address].answers)
    assert engine.asked - asked >= 2


async def test_an_endpoint_that_never_answered_is_silent_at_once(engine, prober):
    engine.status = 500
    prober.set_addresses({engine.address})
    await prober.until(lambda found: engine.address in found)
    assert prober.results()[engine.address] == Probe(answers=False, error="answered 500")


async def test_a_bug_ends_no_probe(engine, prober, monkeypatch):
    async def explode(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(probe, "look", explode)
        prober.set_addresses({engine.address})
        await prober.until(lambda found: engine.address in found)
        assert prober.results()[engine.address].error == "not understood"
    await prober.until(lambda found: found[engine.address].answers)
