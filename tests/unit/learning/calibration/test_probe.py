"""Calibrating the simulated engine, in simulated time, gives back its own cost model."""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from pointsman_core.cost import CostModel
from pointsman_engine_sim.server import running
from pointsman_engine_sim.settings import EngineSettings
from pointsman_learning.calibration.check import compare, held_out_load
from pointsman_learning.calibration.client import Stream, connect
from pointsman_learning.calibration.design import EngineLimits, design
from pointsman_learning.calibration.fit import Times, fit
from pointsman_learning.calibration.measurements import CalibrationError
from pointsman_learning.calibration.probe import ProbeOptions, probe, roundest
from pointsman_learning.calibration.profile import profile_fields

TRUE = CostModel(
    overhead_s=0.004,
    compute_s_per_token=0.0002,
    weights_s=0.016,
    context_s_per_token=2e-6,
    kv_capacity_tokens=16_384,
    max_sequences=8,
    max_batched_tokens=256,
)
OPTIONS = ProbeOptions(concurrency=8, iterations=24)


@asynccontextmanager
async def engine(**settings):
    defaults = {"model": "tiny", "cost": TRUE, "context_tokens": 2048, "expected_output_tokens": 9}
    async with running(EngineSettings(**(defaults | settings))) as url:
        yield url


async def calibrate(url, notes, options=OPTIONS):
    async with connect(url, model="tiny") as client:
        return await probe(client, options, note=notes.append)


def test_the_engine_simulator_gives_back_its_cost_model(run_jumping):
    async def work():
        async with engine() as url, connect(f"{url}/v1/", model="tiny") as client:
            probed = await probe(client, OPTIONS, note=notes.append)
            found = fit(probed.measurements)
            fields = profile_fields(found.times, probed.limits)
            load = held_out_load(fields, requests=40, load=0.54, seed=3)
            return probed, found, await compare(client, fields, load)

    notes = []
    probed, found, comparison = run_jumping(work())
    assert probed.limits == EngineLimits(
        context_tokens=2048, concurrency=8, kv_capacity_tokens=16_384, max_batched_tokens=256
    )
    assert found.held_out.r2 > 0.99
    times = found.times
    assert times.overhead_s + times.weights_s == pytest.approx(0.020, rel=0.03)
    assert times.compute_s_per_token == pytest.approx(TRUE.compute_s_per_token, rel=0.05)
    assert times.context_s_per_token == pytest.approx(TRUE.context_s_per_token, rel=0.05)
    assert not [note for note in notes if "busy" in note or "lower" in note]

    report = comparison.report()
    assert report["requests"] == 40
    assert report["latency_per_token"]["p90_ape"] < 0.05
    assert report["first_token"]["p90_ape"] < 0.15
    assert all(verdict["agree"] > 0.8 for verdict in report["in_time"])


@pytest.mark.parametrize(
    ("budget", "concurrency", "kv_tokens", "context"),
    [
        (512, 8, 16_384, 2048),  # the usual burst and what decodes do not fit the cache
        (512, 2, 65_536, 8192),
        (2048, 8, 65_536, 2048),
        (2048, 4, 65_536, 32_768),
    ],
)
def test_the_burst_for_the_budget_fits_cache_and_batch(
    run_jumping, monkeypatch, budget, concurrency, kv_tokens, context
):
    cost = replace(
        TRUE,
        max_batched_tokens=budget,
        max_sequences=concurrency,
        kv_capacity_tokens=kv_tokens,
    )
    options = ProbeOptions(concurrency=concurrency, iterations=8)
    monkeypatch.setattr("pointsman_learning.calibration.probe.design", lambda *_, **__: [])

    async def work():
        async with engine(cost=cost, context_tokens=context) as url:
            return await calibrate(url, notes, options)

    notes = []
    assert run_jumping(work()).limits.max_batched_tokens == budget
    assert "uncertain" not in " ".join(notes)


def test_an_odd_budget_is_told(run_jumping, monkeypatch):
    monkeypatch.setattr("pointsman_learning.calibration.probe.design", lambda *_, **__: [])

    async def work():
        async with engine(cost=replace(TRUE, max_batched_tokens=233)) as url:
            return await calibrate(url, notes)

    notes = []
    budget = run_jumping(work()).limits.max_batched_tokens
    told = f"maxBatchedTokens {budget} is uncertain: give --max-batched-tokens if you know it"
    assert notes[-1] == told


def test_beside_a_single_sequence_no_budget_is_measured(run_jumping, monkeypatch):
    monkeypatch.setattr("pointsman_learning.calibration.probe.design", lambda *_, **__: [])

    async def work():
        async with engine(cost=replace(TRUE, max_sequences=1)) as url:
            return await calibrate(url, notes, ProbeOptions(concurrency=1))

    notes = []
    assert run_jumping(work()).limits.max_batched_tokens == 512
    assert notes == ["with --concurrency 1 maxBatchedTokens is not measured: 512 is assumed"]


def test_a_batch_that_does_not_run_at_once_is_left_out(run_jumping):
    async def work():
        async with engine(context_tokens=128) as url:
            return await calibrate(url, notes, ProbeOptions(concurrency=16, iterations=8))

    notes = []
    probed = run_jumping(work())
    ended = "16 x 32 tokens: a sequence ended too soon: does the engine serve fewer at once?"
    assert ended in notes
    assert probed.measurements.batch.max() == 8


def test_a_busy_engine_is_not_measured(run_jumping):
    async def work():
        async with engine() as url, connect(url, model="tiny") as client:
            stream, begun = Stream(8, 500), asyncio.Event()
            stream.watchers.append(begun.set)
            task = asyncio.create_task(client.complete(stream))
            await begun.wait()
            try:
                await probe(client, OPTIONS, note=print)
            finally:
                task.cancel()

    with pytest.raises(CalibrationError, match="the engine is busy: 1 requests run and 0 wait"):
        run_jumping(work())


def test_another_model_is_named(run_jumping):
    async def work():
        async with engine(model="other") as url:
            await calibrate(url, [])

    with pytest.raises(CalibrationError, match="the engine serves other, not tiny"):
        run_jumping(work())


async def test_an_engine_that_is_not_there_is_an_error(unused_tcp_port):
    with pytest.raises(CalibrationError, match=r"127\.0\.0\.1.*connect"):
        await calibrate(f"http://127.0.0.1:{unused_tcp_port}", [])


async def test_the_page_of_metrics_that_is_not_there_is_named(unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with connect(url, model="tiny") as client:
        with pytest.raises(CalibrationError, match=f"^{url}/metrics: "):
            await client.counters()


# --- Engines of other kinds ------------------------------------------------------------


class Blind:
    """An engine without metrics: 10 ms per token, any number of requests at once."""

    def __init__(self, **options):
        self.options = options

    async def models(self, _):
        return web.json_response({"data": [{"id": "tiny"}]})

    async def complete(self, request):
        body = await request.json()
        if status := self.options.get("status"):
            return web.Response(status=status, text="no such thing")
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(self.options.get("tokens") or body["max_tokens"]):
            await asyncio.sleep(0.010)
            await self._send(response, self.options.get("event") or {"choices": [{"text": "x"}]})
        await self._send(response, {"choices": [{"text": "", "finish_reason": "length"}]})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response, event):
        data = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {data}\n\n".encode())

    @asynccontextmanager
    async def running(self):
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def calibrate_blind(run_jumping, notes, **options):
    async def work():
        async with Blind(**options).running() as url:
            small = ProbeOptions(concurrency=2, iterations=8, context_tokens=512)
            return await calibrate(url, notes, small)

    return run_jumping(work())


def test_without_metrics_chunks_are_counted(run_jumping):
    notes = []
    probed = calibrate_blind(run_jumping, notes)
    decodes = probed.measurements[probed.measurements.prefill_tokens == 0]
    assert decodes.iteration_seconds == pytest.approx(0.010, rel=0.01)
    assert probed.limits.max_batched_tokens == 512
    assert "does not count its iterations" in notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 3}, "asked for exactly 8 tokens, the engine answered 3"),
        ({"status": 404}, "the engine answered 404: no such thing"),
        ({"event": "{"}, "not JSON in the engine's stream: '{'"),
        ({"event": {"error": {"message": "out of memory"}}}, "an error came .*out of memory"),
    ],
)
def test_engines_that_cannot_be_measured_are_told(run_jumping, options, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate_blind(run_jumping, [], **options)


def test_a_check_ends_with_the_first_failure(run_jumping):
    limits = EngineLimits(
        context_tokens=512, concurrency=2, kv_capacity_tokens=4096, max_batched_tokens=512
    )
    times = Times(overhead_s=0.01, compute_s_per_token=1e-4, weights_s=0.0, context_s_per_token=0.0)
    fields = profile_fields(times, limits)
    load = held_out_load(fields, requests=5, load=0.5, seed=0)

    async def work():
        async with Blind(status=503).running() as url, connect(url, model="tiny") as client:
            await compare(client, fields, load)

    with pytest.raises(CalibrationError, match="the engine answered 503"):
        run_jumping(work())


@pytest.mark.parametrize(("requests", "load"), [(0, 0.5), (5, 0.0)])
def test_a_check_needs_requests_and_load(requests, load):
    with pytest.raises(CalibrationError, match="at least one request and a load above 0"):
        held_out_load({}, requests=requests, load=load, seed=0)


# --- What is planned -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "iterations", "budget"),
    [
        (16_384 + 32, 32, 512),
        (16_384 + 33, 33, 512),
        (16_384 + 34, 34, 512),
        (14_329 + 7, 7, 2048),
        (14_329 + 4, 4, 4096),
        (65_536 + 9, 9, 8192),
        (16_384 + 37, 37, 448),
        (100, 1, 64),
    ],
)
def test_the_roundest_budget_explains_a_burst(tokens, iterations, budget):
    assert roundest(tokens, iterations) == budget


@pytest.mark.parametrize("concurrency", [1, 3, 32, 256])
@pytest.mark.parametrize("kv", [2000, 65_536])
def test_loads_keep_within_the_limits(concurrency, kv):
    limits = EngineLimits(
        context_tokens=1024, concurrency=concurrency, kv_capacity_tokens=kv, max_batched_tokens=512
    )
    loads = design(limits, iterations=32, seed=0)
    assert len(loads) >= 3
    for load in loads:
        assert load.batch <= concurrency
        assert load.prompt_tokens + load.output_tokens <= 1024
        assert load.batch * (load.prompt_tokens + load.output_tokens) <= kv
        for arrival in load.arrivals:
            assert load.batch < concurrency
            assert load.batch + arrival.tokens <= 512
            assert arrival.prompt_tokens < 1024
