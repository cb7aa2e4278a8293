"""Dead, slow and broken parts: what still works, and that nothing is left behind."""

import asyncio
import signal
import time

import aiohttp
import pytest

AT_ONCE = 20
"""Requests under way: were they begun at a pace, a busy machine would fall ever further behind."""


async def load(site, *, count, stop=None, stream=False, max_tokens=8, pause=0.01, begun=None):
    """Requests in the background, ``count`` of them or until ``stop``; their statuses.

    ``begun``, a semaphore, is released for each answer that begins.
    """
    places = asyncio.Semaphore(AT_ONCE)

    async def one():
        try:
            async with site.session.post(
                f"{site.url}/v1/chat/completions",
                json={
                    "model": "auto",
                    "messages": [{"role": "user", "content": "Hello"}],
                    "max_tokens": max_tokens,
                    "ignore_eos": True,
                    "stream": stream,
                },
            ) as response:
                if begun is not None:
                    await response.content.readany()
                    begun.release()
                await response.read()
                return response.status
        except aiohttp.ClientError as error:
            return type(error).__name__
        finally:
            places.release()

    tasks = []
    while len(tasks) < count and not (stop and stop.is_set()):
        await places.acquire()
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(pause)
    return await asyncio.gather(*tasks)


async def test_policy_server_killed_under_load_fails_open_and_comes_back(site):
    stop = asyncio.Event()
    running = asyncio.create_task(load(site, count=10_000, stop=stop))
    await site.until(lambda s: s["in_flight"] > 0, "load")
    await site.kill_server()

    while_away = [await site.ask() for _ in range(20)]
    assert [status for status, _, _ in while_away] == [200] * 20
    # Nobody decided, and yet each engine was asked for a model that it serves.
    assert all("x-pointsman-policy" not in headers for _, headers, _ in while_away)
    assert all(document["model"].endswith("-model") for _, _, document in while_away)

    await site.start_server()
    await site.until_routed_again()
    stop.set()
    statuses = await running
    assert set(statuses) == {200}, f"{len(statuses)} requests"
    await site.until_empty()


async def test_policy_server_frozen_under_load_fails_open(bare_site, in_front):
    await asyncio.gather(*(bare_site.start_engine(name) for name in ("ant", "bee", "cow")))
    bare_site.declare_policy()
    async with in_front(bare_site, hurried=True) as site:
        site.server.process.send_signal(signal.SIGSTOP)
        statuses = await load(site, count=20)
        site.server.process.send_signal(signal.SIGCONT)
        assert set(statuses) == {200}
        await site.until_routed_again()
        await site.until_empty()


async def test_a_killed_engine_costs_no_request_and_leaves_the_table(
    site, kill_child, record_property
):
    stop = asyncio.Event()
    running = asyncio.create_task(load(site, count=10_000, stop=stop))
    victim = site.addresses["bee"]
    await site.until(lambda s: s["endpoints"][victim]["in_flight"] > 0, "load on the victim")
    await kill_child(site.engines["bee"])
    killed = time.monotonic()
    await site.until(lambda s: not s["endpoints"][victim]["ready"], "the dead engine unready")
    record_property("seconds_until_unready", round(time.monotonic() - killed, 3))
    before = dict(await site.metric("pointsman_decisions_total"))
    answers = [await site.ask() for _ in range(20)]
    stop.set()
    assert set(await running) == {200}
    assert {headers["x-pointsman-expert"] for _, headers, _ in answers} <= {"ant", "cow"}
    after = await site.metric("pointsman_decisions_total")
    of_bee = [key for key in after if 'expert="bee"' in key]
    assert [after[key] for key in of_bee] == [before[key] for key in of_bee]
    await site.until_empty()


async def test_an_engine_that_comes_back_is_used_again(site, kill_child):
    port = int(site.addresses["bee"].rpartition(":")[2])
    await kill_child(site.engines["bee"])
    await site.until(lambda s: not s["endpoints"][site.addresses["bee"]]["ready"], "unready")
    await site.start_engine("bee", port=port)
    await site.until(lambda s: s["endpoints"][site.addresses["bee"]]["ready"], "ready again")
    site.declare_policy(algorithm="RoundRobin")
    site.write_manifests()
    await site.until_answered_by({"ant", "bee", "cow"})


async def test_an_engine_that_comes_back_while_the_policy_server_is_away_is_used(site, kill_child):
    """It was announced as not ready, and nobody is there to take that back."""
    port = int(site.addresses["ant"].rpartition(":")[2])
    await kill_child(site.engines["ant"])
    await site.until_announced("ant", "DEGRADED")
    await site.kill_server()
    await site.start_engine("ant", port=port)
    await site.until_stat("cluster.experts.membership_degraded", 1)
    answers = [await site.ask() for _ in range(20)]
    assert {document["model"] for _, _, document in answers} <= {"bee-model", "cow-model"}

    await asyncio.gather(*(kill_child(site.engines[name]) for name in ("bee", "cow")))
    await site.until_stat("cluster.experts.membership_healthy", 0)
    answers = [await site.ask() for _ in range(20)]
    assert [status for status, _, _ in answers] == [200] * 20
    assert {document["model"] for _, _, document in answers} == {"ant-model"}


async def test_all_engines_dead_is_503_with_the_reason(site, kill_child):
    for engine in site.engines.values():
        await kill_child(engine)
    await site.until(lambda s: not any(e["ready"] for e in s["endpoints"].values()), "all unready")
    status, _, document = await site.ask()
    assert status == 503
    assert document["error"]["message"] == (
        "Policy default/auto has no endpoint for this request: 0 of 3 endpoints are ready."
    )
    assert document["error"]["code"] == "no_ready_endpoint"
    await site.until_empty()


async def outcomes_of_ant(site):
    """How requests to the engine ``ant`` ended, except well."""
    completions = await site.metric("pointsman_completions_total")
    of = 'expert="ant",outcome="{}",policy="default/auto"'.format
    counts = {o: completions.get(of(o), 0) for o in ("error", "aborted", "unknown")}
    return {outcome: count for outcome, count in counts.items() if count}


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_dies_in_the_middle_leaves_no_entry(
    bare_site, in_front, kill_child, stream
):
    slow = {"iterationOverheadMs": 50.0}
    await bare_site.start_engine("ant", profile=slow)
    bare_site.declare_policy()
    async with in_front(bare_site) as site:
        begun = asyncio.Semaphore(0) if stream else None
        running = asyncio.create_task(
            load(site, count=3, stream=stream, max_tokens=400, begun=begun)
        )
        await site.until(lambda s: s["in_flight"] == 3, "three in flight")
        for _ in range(3 if begun else 0):
            await begun.acquire()
        await kill_child(site.engines["ant"])
        statuses = await running
        await site.until_empty()
        # Of a whole answer nothing had passed: Envoy tried again, in vain.
        assert await outcomes_of_ant(site) == ({"aborted": 3} if stream else {"error": 3})
        assert set(statuses) == ({"ClientPayloadError"} if stream else {503})


async def test_a_stalled_engine_leaves_no_entry(bare_site, in_front):
    await bare_site.start_engine("ant", "--stall")
    bare_site.declare_policy()
    # Longer than a decision takes on a busy machine: before it the silence would be nobody's.
    async with in_front(bare_site, answers=False, stream_idle_timeout_s=5) as site:
        statuses = await load(site, count=3)
        assert statuses == [504] * 3
        await site.until_empty()
        assert await outcomes_of_ant(site) == {"error": 3}


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engines_error_passes_unchanged_and_is_counted(bare_site, in_front, stream):
    await bare_site.start_engine("ant", "--error-rate", "1")
    bare_site.declare_policy()
    body = {"model": "ant-model", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}

    async def ask(url, **fields):
        async with bare_site.session.post(
            f"{url}/v1/chat/completions", json=body | fields
        ) as response:
            return response.status, response.content_type, await response.read()

    async with in_front(bare_site, answers=False) as site:
        engines_own = await ask(f"http://{site.addresses['ant']}")
        assert engines_own[0] == 500
        for _ in range(3):
            assert await ask(site.url, model="auto") == engines_own
        await site.until_empty()
        assert await outcomes_of_ant(site) == {"error": 3}


async def test_an_engine_that_answers_only_errors_does_not_draw_all_requests(bare_site, in_front):
    """Its metrics page is fine, and the decider likes it best."""
    await bare_site.start_engine("ant", "--error-rate", "1", quality={"default": 0.9})
    await bare_site.start_engine("bee", quality={"default": 0.5})
    bare_site.declare_policy(algorithm="QualityGreedy")
    async with in_front(bare_site, answers=False) as site:
        statuses = []
        while len(statuses) < 30 and 200 not in statuses:
            status, headers, _ = await site.ask(max_tokens=1)
            statuses.append(status)
        assert statuses[-1] == 200
        assert headers["x-pointsman-expert"] == "bee"
        assert await site.metric("pointsman_pauses_total") == {'expert="ant"': 1}


async def paused_after(site, *, requests):
    """Send requests at once; their statuses, and experts that were left alone then."""
    statuses = await load(site, count=requests)
    await site.until_empty()
    paused = await site.metric("pointsman_pauses_total")
    return set(statuses), paused


async def test_an_engine_whose_failures_are_retried_away_costs_no_retry_each_time(
    bare_site, in_front
):
    await bare_site.start_engine("ant", "--fail-after-tokens", "0", quality={"default": 0.9})
    await bare_site.start_engine("bee", quality={"default": 0.5})
    bare_site.declare_policy(algorithm="QualityGreedy")
    async with in_front(bare_site, answers=False) as site:
        # Its own statuses are all good.
        assert await paused_after(site, requests=5) == ({200}, {'expert="ant"': 1})
        before = await site.metric("pointsman_rerouted_total")
        assert set(await load(site, count=5)) == {200}
        assert await site.metric("pointsman_rerouted_total") == before


async def test_an_engine_that_stalls_is_left_alone(bare_site, in_front):
    await bare_site.start_engine("ant", "--stall", quality={"default": 0.9})
    await bare_site.start_engine("bee", quality={"default": 0.5})
    bare_site.declare_policy(algorithm="QualityGreedy", explainHeaders=False)
    async with in_front(bare_site, answers=False, stream_idle_timeout_s=1) as site:
        assert await paused_after(site, requests=5) == ({504}, {'expert="ant"': 1})
        status, headers, _ = await site.ask()
        assert (status, [name for name in headers if "pointsman" in name]) == (200, [])


async def test_clients_that_leave_pause_no_engine(bare_site, in_front):
    await bare_site.start_engine("ant", profile={"iterationOverheadMs": 50.0})
    await bare_site.start_engine("bee")
    bare_site.declare_policy(algorithm="QualityGreedy")
    async with in_front(bare_site, answers=False) as site:
        for stream in (True, False):
            running = asyncio.create_task(load(site, count=8, stream=stream, max_tokens=400))
            await site.until(lambda s: s["in_flight"] == 8, "eight in flight")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await site.until_empty()
        assert await site.metric("pointsman_pauses_total") == {}


async def test_a_connection_dropped_by_the_engine_mid_stream_leaves_no_entry(bare_site, in_front):
    await bare_site.start_engine("ant", "--fail-after-tokens", "5")
    bare_site.declare_policy()
    async with in_front(bare_site) as site:
        results = await load(site, count=5, stream=True, max_tokens=50)
        assert 200 not in results
        await site.until_empty()
        assert await outcomes_of_ant(site) == {"aborted": 5}


async def test_long_answers_are_followed_to_their_end_where_requests_must_be_short(
    bare_site, in_front
):
    # Half a megabyte at once; far faster than any real board.
    profile = {"iterationOverheadMs": 0.001, "maxBatchedTokens": 2**20, "kvCacheGiB": 640}
    speed = {"memoryBandwidthGBps": 1e6, "peakTflops": 1e5}
    await bare_site.start_engine("ant", limits={"contextTokens": 300_000}, profile=profile | speed)
    bare_site.declare_policy()
    limits = {"flags": ("--body-limit", "1024"), "request_body_limit_bytes": 1024}
    async with in_front(bare_site, **limits) as site:
        status, _, answer = await site.ask(max_tokens=80_000, ignore_eos=True)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 80_000)
        await site.until_empty()
        assert await outcomes_of_ant(site) == {}
        (tokens,) = (await site.metric("pointsman_output_tokens_total")).values()
        assert tokens >= 80_000


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_leaves_no_entry(bare_site, in_front, stream):
    await bare_site.start_engine("ant", profile={"iterationOverheadMs": 50.0})
    bare_site.declare_policy()
    async with in_front(bare_site) as site:
        running = asyncio.create_task(load(site, count=3, stream=stream, max_tokens=400))
        await site.until(lambda s: s["in_flight"] == 3, "three in flight")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await site.session.close()
        site.session = aiohttp.ClientSession()
        try:
            await site.until_empty()
            assert await outcomes_of_ant(site) == {"aborted": 3}
        finally:
            await site.session.close()


async def test_an_envoy_that_dies_leaves_no_entry_and_counts_in_no_average(bare_site, in_front):
    """As where only its connection to the policy server breaks, and the answers go on."""
    await bare_site.start_engine("ant", profile={"iterationOverheadMs": 50.0})
    bare_site.declare_policy()
    async with in_front(bare_site) as site:
        before = await site.metric("pointsman_qos_requests_total")
        running = asyncio.create_task(load(site, count=20, stream=True, max_tokens=400))
        await site.until(lambda s: s["in_flight"] == 20, "all in flight")
        site.envoy.process.kill()
        await running
        await site.until_empty()
        assert await outcomes_of_ant(site) == {"unknown": 20}
        assert await site.metric("pointsman_qos_requests_total") == before


async def test_sigterm_lets_requests_under_way_finish(bare_site, in_front):
    await bare_site.start_engine("ant", profile={"iterationOverheadMs": 20.0})
    bare_site.declare_policy()
    async with in_front(bare_site) as site:
        # For some seconds, so that a busy machine, too, sees both under way.
        running = asyncio.create_task(load(site, count=2, stream=True, max_tokens=200))
        await site.until(lambda s: s["in_flight"] == 2, "two in flight")
        site.server.process.terminate()
        assert set(await running) == {200}
        assert await site.server.process.wait() == 0
        log = (site.folder / "policy-server.log").read_text()
        assert '"event": "stopped"' in log


async def test_a_retry_never_leaves_the_experts_that_the_policy_selects(bare_site, in_front):
    await bare_site.start_engine("ant", "--fail-after-tokens", "0")
    await bare_site.start_engine("bee")
    for name in ("ant", "bee"):
        bare_site.experts[name]["metadata"]["labels"] = {"only": name}
    bare_site.declare_policy("auto", selector={"matchLabels": {"only": "ant"}})
    bare_site.declare_policy("other", selector={"matchLabels": {"only": "bee"}})
    async with in_front(bare_site, answers=False) as site:
        assert (await site.ask(model="other"))[0] == 200
        status, headers, document = await site.ask()
        assert (status, headers.get("x-pointsman-expert")) == (503, None)
        assert document["error"]["code"] == "endpoint_failed"
        # A policy that comes later and selects both has both to retry on.
        site.declare_policy("both")
        site.write_manifests()
        await site.until(lambda s: "default/both" in s["snapshots"], "the new policy in force")
        answers = [await site.ask(model="both") for _ in range(4)]
        assert {(status, h["x-pointsman-expert"]) for status, h, _ in answers} == {(200, "bee")}
        await site.until_empty()
