import asyncio
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pointsman_cli.demo.load import Ending, Planned, Progress, drive, padded, plan
from pointsman_core.workload import DOMAINS, synthetic

EXPLAINED = {
    "x-pointsman-expert": "small",
    "x-pointsman-endpoint": "127.0.0.1:1",
    "x-pointsman-why": "LeastLoad: …",
}
STREAM = (
    b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
)
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_post("/", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield session, str(server.make_url("/"))


async def outcomes_of(handler, requests, **options):
    progress = Progress(total=len(requests))
    async with serving(handler) as (session, url):
        return await drive(session, url, requests, progress, **options), progress


def at(*times: float) -> list[Planned]:
    return [Planned(time, b"{}") for time in times]


async def streamed(request: web.Request, *parts: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers=EXPLAINED | {"content-type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
    return response


class TestDrive:
    async def test_a_complete_answer(self):
        async def handler(request):
            return await streamed(request, STREAM, DONE)

        outcomes, progress = await outcomes_of(handler, at(0.0))
        (outcome,) = outcomes
        assert outcome.ending is Ending.ANSWERED
        assert (outcome.expert, outcome.endpoint) == ("small", "127.0.0.1:1")
        assert outcome.decided
        assert outcome.output_tokens == 2
        assert outcome.ms_per_token == pytest.approx(outcome.last_token_s * 500)
        assert outcome.ms_to_first_token >= 0
        assert progress.finished == outcomes
        assert (progress.sent, progress.in_flight) == (1, 0)
        assert progress.endings == {Ending.ANSWERED: 1}

    @pytest.mark.parametrize(
        ("why", "fell_back"),
        [("LeastLoad: score 1 (fallback: HanDrl failed: no model)", True), ("HanDrl: …", False)],
    )
    async def test_a_choice_of_the_fallback_is_told_from_the_deciders_own(self, why, fell_back):
        async def handler(_):
            headers = EXPLAINED | {"x-pointsman-why": why}
            return web.Response(body=STREAM + DONE, headers=headers)

        outcomes, _ = await outcomes_of(handler, at(0.0))
        assert (outcomes[0].decided, outcomes[0].fell_back) == (True, fell_back)

    async def test_is_an_open_loop(self):
        """No request waits for another's answer: the first is answered when all are there."""
        together = asyncio.Barrier(4)

        async def handler(request):
            await together.wait()
            return await streamed(request, STREAM, DONE)

        outcomes, _ = await outcomes_of(handler, at(0.0, 0.0, 0.001, 0.002))
        assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3]
        assert {outcome.ending for outcome in outcomes} == {Ending.ANSWERED}
        assert [outcome.arrival_s for outcome in outcomes] == [0.0, 0.0, 0.001, 0.002]

    @pytest.mark.parametrize(
        ("status", "error", "ending"),
        [
            (429, {"code": "over_limit", "message": "Rejected by policy auto"}, Ending.REJECTED),
            (503, {"code": "no_ready_endpoint", "message": "none"}, Ending.FAILED),
            (503, "not an object", Ending.FAILED),
        ],
    )
    async def test_refusals(self, status, error, ending):
        async def handler(_):
            return web.json_response({"error": error}, status=status)

        outcomes, _ = await outcomes_of(handler, at(0.0))
        assert outcomes[0].ending is ending
        assert outcomes[0].reason.startswith(f"HTTP {status}")
        assert outcomes[0].ms_per_token is None
        assert outcomes[0].ms_to_first_token is None

    async def test_refusal_that_is_not_json(self):
        async def handler(_):
            return web.Response(status=502, text="bad gateway")

        outcomes, _ = await outcomes_of(handler, at(0.0))
        assert outcomes[0].reason == "HTTP 502: bad gateway"

    async def test_a_cut_stream_is_a_failure(self):
        async def handler(request):
            return await streamed(request, STREAM)

        outcomes, _ = await outcomes_of(handler, at(0.0))
        assert outcomes[0].ending is Ending.FAILED
        assert outcomes[0].reason == "the stream ended early"
        assert outcomes[0].ms_per_token is None

    async def test_a_broken_connection_is_a_failure(self):
        async def handler(request):
            request.transport.abort()
            return web.Response()

        outcomes, _ = await outcomes_of(handler, at(0.0))
        assert outcomes[0].ending is Ending.FAILED
        assert outcomes[0].reason.startswith("connection: ")

    async def test_an_endless_answer_is_given_up(self):
        async def handler(request):
            response = await streamed(request, STREAM)
            await asyncio.Event().wait()
            return response

        outcomes, _ = await outcomes_of(handler, at(0.0), timeout_s=0.1)
        assert outcomes[0].ending is Ending.FAILED
        assert outcomes[0].reason.startswith("no end of the answer")


class TestPlan:
    def test_bodies_follow_the_workload(self):
        means = {"a": dict.fromkeys(DOMAINS, 0.5)}
        workload = synthetic(requests=30, rate=2.0, seed=1, means=means)
        requests = plan(workload, model="auto/Random", max_tokens=7, max_input_tokens=300)
        np.testing.assert_allclose([r.at_s for r in requests], workload.arrivals.seconds)
        for request, prompt, tokens in zip(
            requests, workload.prompts, workload.arrivals.input_tokens, strict=True
        ):
            body = orjson.loads(request.body)
            (message,) = body.pop("messages")
            assert body == {
                "model": "auto/Random",
                "max_tokens": 7,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            assert message["content"].startswith(prompt)
            wanted = max(min(tokens, 300), len(prompt) / 4)
            assert len(message["content"]) / 4 == pytest.approx(wanted, abs=20)

    def test_padding_ends_at_the_length_and_never_cuts(self):
        assert len(padded("What?", 1000)) == pytest.approx(4000, abs=2)
        assert padded("What?", 1) == "What?"
