"""The operator under kopf, against an API server that answers wrongly on demand."""

import asyncio
import contextlib
import os
import signal
import threading
from dataclasses import replace

import kopf
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from pointsman_operator import main, supervise
from pointsman_operator.cluster import PATHS, ClusterError
from pointsman_operator.observed import Kind
from pointsman_operator.runtime import Memory
from pointsman_operator.settings import OperatorSettings, TlsFiles
from pointsman_operator.supervise import StaleWatchesError, StartError, operate

SETTINGS = OperatorSettings(http_address="127.0.0.1:0", debounce_s=0.001, resync_interval_s=3600.0)
MAP = "pointsman-snapshot-auto"


class Rig:
    def __init__(self, server, settings):
        self.server, self.settings = server, settings
        self.memory = Memory()
        self.task = None
        self._stop = threading.Event()

    def start(self):
        self._stop = threading.Event()
        # kopf ends every task of its loop with itself: it gets a loop of its own.
        run = operate(self.settings, self.memory, stop_flag=self._stop)
        self.task = asyncio.create_task(asyncio.to_thread(asyncio.run, run))

    async def stop(self):
        self._stop.set()
        await self.task

    async def until(self, holds):
        async with asyncio.timeout(30):
            while not holds():
                self.server.written.clear()
                self.server.watched.clear()
                waiters = [
                    asyncio.create_task(event.wait())
                    for event in (self.server.written, self.server.watched)
                ]
                if not holds():
                    await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
                for waiter in waiters:
                    waiter.cancel()

    def published(self):
        """What the ConfigMap says."""
        found = self.server.objects[Kind.CONFIG_MAP].get(MAP)
        return found["data"]["snapshot.json"] if found else ""


@pytest.fixture
def operating(api, api_server):
    @contextlib.asynccontextmanager
    async def run(settings=SETTINGS):
        api_server.put(api.policy())
        api_server.put(api.expert())
        rig = Rig(api_server, settings)
        rig.start()
        try:
            yield rig
        finally:
            if not rig.task.done():
                await rig.stop()

    return run


async def test_events_of_the_watch_take_effect(api, api_server, operating):
    async with operating() as rig:
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())
        await rig.until(lambda: api_server.watches[Kind.EXPERT])
        api_server.put(api.expert(addresses=["10.0.0.2:8000"], meta={"generation": 2}))
        await rig.until(lambda: "10.0.0.2:8000" in rig.published())
        api_server.remove(Kind.EXPERT, "coder")
        await rig.until(lambda: "10.0.0.2:8000" not in rig.published())


async def test_kopf_writes_nothing_to_objects(api_server, operating):
    async with operating() as rig:
        await rig.until(lambda: rig.published())
        await rig.until(lambda: api_server.objects[Kind.POLICY]["auto"].get("status"))
    for method, path, _, body in api_server.requests:
        if method in ("PATCH", "POST", "PUT") and not path.endswith("accessreviews"):
            assert path.endswith(("/status", "/events", MAP)), path
            assert "annotations" not in body["metadata"]
            assert "finalizers" not in body["metadata"]


async def test_a_410_in_the_stream_loses_a_deletion_until_the_next_list(api_server, operating):
    settings = OperatorSettings(http_address="127.0.0.1:0", debounce_s=0.001, resync_interval_s=1.0)
    async with operating(settings) as rig:
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())
        await rig.until(lambda: api_server.watches[Kind.EXPERT])
        api_server.remove(Kind.EXPERT, "coder", told=False)
        gone = {"kind": "Status", "code": 410, "message": "too old"}
        api_server.end_watches(Kind.EXPERT, {"type": "ERROR", "object": gone})
        await rig.until(lambda: "10.0.0.1:8000" not in rig.published())
        assert not rig.task.done()


FATAL = {"410": (410, "too old resource version"), "404": (404, "the CRD is gone")}


@pytest.mark.parametrize(("status", "message"), FATAL.values(), ids=FATAL)
async def test_an_answer_that_ends_kopf_is_survived_by_another_run(
    api, api_server, operating, status, message
):
    async with operating() as rig:
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())
        await rig.until(lambda: api_server.watches[Kind.EXPERT])

        def refuse(request):
            if request.query.get("watch") and request.path.endswith("llmexperts"):
                return web.json_response({"kind": "Status", "message": message}, status=status)
            return None

        api_server.fail = refuse
        api_server.end_watches(Kind.EXPERT)
        with pytest.raises(Exception, match=message):
            await rig.task
        before = rig.published()
        api_server.fail = None
        writes = len([1 for method, *_ in api_server.requests if method == "PATCH"])
        api_server.put(api.expert(addresses=["10.0.0.3:8000"], meta={"generation": 2}))
        rig.start()  # the same address is free again, and what was written is remembered
        await rig.until(lambda: rig.published() != before)
        assert "10.0.0.3:8000" in rig.published()
        assert writes < len([1 for method, *_ in api_server.requests if method == "PATCH"])


async def test_an_api_server_that_fails_for_a_while_ends_nothing(api, api_server, operating):
    async with operating() as rig:
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())
        await rig.until(lambda: api_server.watches[Kind.EXPERT])
        refused = asyncio.Event()

        def fail(_request):
            refused.set()
            return web.Response(status=503)

        api_server.fail = fail
        for kind in Kind:
            api_server.end_watches(kind)
        await refused.wait()
        api_server.put(api.expert(addresses=["10.0.0.4:8000"], meta={"generation": 2}))
        api_server.fail = None
        await rig.until(lambda: "10.0.0.4:8000" in rig.published())
        assert not rig.task.done()


async def test_a_crd_that_comes_later_is_watched(api_server, operating):
    api_server.missing |= {Kind.EXPERT, Kind.POLICY}
    async with operating() as rig:
        await rig.until(lambda: api_server.watches[Kind.POD])
        assert rig.published() == ""
        api_server.missing = {Kind.POOL}
        api_server.announce("pointsman.dev")
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())
        assert api_server.watches[Kind.EXPERT]


async def test_a_kind_that_may_not_be_watched_is_left_alone_until_it_may(
    api, api_server, operating
):
    forbidden = {"pods"}
    api_server.reviews = lambda asked: asked["resource"] not in forbidden

    def refuse(request):
        if request.path.rpartition("/")[2] in forbidden:
            return web.json_response({"kind": "Status", "message": "forbidden"}, status=403)
        return None

    api_server.fail = refuse
    settings = OperatorSettings(http_address="127.0.0.1:0", debounce_s=0.001, resync_interval_s=0.2)
    async with operating(settings) as rig:
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())
        await rig.until(lambda: api_server.watches[Kind.EXPERT])
        api_server.put(api.expert(addresses=["10.0.0.5:8000"], meta={"generation": 2}))
        await rig.until(lambda: "10.0.0.5:8000" in rig.published())
        assert not rig.task.done()
        forbidden.clear()
        with pytest.raises(StaleWatchesError, match="Pod may be watched now"):
            await rig.task
        rig.start()
        await rig.until(lambda: api_server.watches[Kind.POD])


async def test_an_api_server_that_cannot_tell_stops_no_watch(api_server, operating):
    def refuse(request):
        return web.Response(status=503) if request.path.endswith("accessreviews") else None

    api_server.fail = refuse
    async with operating() as rig:
        await rig.until(lambda: "10.0.0.1:8000" in rig.published())


async def test_a_start_without_access_is_refused_for_good(monkeypatch, tmp_path):
    place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(place, str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(StartError, match="neither in a cluster"):
        await asyncio.to_thread(asyncio.run, operate(SETTINGS, Memory()))


@pytest.mark.parametrize("content", ["garbage", "a: [", "clusters: {}", "[]"])
async def test_a_file_that_is_no_kubeconfig_refuses_the_start(monkeypatch, tmp_path, content):
    """Rather than being tried again and again."""
    path = tmp_path / "config"
    path.write_text(content)
    place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(place, str(path))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(StartError, match="kubeconfig"):
        await asyncio.to_thread(asyncio.run, operate(SETTINGS, Memory()))


async def test_a_signal_while_the_watches_end_is_not_forgotten(api_server, monkeypatch):  # noqa: ARG001
    """Kopf takes no notice of it then, and everything would be started again."""

    async def failing(*, memo, **_):
        start = asyncio.create_task(main.start(settings=kopf.OperatorSettings(), memo=memo))
        await asyncio.sleep(0)  # kopf's, too, come after the beginning of the start
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
        await start
        os.kill(os.getpid(), signal.SIGTERM)
        await memo.ending.wait()
        await main.stop(memo=memo)
        raise RuntimeError("watches ended")

    monkeypatch.setattr(kopf, "operator", failing)
    before = signal.getsignal(signal.SIGTERM)
    try:
        async with asyncio.timeout(20):
            await operate(SETTINGS, Memory())
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGTERM, before)


async def test_a_refused_start_ends_at_once(api_server, monkeypatch):
    """Kopf would wait 5 s for whoever waits for its flag, and then the reaper comes."""
    ended = []
    monkeypatch.setattr(supervise, "PATIENCE_S", 3600.0)
    real = kopf.operator

    async def watched(**options):
        try:
            await real(**options)
        finally:
            ended.append(options["stop_flag"].is_set())

    monkeypatch.setattr(kopf, "operator", watched)
    settings = replace(SETTINGS, http_address=api_server.url.removeprefix("http://"))
    with pytest.raises(StartError, match=r"--http-address 127.0.0.1:\d+: .*already in use"):
        await asyncio.to_thread(asyncio.run, operate(settings, Memory()))
    assert ended == [True]


async def test_certificates_that_are_missing_refuse_the_start(api_server, tmp_path):  # noqa: ARG001
    files = {name: tmp_path / name for name in ("cert", "key", "ca")}
    settings = replace(SETTINGS, tls=TlsFiles(**files))
    with pytest.raises(StartError, match="the certificate for policy servers cannot be read"):
        await asyncio.to_thread(asyncio.run, operate(settings, Memory()))


@pytest.mark.parametrize(("given", "asked"), [({}, True), ({"settings": SETTINGS}, False)])
async def test_logs_are_set_up_for_kopf_run(monkeypatch, given, asked):
    calls = []
    monkeypatch.setattr(main, "configure_logs", lambda **options: calls.append(options))
    monkeypatch.setattr(main, "connect", refuse_to_connect)
    monkeypatch.setenv("POINTSMAN_LOG_LEVEL", "debug")
    with pytest.raises(kopf.PermanentError, match="no access"):
        await main.start(settings=kopf.OperatorSettings(), memo=kopf.Memo(**given))
    assert calls == ([{"level": "debug", "style": "json"}] if asked else [])


def refuse_to_connect(_):
    raise ClusterError("no access")


def test_every_kind_is_watched():
    registry = kopf.get_default_registry()
    selectors = registry._watching.get_all_selectors()
    watched = {(s.group, s.version, s.any_name or s.plural) for s in selectors}
    expected = set()
    for kind, path in PATHS.items():
        if kind is not Kind.CONFIG_MAP:
            *_, group, version = ["", *path.root.removeprefix("/apis/").split("/")]
            expected.add(("" if group == "api" else group, version, path.plural))
    assert watched == expected


async def test_a_task_that_swallows_a_cancellation_is_cancelled_again():
    """As kopf's watchers do now and then; it would wait for them for ever."""
    ending, swallowed = asyncio.Event(), asyncio.Event()
    reaper = asyncio.create_task(
        supervise.end_stragglers(ending, others=asyncio.all_tasks(), patience_s=0.001)
    )

    async def stubborn():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        swallowed.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    task.cancel()
    await swallowed.wait()
    ending.set()
    async with asyncio.timeout(20):
        await asyncio.wait({task})
    assert task.cancelled()
    reaper.cancel()


# --- supervision -----------------------------------------------------------------------


class Runs:
    """Ends as told, one after another."""

    def __init__(self, *ends):
        self._ends, self.pauses, self.now = list(ends), [], 0.0

    def once(self):
        lasts, error = self._ends.pop(0)
        self.now += lasts
        if error is not None:
            raise error

    def supervise(self):
        supervise.supervise(self.once, sleep=self.pauses.append, clock=lambda: self.now)


def test_failed_runs_are_followed_by_others_after_growing_pauses():
    failure = RuntimeError("410")
    runs = Runs((1, failure), (1, failure), (100, failure), (1, failure), (1, None))
    runs.supervise()
    assert runs.pauses == [0.5, 1.0, 0.5, 1.0]


def test_stale_watches_begin_anew_without_the_look_of_a_bug():
    runs = Runs((1, StaleWatchesError("Pod may be watched now")), (1, None))
    with capture_logs() as logs:
        runs.supervise()
    (told,) = logs
    assert (told["log_level"], told["reason"]) == ("warning", "Pod may be watched now")
    assert "exc_info" not in told


@pytest.mark.parametrize("status", [404, 410])
def test_a_kind_that_is_gone_begins_anew_without_the_look_of_a_bug(status):
    """As kopf ends when a CRD is deleted and the watch hears of it first."""
    runs = Runs((1, refused(status)), (1, None))
    with capture_logs() as logs:
        runs.supervise()
    (told,) = logs
    assert (told["log_level"], told["reason"]) == ("warning", "not found")


def test_refused_credentials_are_told_in_one_line():
    """Kopf advises to install a client library."""
    runs = Runs((1, kopf.LoginError("Ran out of valid credentials.")), (1, None))
    with capture_logs() as logs:
        runs.supervise()
    (told,) = logs
    assert told == {"event": supervise.LOCKED_OUT, "log_level": "warning"}


def test_another_failure_of_a_watch_is_told_of_as_an_error():
    runs = Runs((1, refused(400)), (1, None))
    with capture_logs() as logs:
        runs.supervise()
    assert [one["log_level"] for one in logs] == ["error"]


def refused(status):
    """An answer of the API server as kopf raises it."""
    error = RuntimeError("not found")
    error.status = status
    return error


def test_a_refused_start_is_final():
    runs = Runs((0, StartError("no access")))
    with pytest.raises(StartError):
        runs.supervise()
    assert runs.pauses == []


def test_pauses_have_a_limit_and_requests_have_none():
    failures = [(1, RuntimeError())] * 9
    runs = Runs(*failures, (1, None))
    runs.supervise()
    assert max(runs.pauses) == 30.0
    pauses = iter(main.Backoffs())
    assert [next(pauses) for _ in range(100)][-1] == 2.0
