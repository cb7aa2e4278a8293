"""What the operator's service account may do, by the shipped RBAC alone."""

import asyncio
import json
import uuid

import pytest
import yaml

pytestmark = pytest.mark.asyncio(loop_scope="session")

MAY = [
    ("list", "llmexperts.pointsman.dev"),
    ("watch", "routingpolicies.pointsman.dev"),
    ("patch", "llmexperts.pointsman.dev/status"),
    ("patch", "routingpolicies.pointsman.dev/status"),
    ("watch", "services"),
    ("watch", "pods"),
    ("watch", "endpointslices.discovery.k8s.io"),
    ("watch", "inferencepools.inference.networking.k8s.io"),
    ("patch", "configmaps"),
    ("create", "events"),
]
MAY_NOT = [
    ("update", "llmexperts.pointsman.dev"),
    ("patch", "llmexperts.pointsman.dev"),
    ("delete", "llmexperts.pointsman.dev"),
    ("patch", "routingpolicies.pointsman.dev"),
    ("delete", "routingpolicies.pointsman.dev"),
    ("create", "routingpolicies.pointsman.dev"),
    ("get", "secrets"),
    ("list", "secrets"),
    ("create", "pods"),
    ("delete", "pods"),
    ("create", "pods/exec"),
    ("get", "pods/log"),
    ("patch", "services"),
    ("patch", "endpointslices.discovery.k8s.io"),
    ("create", "deployments.apps"),
    ("create", "serviceaccounts/token"),
    ("list", "nodes"),
    ("create", "customresourcedefinitions.apiextensions.k8s.io"),
    ("patch", "customresourcedefinitions.apiextensions.k8s.io"),
    ("create", "clusterrolebindings.rbac.authorization.k8s.io"),
    ("impersonate", "users"),
]


async def test_least_privilege(place):
    user = f"system:serviceaccount:{place.plant.operator_namespace}:{place.plant.service_account}"

    async def allowed(verb, resource):
        resource, _, sub = resource.partition("/")
        name, _, group = resource.partition(".")
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": user,
                "groups": ["system:serviceaccounts", "system:authenticated"],
                "resourceAttributes": {
                    "namespace": place.namespace,
                    "verb": verb,
                    "group": group,
                    "resource": name,
                    "subresource": sub,
                },
            },
        }
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        return (await place.api.call("POST", path, review))["status"]["allowed"]

    answers = await asyncio.gather(*(allowed(*one) for one in MAY + MAY_NOT))
    found = {one for one, answer in zip(MAY + MAY_NOT, answers, strict=True) if answer}
    assert found == set(MAY)


async def test_only_what_is_named_is_allowed(plant):
    rules = [
        rule
        for manifest in yaml.safe_load_all(plant.rbac.read_text())
        if manifest and manifest["kind"] in ("Role", "ClusterRole")
        for rule in manifest["rules"]
    ]
    assert rules
    assert "*" not in json.dumps(rules)


async def test_one_namespace_only(place, eventually, tmp_path, another_namespace):
    """By the RBAC for that, which gives no right to anything else."""
    second = await place.plant.second(
        tmp_path, namespace=place.namespace, processes=place.processes
    )
    (ant,) = await place.engines("ant")
    elsewhere = {"metadata": {"name": "elsewhere", "namespace": another_namespace}}
    await place.apply(
        place.policy(models=[f"auto.{another_namespace}"]) | elsewhere,
        place.expert("ant", addresses=[ant.address]) | elsewhere,
        place.expert("ant", addresses=[ant.address]),
        place.policy(),
    )
    ours, theirs = f"{place.namespace}/auto", f"{another_namespace}/elsewhere"
    # The other operator serves both, so that this one could have seen both.
    await eventually("both", place.plant.live, lambda live: {ours, theirs} <= {*live["snapshots"]})
    live = await eventually("one", second.live, lambda live: ours in live["snapshots"])
    assert [*live["snapshots"]] == [ours]
    assert [*live["endpoints"]] == [ant.address]
    assert second.problems() == []


@pytest.fixture
def another_namespace(cluster):
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    kinds = "llmexperts,routingpolicies"
    cluster.kubectl("delete", kinds, "--all", "--wait=false", f"--namespace={name}")
    cluster.kubectl("delete", "namespace", name, "--wait=false")
