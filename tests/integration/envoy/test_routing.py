"""Which engine gets a request, and with which model in the body."""

import asyncio
import json

import pytest
from aiohttp import web

pytestmark = pytest.mark.integration


async def unavailable(_: web.Request) -> web.Response:
    return web.json_response({"error": "loading"}, status=503)


async def test_the_pick_is_honoured_and_the_body_rewritten(site, toy):
    for engine in (site.code, site.maths, site.code):
        model = engine.models[0]
        site.policy.decision = toy.Decision(model=model, picks=(engine.address,))

        status, _, answer = await site.chat()

        assert (status, answer) == (200, {"served_by": engine.expert})
        got = engine.received[-1]
        assert got.model == model
        assert got.headers["content-length"] == str(len(got.body))
    assert (len(site.maths.received), len(site.code.received)) == (1, 2)


async def test_any_served_name_is_left_alone(site, toy):
    site.policy.decision = toy.Decision(model="maths-alias", picks=(site.maths.address,))
    await site.chat()
    assert site.maths.received[0].model == "maths-alias"


async def test_what_a_client_claims_is_forgotten(site):
    claims = {
        "x-request-id": "chosen-by-client",
        "x-gateway-destination-endpoint": site.code.address,
        "X-Pointsman-Endpoint": site.code.address,
        "x-pointsman-served-models": "evil",
        "x-pointsman-anything": "evil",
        "x-envoy-max-retries": "9",
        "x-envoy-upstream-rq-timeout-ms": "1",
    }

    status, headers, answer = await site.chat(headers=claims)

    assert (status, answer) == (200, {"served_by": "maths"})
    assert headers["x-request-id"] != "chosen-by-client"
    decide, observe = await site.policy.stream("decide"), await site.policy.stream("observe")
    for seen in (decide.headers(), observe.headers(), site.maths.received[0].headers):
        assert seen["x-request-id"] == headers["x-request-id"]
        forged = {name.lower() for name in claims} - {"x-request-id"}
        assert not forged & seen.keys()


async def test_forged_picks_change_nothing_without_the_policy_server(site):
    rogue = site.code
    await site.policy.announce([site.maths.target])
    await site.healthy(1)
    await site.policy.stop()
    claims = {
        "x-gateway-destination-endpoint": rogue.address,
        "x-pointsman-served-models": "evil",
    }

    for _ in range(5):
        status, _, answer = await site.chat(headers=claims)
        assert (status, answer) == (200, {"served_by": "maths"})

    assert {got.model for got in site.maths.received} == {"maths-model"}
    assert rogue.received == []


@pytest.mark.parametrize("failure", ["refused", "503", "reset"])
async def test_a_retry_on_another_expert_carries_its_model(site, toy, failure):
    async def reset(request: web.Request) -> web.Response:
        request.transport.abort()
        return web.Response()

    if failure == "refused":
        await site.maths.stop()
    site.maths.reply = {"503": unavailable, "reset": reset}.get(failure)
    site.policy.decision = toy.Decision(
        model="maths-model", picks=(site.maths.address, site.code.address), explain=True
    )

    status, headers, answer = await site.chat()

    assert (status, answer) == (200, {"served_by": "code"})
    got = site.code.received[0]
    assert got.model == "a-much-longer-code-model"
    assert got.headers["content-length"] == str(len(got.body))
    # The headers tell who served, not who was picked.
    assert headers["x-pointsman-endpoint"] == site.code.address
    assert headers["x-pointsman-expert"] == "code"
    if failure != "refused":
        assert [got.model for got in site.maths.received] == ["maths-model"]


async def test_a_rewritten_attempt_leaves_no_wrong_length_behind(site, toy):
    """The first attempt makes the body longer; the second needs the original length."""
    site.code.reply = unavailable
    site.policy.decision = toy.Decision(
        model="maths-model", picks=(site.code.address, site.maths.address)
    )

    status, _, answer = await site.chat()

    assert (status, answer) == (200, {"served_by": "maths"})
    assert site.code.received[0].model == "a-much-longer-code-model"
    assert site.maths.received[0].model == "maths-model"


async def test_without_further_picks_a_retry_takes_another_host(site):
    """Also where the failing engine is the least loaded, as it always is."""
    release, busy = asyncio.Event(), asyncio.Semaphore(0)

    async def slow(_: web.Request) -> web.Response:
        busy.release()
        await release.wait()
        return web.json_response({"served_by": "code"})

    site.maths.reply, site.code.reply = unavailable, slow
    requests = [asyncio.create_task(site.chat()) for _ in range(20)]
    for _ in requests:
        await busy.acquire()
    release.set()

    answers = await asyncio.gather(*requests)

    assert [status for status, _, _ in answers] == [200] * 20
    assert len(site.code.received) == 20
    assert {got.model for got in site.code.received} == {"a-much-longer-code-model"}
    assert {entry["attempts"] for entry in await site.access_log(20)} == {2}


async def test_a_pick_outside_the_cluster_falls_back(site, toy):
    site.policy.decision = toy.Decision(model="gone", picks=("127.0.0.1:1", "[::1]:1", "rubbish"))
    status, _, answer = await site.chat()
    assert status == 200
    engine = {"maths": site.maths, "code": site.code}[answer["served_by"]]
    assert engine.received[0].model == engine.models[0]


async def test_a_body_near_the_limit_survives_a_retry(site, settings):
    site.maths.reply = unavailable
    body = {"model": "auto", "messages": ""}
    body["messages"] = "x" * (settings.request_body_limit_bytes - 200)

    status, _, answer = await site.chat(body)

    assert (status, answer) == (200, {"served_by": "code"})
    assert json.loads(site.code.received[0].body)["messages"] == body["messages"]


async def test_chunked_requests_are_served(site):
    async def pieces():
        yield b'{"model": '
        yield b'"auto"}'

    url = site.envoy.url + "/v1/completions"
    async with site.client.post(url, data=pieces()) as response:
        assert response.status == 200
    assert site.maths.received[0].model == "maths-model"
    assert "transfer-encoding" not in site.maths.received[0].headers


@pytest.mark.parametrize("explain", [True, False])
async def test_explaining_headers_are_shown_only_on_demand_and_never_the_engines(
    site, toy, explain
):
    async def boasting(_: web.Request) -> web.Response:
        forged = {
            "X-Pointsman-Expert": "best",
            "x-pointsman-endpoint": "1.2.3.4:5",
            "x-pointsman-policy": "mine",
            "x-pointsman-why": "genius",
            "x-pointsman-explain": "true",
            "x-request-id": "engine's",
        }
        return web.json_response({}, headers=forged)

    site.maths.reply = boasting
    site.policy.decision = toy.Decision(
        model="maths-model", picks=(site.maths.address,), explain=explain, why="fits"
    )

    _, headers, _ = await site.chat()

    truth = {
        "x-pointsman-endpoint": site.maths.address,
        "x-pointsman-expert": "maths",
        "x-pointsman-policy": "auto",
        "x-pointsman-why": "fits",
    }
    shown = {k.lower(): v for k, v in headers.items() if k.lower().startswith("x-pointsman")}
    assert shown == (truth if explain else {})
    assert headers.getall("x-request-id") != ["engine's"]
    observe = await site.policy.stream("observe")
    await observe.wait_for(lambda stream: "response_headers" in stream.kinds)
    seen = observe.headers("response_headers")
    assert {k: v for k, v in seen.items() if k.startswith("x-pointsman")} == truth


async def test_the_access_log_tells_decision_and_outcome(site):
    site.maths.reply = unavailable
    _, headers, _ = await site.chat()
    (entry,) = await site.access_log(1)
    assert entry["request_id"] == headers["x-request-id"]
    assert entry["status"] == 200
    assert entry["attempts"] == 2
    assert (entry["upstream"], entry["upstream_expert"]) == (site.code.address, "code")
    assert (entry["policy"], entry["expert"]) == ("auto", "picked-expert")
    assert (entry["endpoint"], entry["why"]) == (site.maths.address, "because")
    assert int(entry["decide_headers_us"]) > 0
    assert int(entry["decide_body_us"]) > 0


async def test_prometheus_gets_the_numbers(site):
    await site.chat()
    async with site.client.get(site.envoy.admin_url + "/stats/prometheus") as response:
        text = await response.text()
    for metric in (
        'envoy_http_ext_proc_decide_streams_started{envoy_http_conn_manager_prefix="clients"} 1',
        'envoy_cluster_upstream_rq_completed{envoy_cluster_name="experts"} 1',
    ):
        assert metric in text
