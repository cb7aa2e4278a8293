"""What the `observe` stream tells the policy server about each request."""

import asyncio

import aiohttp
import pytest
from aiohttp import web

pytestmark = pytest.mark.integration


class Answer:
    """A streaming engine answer, sent event by event as the test says."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            while (event := await self.events.get()) is not None:
                if event == b"die":
                    request.transport.abort()
                    break
                await response.write(event)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response


@pytest.fixture
async def answer(site):
    site.maths.reply = Answer()
    return site.maths.reply


def bodies(stream):
    return [m.response_body for m in stream.messages if m.HasField("response_body")]


async def begin(site, answer):
    """Start a streaming request; return the client's response and the observe stream."""
    answer.events.put_nowait(b"data: 1\n\n")
    url = site.envoy.url + "/v1/chat/completions"
    response = await site.client.post(url, json={"model": "auto", "stream": True})
    assert await response.content.readuntil(b"\n\n") == b"data: 1\n\n"
    return response, await site.policy.stream("observe")


async def test_chunks_arrive_one_by_one_and_then_the_end(site, answer):
    response, observe = await begin(site, answer)
    await observe.wait_for(lambda s: [b.body for b in bodies(s)] == [b"data: 1\n\n"])

    answer.events.put_nowait(b"data: 2\n\n")
    await observe.wait_for(lambda s: len(bodies(s)) == 2)
    assert not bodies(observe)[-1].end_of_stream

    answer.events.put_nowait(None)
    await observe.wait_for(lambda s: bodies(s)[-1].end_of_stream)
    assert await response.read() == b"data: 2\n\n"
    assert b"".join(b.body for b in bodies(observe)) == b"data: 1\n\ndata: 2\n\n"
    assert observe.kinds[:3] == ["request_headers", "response_headers", "response_body"]
    assert observe.headers("response_headers")[":status"] == "200"
    await observe.ended.wait()


async def test_a_client_that_leaves_ends_the_stream(site, answer):
    response, observe = await begin(site, answer)
    response.close()
    await observe.ended.wait()
    while not answer.gone.is_set():  # the engine notices when it writes
        answer.events.put_nowait(b"data: 2\n\n")
        await asyncio.sleep(0)
    assert not any(b.end_of_stream for b in bodies(observe))


@pytest.mark.usefixtures("answer")
async def test_a_client_that_leaves_before_the_answer_ends_the_stream(site):
    url = site.envoy.url + "/v1/chat/completions"
    request = asyncio.create_task(site.client.post(url, json={"model": "auto"}))
    observe = await site.policy.stream("observe")
    await observe.wait_for(lambda s: s.kinds == ["request_headers"])
    request.cancel()
    await observe.ended.wait()
    assert observe.kinds == ["request_headers"]


async def test_an_engine_that_dies_ends_the_stream(site, answer):
    response, observe = await begin(site, answer)
    answer.events.put_nowait(b"die")
    with pytest.raises(aiohttp.ClientPayloadError):
        await response.read()
    await observe.ended.wait()
    assert not any(b.end_of_stream for b in bodies(observe))


async def test_an_answer_outlives_the_policy_server(site, answer):
    response, _ = await begin(site, answer)
    await site.policy.stop()
    await site.policy_gone()
    answer.events.put_nowait(b"data: 2\n\n")
    answer.events.put_nowait(None)
    assert await response.read() == b"data: 2\n\n"


async def test_replies_of_envoy_are_observed_without_an_endpoint(site):
    await site.policy.announce([])
    await site.stat("cluster.experts.membership_total", lambda value: value == 0)
    await site.chat()
    observe = await site.policy.stream("observe")
    await observe.ended.wait()
    seen = observe.headers("response_headers")
    assert seen[":status"] == "503"
    assert "x-pointsman-endpoint" not in seen
    assert bodies(observe)[-1].end_of_stream


@pytest.mark.parametrize("in_time", [True, False])
async def test_an_endpoint_that_gives_no_answer_is_named_to_observe_alone(site, in_time):
    async def hang_up(request):
        request.transport.abort()
        return web.Response()

    site.maths.reply = site.code.reply = hang_up
    if not in_time:
        site.policy.go_on.clear()
    status, headers, _ = await site.chat()
    assert (status, [name for name in headers if "pointsman" in name.lower()]) == (503, [])
    observe = await site.policy.stream("observe")
    await observe.ended.wait()
    seen = observe.headers("response_headers")
    assert seen["x-pointsman-failed-endpoint"] in {site.maths.address, site.code.address}
    assert "x-pointsman-endpoint" not in seen
    # Only of a decision that was used.
    assert seen.get("x-pointsman-policy") == ("auto" if in_time else None)
    site.policy.go_on.set()


async def test_replies_of_the_policy_server_are_observed(site, toy):
    site.policy.immediate = toy.immediate(429, "{}")
    await site.chat()
    observe = await site.policy.stream("observe")
    await observe.ended.wait()
    assert observe.headers("response_headers")[":status"] == "429"


async def test_the_messages_have_the_documented_form(site):
    await site.chat()
    observe, decide = await site.policy.stream("observe"), await site.policy.stream("decide")
    await asyncio.gather(observe.ended.wait(), decide.ended.wait())

    assert decide.kinds == ["request_headers", "request_body"]
    assert observe.kinds[:2] == ["request_headers", "response_headers"]
    assert site.policy.order[0] == ("observe", "request_headers")
    for stream in (observe, decide):
        headers = stream.messages[0].request_headers.headers.headers
        assert all(header.raw_value and not header.value for header in headers)
        assert stream.headers()[":path"] == "/v1/chat/completions"
    assert observe.headers()["x-request-id"] == decide.headers()["x-request-id"]
    assert all(message.observability_mode for message in observe.messages)
    assert not any(message.observability_mode for message in decide.messages)
    assert decide.messages[0].HasField("protocol_config")
    assert not decide.messages[1].HasField("protocol_config")
    assert not observe.messages[0].HasField("protocol_config")
    assert decide.messages[1].request_body.end_of_stream


async def test_engines_are_asked_for_plain_text(site):
    await site.chat(headers={"accept-encoding": "gzip"})
    assert "accept-encoding" not in site.maths.received[0].headers
