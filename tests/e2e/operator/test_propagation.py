"""How long a change at the API server takes to reach decisions."""

import asyncio
import os
import statistics
import time

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHANGES = int(os.environ.get("POINTSMAN_CHANGES", "20"))


async def test_readiness_at_the_api_server_to_the_first_decision(
    place, eventually, record_property
):
    """From sending the EndpointSlice's change to the first decision that respects it."""
    best, other = await place.engines("best", "other")
    await place.apply(
        place.service("best", port=8000),
        place.slice("best", {best.address: True}),
        place.expert("best", backend={"service": {"name": "best", "port": 8000}}, quality=0.9),
        place.expert("other", addresses=[other.address], quality=0.1),
        place.policy(),
    )
    await place.until_policy(Ready="True")
    await eventually("best", place.decide, lambda address: address == best.address)
    (endpoint,) = (await place.get("endpointslices", "best-0"))["endpoints"]
    seconds = []
    for i in range(CHANGES):
        ready = bool(i % 2)
        wanted = best.address if ready else other.address
        changed = [endpoint | {"conditions": {"ready": ready}}]
        started = time.perf_counter()
        sent = asyncio.create_task(place.patch("endpointslices", "best-0", {"endpoints": changed}))
        await eventually("moved", place.decide, lambda a: a == wanted, pause_s=0.002)  # noqa: B023
        seconds.append(time.perf_counter() - started)
        await sent
    p50, p99 = (statistics.quantiles(seconds, n=100, method="inclusive")[q - 1] for q in (50, 99))
    milliseconds = (
        f"p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms, max {max(seconds) * 1e3:.0f} ms"
    )
    record_property("readiness_to_decision", f"{milliseconds} over {CHANGES} changes")
