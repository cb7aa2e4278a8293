"""Scraping the engines: their load, and whether they are there.

One task per endpoint looks at it again and again and reports to callbacks. The rule that
turns findings into readiness, :class:`HealthRule`, stands apart: with a cluster the
operator knows readiness from Kubernetes, and a scraper without ``on_health`` only reads
the load.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import aiohttp
import structlog

from pointsman_core.resources import EngineMetrics, EngineType
from pointsman_policy.engines import EngineLoad, adapter_for
from pointsman_policy.engines.probe import Answer, Finding, Prober, ScrapeError

log = structlog.get_logger(__name__)

_JITTER: Final = 0.1
_FIRST_RETRY_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint to look at."""

    address: str
    """``ip:port``, an IPv6 address in brackets."""
    engine_type: EngineType
    metrics: EngineMetrics


@dataclass(frozen=True, slots=True)
class Health:
    """Whether an endpoint can be given requests."""

    ready: bool
    reason: str
    """Why not; or, when ready, why its load is unknown. Empty when all is well."""


class HealthRule:
    """Turns the findings about one endpoint into its health.

    An endpoint that is gone is unready at once, one that fails only after some failures
    in a row, because a busy engine may be late. One good answer makes it ready. Nothing
    is known before that.
    """

    def __init__(self, *, failures: int) -> None:
        self._failures = failures
        self._streak = 0
        self._known: Health | None = None

    @property
    def ready(self) -> bool | None:
        """The health by now; ``None`` if not known."""
        return None if self._known is None else self._known.ready

    @property
    def streak(self) -> int:
        """How often the endpoint has not been alive, in a row."""
        return self._streak

    def judge(self, finding: Finding) -> Health | None:
        """Take in a finding; the new health where it differs from the known one."""
        if finding.answer is Answer.ALIVE:
            self._streak = 0
            return self._learn(Health(ready=True, reason=finding.reason))
        self._streak += 1
        if finding.answer is Answer.FAILED and self._streak < self._failures:
            return None
        return self._learn(Health(ready=False, reason=finding.reason))

    def _learn(self, health: Health) -> Health | None:
        if health == self._known:
            return None
        self._known = health
        return health


OnLoad = Callable[[str, EngineLoad, float], None]
"""``on_load(address, load, at)``; ``at`` is the scraper's clock when the page arrived."""
OnHealth = Callable[[str, bool, str], None]
"""``on_health(address, ready, reason)``; called when either changes."""
OnError = Callable[[str, ScrapeError], None]
"""``on_error(address, kind)``; called for each failed scrape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrapeSettings:
    """Times of the scraper."""

    timeout_seconds: float = 0.5
    """For one request. An engine's HTTP thread answers in some 20 ms, also under load."""
    failures: int = 3
    """Time-outs or server errors in a row until an endpoint is unready."""
    retry_cap_seconds: float = 1.0
    """Longest pause between two looks at an endpoint that is not there."""


class Scraper:
    """Looks at all endpoints, each in a task of its own.

    Use it as an async context manager and give it the endpoints by :meth:`update`. The
    callbacks run in the event loop's thread and must not block; the endpoints' scrapes do
    not overlap with themselves and drift apart by a jitter.
    """

    def __init__(
        self,
        *,
        on_load: OnLoad,
        on_health: OnHealth | None = None,
        on_error: OnError | None = None,
        settings: ScrapeSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_load = on_load
        self._on_health = on_health
        self._on_error = on_error
        self._settings = settings or ScrapeSettings()
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._tasks: dict[str, tuple[Target, asyncio.Task[None]]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            # Compression would cost the engine more than it saves on the wire.
            headers={"accept-encoding": "identity", "user-agent": "pointsman"},
        )
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop all tasks and close the connections."""
        self.update({})
        await asyncio.gather(*self._ending, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def update(self, targets: Mapping[str, Target]) -> None:
        """Look at these endpoints, by address, from now on; unchanged ones go on undisturbed.

        No callback comes for an endpoint any more once it is left out. Raises
        ``ValueError`` for an address that is none, and changes nothing then.
        """
        changed = {
            address: target
            for address, target in targets.items()
            if address not in self._tasks or self._tasks[address][0] != target
        }
        probers = {address: self._prober(address, target) for address, target in changed.items()}
        for address in [a for a in self._tasks if a not in targets or a in changed]:
            self._end(address)
        for address, target in changed.items():
            task = asyncio.create_task(
                self._watch(target, probers[address]), name=f"scrape {address}"
            )
            self._tasks[address] = (target, task)

    def _prober(self, address: str, target: Target) -> Prober:
        if self._session is None:
            raise RuntimeError("enter the scraper before giving it endpoints")
        if address != target.address:
            raise ValueError(f"target of {address!r} has address {target.address!r}")
        metrics = target.metrics
        return Prober(
            self._session,
            address=address,
            adapter=adapter_for(target.engine_type) if metrics.enabled else None,
            metrics_path=metrics.path,
            clock=self._clock,
        )

    def _end(self, address: str) -> None:
        _, task = self._tasks.pop(address)
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _watch(self, target: Target, prober: Prober) -> None:
        rule = HealthRule(failures=self._settings.failures)
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            finding = await prober.look()
            if finding.answer is Answer.GONE and rule.ready is not False:
                # The engine may just have dropped a kept-alive connection.
                finding = await prober.look()
            try:
                self._report(target.address, finding, rule.judge(finding))
            except Exception:
                log.exception("scrape callback failed", address=target.address)
            pause = self._pause(target, rule) * random.uniform(1 - _JITTER, 1 + _JITTER)
            await asyncio.sleep(max(started + pause - loop.time(), 0.0))

    def _report(self, address: str, finding: Finding, news: Health | None) -> None:
        if finding.error is not None and self._on_error is not None:
            self._on_error(address, finding.error)
        if news is not None:
            log.info("endpoint health", address=address, ready=news.ready, reason=news.reason)
            if self._on_health is not None:
                self._on_health(address, news.ready, news.reason)
        if finding.load is not None:
            self._on_load(address, finding.load, finding.at)

    def _pause(self, target: Target, rule: HealthRule) -> float:
        """Seconds from one look's start to the next: exponential while the endpoint is away."""
        if rule.ready is not False:
            return target.metrics.interval_ms / 1000
        doublings = min(rule.streak - 1, 16)
        return min(_FIRST_RETRY_SECONDS * 2.0**doublings, self._settings.retry_cap_seconds)
