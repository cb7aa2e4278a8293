"""What only the operator can see: missing references and conflicts."""

import hashlib
import json
from importlib import resources

import pytest

from pointsman_core.deciders.han_drl import SHIPPED

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_missing_references_become_conditions(place):
    (ant,) = await place.engines("ant")
    await place.apply(
        place.expert("ant", backend={"service": {"name": "ants", "port": 8000}}), place.policy()
    )
    found = await place.until_expert("ant", Ready="False/ServiceNotFound")
    assert message(found, "Ready") == f"there is no Service {place.namespace}/ants"
    found = await place.until_policy(ResolvedRefs="False/ExpertNotResolved", Ready="False")
    assert "ant (ServiceNotFound)" in message(found, "ResolvedRefs")

    await place.apply(place.service("ants", port=9999))
    found = await place.until_expert("ant", Ready="False/PortNotFound")
    assert message(found, "Ready") == (
        f"Service {place.namespace}/ants has no TCP port 8000; it has 9999"
    )
    await place.kubectl("delete", "service", "ants")
    external = {"type": "ExternalName", "externalName": "example.com", "clusterIP": None}
    await place.apply(place.service("ants", port=8000, **external))
    await place.until_expert("ant", Ready="False/ServiceNotSupported")

    await place.kubectl("delete", "service", "ants")
    await place.apply(place.service("ants", port=8000))
    await place.until_expert("ant", Ready="False/NoEndpoints")
    await place.apply(place.slice("ants", {ant.address: True}))
    await place.until_expert("ant", Ready="True")
    await place.until_policy(Ready="True/Serving", ResolvedRefs="True")
    await place.until_answered_by("ant")


async def test_a_lost_service_takes_its_endpoints_along(place):
    (ant, bee) = await place.engines("ant", "bee")
    await place.apply(
        place.service("ant", port=8000),
        place.slice("ant", {ant.address: True}),
        place.expert("ant", backend={"service": {"name": "ant", "port": 8000}}, quality=0.9),
        place.expert("bee", addresses=[bee.address], quality=0.1),
        place.policy(),
    )
    await place.until_answered_by("ant")
    await place.kubectl("delete", "service", "ant")
    await place.until_expert("ant", Ready="False/ServiceNotFound", endpoints=(0, 0))
    await place.until_policy(Ready="True/Degraded", ResolvedRefs="False/ExpertNotResolved")
    await place.until_answered_by("bee")


async def test_a_model_with_another_checksum(place):
    """The fallback decides, or the model before; the status says what the file has."""
    content = (resources.files("pointsman_core") / "models" / SHIPPED).read_bytes()
    (place.plant.models / "han.onnx").write_bytes(content)
    right, wrong = hashlib.sha256(content).hexdigest(), "0" * 64
    (ant,) = await place.engines("ant")
    learned = {"algorithm": "HanDrl", "fallback": "RoundRobin"}

    def policy(sha256):
        return place.policy(**learned, model={"file": "han.onnx", "sha256": sha256})

    async def refused():
        found = await place.until_policy(
            ModelLoaded="False/LoadFailed", Ready="True/Degraded", Programmed="True"
        )
        text = f"han.onnx has the SHA-256 {right}, not {wrong}"
        assert message(found, "ModelLoaded").endswith(text)
        assert message(found, "Ready").endswith(text)
        assert "Degraded" in await place.kubectl("get", "routingpolicies")
        shown = await place.kubectl("describe", "routingpolicy", "auto")
        assert text in " ".join(shown.split())
        assert await place.answer() == "ant"

    await place.apply(place.expert("ant", addresses=[ant.address]), policy(wrong))
    await refused()
    assert (await place.decision()).algorithm == "RoundRobin"
    await place.apply(policy(right))
    await place.until_policy(ModelLoaded="True/Loaded", Ready="True/Serving")
    assert (await place.decision()).algorithm == "HanDrl"
    await place.apply(policy(wrong))
    await refused()
    assert (await place.decision()).algorithm == "HanDrl"


async def test_two_policies_with_one_model_name(place):
    (ant, bee) = await place.engines("ant", "bee")
    await place.apply(
        place.expert("ant", addresses=[ant.address], metadata={"labels": {"of": "older"}}),
        place.expert("bee", addresses=[bee.address], metadata={"labels": {"of": "newer"}}),
        place.policy("older", selector={"matchLabels": {"of": "older"}}),
    )
    await place.until_policy("older", Ready="True")
    await place.until_answered_by("ant")
    extra = f"more.{place.namespace}"
    # Made within one second, so that names would decide; but the other one is in force.
    await place.apply(
        place.policy(
            "newer", models=[extra, place.model], selector={"matchLabels": {"of": "newer"}}
        )
    )
    found = await place.until_policy(
        "newer",
        Accepted="False/ModelNameConflict",
        Ready="False/ModelNameConflict",
        Programmed="False/NotAccepted",
    )
    assert f"{place.model} is answered by {place.namespace}/older" in message(found, "Accepted")
    status, _, _ = await place.ask(model=extra)
    assert status == 404, "a new policy in conflict has nothing in force"
    await place.until_answered_by("ant")
    await place.until_policy("older", Ready="True")

    await place.delete("routingpolicy", "older")
    await place.until_policy("newer", Accepted="True", Ready="True")
    await place.until_answered_by("bee")
    status, _, _ = await place.ask(model=extra)
    assert status == 200

    # An edit into a conflict leaves what was in force, and giving the name up ends it.
    await place.apply(place.policy("a-third", selector={"matchLabels": {"of": "older"}}))
    await place.until_policy("a-third", Accepted="False/ModelNameConflict")
    await place.patch("routingpolicies", "newer", {"spec": {"models": [extra]}})
    await place.until_policy("a-third", Accepted="True", Ready="True")
    await place.until_answered_by("ant")
    await place.patch("routingpolicies", "newer", {"spec": {"models": [place.model]}})
    found = await place.until_policy("newer", Ready="False/ModelNameConflict")
    text = f"; generation 2 stays in force, for {extra}"
    assert message(found, "Ready").endswith(text)
    status, _, _ = await place.ask(model=extra)
    assert status == 200, "the last good snapshot stays in force"


async def test_the_snapshot_is_kept_in_a_config_map(place, eventually):
    (ant,) = await place.engines("ant")
    await place.apply(place.expert("ant", addresses=[ant.address]), place.policy())
    policy = await place.until_policy(Ready="True")
    version = policy["status"]["snapshotVersion"]

    async def stored():
        found = await place.get("configmaps", "pointsman-snapshot-auto")
        return found and (found, json.loads(found["data"]["snapshot.json"])["version"])

    found, _ = await eventually("stored", stored, lambda seen: seen and seen[1] == version)
    assert found["metadata"]["labels"] == {
        "pointsman.dev/snapshot": "true",
        "pointsman.dev/policy": "auto",
    }
    (owner,) = found["metadata"]["ownerReferences"]
    assert owner["uid"] == policy["metadata"]["uid"]
    managers = {entry["manager"] for entry in found["metadata"]["managedFields"]}
    assert managers == {"pointsman-operator"}


def message(found, type_):
    return next(c["message"] for c in found["status"]["conditions"] if c["type"] == type_)
