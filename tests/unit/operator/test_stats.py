"""Averages for statuses."""

import asyncio
from types import SimpleNamespace

import pytest
from aiohttp import web

from pointsman_operator import stats
from pointsman_operator.observed import Key, Performance
from pointsman_operator.publisher import PolicyCounts

AUTO, IDLE = Key("default", "auto"), Key("default", "idle")


def test_servers_are_added_up():
    servers = [
        {AUTO: PolicyCounts(10, 1, 4.0), IDLE: PolicyCounts(0, 0, 0.0)},
        {AUTO: PolicyCounts(30, 9, 16.0)},
        {},
    ]
    assert stats.from_servers(servers) == {AUTO: Performance(0.5, 0.25)}


def test_averages_are_rounded():
    assert stats.from_servers([{AUTO: PolicyCounts(3, 1, 1.0)}]) == {AUTO: Performance(0.33, 0.33)}


def test_rows_of_prometheus():
    rows = [
        {"metric": {"policy": "default/auto"}, "value": [0, "0.256"]},
        {"metric": {"policy": "default/idle"}, "value": [0, "NaN"]},
        {"metric": {"policy": "nameless"}, "value": [0, "1"]},
        {"metric": {}, "value": [0, "1"]},
        {"metric": {"policy": "a/b"}, "value": []},
        {"metric": {"policy": "a/b"}, "value": [0, "x"]},
        "rubbish",
    ]
    assert stats.by_policy(rows) == {AUTO: 0.26}
    assert stats.by_policy(None) == {}


@pytest.mark.parametrize(("value", "shown"), [("1.04", 1.0), ("-0.01", 0.0), ("1", 1.0)])
def test_shares_stay_within_what_a_status_may_hold(value, shown):
    """Each counter is extrapolated by itself; the API server would refuse the whole status."""
    rows = [{"metric": {"policy": "default/auto"}, "value": [0, value]}]
    assert stats.by_policy(rows) == {AUTO: shown}


def test_what_is_missing_is_taken_from_elsewhere():
    found = {AUTO: Performance(None, 0.5)}
    others = {AUTO: Performance(0.25, 0.75), IDLE: Performance(0.1, 0.0)}
    assert stats.filled(found, others) == {
        AUTO: Performance(0.25, 0.5),
        IDLE: Performance(0.1, 0.0),
    }
    assert stats.filled(found, {}) == found
    assert stats.filled({AUTO: Performance(0.5, None)}, {}) == {AUTO: Performance(0.5, None)}


@pytest.fixture
async def prometheus():
    """A Prometheus that knows violations but no QoS; its ``status`` can be changed."""
    fake = SimpleNamespace(status=200, url="", answer=None)

    async def query(request):
        if fake.status != 200:
            return web.Response(status=fake.status)
        if fake.answer is not None:
            return web.json_response(fake.answer)
        rows = [{"metric": {"policy": "default/auto"}, "value": [0, "0.25"]}]
        found = rows if "violations" in request.query["query"] else []
        return web.json_response({"data": {"result": found}})

    app = web.Application()
    app.router.add_get("/api/v1/query", query)
    server = web.AppRunner(app, shutdown_timeout=0.1)
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{server.addresses[0][1]}"
    yield fake
    await server.cleanup()


async def test_averages_from_prometheus(prometheus):
    reader = stats.PrometheusStats(prometheus.url)
    assert await asyncio.to_thread(reader.read) == {AUTO: Performance(None, 0.25)}
    prometheus.status = 500
    with pytest.raises(ValueError, match="500"):
        await asyncio.to_thread(reader.read)


def test_prometheus_that_nobody_runs():
    with pytest.raises(OSError, match="Connection refused"):
        stats.PrometheusStats("http://127.0.0.1:1").read()


async def test_an_answer_that_is_not_of_prometheus(prometheus):
    prometheus.answer = {"status": "success"}
    with pytest.raises(ValueError, match="not one of the Prometheus API"):
        await asyncio.to_thread(stats.PrometheusStats(prometheus.url).read)
