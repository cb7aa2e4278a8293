"""Each kind of backend: from objects of the API server to answers through Envoy."""

import random
import uuid

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")

POOL_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "inferencepools.inference.networking.k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
    },
    "spec": {
        "group": "inference.networking.k8s.io",
        "scope": "Namespaced",
        "names": {"kind": "InferencePool", "plural": "inferencepools", "singular": "inferencepool"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


async def test_addresses(place):
    (ant, bee) = await place.engines("ant", "bee")
    await place.apply(
        place.expert("ant", addresses=[ant.address], quality=0.9),
        place.expert("bee", addresses=[bee.address], quality=0.1),
        place.policy(),
    )
    await place.until_policy(Ready="True/Serving", Programmed="True/Acknowledged")
    await place.until_answered_by("ant")
    status, headers, document = await place.ask()
    assert status == 200
    assert document["model"] == "ant"
    assert headers["x-pointsman-endpoint"] == ant.address
    assert headers["x-pointsman-policy"] == f"{place.namespace}/auto"
    for name in ("ant", "bee"):
        await place.until_expert(
            name,
            Ready="True/EndpointsReady",
            Reachable="True/AllAnswer",
            ModelServed="True/ModelListed",
        )


async def test_service_by_its_endpoint_slices(place, eventually):
    one, other, third = await place.engines("ant", "ant", "ant")
    states = {one.address: True, other.address: False, third.address: "terminating"}

    async def tell(address, state):
        """A slice per endpoint: their ports differ."""
        await place.apply(place.slice("ant", {address: state}, suffix=address.rpartition(":")[2]))

    await place.apply(place.service("ant", port=8000))
    for address, state in states.items():
        await tell(address, state)
    await place.apply(
        place.expert("ant", backend={"service": {"name": "ant", "port": 8000}}), place.policy()
    )
    await place.until_policy(Ready="True")
    await place.until_expert("ant", Ready="True", endpoints=(1, 2))
    assert {await place.decide() for _ in range(5)} == {one.address}
    await place.until_endpoint(one.address)

    await tell(other.address, True)
    await tell(one.address, False)
    await eventually("moved", place.decide, lambda address: address == other.address)
    await place.until_endpoint(other.address)

    await tell(other.address, False)
    await place.until_answered_by("503")
    await place.until_expert("ant", Ready="False/NoReadyEndpoints", endpoints=(0, 2))
    await place.until_policy(Ready="False/NoReadyEndpoints")

    await tell(one.address, True)
    await place.until_endpoint(one.address)


async def test_pod_selector(place, eventually):
    # Pods may be on loopback, so that two of them can have the same port.
    hosts = [f"127.{random.randint(1, 250)}.{random.randint(0, 250)}.{i}" for i in (2, 3)]
    first = await place.engine("ant", host=hosts[0])
    port = int(first.address.rpartition(":")[2])
    second = await place.engine("ant", host=hosts[1], port=port)
    for i, host in enumerate(hosts):
        await place.pod(f"ant-{i}", ip=host, ready=i == 0, labels={"app": "ant"})
    await place.pod("other", ip="127.0.0.1", ready=True, labels={"app": "other"})
    backend = {"podSelector": {"matchLabels": {"app": "ant"}, "port": port}}
    await place.apply(place.expert("ant", backend=backend), place.policy())
    await place.until_policy(Ready="True")
    await place.until_endpoint(first.address)
    await place.until_expert("ant", Ready="True", endpoints=(1, 2))

    await place.set_pod("ant-1", ip=hosts[1], ready=True)
    await place.set_pod("ant-0", ip=hosts[0], ready=False)
    await eventually("moved", place.decide, lambda address: address == second.address)
    await place.until_endpoint(second.address)

    # Nobody finishes its deletion: it stays, on its way out, as while a pod drains.
    await place.patch("pods", "ant-1", {"metadata": {"finalizers": ["test.dev/kept"]}})
    await place.kubectl("delete", "pod", "ant-1", "--wait=false")
    await place.until_answered_by("503")
    await place.until_expert("ant", Ready="False/NoReadyEndpoints", endpoints=(0, 1))
    await place.patch("pods", "ant-1", {"metadata": {"finalizers": None}})


async def test_pods_of_a_service_by_the_endpointslice_controller(place, node):
    """What a cluster does by itself: pods, Service, EndpointSlices from the controller."""
    one, other = await place.engines("ant", "ant")
    ports = [int(engine.address.rpartition(":")[2]) for engine in (one, other)]
    for i, port in enumerate(ports):
        await place.pod(
            f"ant-{i}",
            ip=place.plant.host,
            ready=i == 0,
            labels={"app": "ant"},
            node=node,
            port=port,
        )
    await place.apply(
        place.service(
            "ant",
            port=None,
            ports=[{"name": "http", "port": 80, "targetPort": "http"}],
            selector={"app": "ant"},
        ),
        place.expert("ant", backend={"service": {"name": "ant", "port": 80}}),
        place.policy(),
    )
    await place.until_policy(Ready="True")
    await place.until_endpoint(one.address)

    await place.set_pod("ant-1", ip=place.plant.host, ready=True)
    await place.set_pod("ant-0", ip=place.plant.host, ready=False)
    await place.until_endpoint(other.address)
    await place.until_expert("ant", Ready="True", endpoints=(1, 2))


async def test_a_service_of_both_families_counts_each_pod_once(place):
    (ant,) = await place.engines("ant")
    service = place.service("ants", port=8000, ipFamilyPolicy="RequireDualStack")
    four = place.slice("ants", {ant.address: True})
    six = place.slice("ants", {"fd00::1:8000": True}, suffix="6") | {"addressType": "IPv6"}
    await place.apply(
        place.expert("ant", backend={"service": {"name": "ants", "port": 8000}}),
        place.policy(),
        *(service, four, six),
    )
    families = (await place.get("services", "ants"))["spec"]["ipFamilies"]
    assert families == ["IPv4", "IPv6"]
    await place.until_expert("ant", Ready="True/EndpointsReady", endpoints=(1, 1))
    await place.until_endpoint(ant.address)
    assert await place.decide() == ant.address


async def test_inference_pool_once_its_crd_is_there(place):
    hosts = [f"127.{random.randint(1, 250)}.{random.randint(0, 250)}.4"]
    ant = await place.engine("ant", host=hosts[0])
    await place.apply(
        place.expert("ant", backend={"inferencePool": {"name": "ants"}}), place.policy()
    )
    crds = await place.kubectl("get", "crd", "-o", "name")
    ours = POOL_CRD["metadata"]["name"] not in crds
    if ours:
        await place.until_expert("ant", Ready="False/InferencePoolNotInstalled")
        await place.apply(POOL_CRD)
        await place.kubectl("wait", "--for=condition=Established", f"crd/{name_of(POOL_CRD)}")
    try:
        pool = {
            "apiVersion": "inference.networking.k8s.io/v1",
            "kind": "InferencePool",
            "metadata": {"name": "ants", "namespace": place.namespace},
            "spec": {
                "selector": {"matchLabels": {"app": "ant"}},
                "targetPorts": [{"number": int(ant.address.rpartition(":")[2])}],
                "endpointPickerRef": {"name": "unused", "port": {"number": 9002}},
            },
        }
        await place.apply(pool)
        await place.pod("ant", ip=hosts[0], ready=True, labels={"app": "ant"})
        await place.until_endpoint(ant.address)
        await place.kubectl("delete", "inferencepool", "ants")
        await place.until_expert("ant", Ready="False/InferencePoolNotFound")
    finally:
        if ours:
            await place.kubectl("delete", "crd", name_of(POOL_CRD))


def name_of(manifest):
    return manifest["metadata"]["name"]


@pytest.fixture
def node(controllers):
    """A node that does nothing; controllers pass over pods whose node they do not know."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    controllers.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    yield name
    controllers.kubectl("delete", "node", name)
