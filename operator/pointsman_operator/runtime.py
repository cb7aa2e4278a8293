"""The operator itself: what kopf's events feed, and all that runs beside them.

Two loops share one `reconcile`. The first brings snapshots to the policy servers as soon as
something changed. The second writes ConfigMaps, statuses and Events, when the policy
servers have answered: the API server never stands between a change and the request path.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import structlog
from aiohttp import web
from prometheus_client import generate_latest

from pointsman_core.resources import LLMExpert, RoutingPolicy
from pointsman_operator.budget import EventBudget
from pointsman_operator.cluster import Cluster, ClusterError
from pointsman_operator.endpoints import Resolver, find_port
from pointsman_operator.health import Health
from pointsman_operator.metrics import Metrics
from pointsman_operator.observed import (
    Declared,
    JsonObject,
    Key,
    Kind,
    Observed,
    Performance,
    SnapshotMap,
    read_meta,
)
from pointsman_operator.probe import Prober
from pointsman_operator.publisher import GrpcServerClient, Publisher, ServerClient
from pointsman_operator.reconcile import (
    Outcome,
    Previous,
    Ref,
    SnapshotWrite,
    StatusWrite,
    StoredSnapshot,
    reconcile,
    stored_bytes,
)
from pointsman_operator.retries import FIRST_RETRY_S, LAST_RETRY_S, Retries
from pointsman_operator.settings import OperatorSettings
from pointsman_operator.stats import PrometheusStats, filled, from_servers
from pointsman_operator.store import Store

HEARTBEAT_S: Final = 5.0
RESYNC_TIMEOUT_S: Final = 90.0
POOLS_INTERVAL_S: Final = 5.0
"""Between two looks for our own CRDs, and for InferencePool's while an expert waits for it."""
SETTLE_S: Final = 1.0
"""Statuses wait so long for the answers of policy servers and engines."""
FIRST_SETTLE_S: Final = 8.0
"""After a start: longer than a policy server may take, so that no status forgets in between."""
WRITES_AT_ONCE: Final = 8
GOOD_RUN_S: Final = 60.0
"""A loop that a bug ends after so long begins anew soon."""

OWN_KINDS: Final = (Kind.EXPERT, Kind.POLICY)

_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """A full list of one kind."""

    found: Sequence[JsonObject] | None
    """``None`` when the API server does not know the kind."""
    forbidden: frozenset[str] = frozenset()
    """Namespaces that may not be listed; an empty one means all."""


@dataclass(slots=True)
class Memory:
    """What outlives a restart of the watches: the last good state and what was written."""

    previous: Previous = field(default_factory=Previous)
    restored: bool = False
    """The ConfigMaps were read."""
    unstored: dict[Key, str] = field(default_factory=dict)
    """Why the API server refuses a policy's ConfigMap."""


class Operator:
    """One run of the operator, between `start` and `stop`."""

    def __init__(
        self,
        settings: OperatorSettings,
        cluster: Cluster,
        *,
        memory: Memory | None = None,
        connect: Callable[[str], ServerClient] | None = None,
        clock: Callable[[], float] = time.monotonic,
        unwatched: Collection[Kind] = (),
        on_stale_watches: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.health = Health()
        self.store = Store()
        self.http_port = 0
        """Where the probes are served, once started."""
        self._cluster = cluster
        self._memory = memory or Memory()
        self._connect = connect or (lambda address: GrpcServerClient(address, settings.tls))
        self._clock = clock
        self._unwatched = frozenset(unwatched)
        """Kinds that the role did not let anybody watch when the watches began."""
        self._forbidden: frozenset[tuple[Kind, str]] = frozenset()
        """Kinds and namespaces that could not be listed the last time, for want of a right."""
        self._list_error = ""
        """Why the last full list failed."""
        self._on_stale_watches = on_stale_watches
        """Called with the reason when the watches should begin anew."""
        self._changed = asyncio.Event()
        self._unwritten = asyncio.Event()
        self._performance: Mapping[Key, Performance] = {}
        self._snapshot_times: dict[tuple[Key, str], float] = {}
        self._retry_s = FIRST_RETRY_S
        self._retries = Retries(FIRST_RETRY_S, LAST_RETRY_S)
        """Of writes, by object."""
        self._late: set[Kind] = set()
        """Own kinds that were not installed once, and that no watch has told of since."""
        self._events = EventBudget()
        self._publishing = False
        """A change is on its way to the publisher."""
        self._tasks: list[asyncio.Task[None]] = []
        self._exit = contextlib.AsyncExitStack()
        self._publisher = Publisher(
            self._connect,
            # A run counts its sets from one; policy servers must not call them old.
            identity=f"{settings.identity}/{os.urandom(4).hex()}",
            on_change=self._unwritten.set,
            metrics=self.metrics,
            poll_interval_s=settings.status_poll_interval_s,
            clock=clock,
        )
        self._prober: Prober | None = None

    async def start(self) -> None:
        """Serve probes and start all loops.

        Raises:
            OSError: the address of the probes is taken.
            ValueError: a certificate cannot be read.

        """
        if self.settings.tls is not None:
            await asyncio.to_thread(self.settings.tls.check)
        await self._exit.enter_async_context(self._http())
        self._prober = Prober(
            interval_s=self.settings.probe_interval_s, on_change=self._changed.set
        )
        loops: dict[str, Callable[[], Awaitable[None]]] = {
            "resync": self._resync_loop,
            "pools": self._pools_loop,
            "snapshots": self._snapshot_loop,
            "writes": self._write_loop,
            "stats": self._stats_loop,
        }
        self._tasks = [asyncio.create_task(_forever(f), name=name) for name, f in loops.items()]

    async def stop(self) -> None:
        """End; policy servers and ConfigMaps stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._publisher.close()
        if self._prober is not None:
            await self._prober.close()
        await self._cluster.close()
        await self._exit.aclose()

    def feed(self, kind: Kind, event: Mapping[str, Any]) -> None:
        """Take in one watch event."""
        body = event.get("object")
        changed = self.store.take_event(kind, event.get("type"), body, now=self._clock())
        if changed and self._concerns_us(kind, body):
            self._changed.set()

    def _concerns_us(self, kind: Kind, body: object) -> bool:
        """Not so the pods of others: a busy cluster would be reconciled all the time."""
        meta = read_meta(body) if isinstance(body, Mapping) else None
        if kind in OWN_KINDS or meta is None:
            return True
        namespace, servers = meta.key.namespace, self.settings.policy_servers
        if servers is not None and servers.service.namespace == namespace:
            return True
        return any(self.store.holds_any(own, namespace) for own in OWN_KINDS)

    # --- full lists --------------------------------------------------------------------

    async def _resync_loop(self) -> None:
        while True:
            self.health.beat("resync", now=self._clock())
            pause = self.settings.resync_interval_s
            try:
                async with asyncio.timeout(RESYNC_TIMEOUT_S):
                    await self.resync()
                self.metrics.resyncs.labels("ok").inc()
                self._retry_s, self._list_error = FIRST_RETRY_S, ""
                self._publisher.up_to_date = True
            except (ClusterError, TimeoutError) as error:
                self._publisher.up_to_date = False
                self.metrics.resyncs.labels("failed").inc()
                self._list_error = str(error) or "timed out"
                log.warning("full list failed", error=self._list_error)
                pause = min(pause, self._backoff())
            await self._sleep("resync", pause)

    async def _pools_loop(self) -> None:
        """A CRD that is installed is told of by no watch before it has objects, if at all."""
        while True:
            for kind in self._awaited() if self.health.synced else ():
                try:
                    await self._relist(kind)
                except ClusterError as error:  # full lists tell of it, too
                    log.debug("list failed", kind=kind, error=str(error))
            await self._sleep("pools", POOLS_INTERVAL_S)

    def _awaited(self) -> list[Kind]:
        """Kinds whose CRD may come at any time."""
        self._late |= {kind for kind in OWN_KINDS if not self.store.installed(kind)}
        # Until a watch tells of one: kopf overlooks a CRD that is not established yet.
        self._late -= {
            kind
            for kind in self._late
            if self.store.installed(kind) and self.store.events(kind) > 0
        }
        late = sorted(self._late)
        return [*late, Kind.POOL] if self._pools_wanted else late

    @property
    def _pools_wanted(self) -> bool:
        """An expert names an InferencePool, and no watch has told of any yet.

        Kopf begins to watch a new kind some time after it was installed; what is deleted in
        between, no watch tells.
        """
        experts: Mapping[Key, Declared[LLMExpert]] = self.store.objects(Kind.EXPERT)
        watched = self.store.installed(Kind.POOL) and self.store.events(Kind.POOL) > 0
        return not watched and any(
            one.resource is not None and one.resource.spec.backend.inference_pool is not None
            for one in experts.values()
        )

    async def _relist(self, kind: Kind) -> None:
        touched = self.store.begin_list(kind)
        try:
            listed = await self._list(kind)
        except BaseException:
            self.store.abandon_list(kind, touched)
            raise
        if self._end_list(kind, touched, listed, now=self._clock()):
            self._changed.set()

    async def resync(self) -> None:
        """List everything in full; raises `ClusterError`, and then nothing has changed."""
        touched = {kind: self.store.begin_list(kind) for kind in Kind}
        written = self._memory.previous.statuses
        try:
            listed = dict(zip(Kind, await asyncio.gather(*map(self._list, Kind)), strict=True))
        except BaseException:
            for kind in Kind:
                self.store.abandon_list(kind, touched[kind])
            raise
        now = self._clock()
        self._events.forget(now=now)
        missed = {kind: self.store.missed(kind, now=now) for kind in Kind}
        changed = [self._end_list(kind, touched[kind], listed[kind], now=now) for kind in Kind]
        watched = [kind for kind in Kind if kind not in {Kind.CONFIG_MAP, *self._unwatched}]
        self.health.listed({kind: self.store.events(kind) for kind in watched}, missed)
        for kind in watched:
            self.metrics.resync_corrections.labels(kind).inc(missed[kind])
        forbidden = frozenset((k, name) for k, one in listed.items() for name in one.forbidden)
        changed.append(forbidden != self._forbidden)
        self._forbidden = forbidden
        self._take_config_maps()
        if not self.health.synced:
            self._performance = last_told(self.store.objects(Kind.POLICY))
        self._audit(written, {key for kind in OWN_KINDS for key in touched[kind]})
        if not self.health.synced or any(changed):
            self.health.synced = True
            self._changed.set()
        self._unwritten.set()
        if self._on_stale_watches is not None:
            try:
                reason = await self._why_stale()
            except ClusterError as error:  # the lists are good; the next one asks again
                log.debug("not known whether watches are stale", error=str(error))
            else:
                if reason:
                    self._on_stale_watches(reason)

    async def _why_stale(self) -> str:
        """Why the watches should begin anew; empty when they should not."""
        if silent := self.health.silent_watches:
            return f"watches of {', '.join(silent)} missed changes and said nothing"
        for kind in sorted(self._unwatched):
            if await self._cluster.may_watch(kind):
                return f"{kind} may be watched now"
        forbidden = {kind for kind, _ in self._forbidden}
        for kind in sorted(forbidden - self._unwatched - {Kind.CONFIG_MAP}):
            if not await self._cluster.may_watch(kind):
                return f"{kind} may not be watched any more"
        return ""

    async def _list(self, kind: Kind) -> Listed:
        """All objects of a kind; what may not be listed is no fault of others."""
        items: list[JsonObject] = []
        refused: dict[str, ClusterError] = {}
        namespaces = self.settings.namespaces or ("",)
        for namespace in namespaces:
            try:
                found = await self._cluster.list_all(kind, namespace)
            except ClusterError as error:
                if not error.forbidden:
                    raise
                refused[namespace] = error
                continue
            if found is None:
                return Listed(None)
            items += found
        # Before the first list nobody knows what is in force there: sending the rest would end it.
        first = not self._memory.restored
        needed = {*OWN_KINDS, Kind.CONFIG_MAP} if first else {*OWN_KINDS}
        if refused and kind in needed and (first or len(refused) == len(namespaces)):
            raise _not_permitted(kind, refused)
        for namespace, refusal in refused.items():
            if (kind, namespace) not in self._forbidden:
                log.warning("not permitted, the rest goes on", kind=kind, error=str(refusal))
        return Listed(items, frozenset(refused))

    def _end_list(
        self,
        kind: Kind,
        touched: set[Key],
        listed: Listed,
        *,
        now: float,
    ) -> bool:
        if listed.forbidden == frozenset(self.settings.namespaces or ("",)):
            self.store.abandon_list(kind, touched)
            return False
        return self.store.end_list(kind, touched, listed.found, now=now, kept=listed.forbidden)

    def _take_config_maps(self) -> None:
        """What stands in the API is what has been written, whoever wrote it."""
        maps: Mapping[Key, SnapshotMap] = self.store.objects(Kind.CONFIG_MAP)
        stored = {
            one.policy: StoredSnapshot(one.snapshot.version if one.snapshot else "", one.owner_uid)
            for one in maps.values()
        }
        self._remember(stored=stored)
        if not self._memory.restored:
            self._memory.restored = True
            kept = {one.policy: one.snapshot for one in maps.values() if one.snapshot is not None}
            self._remember(snapshots=kept)

    def _audit(self, written: Mapping[Ref, Any], touched: set[Key]) -> None:
        """Forget what was written of objects that are gone, or that somebody changed."""
        kept: dict[Ref, JsonObject] = {}
        known: dict[Ref, Mapping[str, JsonObject]] = {}
        for kind in OWN_KINDS:
            for key, found in self.store.objects(kind).items():
                ref = Ref(kind, key, found.meta.uid)
                ours = self._memory.previous.statuses.get(ref)
                settled = written.get(ref) is ours and key not in touched
                if ours is not None and not (settled and found.status != ours):
                    kept[ref] = ours
                if ref in self._memory.previous.known:
                    known[ref] = self._memory.previous.known[ref]
        self._remember(statuses=kept, known=known)

    # --- snapshots ---------------------------------------------------------------------

    async def _snapshot_loop(self) -> None:
        while True:
            self.health.beat("snapshots", now=self._clock())
            if await self._wait(self._changed):
                await asyncio.sleep(self.settings.debounce_s)
                self._changed.clear()
                self._publishing = True
                try:
                    with _again_unless_done(self._changed):
                        await self._publish()
                finally:
                    self._publishing = False

    async def _publish(self) -> None:
        if not self.health.synced:
            return
        observed = self._observe()
        await self._publisher.set_servers(self._find_servers(observed))
        if not all(self.store.installed(kind) for kind in OWN_KINDS):
            log.warning("the CRDs are not installed: what is in force stays")
            return
        outcome = await self._reconcile(observed)
        self._remember(
            snapshots=outcome.next.snapshots,
            experts=outcome.next.experts,
            policies=outcome.next.policies,
            unfit=outcome.next.unfit,
        )
        self._show_snapshots(outcome)
        if self._prober is not None:
            self._prober.set_addresses(outcome.addresses)
        if self._publisher.publish(outcome.snapshots):
            log.info("publishing", policies=len(outcome.snapshots))
        self._unwritten.set()

    def _observe(self) -> Observed:
        objects = self.store.objects
        seen = Observed(
            experts=objects(Kind.EXPERT),
            policies=objects(Kind.POLICY),
            services=objects(Kind.SERVICE),
            slices=objects(Kind.SLICE),
            pods=objects(Kind.POD),
            pools=objects(Kind.POOL),
            pools_installed=self.store.installed(Kind.POOL),
            unreadable=self._forbidden,
            unstored=dict(self._memory.unstored),
            servers=self._publisher.states(),
            probes={} if self._prober is None else self._prober.results(),
            performance=self._performance,
        )
        return seen if seen.servers else replace(seen, serverless=self._why_no_server(seen))

    def _why_no_server(self, observed: Observed) -> str:
        ref = self.settings.policy_servers
        if ref is None:
            return "give the operator --policy-servers or --policy-server-address"
        for kind in (Kind.SERVICE, Kind.SLICE):
            if not observed.may_read(kind, ref.service.namespace):
                return f"the operator is not permitted to list {kind}: see its role"
        found = Resolver(observed).by_service(ref.service, ref.port)
        return f"{found.message} (--policy-servers)" if found.message else ""

    async def _reconcile(self, observed: Observed) -> Outcome:
        started = time.perf_counter()
        try:
            # In a thread: a large site takes long enough to be felt by watches and probes.
            outcome = await asyncio.to_thread(
                reconcile, observed, self._memory.previous, datetime.now(UTC)
            )
        except Exception:
            self.metrics.reconciles.labels("failed").inc()
            raise
        self.metrics.reconciles.labels("ok").inc()
        self.metrics.reconcile_seconds.observe(time.perf_counter() - started)
        return outcome

    def _find_servers(self, observed: Observed) -> dict[str, bool]:
        """Policy servers by address, and whether each is ready.

        Those that are not get snapshots as well: it is what makes them ready.
        """
        servers = dict.fromkeys(self.settings.policy_server_addresses, True)
        ref = self.settings.policy_servers
        service = observed.services.get(ref.service) if ref else None
        port = find_port(service, ref.port) if ref and service else None
        if ref and port:
            servers |= Resolver(observed).service_endpoints(ref.service, port)
        return servers

    def _show_snapshots(self, outcome: Outcome) -> None:
        now = self._clock()
        before, self._snapshot_times = self._snapshot_times, {}
        self.metrics.snapshot_bytes.clear()
        for one in outcome.snapshots:
            key = Key(one.namespace, one.policy)
            self._snapshot_times[key, one.version] = before.get((key, one.version), now)
            self.metrics.snapshot_bytes.labels(str(key)).set(stored_bytes(one))

    # --- writes ------------------------------------------------------------------------

    async def _write_loop(self) -> None:
        settle_s = FIRST_SETTLE_S
        while True:
            self.health.beat("writes", now=self._clock())
            retry_s = self._retries.wait_s(now=self._clock())
            told = await self._wait(self._unwritten, at_most_s=min(HEARTBEAT_S, retry_s))
            due = self._retries.wait_s(now=self._clock()) <= 0.0
            if not (told or due) or not self.health.synced:
                continue
            await self._settle(settle_s)
            settle_s = SETTLE_S
            self._unwritten.clear()
            with _again_unless_done(self._unwritten):
                wrote = await self._write()
            if wrote:  # a backend that flaps must not become as many writes of a large ConfigMap
                await self._sleep("writes", self.settings.write_pause_s)

    async def _settle(self, at_most_s: float) -> None:
        """Wait a little for pending changes, and for answers of policy servers and engines."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                while self._busy:  # noqa: ASYNC110
                    await asyncio.sleep(self.settings.debounce_s)

    @property
    def _busy(self) -> bool:
        return (
            self._changed.is_set()
            or self._publishing
            or not self._publisher.settled
            or (self._prober is not None and not self._prober.settled)
        )

    async def _write(self) -> bool:
        """Write what differs, but for what has failed just now; whether there was anything."""
        if not all(self.store.installed(kind) for kind in OWN_KINDS):
            return False
        outcome = await self._reconcile(self._observe())
        self._forget_refusals({one.policy for one in outcome.config_maps})
        writes: dict[Hashable, Callable[[], Awaitable[bool]]] = {
            **{one.policy: partial(self._write_snapshot, one) for one in outcome.config_maps},
            **{key: partial(self._delete_snapshot, key) for key in outcome.stale_config_maps},
            **{one.ref: partial(self._write_status, one) for one in outcome.statuses},
        }
        self._retries.keep(writes)
        now = self._clock()
        due = {key: write for key, write in writes.items() if self._retries.due(key, now=now)}
        gate = asyncio.Semaphore(WRITES_AT_ONCE)

        async def gated(write: Callable[[], Awaitable[bool]]) -> bool:
            async with gate:
                return await write()

        done = await asyncio.gather(*(gated(write) for write in due.values()))
        now = self._clock()
        for key, one in zip(due, done, strict=True):
            self._retries.tried(key, done=one, now=now)
        return bool(due)

    def _forget_refusals(self, wanted: Collection[Key]) -> None:
        for key in self._memory.unstored.keys() - set(wanted):
            del self._memory.unstored[key]
            self._unwritten.set()  # its status says so

    async def _write_snapshot(self, write: SnapshotWrite) -> bool:
        error = await self._try("configmap", self._cluster.write_snapshot(write))
        refusal = str(error) if error is not None and error.refused else None
        if error is None or refusal is not None:
            self._note_refusal(write.policy, refusal)
        if error is not None:
            return False
        stored = StoredSnapshot(write.snapshot.version, write.owner_uid)
        self._remember(stored={**self._memory.previous.stored, write.policy: stored})
        return True

    def _note_refusal(self, policy: Key, text: str | None) -> None:
        before = self._memory.unstored.pop(policy, None)
        if text is not None:
            self._memory.unstored[policy] = text
        if text != before:
            self._unwritten.set()

    async def _delete_snapshot(self, policy: Key) -> bool:
        error = await self._try("configmap", self._cluster.delete_snapshot(policy))
        if error is not None and not error.object_is_gone:
            return False
        left = {k: v for k, v in self._memory.previous.stored.items() if k != policy}
        self._remember(stored=left)
        return True

    async def _write_status(self, write: StatusWrite) -> bool:
        error = await self._try("status", self._cluster.write_status(write))
        if error is not None and not error.object_is_gone:
            return False
        previous = self._memory.previous
        self._remember(
            statuses={**previous.statuses, write.ref: write.status},
            known={**previous.known, write.ref: write.known},
        )
        if error is not None:
            return True  # its end, or its successor, will be told by the watch
        for event in write.events:
            if not self._events.spend(write.ref, now=self._clock()):
                self.metrics.writes.labels("event", "spared").inc()
                continue
            # One that is lost is lost: the conditions say the same.
            await self._try("event", self._cluster.post_event(write.ref, event, datetime.now(UTC)))
        return True

    async def _try(self, what: str, call: Awaitable[None]) -> ClusterError | None:
        """Why it failed."""
        self.health.beat("writes", now=self._clock())
        try:
            await call
        except ClusterError as error:
            if error.object_is_gone:
                self.metrics.writes.labels(what, "gone").inc()
                log.debug("nothing to write to", what=what, error=str(error))
                return error
            self.metrics.writes.labels(what, "failed").inc()
            log.warning("write failed", what=what, error=str(error))
            return error
        self.metrics.writes.labels(what, "ok").inc()
        return None

    # --- the rest ----------------------------------------------------------------------

    async def _stats_loop(self) -> None:
        url = self.settings.prometheus_url
        prometheus = PrometheusStats(url) if url else None
        while True:
            self.health.beat("stats", now=self._clock())
            if not self.health.synced or not self._publisher.asked:
                await asyncio.sleep(min(HEARTBEAT_S, self.settings.stats_interval_s) / 5)
                continue
            found = from_servers(self._publisher.counts())
            if prometheus is not None:
                try:
                    found = filled(await asyncio.to_thread(prometheus.read), found)
                except (OSError, ValueError) as error:
                    log.warning("no averages from Prometheus", error=str(error))
            if found != self._performance:
                self._performance = found
                self._unwritten.set()
            await self._sleep("stats", self.settings.stats_interval_s)

    async def _wait(self, event: asyncio.Event, *, at_most_s: float = HEARTBEAT_S) -> bool:
        """Whether the event came in time."""
        with contextlib.suppress(TimeoutError):
            # Not wait_for: before Python 3.12 it may swallow a cancellation.
            async with asyncio.timeout(at_most_s):
                await event.wait()
        return event.is_set()

    async def _sleep(self, loop: str, seconds: float) -> None:
        end = self._clock() + seconds
        while (left := end - self._clock()) > 0:
            self.health.beat(loop, now=self._clock())
            await asyncio.sleep(min(HEARTBEAT_S, left))

    def _backoff(self) -> float:
        pause, self._retry_s = self._retry_s, min(LAST_RETRY_S, self._retry_s * 2)
        return pause

    def _remember(self, **changes: Any) -> None:  # noqa: ANN401 - fields of `Previous`
        self._memory.previous = replace(self._memory.previous, **changes)

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        host, _, port = self.settings.http_address.rpartition(":")
        runner = web.AppRunner(self._app(), access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host.strip("[]") or None, int(port))
            try:
                await site.start()
            except OSError as error:
                why = error.strerror or str(error)
                raise OSError(f"--http-address {self.settings.http_address}: {why}") from None
            self.http_port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    def _app(self) -> web.Application:
        async def metrics(_: web.Request) -> web.Response:
            self._show_gauges()
            page = generate_latest(self.metrics.registry)
            return web.Response(body=page, headers={"content-type": _TEXT})

        async def healthz(_: web.Request) -> web.Response:
            problems = self.health.problems(now=self._clock())
            text = "\n".join(problems) or "ok"
            return web.Response(text=text + "\n", status=503 if problems else 200)

        async def readyz(_: web.Request) -> web.Response:
            ready = self.health.synced
            why = f": {self._list_error}" if self._list_error else ""
            text = "ok" if ready else f"the first full list is not there yet{why}"
            return web.Response(text=text + "\n", status=200 if ready else 503)

        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", metrics),
                web.get("/healthz", healthz),
                web.get("/readyz", readyz),
            ]
        )
        return app

    def _show_gauges(self) -> None:
        now = self._clock()
        self.metrics.snapshot_age.clear()
        for (policy, _), since in self._snapshot_times.items():
            self.metrics.snapshot_age.labels(str(policy)).set(now - since)
        for kind in Kind:
            age = self.store.event_age(kind, now=now)
            if age is not None:
                self.metrics.watch_age.labels(kind).set(age)


def last_told(policies: Mapping[Key, Declared[RoutingPolicy]]) -> Mapping[Key, Performance]:
    """Averages as statuses tell them, until the first ones of this run are there."""
    statuses = {key: found.status or {} for key, found in policies.items()}
    return {
        key: Performance(status.get("averageQos"), status.get("violationRate"))
        for key, status in statuses.items()
        if {"averageQos", "violationRate"} & status.keys()
    }


def _not_permitted(kind: Kind, refused: Mapping[str, ClusterError]) -> ClusterError:
    """For a kind without which nothing can be sent."""
    namespaces, (error, *_) = sorted(filter(None, refused)), refused.values()
    if not namespaces:
        return error
    text = f"not permitted to list {kind} in {', '.join(namespaces)}: give the operator its Role "
    text += f"there, or take the namespace out of --namespace ({error})"
    return ClusterError(text, status=error.status, cause=error.cause)


@contextlib.contextmanager
def _again_unless_done(event: asyncio.Event) -> Iterator[None]:
    """Set the event again when the block fails: what was to be done is still to be done."""
    try:
        yield
    except BaseException:
        event.set()
        raise


async def _forever(loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop again when a bug has ended it, as long as the process lives."""
    pause = FIRST_RETRY_S
    while True:
        started = time.monotonic()
        try:
            await loop()
        except Exception:
            log.exception("loop failed, starting it again")
            if time.monotonic() - started >= GOOD_RUN_S:
                pause = FIRST_RETRY_S
            await asyncio.sleep(pause)
            pause = min(LAST_RETRY_S, pause * 2)
