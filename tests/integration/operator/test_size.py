"""A large site: that it comes to rest, and what that costs."""

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pointsman_core.resources import ObjectMeta, RoutingPolicy, RoutingPolicySpec
from pointsman_core.snapshot import compile_snapshot
from pointsman_operator.cluster import config_map
from pointsman_operator.observed import Key
from pointsman_operator.reconcile import MAX_STORED_BYTES, SnapshotWrite, stored_bytes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

EXPERTS = 500
POLICIES = ("auto", "fast")
RESYNC_S = float(os.environ.get("POINTSMAN_SIZE_RESYNC_S", "10"))
"""The operator's default is 60: longer measures better, and takes longer."""
PATIENCE_S = 300.0


@pytest.fixture
async def large(site, engine):
    """A site with many experts, all of which answer, and no operator yet."""
    addresses = [await engine(f"expert-{at}-model") for at in range(EXPERTS)]
    await site.apply(*(site.policy(name) for name in POLICIES))

    def create():
        with site.plane.api_client() as client, ThreadPoolExecutor(4) as pool:
            # The client's own pool of threads and connections is one connection small.
            list(pool.map(lambda at: post(client, expert(at)), range(EXPERTS)))

    def expert(at):
        body = site.expert(f"expert-{at}", addresses=[addresses[at]])
        # Here the operator is looked at, not the policy server, which looks at engines.
        body["spec"]["engine"]["metrics"]["intervalMs"] = 60_000
        return body

    def post(client, body):
        path = f"/apis/pointsman.dev/v1alpha1/namespaces/{site.namespace}/llmexperts"
        client.call_api(
            *client.param_serialize(
                "POST", path, body=body, header_params={"Content-Type": "application/json"}
            )
        ).read()

    await asyncio.to_thread(create)
    return site


async def test_a_large_site_comes_to_rest(large, record_property):
    began = time.monotonic()
    operator = await large.start_operator(proxied=True, resync_s=RESYNC_S, synced=False)

    async def in_force():
        found = await large.server.in_force()
        return set(found.generations) == set(POLICIES) and len(found.addresses) == EXPERTS

    async def ready():
        items = (await large.get("llmexperts"))["items"]
        return sum(1 for one in items if is_ready(one)) == EXPERTS

    def is_ready(expert):
        conditions = expert.get("status", {}).get("conditions", ())
        by_type = {one["type"]: one["status"] for one in conditions}
        return by_type == {"Ready": "True", "Reachable": "True", "ModelServed": "True"}

    await large.eventually(in_force, patience_s=PATIENCE_S)
    routed_s = time.monotonic() - began
    # Seldom: the API server has better things to do.
    await large.eventually(ready, patience_s=PATIENCE_S, pause_s=1.0)
    for name in POLICIES:
        await large.eventually(
            lambda name=name: large.programmed(name), equals=("True", 1), patience_s=PATIENCE_S
        )
    steady_s = time.monotonic() - began
    writes = dict(large.proxy.requests)
    start_cpu_s = operator.cpu_s()

    # At rest: what is asked for between the end of one full list and the end of another.
    async def listed():
        return await operator.metric("pointsman_operator_resyncs_total", result="ok")

    async def next_list():
        count = await listed()

        async def one_more():
            return await listed() > count

        await large.eventually(one_more, patience_s=PATIENCE_S)

    await next_list()
    asked, cpu_s, since = large.proxy.requests.copy(), operator.cpu_s(), time.monotonic()
    await next_list()
    rest_s = time.monotonic() - since
    at_rest = large.proxy.requests - asked
    rest_cpu = (operator.cpu_s() - cpu_s) / rest_s

    # One change of one expert, which both policies have.
    versions = [await large.server.version(name) for name in POLICIES]

    async def both_changed():
        now = [await large.server.version(name) for name in POLICIES]
        return all(new != old for new, old in zip(now, versions, strict=True))

    since = time.monotonic()
    await large.patch("llmexpert", "expert-7", {"quality": {"default": 0.123}})
    changed_at = time.monotonic()
    await large.eventually(both_changed)
    change_s = time.monotonic() - changed_at

    memory_mib, peak_mib = operator.memory_mib(), operator.memory_mib("VmHWM")
    measured = {
        "until all is routed": f"{routed_s:.1f} s",
        "until every status is true": f"{steady_s:.1f} s, {start_cpu_s:.1f} s of CPU",
        "requests until then": show(writes),
        "requests at rest": f"{at_rest.total() / rest_s:.2f}/s over {rest_s:.0f} s"
        f" (full list each {RESYNC_S:g} s): {show(at_rest)}",
        "CPU at rest": f"{rest_cpu:.1%} of a core",
        "from kubectl to force": f"{change_s:.2f} s",
        "memory": f"{memory_mib:.0f} MiB, at most {peak_mib:.0f} MiB",
    }
    for name, value in measured.items():
        record_property(name, value)
    assert {verb for verb, _ in at_rest} <= {"list", "watch"}
    assert at_rest.total() <= 20


async def test_what_is_kept_from_the_api_server_is_what_it_would_refuse(site):
    spec = RoutingPolicySpec(models=["auto"])
    metadata = ObjectMeta(name="auto", namespace=site.namespace)
    compiled = compile_snapshot(RoutingPolicy(metadata=metadata, spec=spec), (), {})
    # As it will be written with other content: not by the version that it was compiled with.
    empty = compiled.model_copy(update={"version": "0" * len(compiled.version)})
    room = MAX_STORED_BYTES - stored_bytes(empty)
    largest = empty.model_copy(update={"models": ("auto" + "o" * room,)})
    larger = empty.model_copy(update={"models": ("auto" + "o" * (room + 1),)})
    assert (stored_bytes(largest), stored_bytes(larger)) == (MAX_STORED_BYTES, MAX_STORED_BYTES + 1)

    def apply(snapshot):
        body = config_map(SnapshotWrite(Key(site.namespace, "auto"), "uid", snapshot))
        arguments = ("apply", "--server-side", "-f", "-")
        return site.plane.kubectl(*arguments, stdin=json.dumps(body), check=False)

    assert (await asyncio.to_thread(apply, largest)).returncode == 0
    refused = await asyncio.to_thread(apply, larger)
    assert "Too long" in refused.stderr


def show(requests):
    return ", ".join(f"{verb} {plural} {count}" for (verb, plural), count in requests.items())
