"""What clients get when something is away, too big, or unknown."""

import asyncio
import contextlib
import dataclasses
import io
import json
import signal
import sys

import pytest
import yarl
from aiohttp import web

from pointsman_policy.envoy import EnvoySettings, running_envoy

pytestmark = pytest.mark.integration


def assert_served_by_its_model(site, answer):
    engine = {"maths": site.maths, "code": site.code}[answer["served_by"]]
    assert engine.received[-1].model == engine.models[0]


def error_of(answer):
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "code", "param"}
    assert answer["error"]["param"] is None
    return answer["error"]["type"], answer["error"]["code"]


async def test_a_killed_policy_server_is_not_missed(site):
    await site.policy.stop()
    for _ in range(3):
        status, _, answer = await site.chat()
        assert status == 200
        assert_served_by_its_model(site, answer)
    await site.policy_gone()
    status, _, answer = await site.chat()
    assert status == 200
    assert_served_by_its_model(site, answer)
    entry = (await site.access_log(4))[-1]
    assert entry["policy"] is None


async def test_a_policy_server_killed_in_the_middle_of_a_decision_is_not_missed(site):
    site.policy.go_on.clear()
    request = asyncio.create_task(site.chat())
    decide = await site.policy.stream("decide")
    await decide.wait_for(lambda stream: bool(stream.messages))
    await site.policy.stop()
    status, _, answer = await request
    assert status == 200
    assert_served_by_its_model(site, answer)


class TestSlowDecision:
    @pytest.fixture
    def settings(self, policy):
        return EnvoySettings(listen_port=0, admin_port=0, policy_server_address=policy.address)

    async def test_is_not_awaited(self, site):
        site.policy.go_on.clear()
        status, _, answer = await site.chat()
        assert status == 200
        assert_served_by_its_model(site, answer)
        assert (await site.envoy.stats())["http.clients.ext_proc.decide.message_timeouts"] == 1


async def test_decisions_resume_with_the_policy_server(site, toy):
    address = site.policy.address
    await site.policy.stop()
    await site.policy_gone()
    await site.policy.start(address)
    await site.stat("cluster.policy_server.membership_healthy", lambda value: value == 1)
    site.policy.decision = toy.Decision(model="maths-alias", picks=(site.maths.address,))

    await site.chat()

    assert site.maths.received[-1].model == "maths-alias"
    # Endpoints flow again, too.
    await site.policy.announce([site.maths.target])
    await site.healthy(1)


@contextlib.asynccontextmanager
async def policy_process(toy_path, arguments):
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(toy_path), json.dumps(arguments), stdout=asyncio.subprocess.PIPE
    )
    try:
        address = (await process.stdout.readline()).decode().strip()
        yield process, address
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def begin_streaming(engine, envoy, client):
    """Start a request whose answer ends when `engine.finish` is set."""
    engine.finish = asyncio.Event()

    async def reply(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/chat/completions":
            return web.json_response({"served_by": engine.expert})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"1")
        await engine.finish.wait()
        await response.write(b"2")
        return response

    engine.reply = reply
    return await client.post(envoy.url + "/v1/completions", json={"model": "auto"})


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_frozen_or_killed_process_fails_open(how, toy_path, maths, code, client, tmp_path):
    targets = [[e.address, list(e.models), e.expert] for e in (maths, code)]
    wanted = {"targets": targets, "model": "maths-alias", "picks": [maths.address]}
    async with policy_process(toy_path, wanted) as (process, address):
        settings = EnvoySettings(listen_port=0, admin_port=0, policy_server_address=address)
        async with running_envoy(settings, log_path=tmp_path / "log") as envoy:
            site_class = sys.modules[type(maths).__module__].Site
            site = site_class(None, maths, code, envoy, client)
            await site.healthy(2)
            await site.chat()
            assert maths.received[-1].model == "maths-alias"

            streaming = await begin_streaming(maths, envoy, client)
            process.send_signal(how)

            for _ in range(2):
                status, _, answer = await site.chat()
                assert status == 200
                assert_served_by_its_model(site, answer)
            await site.policy_gone()
            status, _, answer = await site.chat()
            assert status == 200
            assert_served_by_its_model(site, answer)
            # An answer that was under way is not cut.
            maths.finish.set()
            assert await streaming.read() == b"12"
            maths.reply = None
            if how == signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)
                await site.stat("cluster.policy_server.membership_healthy", bool)
                await site.chat()
                assert maths.received[-1].model == "maths-alias"


class TestFailClosed:
    @pytest.fixture
    def settings(self, policy):
        return EnvoySettings(
            listen_port=0, admin_port=0, policy_server_address=policy.address, fail_open=False
        )

    async def test_answers_503(self, site):
        await site.policy.stop()
        status, headers, answer = await site.chat()
        assert (status, headers["content-type"]) == (503, "application/json")
        assert error_of(answer) == ("server_error", "policy_server_unavailable")
        assert site.maths.received == site.code.received == []


@pytest.mark.parametrize("policy_alive", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
async def test_a_body_over_the_limit_gets_413(site, settings, policy_alive, chunked):
    if not policy_alive:
        await site.policy.stop()
    body = b'{"model": "auto", "prompt": "' + b"x" * settings.request_body_limit_bytes + b'"}'

    async def pieces():
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    url = site.envoy.url + "/v1/completions"
    async with site.client.post(url, data=pieces() if chunked else io.BytesIO(body)) as response:
        assert response.status == 413
        assert response.content_type == "application/json"
        error = error_of(await response.json())
    assert error == ("invalid_request_error", "request_too_large")
    assert site.maths.received == site.code.received == []


@pytest.mark.parametrize("policy_alive", [True, False])
async def test_unknown_paths_and_methods_never_reach_anyone(site, policy_alive):
    if not policy_alive:
        await site.policy.stop()
    for method, path, status, code, allow in (
        ("POST", "/v1/embeddings", 404, "unknown_path", None),
        ("GET", "/", 404, "unknown_path", None),
        ("POST", "/v1/chat/completions/../../admin", 404, "unknown_path", None),
        ("POST", "/v1%2fchat/completions", 404, "unknown_path", None),
        ("POST", "/v1/chat%2Fcompletions", 404, "unknown_path", None),
        ("GET", "/v1%2Fmodels", 404, "unknown_path", None),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed", "POST"),
        ("POST", "/v1/models", 405, "method_not_allowed", "GET, HEAD"),
        ("DELETE", "/v1/models/auto", 405, "method_not_allowed", "GET, HEAD"),
    ):
        url = yarl.URL(site.envoy.url + path, encoded=True)
        async with site.client.request(method, url) as response:
            assert (response.status, response.content_type) == (status, "application/json"), path
            assert error_of(await response.json()) == ("invalid_request_error", code)
            assert response.headers.get("allow") == allow
    assert site.maths.received == site.code.received == []
    assert site.policy.streams == []


async def raw(site, request):
    """Send bytes; return the status and the decoded body of the answer."""
    host, _, port = site.envoy.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert b"content-type: application/json\r\n" in head + b"\r\n"
    return int(head.split()[1]), json.loads(body)


TWO_LENGTHS = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
BAD_HTTP = {
    "two lengths": (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + TWO_LENGTHS, 400),
    "NUL in the path": (b"GET /v1/%00 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 400),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "another coding": (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        501,
    ),
    "no HTTP": (b"\x16\x03\x01\x00\xa5\r\n\r\n", 400),
    "old HTTP": (b"GET /v1/models HTTP/1.0\r\nhost: x\r\n\r\n", 426),
}


@pytest.mark.parametrize("what", BAD_HTTP)
async def test_bad_http_gets_an_error_object(site, what):
    request, status = BAD_HTTP[what]
    got, answer = await raw(site, request)
    assert got == status
    assert error_of(answer) == ("invalid_request_error", "bad_request")
    assert site.policy.of("decide") == site.maths.received == []


@pytest.mark.parametrize(
    ("request_", "status", "want", "tells"),
    [
        (b"GET /v1/models HTTP/1.0\r\nhost: x\r\n\r\n", 426, "bad_request", "use HTTP/1.1"),
        (b"CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n", 403, "bad_request", "CONNECT"),
        (
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            403,
            "bad_request",
            "websocket",
        ),
    ],
)
async def test_what_is_not_spoken_is_refused_in_words(site, request_, status, want, tells):
    got, answer = await raw(site, request_)
    assert (got, error_of(answer)) == (status, ("invalid_request_error", want))
    assert tells in answer["error"]["message"]


class TestSlowClients:
    @pytest.fixture
    def settings(self, policy) -> EnvoySettings:
        ports = {"listen_port": 0, "admin_port": 0, "policy_server_address": policy.address}
        return EnvoySettings(**ports, request_receive_timeout_s=1, header_receive_timeout_s=1)

    @pytest.mark.parametrize(
        "begun",
        [
            b"POST /v1/comp",
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{",
        ],
    )
    async def test_are_told_that_they_were(self, site, begun):
        got, answer = await raw(site, begun)
        assert (got, error_of(answer)) == (408, ("invalid_request_error", "request_timeout"))
        assert answer["error"]["message"] == (
            "The request did not arrive in time: 1 s for its headers, 1 s for all of it."
        )


async def test_bad_http_is_observed_as_an_answer_without_a_request(site):
    await raw(site, BAD_HTTP["two lengths"][0])
    observe = await site.policy.stream("observe")
    await observe.ended.wait()
    assert observe.kinds == ["response_headers", "response_body"]


async def test_models_come_from_the_policy_server_or_not_at_all(site, toy):
    listing = '{"object":"list","data":[]}'
    site.policy.immediate = toy.immediate(200, listing)
    url = site.envoy.url + "/v1/models"
    async with site.client.get(url) as response:
        assert (response.status, await response.text()) == (200, listing)
        assert response.content_type == "application/json"
    await site.policy.stop()
    async with site.client.get(url) as response:
        assert response.status == 503
        assert error_of(await response.json()) == ("server_error", "policy_server_unavailable")


async def test_a_model_with_a_slash_can_be_asked_for(site, toy):
    site.policy.immediate = toy.immediate(200, "{}")
    for path in ("/v1/models/auto%2FRandom", "/v1/models/auto/Random"):
        url = yarl.URL(site.envoy.url + path, encoded=True)
        async with site.client.get(url) as response:
            assert (response.status, await response.text()) == (200, "{}")
    paths = {stream.headers()[":path"] for stream in site.policy.of("decide")}
    assert paths == {"/v1/models/auto%2FRandom", "/v1/models/auto/Random"}


async def test_the_policy_server_is_asked_for_the_head_of_models(site, toy):
    site.policy.immediate = toy.immediate(200, "{}")
    async with site.client.head(site.envoy.url + "/v1/models") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.read() == b""
    (decide,) = site.policy.of("decide")
    assert decide.headers()[":method"] == "HEAD"


@pytest.mark.parametrize("status", [400, 404, 413, 429, 503, 504])
async def test_answers_of_the_policy_server_pass_unchanged(site, toy, status):
    site.policy.immediate = toy.immediate(status, '{"error":"ours"}')
    got, headers, answer = await site.chat()
    assert (got, answer) == (status, {"error": "ours"})
    assert headers["content-type"] == "application/json"


async def test_no_endpoint_at_all_gets_503(site):
    await site.policy.announce([])
    await site.stat("cluster.experts.membership_total", lambda value: value == 0)
    status, headers, answer = await site.chat()
    assert (status, headers["content-type"]) == (503, "application/json")
    assert error_of(answer) == ("server_error", "no_healthy_endpoint")


async def test_all_endpoints_dead_gets_503(site):
    await asyncio.gather(site.maths.stop(), site.code.stop())
    status, _, answer = await site.chat()
    assert status == 503
    kind, code = error_of(answer)
    assert kind == "server_error"
    assert code in ("endpoint_failed", "no_healthy_endpoint")

    await site.healthy(0)
    await site.policy.stop()
    status, _, answer = await site.chat()
    assert status == 503
    assert error_of(answer) == ("server_error", "no_healthy_endpoint")


async def test_a_dead_engine_leaves_and_returns(site):
    await site.maths.stop()
    await site.healthy(1)
    await site.policy.stop()
    for _ in range(4):
        status, _, answer = await site.chat()
        assert (status, answer) == (200, {"served_by": "code"})
    assert {entry["attempts"] for entry in await site.access_log(4)} == {1}

    await site.maths.start()
    await site.healthy(2)


class TestNotReady:
    """Endpoints that the policy server announced as not ready, and then vanished."""

    async def announce(self, site, *ready):
        targets = [
            dataclasses.replace(engine.target, ready=engine in ready)
            for engine in (site.maths, site.code)
        ]
        await site.policy.announce(targets)
        await site.healthy(len(ready))
        await site.stat(
            "cluster.experts.membership_degraded", lambda value: value == 2 - len(ready)
        )

    async def test_gets_nothing_while_another_one_is_ready(self, site):
        await self.announce(site, site.code)
        await site.policy.stop()
        await site.policy_gone()
        answers = await asyncio.gather(*(site.chat() for _ in range(40)))
        assert [status for status, _, _ in answers] == [200] * 40
        assert (len(site.maths.received), len(site.code.received)) == (0, 40)

    async def test_serves_when_no_ready_one_is_alive(self, site):
        await self.announce(site, site.code)
        await site.policy.stop()
        await site.policy_gone()
        await site.code.stop()
        await site.healthy(0)
        for _ in range(5):
            status, _, answer = await site.chat()
            assert (status, answer) == (200, {"served_by": "maths"})
        assert {entry["attempts"] for entry in await site.access_log(5)} == {1}

    async def test_serves_when_none_was_announced_ready(self, site):
        await self.announce(site)
        await site.policy.stop()
        await site.policy_gone()
        assert (await site.chat())[0] == 200
        # The really dead are told by Envoy's own checks.
        await site.maths.stop()
        await site.stat("cluster.experts.membership_degraded", lambda value: value == 1)
        for _ in range(5):
            status, _, answer = await site.chat()
            assert (status, answer) == (200, {"served_by": "code"})

    async def test_does_not_disturb_picks(self, site, toy):
        await self.announce(site, site.code)
        for engine in (site.code, site.maths):  # a decision may be older than the news
            site.policy.decision = toy.Decision(model=engine.models[0], picks=(engine.address,))
            for _ in range(10):
                status, _, answer = await site.chat()
                assert (status, answer) == (200, {"served_by": engine.expert})


async def test_an_endpoint_taken_away_leaves_although_it_works(site):
    await site.policy.announce([site.code.target])
    await site.stat("cluster.experts.membership_total", lambda value: value == 1)
    status, _, answer = await site.chat()
    assert (status, answer) == (200, {"served_by": "code"})


async def test_one_dead_engine_loses_none_of_many_requests(site):
    await site.maths.stop()
    answers = await asyncio.gather(*(site.chat() for _ in range(32)))
    assert [status for status, _, _ in answers] == [200] * 32
    assert {got.model for got in site.code.received} == {"a-much-longer-code-model"}


async def test_errors_of_an_engine_reach_the_client(site):
    async def broken(_: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "CUDA"}}, status=500)

    site.maths.reply = broken
    status, _, answer = await site.chat()
    assert (status, answer) == (500, {"error": {"message": "CUDA"}})
    assert site.code.received == []


class TestSilentEngine:
    @pytest.fixture
    def settings(self, policy):
        return EnvoySettings(
            listen_port=0,
            admin_port=0,
            policy_server_address=policy.address,
            stream_idle_timeout_s=1,
        )

    async def test_gets_504(self, site):
        release = asyncio.Event()

        async def silent(_: web.Request) -> web.Response:
            await release.wait()
            return web.Response()

        site.maths.reply = silent
        status, _, answer = await site.chat()
        release.set()
        assert status == 504
        assert error_of(answer) == ("server_error", "timeout")


async def unavailable(_request: web.Request) -> web.Response:
    return web.json_response({}, status=503)


async def announce(site, **policies):
    """Tell Envoy which policies select each engine."""
    engines = {"maths": site.maths, "code": site.code}
    await site.policy.announce(
        [dataclasses.replace(e.target, policies=policies[name]) for name, e in engines.items()]
    )
    await site.stat("cluster.experts.lb_subsets_active", lambda value: value > 0)


async def test_a_retry_stays_with_the_endpoints_of_the_policy(site, toy):
    await announce(site, maths=("ns/maths",), code=("ns/other",))
    site.policy.decision = toy.Decision(picks=(site.maths.address,), policy="ns/maths")
    site.maths.reply = unavailable
    status, _, _ = await site.chat()
    assert status == 503
    assert site.maths.received
    assert not site.code.received


async def test_a_retry_goes_to_any_endpoint_of_the_policy(site, toy):
    await announce(site, maths=("ns/maths", "ns/both"), code=("ns/both",))
    site.policy.decision = toy.Decision(picks=(site.maths.address,), policy="ns/both")
    site.maths.reply = unavailable
    status, _, answer = await site.chat()
    assert (status, answer) == (200, {"served_by": "code"})


async def test_without_a_decision_any_endpoint_serves(site):
    await announce(site, maths=("ns/maths",), code=("ns/other",))
    await site.policy.stop()
    await site.policy_gone()
    site.maths.reply = unavailable
    assert [(await site.chat())[0] for _ in range(6)] == [200] * 6
    assert site.code.received
