"""The operator's loops, with an API and policy servers that tests play."""

import asyncio
import contextlib
import gc
from dataclasses import replace
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from pointsman_operator import runtime, store
from pointsman_operator.cluster import ClusterError, config_map
from pointsman_operator.conditions import Transition
from pointsman_operator.observed import Key, Kind
from pointsman_operator.publisher import PolicyCounts, ServerReport
from pointsman_operator.reconcile import Ref, StatusWrite
from pointsman_operator.runtime import Memory, Operator
from pointsman_operator.settings import OperatorSettings, ServiceRef

AUTO = Key("default", "auto")
SERVER = "127.0.0.1:9003"


class FakeCluster:
    """An API server of plain tables; every write is recorded."""

    def __init__(self):
        self.objects = {kind: {} for kind in Kind}
        self.missing = set()
        self.forbidden = set()
        self.closed = set()
        """Namespaces without a Role."""
        self.error = None
        self.log = []
        self.changed = asyncio.Event()

    def put(self, *bodies):
        for body in bodies:
            self.objects[Kind(body["kind"])][body["metadata"]["name"]] = body

    async def list_all(self, kind, namespace=""):
        self._check("list", kind)
        if kind in self.forbidden or namespace in self.closed:
            raise ClusterError("forbidden", status=403)
        if kind in self.missing:
            return None
        found = self.objects[kind].values()
        return [one for one in found if namespace in ("", one["metadata"]["namespace"])]

    async def may_watch(self, kind):
        return kind not in self.forbidden

    async def write_snapshot(self, write):
        self._check("snapshot", write.snapshot)
        self.put(config_map(write))

    async def delete_snapshot(self, policy):
        self._check("delete", policy)
        self.objects[Kind.CONFIG_MAP].pop(f"pointsman-snapshot-{policy.name}", None)

    async def write_status(self, write):
        self._check("status", write)
        table = self.objects[write.ref.kind]
        if write.ref.key.name not in table:
            raise ClusterError("gone", status=404)
        table[write.ref.key.name] = table[write.ref.key.name] | {"status": write.status}

    async def post_event(self, ref, transition, _now):
        self._check("event", (ref.key.name, transition.reason))

    async def close(self):
        self._check("close", None)

    def _check(self, what, content):
        self.log.append((what, content))
        self.changed.set()
        if self.error is not None:
            raise self.error

    def writes(self):
        return [(what, content) for what, content in self.log if what not in ("list", "close")]


class FakeServers:
    """Policy servers that take everything."""

    def __init__(self):
        self.sets = []
        self.publishers = []
        self.changed = asyncio.Event()
        self.counts = {}
        self.open = asyncio.Event()
        """They answer to sets."""
        self.open.set()

    def connect(self, address):
        return FakeServer(self, address)


class FakeServer:
    def __init__(self, owner, address):
        self._owner, self._address = owner, address
        self._applied = {}

    async def publish(self, publisher, what):
        await self._owner.open.wait()
        self._owner.publishers.append(publisher)
        self._applied = what.applied
        self._owner.sets.append((self._address, what))
        self._owner.changed.set()
        return ServerReport("one", self._applied)

    async def status(self):
        self._owner.changed.set()
        return ServerReport("one", self._applied, self._owner.counts)

    async def close(self):
        pass


SETTINGS = OperatorSettings(
    policy_server_addresses=(SERVER,),
    http_address="127.0.0.1:0",
    debounce_s=0.001,
    write_pause_s=0.0,
    status_poll_interval_s=0.05,
    stats_interval_s=0.05,
    probe_interval_s=60.0,
)


class Rig:
    def __init__(self):
        self.cluster, self.servers = FakeCluster(), FakeServers()
        self.memory = Memory()
        self.operator = None

    @contextlib.asynccontextmanager
    async def running(self, *, unwatched=(), on_stale_watches=None, **settings):
        self.operator = Operator(
            replace(SETTINGS, **settings),
            self.cluster,
            memory=self.memory,
            connect=self.servers.connect,
            unwatched=unwatched,
            on_stale_watches=on_stale_watches,
        )
        await self.operator.start()
        try:
            yield self.operator
        finally:
            await self.operator.stop()

    async def until(self, holds):
        async with asyncio.timeout(20):
            while not holds():
                self.cluster.changed.clear()
                self.servers.changed.clear()
                waiters = [
                    asyncio.create_task(self.cluster.changed.wait()),
                    asyncio.create_task(self.servers.changed.wait()),
                ]
                await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
                for waiter in waiters:
                    waiter.cancel()

    def status(self, name, kind=Kind.POLICY):
        return self.cluster.objects[kind].get(name, {}).get("status") or {}

    def reason(self, name, condition, kind=Kind.POLICY):
        found = self.status(name, kind).get("conditions", [])
        return {c["type"]: c["reason"] for c in found}.get(condition)

    def message(self, name, condition, kind=Kind.POLICY):
        found = self.status(name, kind).get("conditions", [])
        return {c["type"]: c["message"] for c in found}.get(condition, "")

    def written(self, name):
        """Writes of an object's status, in their order."""
        return [one for what, one in self.cluster.log if what == "status" and named(one, name)]

    async def get(self, path):
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{self.operator.http_port}{path}"
            async with session.get(url) as response:
                return response.status, await response.text()


def named(write, name):
    return isinstance(write, StatusWrite) and write.ref.key.name == name


@pytest.fixture
def rig():
    return Rig()


async def test_from_objects_to_a_policy_server_and_back_to_a_status(api, rig):
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running():
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        assert rig.servers.sets[0][0] == SERVER
        assert "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP]
        await rig.until(lambda: rig.reason("coder", "Reachable", Kind.EXPERT) == "NoneAnswers")
        await rig.until(lambda: ("event", ("auto", "NoneAnswers")) in rig.cluster.log)
        assert (await rig.get("/readyz"))[0] == 200
        assert (await rig.get("/healthz")) == (200, "ok\n")
        page = (await rig.get("/metrics"))[1]
        assert 'pointsman_operator_snapshot_age_seconds{policy="default/auto"}' in page
        assert 'pointsman_operator_reconciles_total{result="ok"}' in page


async def test_a_watch_event_takes_effect_without_a_list(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=3600.0) as operator:
        await rig.until(lambda: len(rig.servers.sets) == 1)
        changed = api.expert(addresses=["10.0.0.7:8000"], meta={"generation": 2})
        rig.cluster.put(changed)
        operator.feed(Kind.EXPERT, {"type": "MODIFIED", "object": changed})
        await rig.until(lambda: len(rig.servers.sets) == 2)
        sent = rig.servers.sets[1][1].snapshots[0].snapshot_json
        assert b"10.0.0.7:8000" in sent
        assert 'watch_age_seconds{kind="LLMExpert"}' in (await rig.get("/metrics"))[1]


@pytest.mark.parametrize(
    ("namespace", "concerns"), [("default", True), ("servers", True), ("elsewhere", False)]
)
async def test_pods_of_others_are_no_reason_to_reconcile(api, rig, namespace, concerns):
    rig.operator = Operator(
        replace(SETTINGS, policy_servers=ServiceRef.parse("servers/policy:1")), rig.cluster
    )
    rig.operator.feed(Kind.EXPERT, {"type": "ADDED", "object": api.expert()})
    rig.operator._changed.clear()
    pod = api.pod(meta={"namespace": namespace})
    rig.operator.feed(Kind.POD, {"type": "ADDED", "object": pod})
    assert rig.operator._changed.is_set() is concerns
    # It is known all the same, should an expert come.
    assert rig.operator.store.objects(Kind.POD)


async def test_a_list_finds_what_no_watch_has_told(api, rig):
    rig.cluster.put(api.policy(), api.expert(), api.expert("chat", addresses=["10.0.0.2:1"]))
    async with rig.running(resync_interval_s=0.05):
        await rig.until(lambda: len(rig.servers.sets) == 1)
        del rig.cluster.objects[Kind.EXPERT]["chat"]
        await rig.until(lambda: len(rig.servers.sets) == 2)
        assert b"10.0.0.2" not in rig.servers.sets[1][1].snapshots[0].snapshot_json


async def test_an_engine_that_serves_another_model_gets_no_requests(api, rig, engine):
    rig.cluster.put(api.policy(), api.expert(addresses=[engine.address]))
    async with rig.running(probe_interval_s=0.05):
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == "ModelNotListed")
        await rig.until(lambda: engine.address not in sent(rig))
        await rig.until(lambda: rig.reason("auto", "Ready") == "NoReadyEndpoints")
        engine.models = ["coder-model"]
        await rig.until(lambda: engine.address in sent(rig))
        await rig.until(lambda: rig.reason("auto", "Ready") == "Serving")


def sent(rig):
    """The last set as text."""
    return "".join(one.snapshot_json.decode() for one in rig.servers.sets[-1][1].snapshots)


@pytest.fixture
async def engine():
    """An engine whose list of ``models`` can be changed; it hangs unless ``open``."""
    fake = SimpleNamespace(models=["another-model"], address="", open=asyncio.Event())
    fake.open.set()

    async def answer(_):
        await fake.open.wait()
        return web.json_response({"data": [{"id": name} for name in fake.models]})

    app = web.Application()
    app.router.add_get("/v1/models", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.address = f"127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()


async def test_at_rest_nothing_is_written_or_sent(api, rig):
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running(resync_interval_s=0.05):
        await told_of_silence(rig)
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        await lists(rig, 4)
        before = (rig.cluster.writes(), list(rig.servers.sets))
        await lists(rig, 4)
        assert (rig.cluster.writes(), rig.servers.sets) == before


async def told_of_silence(rig):
    """Wait until all statuses say that the engine does not answer."""
    await rig.until(lambda: rig.reason("coder", "Reachable", Kind.EXPERT) == "NoneAnswers")
    await rig.until(lambda: rig.reason("auto", "Ready") == "NoneAnswers")


async def lists(rig, count):
    """Wait for more full lists."""
    wanted = len([1 for what, _ in rig.cluster.log if what == "list"]) + count * len(Kind)
    await rig.until(lambda: len([1 for what, _ in rig.cluster.log if what == "list"]) >= wanted)


async def test_a_restart_writes_nothing_and_sends_the_same(api, rig):
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running():
        await told_of_silence(rig)
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
    first = rig.servers.sets[-1][1]
    rig.memory, rig.cluster.log = Memory(), []
    async with rig.running(resync_interval_s=0.05):
        await rig.until(lambda: len(rig.servers.sets) == 2)
        await lists(rig, 4)
        assert rig.servers.sets[-1][1].applied == first.applied
        # Not even that nobody was asked yet.
        assert rig.cluster.writes() == []


async def test_after_a_restart_a_slow_policy_server_is_waited_for(api, rig, monkeypatch):
    """Else each policy would be told of as Pending, and once more as Acknowledged."""
    monkeypatch.setattr(runtime, "SETTLE_S", 0.001)
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running():
        await told_of_silence(rig)
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
    rig.memory, rig.cluster.log = Memory(), []
    rig.servers.open.clear()
    async with rig.running(resync_interval_s=0.05):
        await lists(rig, 4)
        rig.servers.open.set()
        await rig.until(lambda: len(rig.servers.sets) == 2)
        await lists(rig, 4)
        assert rig.cluster.writes() == []


async def test_each_run_publishes_under_a_name_of_its_own(api, rig):
    """It counts its sets from one; policy servers refuse what seems older than the last."""
    rig.cluster.put(api.policy(), api.expert())
    for run in (1, 2):
        async with rig.running():
            await rig.until(lambda run=run: len(rig.servers.publishers) == run)
    assert len(set(rig.servers.publishers)) == 2


async def test_what_may_not_be_listed_stops_nothing_else(api, rig):
    pods = {"podSelector": {"matchLabels": {"app": "llm"}, "port": 8000}}
    rig.cluster.put(api.policy(), api.expert(), api.expert("chat", **pods))
    rig.cluster.forbidden = {Kind.POD}
    async with rig.running(resync_interval_s=0.05):
        await rig.until(lambda: rig.reason("chat", "Ready", Kind.EXPERT) == "NotPermitted")
        assert [one.policy for one in rig.servers.sets[0][1].snapshots] == ["auto"]
        rig.cluster.forbidden = {Kind.POD, Kind.CONFIG_MAP}
        await lists(rig, 2)
        rig.cluster.put(api.expert(addresses=["10.0.0.7:8000"], meta={"generation": 2}))
        await rig.until(lambda: "10.0.0.7:8000" in sent(rig))
        rig.cluster.forbidden = set()
        await rig.until(lambda: rig.reason("chat", "Ready", Kind.EXPERT) == "NoEndpoints")


async def test_an_inference_pool_crd_that_comes_later_is_found_soon(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "POOLS_INTERVAL_S", 0.01)
    rig.cluster.missing = {Kind.POOL}
    rig.cluster.put(api.policy(), api.expert(inferencePool={"name": "ants"}))
    async with rig.running(resync_interval_s=3600.0) as operator:
        reason = "InferencePoolNotInstalled"
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == reason)
        rig.cluster.missing = set()
        reason = "InferencePoolNotFound"
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == reason)
        operator.feed(Kind.POOL, {"type": "ADDED", "object": api.pool("other")})
        looks = rig.cluster.log.count(("list", Kind.POOL))
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        left = rig.cluster.log.count(("list", Kind.POOL)) - looks
        assert left <= 1, "it is watched: no more looks but the one under way"


async def test_an_inference_pool_that_goes_before_it_is_watched_is_found_gone(
    api, rig, monkeypatch
):
    monkeypatch.setattr(runtime, "POOLS_INTERVAL_S", 0.01)
    rig.cluster.missing = {Kind.POOL}
    rig.cluster.put(api.policy(), api.expert(inferencePool={"name": "ants"}))
    async with rig.running(resync_interval_s=3600.0):
        reason = "InferencePoolNotInstalled"
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == reason)
        rig.cluster.missing = set()
        rig.cluster.put(api.pool("ants"))
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == "NoEndpoints")
        del rig.cluster.objects[Kind.POOL]["ants"]
        reason = "InferencePoolNotFound"
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == reason)


async def test_own_crds_that_come_later_are_found_soon(api, rig, monkeypatch):
    """Also what is created before kopf watches them."""
    monkeypatch.setattr(runtime, "POOLS_INTERVAL_S", 0.01)
    rig.cluster.missing = {Kind.EXPERT, Kind.POLICY}
    async with rig.running(resync_interval_s=3600.0) as operator:
        await rig.until(lambda: operator.health.synced)
        rig.cluster.missing = set()
        lists = rig.cluster.log.count(("list", Kind.EXPERT))
        await rig.until(lambda: rig.cluster.log.count(("list", Kind.EXPERT)) > lists + 1)
        rig.cluster.put(api.policy(), api.expert())
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        for kind, body in ((Kind.POLICY, api.policy("b")), (Kind.EXPERT, api.expert("b"))):
            operator.feed(kind, {"type": "ADDED", "object": body})
        assert operator._awaited() == []


async def test_an_inference_pool_crd_that_nobody_waits_for_is_not_looked_for(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "POOLS_INTERVAL_S", 0.001)
    rig.cluster.missing = {Kind.POOL}
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        assert rig.cluster.log.count(("list", Kind.POOL)) == 1


async def test_engines_are_asked_before_the_first_status_is_written(api, rig, engine):
    experts = [api.expert(f"e{number}", addresses=[engine.address]) for number in range(20)]
    engine.models = [one["spec"]["model"] for one in experts]
    rig.cluster.put(api.policy(), *experts)
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: rig.reason("auto", "Ready") == "Serving")
        for one in experts:
            name = one["metadata"]["name"]
            await rig.until(lambda n=name: rig.reason(n, "ModelServed", Kind.EXPERT))
    statuses = [one.ref.key.name for what, one in rig.cluster.writes() if what == "status"]
    assert sorted(statuses) == sorted(["auto", *(one["metadata"]["name"] for one in experts)])
    assert rig.reason("e0", "ModelServed", Kind.EXPERT) == "ModelListed"


async def test_an_engine_that_hangs_does_not_keep_statuses_back(api, rig, engine, monkeypatch):
    monkeypatch.setattr(runtime, "FIRST_SETTLE_S", 0.01)
    engine.open.clear()
    rig.cluster.put(api.policy(), api.expert(addresses=[engine.address]))
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: rig.reason("coder", "Reachable", Kind.EXPERT) == "NotProbed")
        engine.open.set()


async def test_a_stop_amid_many_writes_leaves_nothing_unawaited(api, rig):
    rig.cluster.put(api.policy(), *(api.expert(f"e{number}") for number in range(20)))
    rig.cluster.write_status = blocked(rig.cluster)
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: ("status", "blocked") in rig.cluster.log)
    gc.collect()  # a coroutine that was never awaited would be told of by now


def blocked(cluster):
    async def write(_):
        cluster.log.append(("status", "blocked"))
        cluster.changed.set()
        await asyncio.Event().wait()

    return write


async def test_without_experts_and_policies_nothing_is_known(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    rig.cluster.forbidden = {Kind.EXPERT}
    async with rig.running(resync_interval_s=0.05):
        await lists(rig, 2)
        assert (await rig.get("/readyz"))[0] == 503
        assert rig.servers.sets == []


async def test_a_watch_that_misses_changes_and_says_nothing_is_told_of(api, rig, monkeypatch):
    monkeypatch.setattr(store, "GRACE_S", 0.1)
    told = asyncio.Queue()
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=0.05, on_stale_watches=told.put_nowait):
        await rig.until(lambda: len(rig.servers.sets) == 1)
        rig.cluster.put(api.expert(addresses=["10.0.0.7:8000"], meta={"generation": 2}))
        async with asyncio.timeout(20):
            assert "LLMExpert" in await told.get()


async def test_what_may_not_be_watched_is_listed_and_watched_once_it_may(api, rig):
    told = asyncio.Queue()
    pods = {"podSelector": {"matchLabels": {"app": "llm"}, "port": 8000}}
    rig.cluster.put(api.policy(), api.expert(**pods))
    rig.cluster.forbidden = {Kind.POD}
    async with rig.running(
        resync_interval_s=0.05, unwatched=[Kind.POD], on_stale_watches=told.put_nowait
    ):
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == "NotPermitted")
        await lists(rig, 2)
        assert told.empty()
        rig.cluster.forbidden = set()
        async with asyncio.timeout(20):
            assert await told.get() == "Pod may be watched now"


async def test_a_right_that_is_taken_away_is_told_of(api, rig):
    told = asyncio.Queue()
    pods = {"podSelector": {"matchLabels": {"app": "llm"}, "port": 8000}}
    rig.cluster.put(api.policy(), api.expert(**pods), api.pod(ip="127.0.0.1"))
    async with rig.running(resync_interval_s=0.05, on_stale_watches=told.put_nowait):
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == "NoneAnswers")
        rig.cluster.forbidden = {Kind.POD, Kind.CONFIG_MAP}
        await rig.until(lambda: rig.reason("coder", "Ready", Kind.EXPERT) == "NotPermitted")
        async with asyncio.timeout(20):
            assert await told.get() == "Pod may not be watched any more"
    assert len(rig.servers.sets) == 1


async def test_a_namespace_that_ends_is_no_failure(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    ending = ClusterError("being terminated", status=403, cause="NamespaceTerminating")
    rig.cluster.post_event = raising(ending, rig.cluster)
    rig.cluster.write_snapshot = raising(ending, rig.cluster)
    with capture_logs() as logs:
        async with rig.running(resync_interval_s=0.05):
            await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
            await lists(rig, 2)
            page = (await rig.get("/metrics"))[1]
    assert [one for one in logs if one["log_level"] in ("warning", "error")] == []
    assert 'writes_total{result="gone",what="configmap"}' in page
    assert 'writes_total{result="gone",what="event"}' in page
    assert 'result="failed",what="configmap"' not in page


async def test_averages_of_a_status_outlive_a_restart(api, rig):
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    rig.servers.counts = {AUTO: PolicyCounts(4, 1, 2.0)}
    async with rig.running():
        await rig.until(lambda: rig.status("auto").get("averageQos") == 0.5)
        await told_of_silence(rig)
    rig.memory, rig.cluster.log = Memory(), []
    async with rig.running(resync_interval_s=0.05, status_poll_interval_s=3600.0):
        await lists(rig, 4)
        assert rig.cluster.writes() == []


async def test_a_broken_policy_keeps_its_snapshot_over_a_restart(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running():
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
    rig.memory = Memory()
    rig.cluster.put(api.policy(models=[], meta={"generation": 2}))
    async with rig.running():
        await rig.until(lambda: len(rig.servers.sets) == 2)
        assert rig.servers.sets[1][1].applied == rig.servers.sets[0][1].applied
        await rig.until(lambda: rig.reason("auto", "Accepted") == "InvalidSpec")


async def test_a_start_that_cannot_read_config_maps_ends_nothing(api, rig, monkeypatch):
    """They alone tell what a policy had in force whose spec is not valid now."""
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running():
        await rig.until(lambda: "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP])
    rig.memory = Memory()
    rig.servers.sets.clear()
    rig.cluster.put(api.policy(algorithm="Unknown", meta={"generation": 2}))
    rig.cluster.forbidden = {Kind.CONFIG_MAP}
    async with rig.running(resync_interval_s=0.05):
        await lists(rig, 2)
        assert (rig.servers.sets, (await rig.get("/readyz"))[0]) == ([], 503)
        rig.cluster.forbidden = set()
        await rig.until(lambda: rig.servers.sets)
        assert AUTO in rig.servers.sets[-1][1].applied


async def test_nothing_happens_before_everything_was_listed(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    rig.cluster.error = ClusterError("away")
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running() as operator:
        operator.feed(Kind.POLICY, {"type": "ADDED", "object": api.policy()})
        await lists(rig, 2)
        assert (await rig.get("/readyz"))[0] == 503
        assert rig.servers.sets == []
        rig.cluster.error = None
        await rig.until(lambda: len(rig.servers.sets) == 1)


async def test_an_api_server_that_is_away_stops_no_snapshot(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running() as operator:
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        rig.cluster.error = ClusterError("away")
        moved = api.expert(addresses=["10.0.0.9:1"])
        operator.feed(Kind.EXPERT, {"type": "MODIFIED", "object": moved})
        await rig.until(lambda: len(rig.servers.sets) == 2)
        await rig.until(lambda: rig.cluster.log[-1][0] in ("status", "snapshot"))
        rig.cluster.error = None
        version = rig.servers.sets[1][1].applied[AUTO][1]
        await rig.until(lambda: rig.status("auto").get("snapshotVersion") == version)


async def test_an_object_that_is_gone_is_not_written_again_and_again(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    rig.cluster.write_status = raising(ClusterError("gone", status=404), rig.cluster)
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP])


def raising(error, cluster):
    async def write(what, *_):
        cluster.log.append(("status", what))
        cluster.changed.set()
        raise error

    return write


async def test_a_name_in_force_stays_with_its_policy_over_a_restart(api, rig):
    rig.cluster.put(api.policy("late", models=["late"], meta={"creationTimestamp": "2027"}))
    rig.cluster.put(api.expert())
    async with rig.running():
        await rig.until(lambda: rig.reason("late", "Programmed") == "Acknowledged")
    rig.cluster.put(api.policy("early", models=["late"]))
    rig.memory = Memory()
    async with rig.running():
        await rig.until(lambda: rig.reason("early", "Accepted") == "ModelNameConflict")
        assert [one.policy for one in rig.servers.sets[-1][1].snapshots] == ["late"]
    assert list(rig.cluster.objects[Kind.CONFIG_MAP]) == ["pointsman-snapshot-late"]


async def test_a_status_that_somebody_changed_is_put_right(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=0.05):
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        rig.cluster.put(rig.cluster.objects[Kind.POLICY]["auto"] | {"status": {"experts": 99}})
        await rig.until(lambda: rig.status("auto").get("experts") == 1)


async def test_a_backend_that_flaps_is_not_written_each_time(api, rig):
    """Policy servers are told of each change; ConfigMaps, which may be large, are not."""
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running(resync_interval_s=0.02, write_pause_s=3600.0):
        await rig.until(lambda: "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP])
        for port in range(2, 6):
            rig.cluster.put(api.expert(addresses=[f"127.0.0.1:{port}"]))
            await rig.until(lambda port=port: f"127.0.0.1:{port}" in sent(rig))
            await lists(rig, 3)
        assert [what for what, _ in rig.cluster.writes()].count("snapshot") == 1


async def test_whoever_cannot_list_does_not_call_its_set_the_newest(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=0.05) as operator:
        await rig.until(lambda: rig.servers.sets)
        assert operator._publisher.up_to_date
        rig.cluster.error = ClusterError("cut off")
        await lists(rig, 2)
        assert not operator._publisher.up_to_date
        rig.cluster.error = None
        await lists(rig, 2)
        assert operator._publisher.up_to_date


async def test_objects_that_are_gone_are_forgotten(api, rig):
    rig.cluster.put(api.policy())
    async with rig.running(resync_interval_s=0.05):
        for name in ("one", "two"):
            rig.cluster.put(api.expert(name, addresses=["127.0.0.1:1"]))
            await rig.until(lambda name=name: rig.reason(name, "Ready", Kind.EXPERT))
            del rig.cluster.objects[Kind.EXPERT][name]
        await lists(rig, 3)
        assert {ref.key for ref in rig.memory.previous.statuses} == {AUTO}


async def test_a_config_map_that_somebody_changed_is_put_right(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    maps = rig.cluster.objects[Kind.CONFIG_MAP]
    async with rig.running(resync_interval_s=0.05):
        await rig.until(lambda: "pointsman-snapshot-auto" in maps)
        good = maps["pointsman-snapshot-auto"]
        maps["pointsman-snapshot-auto"] = good | {"data": {"snapshot.json": "{}"}}
        await rig.until(lambda: maps["pointsman-snapshot-auto"]["data"] == good["data"])


async def test_without_the_crds_what_is_in_force_stays(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=0.05):
        await rig.until(lambda: len(rig.servers.sets) == 1)
        await rig.until(lambda: "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP])
        rig.cluster.missing = {Kind.EXPERT, Kind.POLICY}
        await lists(rig, 4)
        assert len(rig.servers.sets) == 1
        assert "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP]
        rig.cluster.missing = set()
        await lists(rig, 2)
        assert len(rig.servers.sets) == 1


async def test_the_last_policy_that_goes_leaves_an_empty_set(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=3600.0) as operator:
        await rig.until(lambda: len(rig.servers.sets) == 1)
        operator.feed(Kind.POLICY, {"type": "DELETED", "object": api.policy()})
        await rig.until(lambda: len(rig.servers.sets) == 2)
        assert rig.servers.sets[1][1].snapshots == ()


async def test_an_object_that_flaps_causes_few_events(api, rig):
    rig.cluster.put(api.policy())
    flaps = (Transition(True, "Flaps", "up"),) * 40
    async with rig.running(resync_interval_s=3600.0) as operator:
        await rig.until(lambda: rig.reason("auto", "Ready"))
        for name in ("auto", "other"):
            ref = Ref(Kind.POLICY, Key("default", name), name)
            rig.cluster.put(api.policy(name))
            await operator._write_status(StatusWrite(ref, {}, flaps))
        written = [content for what, content in rig.cluster.log if what == "event"]
        assert written.count(("auto", "Flaps")) == written.count(("other", "Flaps")) == 25
        _, metrics = await rig.get("/metrics")
    assert 'pointsman_operator_writes_total{result="spared",what="event"} 30.0' in metrics


WITHOUT_SERVERS = {
    "nothing is said of them": (
        None,
        "give the operator --policy-servers or --policy-server-address",
    ),
    "no Service": (
        ServiceRef(Key("default", "polcy"), "http"),
        "there is no Service default/polcy (--policy-servers)",
    ),
    "no such port": (
        ServiceRef(Key("default", "policy"), "9004"),
        "Service default/policy has no TCP port 9004; it has 9003 (--policy-servers)",
    ),
    "no endpoints": (
        ServiceRef(Key("default", "policy"), "9003"),
        "Service default/policy has no endpoints: no pod with an address matches its selector "
        "(--policy-servers)",
    ),
}


@pytest.mark.parametrize(("servers", "text"), WITHOUT_SERVERS.values(), ids=WITHOUT_SERVERS)
async def test_why_there_is_no_policy_server_is_told(api, rig, servers, text):
    rig.cluster.put(api.policy(), api.expert(), api.service("policy", port=9003))
    async with rig.running(policy_server_addresses=(), policy_servers=servers):
        await rig.until(lambda: rig.reason("auto", "Programmed") == "NoPolicyServers")
        (told,) = (c for c in rig.status("auto")["conditions"] if c["type"] == "Programmed")
        assert told["message"] == f"no policy server is ready: {text}"


async def test_a_role_that_hides_the_policy_servers_is_told(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    rig.cluster.forbidden = {Kind.SLICE}
    servers = ServiceRef(Key("default", "policy"), "http")
    async with rig.running(policy_server_addresses=(), policy_servers=servers):
        await rig.until(lambda: rig.reason("auto", "Programmed") == "NoPolicyServers")
        (told,) = (c for c in rig.status("auto")["conditions"] if c["type"] == "Programmed")
        assert "not permitted to list EndpointSlice" in told["message"]


async def test_policy_servers_are_found_by_their_service(api, rig):
    rig.cluster.put(
        api.policy(),
        api.expert(),
        api.service("policy", port=9003),
        api.slice("policy", "127.0.0.1", "127.0.0.2", port=9003, ready=False),
    )
    servers = ServiceRef(Key("default", "policy"), "http")
    async with rig.running(policy_server_addresses=(), policy_servers=servers) as operator:
        # Those that are not ready get it too: it is what makes them ready.
        await rig.until(lambda: len(rig.servers.sets) == 2)
        await rig.until(lambda: rig.reason("auto", "Programmed") == "NoPolicyServers")
        ready = api.slice("policy", "127.0.0.1", port=9003)
        operator.feed(Kind.SLICE, {"type": "MODIFIED", "object": ready})
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")


async def test_averages_reach_the_reconciliation(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    rig.servers.counts = {AUTO: PolicyCounts(4, 1, 2.0)}
    async with rig.running() as operator:
        await rig.until(lambda: AUTO in operator._performance)
        assert operator._performance[AUTO].violation_rate == 0.25


async def test_prometheus_that_is_away_is_survived(api, rig):
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(prometheus_url="http://127.0.0.1:1"):
        await rig.until(lambda: rig.reason("auto", "Programmed") == "Acknowledged")
        assert (await rig.get("/healthz"))[0] == 200


async def test_a_watch_that_says_nothing_makes_the_process_unhealthy(rig):
    async with rig.running() as operator:
        for events, missed in ((0, 0), (0, 1), (0, 1)):
            operator.health.listed({Kind.POD: events}, {Kind.POD: missed})
        assert await rig.get("/healthz") == (503, "the watch of Pod misses changes\n")


async def test_a_bug_in_a_loop_does_not_end_it(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    real, calls = runtime.reconcile, []

    def explode_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(runtime, "reconcile", explode_once)
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: len(rig.servers.sets) == 1)
        assert 'reconciles_total{result="failed"} 1.0' in (await rig.get("/metrics"))[1]


async def test_a_write_that_fails_makes_no_other_wait(api, rig, monkeypatch):
    """One tenant's quota must not stall the statuses of the others."""
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 3600.0)
    quota = ClusterError("exceeded quota", status=403)
    real = rig.cluster.write_snapshot

    async def write(what):
        if what.policy.namespace == "full":
            await raising(quota, rig.cluster)(what)
        await real(what)

    rig.cluster.write_snapshot = write
    meta = {"namespace": "full", "labels": {}, "uid": "full"}
    rig.cluster.put(api.policy("stuck", meta=meta), api.expert("near", meta=meta))
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=3600.0) as operator:
        await rig.until(lambda: rig.reason("stuck", "Ready") == "SnapshotNotStored")
        assert "exceeded quota" in rig.status("stuck")["conditions"][0]["message"]
        late = api.expert("late", addresses=["127.0.0.1:1"])
        rig.cluster.put(late)
        operator.feed(Kind.EXPERT, {"type": "ADDED", "object": late})
        await rig.until(lambda: rig.reason("late", "Ready", Kind.EXPERT))
        tries = [one for what, one in rig.cluster.log if getattr(one, "policy", None) == STUCK]
        assert len(tries) == 1, "it is not due yet"


STUCK = Key("full", "stuck")


async def test_a_config_map_that_is_refused_is_written_when_it_may(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    real = rig.cluster.write_snapshot
    rig.cluster.write_snapshot = raising(ClusterError("quota", status=403), rig.cluster)
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    rig.cluster.put(api.service())
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: ("status", "auto") in tried(rig))
        assert "pointsman-snapshot-auto" not in rig.cluster.objects[Kind.CONFIG_MAP]
        rig.cluster.write_snapshot = real
        await rig.until(lambda: "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP])
        await rig.until(lambda: not rig.memory.unstored)


async def test_a_refused_config_map_is_not_forgotten_when_the_watches_start_again(
    api, rig, monkeypatch
):
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    rig.cluster.write_snapshot = raising(ClusterError("quota", status=403), rig.cluster)
    rig.cluster.put(api.policy(), api.expert(addresses=["127.0.0.1:1"]))
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: "quota" in rig.message("auto", "Ready"))
    rig.cluster.log.clear()
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: tried(rig))
    told = [write.status["conditions"][0]["message"] for write in rig.written("auto")]
    assert all("quota" in one for one in told), told


def tried(rig):
    """Objects of all tries of `raising`, by name."""
    return [(what, one.policy.name) for what, one in rig.cluster.log if hasattr(one, "policy")]


async def test_a_config_map_without_its_namespace_does_not_count_as_stored(api, rig, monkeypatch):
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    real = rig.cluster.write_snapshot
    rig.cluster.write_snapshot = raising(ClusterError("no namespace", status=404), rig.cluster)
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(resync_interval_s=3600.0):
        await rig.until(lambda: ("status", "auto") in tried(rig))
        rig.cluster.write_snapshot = real
        await rig.until(lambda: "pointsman-snapshot-auto" in rig.cluster.objects[Kind.CONFIG_MAP])


def two_namespaces(api, rig):
    b = {"namespace": "b", "uid": "b"}
    rig.cluster.put(api.policy(), api.expert())
    rig.cluster.put(api.policy("other", meta=b), api.expert("far", meta=b))


@pytest.mark.parametrize("again", [False, True], ids=["same run", "watches begun again"])
async def test_a_namespace_that_is_closed_stops_no_other(api, rig, again):
    two_namespaces(api, rig)
    served = {"namespaces": ("default", "b"), "resync_interval_s": 0.05}
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(rig.running(**served))
        await rig.until(lambda: rig.reason("other", "Programmed") == "Acknowledged")
        if again:
            await stack.aclose()
        rig.cluster.closed = {"b"}
        rig.cluster.put(api.expert(addresses=["10.0.0.7:8000"], meta={"generation": 2}))
        if again:
            await stack.enter_async_context(rig.running(**served))
        await rig.until(lambda: "10.0.0.7:8000" in sent(rig))
        applied = rig.servers.sets[-1][1].applied
        assert Key("b", "other") in applied
        assert (await rig.get("/readyz"))[0] == 200
        rig.cluster.closed = set()
        del rig.cluster.objects[Kind.POLICY]["other"]
        await rig.until(lambda: Key("b", "other") not in rig.servers.sets[-1][1].applied)


async def test_a_namespace_that_is_closed_from_the_start_is_named(api, rig, monkeypatch):
    """What is in force there is not known: sending the rest would end it."""
    monkeypatch.setattr(runtime, "FIRST_RETRY_S", 0.01)
    two_namespaces(api, rig)
    rig.cluster.closed = {"b"}
    async with rig.running(namespaces=("default", "b")):
        await lists(rig, 2)
        status, text = await rig.get("/readyz")
        assert (status, rig.servers.sets) == (503, [])
        assert "in b: give the operator its Role there, or take the namespace out" in text
        rig.cluster.closed = set()
        await rig.until(lambda: rig.reason("other", "Programmed") == "Acknowledged")


async def test_a_question_that_fails_makes_no_list_fail(api, rig):
    asked = asyncio.Event()

    async def may_watch(_):
        asked.set()
        raise ClusterError("busy", status=503)

    rig.cluster.may_watch = may_watch
    rig.cluster.put(api.policy(), api.expert())
    async with rig.running(
        resync_interval_s=0.05, unwatched=[Kind.POD], on_stale_watches=lambda _: None
    ):
        async with asyncio.timeout(20):
            await asked.wait()
        await lists(rig, 2)
        page = (await rig.get("/metrics"))[1]
    assert 'resyncs_total{result="ok"}' in page
    assert 'resyncs_total{result="failed"}' not in page


async def test_a_loop_that_ran_for_long_begins_anew_soon(monkeypatch):
    now, pauses, runs = 0.0, [], [1.0, 1.0, 100.0, 1.0]

    async def loop():
        nonlocal now
        if not runs:
            raise asyncio.CancelledError
        now += runs.pop(0)
        raise ZeroDivisionError

    async def sleep(pause):
        pauses.append(pause)

    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(runtime, "time", clock)
    monkeypatch.setattr(runtime, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(asyncio.CancelledError):
        await runtime._forever(loop)
    assert pauses == [0.5, 1.0, 0.5, 1.0]
