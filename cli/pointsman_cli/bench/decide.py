"""``pointsman bench decide``: one decision inside the server, no transport."""

import time
from collections.abc import Sequence

import numpy as np

from pointsman_cli.bench import site
from pointsman_cli.bench.report import Timing, row
from pointsman_core.observation import Request
from pointsman_core.resources import Algorithm
from pointsman_core.snapshot import compile_snapshot
from pointsman_core.state import Admitted
from pointsman_policy.metrics import Metrics
from pointsman_policy.service import RoutingService


def run(
    *, endpoints: int, in_flight: int, requests: int, algorithms: Sequence[Algorithm]
) -> list[dict[str, object]]:
    """Measure every algorithm on the same state; one dictionary per algorithm."""
    service = build_service(endpoints=endpoints, in_flight=in_flight, algorithms=algorithms)
    wanted = [_request(prompt, service.clock()) for prompt in site.prompts(64)]
    labels = {"endpoints": endpoints, "in_flight": in_flight}
    return [
        row({"decider": str(a), **labels}, _measure(service, a, wanted, requests))
        for a in algorithms
    ]


def build_service(
    *, endpoints: int, in_flight: int, algorithms: Sequence[Algorithm]
) -> RoutingService:
    """A service with so many endpoints and requests, and a policy per algorithm."""
    addresses = [f"10.0.{i // 250}.{i % 250 + 1}:8000" for i in range(endpoints)]
    experts = site.experts(addresses)
    where = {e.metadata.name: tuple(e.spec.backend.addresses or ()) for e in experts}
    service = RoutingService(Metrics(), seed=0)
    service.install([compile_snapshot(site.policy(a), experts, where) for a in algorithms])
    _fill(service, addresses, in_flight)
    return service


def _fill(service: RoutingService, addresses: Sequence[str], in_flight: int) -> None:
    rng = np.random.default_rng(1)
    now = service.clock()
    for i in range(in_flight):
        request_id = f"resident-{i}"
        resident = Admitted(
            arrival_s=now - float(rng.uniform(0, 10)),
            prompt_tokens=float(rng.integers(20, 2000)),
            expected_output_tokens=float(rng.integers(50, 500)),
            limit_s=0.06,
            quality=float(rng.uniform(0.2, 0.9)),
        )
        service.state.begin(request_id, addresses[i % len(addresses)], resident)
        service.state.add_tokens(request_id, int(rng.integers(0, 50)))


def _request(prompt: str, now_s: float) -> Request:
    return Request(prompt=prompt, prompt_tokens=len(prompt) // 4, arrival_s=now_s, limit_s=0.06)


def _measure(
    service: RoutingService, algorithm: Algorithm, wanted: Sequence[Request], requests: int
) -> Timing:
    router = service.router(site.model_name(algorithm))
    for request in wanted:  # warm caches
        service.decide(router, request)
    seconds = []
    started = time.perf_counter()
    for i in range(requests):
        before = time.perf_counter()
        service.decide(router, wanted[i % len(wanted)])
        seconds.append(time.perf_counter() - before)
    return Timing.of(seconds, wall_s=time.perf_counter() - started)
