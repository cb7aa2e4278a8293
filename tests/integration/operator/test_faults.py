"""What breaks around the operator, and what must hold meanwhile and afterwards.

Requests are routed by what the policy servers have in force: that must not change because
of a fault, and must follow every change once the fault is over.
"""

import asyncio
import contextlib
import json
import urllib.request

import aiohttp
import pytest
import yaml

pytestmark = pytest.mark.integration

READING = {"get", "list", "watch"}
OUTAGE_S = 30.0
PAUSE_S = 0.5
"""Between two requests meanwhile."""
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
    """Whether it runs and says that it is well, once its pages are there."""

    async def answer():
        # While the watches are started again nobody listens.
        with contextlib.suppress(aiohttp.ClientConnectionError):
            return await operator.page("/healthz")

    status, text = await operator.site.eventually(answer)
    return operator.running and (status, text) == (200, "ok\n")


# --- API server and etcd ---------------------------------------------------------------


async def test_the_api_server_is_down_for_half_a_minute(scene, engine):
    # The one that answers: the policy server passes over the others, once it has noticed.
    address = await engine("fixed-model")
    await scene.patch("llmexpert", "fixed", {"backend": {"addresses": [address]}})
    operator = await scene.start_operator(proxied=True)
    await scene.eventually(lambda: scene.programmed("auto"), equals=("True", 1))

    async def decided():
        return (await scene.server.decide("auto")).endpoint

    await scene.eventually(decided, equals=address)
    async with scene.server.history() as versions:
        await asyncio.to_thread(scene.plane.api_server.kill)
        end = asyncio.get_running_loop().time() + OUTAGE_S
        while asyncio.get_running_loop().time() < end:
            assert await decided()
            # A restart would only lose what it knows.
            assert await healthy(operator)
            await asyncio.sleep(PAUSE_S)
        assert await decided() == address
        await failed_lists(operator, at_least=3)
        # Others are back sooner than the operator, and change things meanwhile.
        scene.proxy.refuse()
        await scene.start(scene.plane.api_server)
        await scene.change_the_scene()
    assert len(versions) == 1
    scene.proxy.admit()
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

    async def expired():
        return scene.proxy.expired.total()

    # A full list may be sooner than the watches' next try.
    await scene.eventually(expired)
    assert await healthy(operator)


async def test_the_token_has_expired(scene):
    """What is wrong is told in words, without traceback; with a good one all goes on."""
    operator = await scene.start_operator(proxied=True)
    await scene.converged(scene.before)
    async with scene.server.history() as versions:
        scene.proxy.unauthorized = True
        scene.proxy.end(*WATCHED)

        async def told_twice():
            words = "the API server does not accept the operator's credentials"
            return operator.log.count(words) > 1

        await scene.eventually(told_twice)
        await scene.change_the_scene()
    assert len(versions) == 1
    scene.proxy.unauthorized = False
    await scene.converged(scene.after)
    assert await healthy(operator)
    assert operator.errors() == []
    for word in ("Traceback", "API client library"):
        assert word not in operator.log


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
    for limit in range(100, 110):
        await scene.limit(limit, "doomed")
    grown = scene.in_force({**scene.before.generations, "doomed": 11}, scene.before.addresses)
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
    assert operator.errors() == []
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
    assert operator.errors() == []
    assert await healthy(operator)


async def watching(scene, *kinds):
    """Wait until these kinds are watched, by default every one."""

    async def watched():
        return set(kinds or WATCHED) <= scene.proxy.watched()

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
        operator = await scene.start_operator(proxied=True)
        await scene.eventually(lambda: operator.metric("pointsman_operator_pushes_total"))
        assert await quiet(scene) == at_first
    assert len(versions) == 1
    # Nothing is written, not even the same once more.
    questions = ("create", "selfsubjectaccessreviews")
    assert {verb for verb, _ in scene.proxy.requests.keys() - {questions}} <= READING


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


@pytest.fixture
async def without_pods(scene):
    """Take away the right to pods, and give it back."""
    role = scene.shipped("ClusterRole")
    rules = [
        {**rule, "resources": [one for one in rule["resources"] if one != "pods"]}
        for rule in role["rules"]
    ]

    async def replace(found):
        text = yaml.safe_dump(found)
        await asyncio.to_thread(scene.plane.kubectl, "replace", "-f", "-", stdin=text)

    async def take():
        await replace({**role, "rules": [rule for rule in rules if rule["resources"]]})
        # The API server's own view of its roles follows a moment later.
        meta = scene.shipped("ServiceAccount")["metadata"]
        account = f"--as=system:serviceaccount:{meta['namespace']}:{meta['name']}"

        async def taken():
            return await scene.kubectl("auth", "can-i", "list", "pods", account, check=False)

        await scene.eventually(taken, equals="no\n")

    async def give():
        await replace(role)

    yield take, give
    await give()


async def reason(scene, name):
    return (await scene.condition("llmexpert", name, "Ready")).get("reason")


async def test_a_permission_is_missing_from_the_start(scene, without_pods):
    """Without one kind the operator says so, and does the rest."""
    take, give = without_pods
    await take()
    operator = await scene.start_operator(proxied=True)
    known = frozenset(one for one in scene.before.addresses if not one.startswith("127.0.1."))
    await scene.converged(scene.in_force(scene.before.generations, known))
    await scene.eventually(lambda: reason(scene, "selected"), equals="NotPermitted")
    assert "pods is forbidden" in operator.log
    await watching(scene, *(one for one in WATCHED if one != "pods"))
    await scene.limit(65)
    later = {**scene.before.generations, "auto": 2}
    await scene.converged(scene.in_force(later, known))
    assert "starting again" not in operator.log
    await give()
    await scene.converged(scene.in_force(later, scene.before.addresses))
    await watching(scene)
    assert await healthy(operator)


async def test_a_permission_is_taken_away(scene, without_pods):
    """What was found by it stays in force, also over a restart."""
    take, give = without_pods
    operator = await scene.start_operator(proxied=True)
    await scene.converged(scene.before)
    await watching(scene)
    async with scene.server.history() as versions:
        await take()
        scene.proxy.end("pods")  # a watch under way goes on without the right
        await scene.eventually(lambda: reason(scene, "selected"), equals="NotPermitted")
        await watching(scene, *(one for one in WATCHED if one != "pods"))
        assert await healthy(operator)
        assert await operator.stop() == 0
        operator = await scene.start_operator(proxied=True)
        await scene.eventually(lambda: operator.metric("pointsman_operator_pushes_total"))
        assert await scene.server.in_force() == scene.before
        await give()
        await scene.eventually(lambda: reason(scene, "selected"), equals="NoneAnswers")
        await watching(scene)
    assert len(versions) == 1
    await scene.change_the_scene()
    await scene.converged(scene.after)


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
