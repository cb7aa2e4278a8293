"""What users see of it: columns, ``kubectl describe``, Events; and that nothing is told twice."""

import asyncio
import re
import time
from datetime import UTC, datetime

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def two_experts(place, **spec):
    """One expert that works and one whose Service is missing."""
    (ant,) = await place.engines("ant")
    await place.apply(
        place.expert("ant", addresses=[ant.address], quality=0.8),
        place.expert("bee", backend={"service": {"name": "bee", "port": 8000}}),
        place.policy(**spec),
    )
    await place.until_policy(Ready="True/Degraded")
    await place.until_expert("ant", Ready="True", Reachable="True", ModelServed="True")
    await place.until_expert("bee", Ready="False")
    return ant


async def test_columns(place):
    await two_experts(place)
    rows = columns(await place.kubectl("get", "llmexperts"))
    assert [(r["NAME"], r["MODEL"], r["READY"], r["REASON"], r["ENDPOINTS"]) for r in rows] == [
        ("ant", "ant", "True", "EndpointsReady", "1"),
        ("bee", "bee", "False", "ServiceNotFound", "0"),
    ]
    rows = columns(await place.kubectl("get", "llmexperts", "-o", "wide"))
    assert [r["TOTAL"] for r in rows] == ["1", "0"]
    (row,) = columns(await place.kubectl("get", "routingpolicies", "-o", "wide"))
    found = await place.until_policy()
    assert row["READY"] == "True"
    assert row["REASON"] == "Degraded"
    assert row["EXPERTS"] == "2"
    assert row["SNAPSHOT"] == found["status"]["snapshotVersion"]


REASONS = ["EndpointsReady", "ServiceNotFound", "ExpertNotResolved", "Degraded"]


async def test_describe(place, eventually):
    await two_experts(place)

    async def describe():
        # One by one: of several objects kubectl leaves out the Events.
        named = ("llmexpert/ant", "llmexpert/bee", "routingpolicy/auto")
        return "".join([await place.kubectl("describe", one) for one in named])

    def events(text):
        return [
            reason
            for reason in REASONS
            if re.search(rf"^  (Normal|Warning) +{reason} ", text, re.MULTILINE)
        ]

    text = await eventually("told", describe, lambda text: events(text) == REASONS)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"Message: there is no Service {place.namespace}/bee" in lines
    assert "Message: 1 of 1 endpoint is ready" in lines
    assert "Message: 1/1 policy server has generation 1" in lines
    assert "Message: 1 of 2 experts not resolved: bee (ServiceNotFound)" in lines
    about = "ResolvedRefs: 1 of 2 experts not resolved: bee (ServiceNotFound)"
    assert any(
        re.fullmatch(rf"Warning ExpertNotResolved \d+s pointsman-operator {re.escape(about)}", line)
        for line in lines
    )


async def test_a_transition_is_told_once(place, eventually):
    ant = await two_experts(place)

    async def told(name="ant"):
        found = await place.api.call("GET", place.path("events", "")[:-1])
        return sorted(
            (one["type"], one["reason"])
            for one in found["items"]
            if one["involvedObject"]["name"] == name
        )

    ready = ("Normal", "EndpointsReady")
    lost = ("Warning", "NoneAnswers")
    await eventually("told", told, lambda found: found == [ready])
    await ant.kill()
    await place.until_expert("ant", Ready="False/NoneAnswers")
    seen = await eventually("told", told, lambda found: lost in found)
    await asked_again(place, eventually)
    assert await told() == seen == [ready, lost]


async def test_nothing_is_written_when_nothing_has_changed(place, eventually):
    await two_experts(place)
    kinds = {"ant": "llmexperts", "bee": "llmexperts", "auto": "routingpolicies"}
    await asked_again(place, eventually)
    before = {name: await place.get(kind, name) for name, kind in kinds.items()}
    stored = await place.get("configmaps", "pointsman-snapshot-auto")
    await asked_again(place, eventually)
    assert {name: await place.get(kind, name) for name, kind in kinds.items()} == before
    assert await place.get("configmaps", "pointsman-snapshot-auto") == stored


async def test_times_move_with_the_status_only(place, eventually):
    await two_experts(place)
    before = times(await place.until_policy(Ready="True"))
    await eventually("the next second", second, lambda now: now > max(before.values()))
    await place.patch("routingpolicies", "auto", {"spec": {"admission": "Reject"}})
    found = await place.until_policy(Ready="True", Programmed="True")
    assert found["status"]["observedGeneration"] == 2
    after = times(found)
    unmoved = ("Accepted", "ResolvedRefs", "ModelLoaded")
    assert {t: after[t] for t in unmoved} == {t: before[t] for t in unmoved}

    await place.delete("llmexpert", "bee")
    found = await place.until_policy(Ready="True/Serving", ResolvedRefs="True")
    assert times(found)["ResolvedRefs"] > before["ResolvedRefs"]
    assert times(found)["Accepted"] == before["Accepted"]


async def test_averages(place, eventually):
    # However busy the machine is, every answer is in time.
    await two_experts(place, qos={"latencyPerTokenMs": 600_000})
    answers = await asyncio.gather(*(place.ask(max_tokens=4) for _ in range(10)))
    assert {status for status, _, _ in answers} == {200}

    async def status():
        return (await place.get("routingpolicies", "auto"))["status"]

    found = await eventually("averages", status, lambda status: "averageQos" in status)
    # Declared quality of those in time.
    assert found["averageQos"] == 0.8
    assert found["violationRate"] == 0.0


async def asked_again(place, eventually):
    """Wait until the operator has looked at everything once more."""
    before = await reconciled(place)
    await place.apply(place.service(f"unused-{time.monotonic_ns()}", port=80))
    # Once for the policy servers, once for what is to be written.
    await eventually("reconciled", lambda: reconciled(place), lambda count: count >= before + 2)


async def reconciled(place):
    url = f"http://127.0.0.1:{place.plant.ports['operator']}/metrics"
    async with place.plant.session.get(url) as response:
        text = await response.text()
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("pointsman_operator_reconciles_total")
    )


async def second():
    """As Kubernetes writes times."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def columns(text):
    head, *lines = [line for line in text.splitlines() if line.strip()]
    names = re.findall(r"\S+\s*", head)
    starts = [sum(map(len, names[:i])) for i in range(len(names))]
    return [
        {
            name.strip(): line[start : start + len(name)].strip()
            for name, start in zip(names, starts, strict=True)
        }
        for line in lines
    ]


def times(found):
    return {one["type"]: one["lastTransitionTime"] for one in found["status"]["conditions"]}
