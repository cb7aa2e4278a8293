import asyncio
import io
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from pointsman_cli.demo import runner
from pointsman_cli.demo.errors import DemoError
from pointsman_cli.demo.options import DemoOptions, WorkloadName
from pointsman_cli.demo.processes import Children
from pointsman_cli.demo.results import Comparison
from pointsman_cli.demo.runner import DEFAULT_LOAD, prepare, run_demo
from pointsman_cli.demo.stack import Stack
from pointsman_core.resources import Algorithm

MANIFESTS = """
apiVersion: pointsman.dev/v1alpha1
kind: LLMExpert
metadata: {name: small}
spec: {model: small-7b, backend: {addresses: ["127.0.0.1:1"]}, limits: {contextTokens: 900}}
---
apiVersion: pointsman.dev/v1alpha1
kind: RoutingPolicy
metadata: {name: auto}
spec: {models: [auto]}
"""
ANSWER = (
    b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 10}}\n\n'
    b"data: [DONE]\n\n"
)
EXPLAINED = {"x-pointsman-expert": "small", "x-pointsman-why": "because"}


@pytest.fixture
def options(tmp_path) -> DemoOptions:
    manifests = tmp_path / "site.yaml"
    manifests.write_text(MANIFESTS)
    return DemoOptions(
        seconds=0.05,
        rate=100.0,
        deciders=(Algorithm.RANDOM, Algorithm.LEAST_LOAD),
        manifests=manifests,
        output_dir=tmp_path,
        workload=WorkloadName.SYNTHETIC,
        limit_ms=600_000.0,
        seed=3,
        keep_running=False,
    )


@dataclass
class StandIn:
    """A stand-in for the running site."""

    bodies: list[dict] = field(default_factory=list)
    in_flight: int = 0
    in_flight_status: int = 200


@pytest.fixture
async def stand_in(monkeypatch):
    state = StandIn()

    async def answer(request):
        state.bodies.append(orjson.loads(await request.read()))
        headers = EXPLAINED | {"content-type": "text/event-stream"}
        return web.Response(body=ANSWER, headers=headers)

    async def in_flight(_):
        page = {"in_flight": state.in_flight, "endpoints": {}}
        return web.json_response(page, status=state.in_flight_status)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_get("/in-flight", in_flight)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")

        @asynccontextmanager
        async def running(site, *_, **__):
            yield Stack(url, f"{url}/in-flight", site, ("small",), Children())

        monkeypatch.setattr(runner, "running_stack", running)
        yield state


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


class TestPrepare:
    def test_equal_options_give_equal_requests(self, options):
        first, again = prepare(options), prepare(options)
        assert first.workload.prompts == again.workload.prompts
        assert len(first.workload) == 5
        assert prepare(replace(options, seed=4)).workload.prompts != first.workload.prompts

    def test_default_rate_is_a_share_of_capacity(self, options):
        prepared = prepare(replace(options, rate=None, limit_ms=None, seconds=30))
        assert prepared.limit_ms == 60
        assert prepared.load == pytest.approx(DEFAULT_LOAD)
        assert prepared.rate > 0
        assert len(prepared.workload) == round(30 * prepared.rate)

    def test_prompts_leave_room_for_the_answer(self, options):
        assert prepare(options).max_input_tokens + runner.MAX_OUTPUT_TOKENS < 900

    def test_a_site_that_is_too_slow_needs_a_rate(self, options):
        with pytest.raises(DemoError, match=r"no expert can keep 0\.1 ms per token; name a --rate"):
            prepare(replace(options, rate=None, limit_ms=0.1))
        assert prepare(replace(options, limit_ms=0.1)).load is None


@pytest.mark.usefixtures("stand_in")
async def test_says_when_the_limit_raises_that_of_the_first_token(options, console):
    text = MANIFESTS.replace("models: [auto]", "models: [auto], qos: {timeToFirstTokenMs: 1000}")
    options.manifests.write_text(text)
    await run_demo(replace(options, limit_ms=500), console, lambda _: None)
    assert "timeToFirstTokenMs" not in console.file.getvalue()
    await run_demo(replace(options, limit_ms=2000), console, lambda _: None)
    assert "--limit-ms raises timeToFirstTokenMs from 1000 too" in console.file.getvalue()


async def test_each_decider_gets_the_same_requests(options, stand_in, console):
    reports = []
    await run_demo(options, console, reports.append)
    (report,) = reports
    assert (report.model, report.comparison) == (None, [])
    assert [run.decider for run in report.runs] == ["Random", "LeastLoad"]
    for run in report.runs:
        assert (run.requests, run.failed, run.in_flight_at_end) == (5, 0, 0)
        assert run.experts["small"].requests == 5
    assert report.simulated
    assert report.workload.description.startswith("synthetic")
    by_model = {
        model: [body["messages"] for body in stand_in.bodies if body["model"] == model]
        for model in ("auto/Random", "auto/LeastLoad")
    }
    assert len(by_model["auto/Random"]) == 5
    # Connections may reorder requests that are due within a millisecond.
    assert sorted(map(str, by_model["auto/Random"])) == sorted(map(str, by_model["auto/LeastLoad"]))


@pytest.mark.usefixtures("stand_in")
async def test_tells_the_model_of_the_learned_decider(options, console):
    reports = []
    await run_demo(replace(options, deciders=(Algorithm.HAN_DRL,)), console, reports.append)
    assert "HanDrl decides by the shipped model, SHA-256 " in console.file.getvalue()
    assert len(reports[0].model.sha256) == 64


@pytest.mark.usefixtures("stand_in")
async def test_sets_the_simulator_beside_each_decider(options, console):
    reports = []
    await run_demo(replace(options, compare=True), console, reports.append)
    compared: list[Comparison] = reports[0].comparison
    assert [one.decider for one in compared] == ["Random", "LeastLoad"]
    for run, one in zip(reports[0].runs, compared, strict=True):
        assert one.simulator.requests == run.requests
        assert one.difference == pytest.approx(run.average_qos - one.simulator.average_qos)
        assert one.same_expert == 1


async def test_what_cannot_be_simulated_is_told_before_anything_starts(options, stand_in, console):
    options.manifests.write_text(MANIFESTS.replace("127.0.0.1:1", "10.0.0.7:8000"))
    message = "--compare: small at 10.0.0.7:8000 is a real engine"
    with pytest.raises(DemoError, match=message):
        await run_demo(replace(options, compare=True), console, lambda _: None)
    assert stand_in.bodies == []


@pytest.mark.usefixtures("stand_in")
async def test_keeps_serving_until_cancelled(options, console):
    served = replace(options, deciders=(), keep_running=True)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(run_demo(served, console, lambda _: None))
        while "curl" not in console.file.getvalue():  # noqa: ASYNC110 - the console has no event
            await asyncio.sleep(0)
        task.cancel()
    text = console.file.getvalue()
    assert "serving http://127.0.0.1" in text
    assert "/v1/chat/completions -H 'content-type: application/json'" in text


async def test_what_stays_in_flight_is_reported(options, stand_in, console, monkeypatch):
    monkeypatch.setattr(runner, "DRAIN_TIMEOUT_S", 0.05)
    stand_in.in_flight = 2
    reports = []
    await run_demo(options, console, reports.append)
    assert [run.in_flight_at_end for run in reports[0].runs] == [2, 2]
    assert "2 requests stayed in the in-flight table" in reports[0].warnings[-1]


async def test_a_server_that_went_away_is_told(options, stand_in, console):
    stand_in.in_flight_status = 503
    with pytest.raises(DemoError, match="the policy server does not answer any more"):
        await run_demo(options, console, lambda _: None)
