"""The HTTP side of the policy server: metrics, probes, and a look at the live state."""

import orjson
from aiohttp import web
from prometheus_client import generate_latest

from pointsman_policy.service import RoutingService

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Health:
    """Whether the server can serve, and whether it is on its way out."""

    def __init__(self) -> None:
        self.ready = False


def build_app(service: RoutingService, health: Health) -> web.Application:
    """``/metrics``, ``/healthz``, ``/readyz`` and ``/debug/in-flight``."""

    async def metrics(_: web.Request) -> web.Response:
        show_state(service)
        page = generate_latest(service.metrics.registry)
        return web.Response(body=page, headers={"content-type": _TEXT})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        text, status = (
            ("ok\n", 200) if health.ready else ("no snapshot in force, or draining\n", 503)
        )
        return web.Response(text=text, status=status)

    async def in_flight(_: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(live_state(service)), content_type="application/json")

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/debug/in-flight", in_flight),
        ]
    )
    return app


def show_state(service: RoutingService) -> None:
    """Bring the gauges that mirror live state up to date."""
    metrics = service.metrics
    metrics.in_flight.clear()
    metrics.endpoint_ready.clear()
    for address, found in service.candidates().items():
        expert = ",".join(candidate.expert for candidate in found)
        metrics.in_flight.labels(address, expert).set(service.state.in_flight(address))
        may_be_chosen = service.state.is_ready(address) and not service.state.is_paused(address)
        metrics.endpoint_ready.labels(address, expert).set(may_be_chosen)


def live_state(service: RoutingService) -> dict[str, object]:
    """The in-flight table and the endpoints, as JSON-ready data."""
    now = service.clock()
    state = service.state
    kv_usage, foreign = state.kv_usage(now_s=now), state.foreign(now_s=now)

    def endpoint(address: str, expert: str) -> dict[str, object]:
        row = state.row(address)
        load = state.load(address)
        return {
            "expert": expert,
            "ready": state.is_ready(address),
            "paused": state.is_paused(address),
            "in_flight": state.in_flight(address),
            "foreign": int(foreign[row]),
            "running": None if load is None else load.running,
            "waiting": None if load is None else load.waiting,
            "kv_usage": None if kv_usage[row] != kv_usage[row] else float(kv_usage[row]),
        }

    return {
        "in_flight": len(state),
        "tracked": len(service.tracker),
        "snapshots": {
            s.full_name: {"version": s.version, "generation": s.generation}
            for s in service.snapshots
        },
        "endpoints": {
            address: endpoint(address, ",".join(c.expert for c in found))
            for address, found in service.candidates().items()
        },
    }
