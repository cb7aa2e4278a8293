"""Routing as a service: all policies at work on one live state.

Pure bookkeeping round `pointsman_core`, no I/O: the ext_proc streams, the server's own
API and the benchmarks all call this. One event loop owns it; nothing here blocks.
"""

import re
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from pointsman_core.observation import Request
from pointsman_core.predictors import Artefact, make_predictor
from pointsman_core.records import record
from pointsman_core.router import Decision, Rejection, Router
from pointsman_core.snapshot import Candidate, Snapshot
from pointsman_core.state import LiveState
from pointsman_policy.metrics import Metrics
from pointsman_policy.models import ModelStore, PolicyModel
from pointsman_policy.openai_api import ApiError, CompletionRequest, unknown_model
from pointsman_policy.outliers import Outliers
from pointsman_policy.stats import WINDOW_S, PolicyStatistics
from pointsman_policy.tracker import RequestTracker

RECENT_DECISIONS = 1024
"""How many past decisions Explain can look up."""

MAX_LIMIT_MS = 600_000.0
"""The largest latency limit, the same bound as the CRD has."""

LEAST_LIMIT_S = 1e-9
"""A smaller limit counts as this one: nobody keeps it either, and ratios to it stay finite.

Those of a request are seen by all that are decided while it is in flight.
"""

_NUMBER = re.compile(r"\s*(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
"""A latency limit as clients write it."""

log = structlog.get_logger(__name__)


@record
class Limits:
    """A request's own limits; None where the policy's holds."""

    latency_per_token_ms: float | None = None
    first_token_ms: float | None = None


class RoutingService:
    """Policies by model name, the live state they share, and the requests on their way."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        stats_window_s: float = WINDOW_S,
        artefact: Artefact | None = None,
        models: ModelStore | None = None,
    ) -> None:
        """``artefact`` predicts quality where it knows the expert; None: nothing is learned."""
        self.state = LiveState()
        self.metrics = metrics
        self.statistics = PolicyStatistics(window_s=stats_window_s)
        self.tracker = RequestTracker(self.state, metrics, self.statistics)
        self.clock = clock
        self._outliers = Outliers()
        self._seed = seed
        self._artefact = artefact
        self.model_store = models or ModelStore()
        self._policy_models: dict[str, PolicyModel] = {}
        self._routers: dict[str, Router] = {}
        self._by_model: dict[str, Router] = {}
        self._installed = False
        self._recent: OrderedDict[str, Decision] = OrderedDict()

    # --- snapshots ---------------------------------------------------------------------

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots in force."""
        return tuple(router.snapshot for router in self._routers.values())

    @property
    def models(self) -> list[str]:
        """All model names that some policy answers, sorted."""
        return sorted(self._by_model)

    def candidates(self) -> dict[str, list[Candidate]]:
        """The candidates of all policies by address; several where experts share one."""
        by_address: dict[str, dict[str, Candidate]] = {}
        for snapshot in self.snapshots:
            for candidate in snapshot.candidates:
                by_address.setdefault(candidate.address, {})[candidate.expert] = candidate
        return {address: list(found.values()) for address, found in by_address.items()}

    def policies(self) -> dict[str, tuple[str, ...]]:
        """The full names of the policies that select each address."""
        by_address: dict[str, dict[str, None]] = {}
        for snapshot in self.snapshots:
            for candidate in snapshot.candidates:
                by_address.setdefault(candidate.address, {})[snapshot.full_name] = None
        return {address: tuple(names) for address, names in by_address.items()}

    def install(self, snapshots: Sequence[Snapshot]) -> None:
        """Put these snapshots in force, all at once; a policy that did not change is kept."""
        self.state.set_endpoints(c.address for s in snapshots for c in s.candidates)
        models = self._find_models(snapshots)
        routers = {}
        for snapshot in snapshots:
            key = snapshot.full_name
            old, model = self._routers.get(key), models.get(key)
            if old is None or old.snapshot.version != snapshot.version:
                routers[key] = self._make_router(snapshot, model)
                continue
            routers[key] = old
            if model is not None:
                old.replace_decider(model.decider())
        self._policy_models = models
        self._routers = routers
        self._by_model = {m: r for r in routers.values() for m in r.snapshot.models}
        self._installed = True
        self.statistics.retain(routers)
        self._outliers.retain(self.candidates())
        self._show_snapshots()

    def _make_router(self, snapshot: Snapshot, model: PolicyModel | None) -> Router:
        seed = None if self._seed is None else policy_seed(self._seed, snapshot)
        predictor = make_predictor(self._artefact, snapshot)
        decider = None if model is None else model.decider()
        return Router(snapshot, self.state, predictor=predictor, decider=decider, seed=seed)

    def _find_models(self, snapshots: Iterable[Snapshot]) -> dict[str, PolicyModel]:
        """The policies' models; one that could not be loaded before is tried again."""
        found = {}
        self.metrics.model_info.clear()
        for snapshot in snapshots:
            name = snapshot.full_name
            one = self.model_store.of(snapshot, self._policy_models.get(name))
            if one is None:
                continue
            found[name] = one
            if one.model is not None:
                self.metrics.model_info.labels(name, one.model.sha256).set(1)
            if one.error:
                self.metrics.model_failures.labels(name).inc()
        return found

    def model(self, policy: str) -> PolicyModel | None:
        """What a policy, by its full name, decides by; None where it needs no model."""
        return self._policy_models.get(policy)

    def _show_snapshots(self) -> None:
        self.metrics.snapshot_info.clear()
        for name, router in self._routers.items():
            snapshot = router.snapshot
            self.metrics.snapshot_info.labels(name, snapshot.version, snapshot.generation).set(1)
            self.metrics.expect(name)

    def router(self, model: str) -> Router:
        """The policy that answers a model name.

        Raises:
            ApiError: 404, no policy does; 503, there has been no snapshot yet.

        """
        router = self._by_model.get(model)
        if router is None and not self._installed:
            raise ApiError(
                503,
                "no_snapshot",
                "The policy server has no routing table yet.",
                headers=(("retry-after", "1"),),
            )
        if router is None:
            raise unknown_model(model, self.models)
        return router

    # --- decisions ---------------------------------------------------------------------

    def decide(self, router: Router, request: Request) -> Decision:
        """Decide and count, without touching the in-flight table."""
        now = self.clock()
        for address in self._outliers.due(now_s=now):
            self.state.set_paused(address, paused=False)
        started = time.perf_counter()
        decision = router.decide(request, now_s=now)
        if decision.rejection is Rejection.NO_READY_ENDPOINT and self._resume_all(router):
            decision = router.decide(request, now_s=now)
        elapsed = time.perf_counter() - started
        self._count(decision, elapsed)
        return decision

    def route(
        self,
        completion: CompletionRequest,
        limits: Limits,
        *,
        request_id: str | None,
        arrival_s: float,
    ) -> Decision:
        """Decide a request and put it into the in-flight table.

        Raises:
            ApiError: 404 unknown model, 429 no endpoint in time, 503 no endpoint ready or no
                snapshot yet.

        """
        router = self.router(completion.model)
        request = make_request(
            router.snapshot,
            limits,
            prompt=completion.prompt,
            prompt_tokens=completion.prompt_tokens,
            max_output_tokens=completion.max_output_tokens,
            arrival_s=arrival_s,
            streams=completion.streams,
        )
        decision = self.decide(router, request)
        if request_id is not None:
            self._remember(request_id, decision)
        if decision.chosen is None:
            self.statistics.rejected(decision.snapshot.full_name, now_s=self.clock())
            self.metrics.count_qos(decision.snapshot.full_name, 0.0)
            raise rejection_error(decision)
        self.tracker.decided(request_id, decision)
        return decision

    # --- endpoints that only fail ------------------------------------------------------

    def answered(self, address: str | None, *, status: int) -> None:
        """Note how an endpoint answered: one that only fails gets no decisions for a while.

        Unless some policy would be left with none: then its errors are as good an answer as any.
        """
        if address is None or 400 <= status < 500:  # those are the client's
            return
        if status < 400:
            self._outliers.succeeded(address)
        else:
            self.failed(address, why=f"status {status}")

    def failed(self, address: str, *, why: str) -> None:
        """Note that an endpoint did not serve a request that it was sent, as in `answered`."""
        if self._outliers.failed(address) and self._can_be_spared(address):
            seconds = self._outliers.pause(address, now_s=self.clock())
            self.state.set_paused(address, paused=True)
            experts = ",".join(c.expert for c in self.candidates().get(address, ()))
            self.metrics.pauses.labels(experts).inc()
            log.warning("endpoint only fails", address=address, last=why, pause_s=seconds)

    def _can_be_spared(self, address: str) -> bool:
        """Whether each policy of an endpoint in force can choose another one."""
        pools = [{c.address for c in snapshot.candidates} for snapshot in self.snapshots]
        pools = [pool for pool in pools if address in pool]
        return bool(pools) and all(
            any(self._may_be_chosen(other) for other in pool - {address}) for pool in pools
        )

    def _may_be_chosen(self, address: str) -> bool:
        return self.state.is_ready(address) and not self.state.is_paused(address)

    def _resume_all(self, router: Router) -> bool:
        """Put a policy's endpoints in use again that were left alone; whether there were any."""
        addresses = {c.address for c in router.snapshot.candidates}
        paused = [address for address in addresses if self.state.is_paused(address)]
        for address in paused:
            self._outliers.resume(address)
            self.state.set_paused(address, paused=False)
        return bool(paused)

    # --- past decisions ----------------------------------------------------------------

    def recent(self, request_id: str) -> Decision | None:
        """A past decision, while it is remembered."""
        return self._recent.get(request_id)

    def _remember(self, request_id: str, decision: Decision) -> None:
        self._recent[request_id] = decision
        if len(self._recent) > RECENT_DECISIONS:
            self._recent.popitem(last=False)

    def _count(self, decision: Decision, elapsed_s: float) -> None:
        policy, algorithm = decision.snapshot.full_name, decision.algorithm
        if decision.fallback_reason is not None:
            self.metrics.fallbacks.labels(policy, algorithm).inc()
        if decision.chosen is None:
            code = _CODES[decision.rejection or Rejection.NO_READY_ENDPOINT]
            self.metrics.rejections.labels(policy, code).inc()
            self.metrics.decision_seconds.labels(algorithm).observe(elapsed_s)
        else:
            self.metrics.count_decision(
                policy,
                algorithm,
                decision.chosen.expert,
                learned=decision.learned,
                seconds=elapsed_s,
            )


def policy_seed(seed: int, snapshot: Snapshot) -> int:
    """Seed of a policy's router in a server that was given one: a sequence of its own."""
    return seed ^ zlib.crc32(snapshot.full_name.encode())


def make_request(
    snapshot: Snapshot,
    limits: Limits,
    *,
    prompt: str,
    prompt_tokens: int,
    max_output_tokens: int | None,
    arrival_s: float,
    streams: bool,
) -> Request:
    """Join a request with its policy's limits; its own win where the policy lets them."""
    qos = snapshot.qos
    per_token, first = qos.latency_per_token_ms, qos.time_to_first_token_ms
    if qos.allow_override:
        per_token = limits.latency_per_token_ms or per_token
        first = limits.first_token_ms or first
    return Request(
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        arrival_s=arrival_s,
        limit_s=max(per_token / 1e3, LEAST_LIMIT_S),
        first_token_limit_s=float("inf") if first is None else max(first / 1e3, LEAST_LIMIT_S),
        max_output_tokens=max_output_tokens,
        streams=streams,
    )


def parse_limits(headers: Mapping[str, str]) -> Limits:
    """Read ``x-slo-tpot-ms`` and ``x-slo-ttft-ms``.

    Raises:
        ApiError: 400, a header is not a number in (0, 600000].

    """
    return Limits(
        latency_per_token_ms=_parse_limit(headers, "x-slo-tpot-ms"),
        first_token_ms=_parse_limit(headers, "x-slo-ttft-ms"),
    )


def _parse_limit(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    # Not by float() alone: it also takes 1_0, and the digits of other scripts.
    value = float(text) if _NUMBER.fullmatch(text) else float("nan")
    if not 0.0 < value <= MAX_LIMIT_MS:
        raise ApiError(
            400,
            "invalid_limit",
            f"The header {name} must be a number of milliseconds above 0 and at most"
            f" {MAX_LIMIT_MS:.0f}, not {text[:40]!r}.",
            param=name,
        )
    return value


_CODES = {
    Rejection.OVER_LIMIT: "over_limit",
    Rejection.NO_READY_ENDPOINT: "no_ready_endpoint",
}


def rejection_error(decision: Decision) -> ApiError:
    """The error that a client gets when no endpoint was chosen."""
    snapshot = decision.snapshot
    if decision.rejection is Rejection.OVER_LIMIT:
        message = f"Rejected by policy {snapshot.full_name}: {Rejection.OVER_LIMIT}."
        code = _CODES[Rejection.OVER_LIMIT]
        return ApiError(429, code, message, headers=(("retry-after", "1"),))
    total = len(snapshot.candidates)
    message = (
        f"Policy {snapshot.full_name} has no endpoint for this request:"
        f" 0 of {total} endpoints are ready."
    )
    return ApiError(503, _CODES[Rejection.NO_READY_ENDPOINT], message)
