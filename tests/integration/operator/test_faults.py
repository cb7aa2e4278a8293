"""What breaks around the operator, and what must hold meanwhile and afterwards.

Requests are routed by what the policy servers have in force: that must not change because
of a fault, and must follow every change once the fault is over.
"""

import asyncio
import json
import urllib.request

import pytest
import yaml

pytestmark = pytest.mark.integration

WATCHED = ("llmexperts", "routingpolicies", "services", "endpointslices", "pods")
CHANGED = ("llmexperts", "routingpolicies", "endpointslices", "pods")


@pytest.fixture
async def scene(site):
    """A namespace with something to lose in each kind, and no operator yet."""
    await site.set_the_scene()
    return site


async def failed_lists(operator, *, at_least):
    """Wait until so many full lists have failed."""

    async def enough():
        metric = operator.metric("pointsman_operator_resyncs_total", result="failed")
        return await metric >= at_least

    await operator.site.eventually(enough)


async def healthy(operator):
    return operator.running and await operator.page("/healthz") == (200, "ok\n")


# --- API server and etcd ---------------------------------------------------------------


async def test_the_api_server_ends_and_comes_back(scene, engine):
    address = await engine("fixed-model")
    await scene.patch("llmexpert", "fixed", {"backend": {"addresses": [address]}})
    operator = await scene.start_operator()

    async def decided():
        return (await scene.server.decide("auto")).endpoint

    await scene.eventually(scene.server.version)
    await scene.eventually(decided, equals=address)
    async with scene.server.history() as versions:
        await asyncio.to_thread(scene.plane.api_server.kill)
        await failed_lists(operator, at_least=3)
        assert await decided() == address
        # A restart would only lose what it knows.
        assert await healthy(operator)
    assert len(versions) == 1
    await scene.start(scene.plane.api_server)
    await scene.change_the_scene()
    await scene.converged(scene.after)
    assert await healthy(operator)


async def test_etcd_ends_and_comes_back(scene):
    operator = await scene.start_operator()
    await scene.converged(scene.before)
    async with scene.server.history() as versions:
        await asyncio.to_thread(scene.plane.etcd.kill)
        refused = await scene.kubectl("get", "llmexperts", "--request-timeout=1s", check=False)
        assert refused == ""
    assert len(versions) == 1
    await scene.start(scene.plane.etcd)
    await asyncio.to_thread(scene.plane.api_server.wait_until_ready)
    await scene.change_the_scene()
    await scene.converged(scene.after)
    assert await healthy(operator)


async def test_the_api_server_hangs(scene):
    operator = await scene.start_operator()
    await scene.converged(scene.before)
    scene.plane.api_server.freeze()
    async with scene.server.history() as versions:
        assert await healthy(operator)
        await scene.server.in_force()
    scene.plane.api_server.thaw()
    assert len(versions) == 1
    await scene.change_the_scene()
    await scene.converged(scene.after)
    assert await healthy(operator)


async def test_changes_and_deletions_while_the_operator_is_cut_off(scene):
    operator = await scene.start_operator(proxied=True)
    await scene.converged(scene.before)
    async with scene.server.history() as versions:
        scene.proxy.refuse()
        await failed_lists(operator, at_least=1)
        await scene.change_the_scene()
        await failed_lists(operator, at_least=2)
    assert len(versions) == 1
    scene.proxy.admit()
    await scene.converged(scene.after)
    assert await healthy(operator)


async def compact(plane):
    """Drop all but the newest revision of etcd."""

    def call(path, **content):
        request = urllib.request.Request(
            f"{plane.etcd_url}/v3/{path}", data=json.dumps(content).encode(), method="POST"
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    status = await asyncio.to_thread(call, "maintenance/status")
    revision = status["header"]["revision"]
    await asyncio.to_thread(call, "kv/compaction", revision=revision, physical=True)


async def test_etcd_is_compacted(scene):
    operator = await scene.start_operator()
    await scene.converged(scene.before)
    await compact(scene.plane)
    await scene.change_the_scene()
    await compact(scene.plane)
    await scene.converged(scene.after)
    assert await healthy(operator)


async def test_what_the_operator_knows_is_too_old(scene):
    """The real 410: what it missed is compacted, and no API server has it cached."""
    operator = await scene.start_operator(proxied=True)
    await scene.converged(scene.before)
    scene.proxy.refuse()
    await scene.change_the_scene()
    await compact(scene.plane)
    await asyncio.to_thread(scene.plane.api_server.kill)
    await scene.start(scene.plane.api_server)
    scene.proxy.admit()
    await scene.converged(scene.after)
    assert scene.proxy.expired.total() > 0
    assert await healthy(operator)


# --- watches ---------------------------------------------------------------------------


async def lose_changes(scene):
    """Change the scene while every watch is silent, so that its events are lost."""
    scene.proxy.stall(*WATCHED)
    await scene.change_the_scene()

    async def lost():
        return all(scene.proxy.lost[plural] for plural in CHANGED)

    await scene.eventually(lost)


@pytest.mark.parametrize("how", ["event", "status"])
async def test_watches_are_answered_410(scene, how):
    operator = await scene.start_operator(proxied=True, resync_s=5)
    await scene.converged(scene.before)
    # As after some time: a new beginning must not count from one again.
    for limit in range(100, 130):
        await scene.limit(limit, "doomed")
    grown = scene.in_force({**scene.before.generations, "doomed": 31}, scene.before.addresses)
    await scene.converged(grown)
    async with scene.server.history() as versions:
        await lose_changes(scene)
        if how == "event":
            scene.proxy.expire(*WATCHED)
        else:
            scene.proxy.gone.update(WATCHED)
            scene.proxy.end(*WATCHED)
        await scene.converged(scene.after)
        assert scene.proxy.gone.total() == 0
        # The watches are back: what comes now does not wait for a list.
        await scene.limit(80)
        await scene.converged(scene.in_force({"auto": 3}, scene.after.addresses))
    assert "" not in versions
    assert await healthy(operator)


async def test_watches_stall(scene):
    operator = await scene.start_operator(proxied=True, resync_s=1)
    await scene.converged(scene.before)
    async with scene.server.history() as versions:
        # Full lists find what the watches miss, and then that the watches miss it.
        await lose_changes(scene)
        await scene.converged(scene.after)
        await watching(scene)
        await scene.limit(80)
        await scene.converged(scene.in_force({"auto": 3}, scene.after.addresses))
    assert "" not in versions
    assert await healthy(operator)


async def watching(scene):
    """Wait until every kind is watched."""

    async def watched():
        return set(WATCHED) <= scene.proxy.watched()

    await scene.eventually(watched)


@pytest.mark.parametrize("scope", ["cluster", "namespace"])
async def test_the_crds_are_deleted_and_created_again(scene, scope):
    flags = {"cluster": (), "namespace": (f"--namespace={scene.namespace}",)}[scope]
    operator = await scene.start_operator(*flags, proxied=True)
    await scene.converged(scene.before)
    names = ("crd/llmexperts.pointsman.dev", "crd/routingpolicies.pointsman.dev")
    try:
        for name in names:
            await scene.kubectl("delete", name, "--timeout=60s")
        # What the deletion took along is gone, or stays for want of a CRD: both can be had.
        assert await healthy(operator)
    finally:
        await asyncio.to_thread(scene.install_crds, scene.plane)
    await scene.set_the_scene()
    await scene.converged(scene.before)
    await scene.change_the_scene()
    await scene.converged(scene.after)
    assert operator.running
    await watching(scene)


# --- the operator itself ---------------------------------------------------------------


async def test_the_operator_is_killed_amid_a_reconciliation(scene):
    operator = await scene.start_operator(proxied=True)
    await scene.converged(scene.before)
    first = await scene.server.version()
    async with scene.server.history() as versions:
        # Killed when the policy server has the change and the API server does not.
        hold = scene.proxy.hold("patch", "configmaps")
        await scene.limit(65)
        await scene.eventually(hold.at_the_door)
        second = await scene.server.version()
        assert second != first
        await operator.kill()
        scene.proxy.release()
        await scene.change_the_scene()
        assert await scene.server.version() == second

        # Killed again amid its first lists, of which it must not believe a part.
        hold = scene.proxy.hold("list", "llmexperts")
        operator = await scene.start_operator(proxied=True, synced=False)
        await scene.eventually(hold.at_the_door)
        assert (await operator.page("/readyz"))[0] == 503
        await operator.kill()
        scene.proxy.release()
        assert await scene.server.version() == second

        await scene.start_operator(proxied=True)
        await scene.converged(scene.in_force({"auto": 3}, scene.after.addresses))
        last = await scene.server.version()
    assert versions == [first, second, last]


async def test_a_restart_of_the_operator_changes_nothing(scene):
    operator = await scene.start_operator()
    await scene.converged(scene.before)
    at_first = await quiet(scene)
    async with scene.server.history() as versions:
        assert await operator.stop() == 0
        operator = await scene.start_operator()
        await scene.eventually(lambda: operator.metric("pointsman_operator_pushes_total"))
        now = await quiet(scene)
        assert {name: one for name, one in now.items() if one != at_first[name]} == {}
    assert len(versions) == 1


async def quiet(scene):
    """Wait until two looks find the same objects; gives their statuses and data, by name."""
    seen = []

    async def same():
        found = await scene.get("llmexperts,routingpolicies,configmaps")
        seen.append(
            {
                (one["kind"], one["metadata"]["name"]): (
                    one["metadata"]["resourceVersion"],
                    one.get("status"),
                    one.get("data"),
                )
                for one in found["items"]
            }
        )
        await asyncio.sleep(1.5)
        return len(seen) > 1 and seen[-1] == seen[-2]

    await scene.eventually(same)
    return seen[-1]


async def test_two_operators(scene):
    """A mistake that the data plane must not feel."""
    first = await scene.start_operator()
    await scene.converged(scene.before)
    async with scene.server.history() as versions:
        second = await scene.start_operator()
        await scene.eventually(lambda: second.metric("pointsman_operator_pushes_total"))
        await scene.change_the_scene()
        await scene.converged(scene.after)
        await quiet(scene)
        # Each change once: neither takes back what the other one has done.
        assert len(set(versions)) == len(versions)
        await first.kill()
        await scene.limit(80)
        await scene.converged(scene.in_force({"auto": 3}, scene.after.addresses))
    assert len(set(versions)) == len(versions)


async def test_two_operators_that_see_different_things(scene):
    """They take turns, ever more slowly, and both say so."""
    operators = [await scene.start_operator()]
    await scene.converged(scene.before)
    operators.append(await scene.start_operator("--namespace=default"))
    for operator in operators:
        name = "pointsman_operator_foreign_publishes_total"
        await scene.eventually(lambda operator=operator, name=name: operator.metric(name))
        assert "somebody else publishes to the policy server" in operator.log


async def test_a_permission_is_missing(scene):
    """Without one kind the operator says so, and does the rest."""
    role = scene.shipped("ClusterRole")
    rules = [
        {**rule, "resources": [one for one in rule.get("resources", []) if one != "pods"]}
        for rule in role["rules"]
    ]
    smaller = {**role, "rules": [rule for rule in rules if rule["resources"]]}
    try:
        await asyncio.to_thread(
            scene.plane.kubectl, "replace", "-f", "-", stdin=yaml.safe_dump(smaller)
        )
        operator = await scene.start_operator(synced=False)
        without_pods = {one for one in scene.before.addresses if not one.startswith("127.0.1.")}
        expected = scene.in_force(scene.before.generations, frozenset(without_pods))
        await scene.eventually(scene.server.in_force, equals=expected)
        assert "pods is forbidden" in operator.log
        await scene.limit(65)
        later = {**scene.before.generations, "auto": 2}
        await scene.eventually(
            scene.server.in_force, equals=scene.in_force(later, frozenset(without_pods))
        )
    finally:
        await asyncio.to_thread(
            scene.plane.kubectl, "replace", "-f", "-", stdin=yaml.safe_dump(role)
        )
    # Given later, it is used without a restart.
    complete = scene.in_force(later, scene.before.addresses)
    await scene.converged(complete)
    assert await healthy(operator)


# --- policy servers --------------------------------------------------------------------


async def test_a_policy_server_starts_again_with_nothing(scene):
    await scene.start_operator()
    await scene.converged(scene.before)
    await scene.server.kill()
    await scene.server.start()
    await scene.converged(scene.before)


async def test_a_policy_server_is_away_during_a_change(scene):
    other = await scene.start_server()
    operator = await scene.start_operator()
    await scene.converged(scene.before)
    await other.kill()
    await scene.change_the_scene()
    # The one that is there does not wait for the one that is not.
    await scene.eventually(scene.server.in_force, equals=scene.after)

    async def reason():
        return (await scene.condition("routingpolicy", "auto", "Programmed")).get("reason")

    await scene.eventually(reason, equals="ServerUnreachable")
    await other.start()
    await scene.converged(scene.after)
    assert await healthy(operator)


async def test_a_policy_server_hangs(scene):
    other = await scene.start_server()
    await scene.start_operator()
    await scene.converged(scene.before)
    other.freeze()
    await scene.change_the_scene()
    await scene.eventually(scene.server.in_force, equals=scene.after)
    other.thaw()
    await scene.converged(scene.after)
