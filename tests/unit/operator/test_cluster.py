"""The official client against an API server that answers over real HTTP."""

from datetime import UTC, datetime

import pytest
from aiohttp import web

from pointsman_operator.cluster import ClusterError, connect
from pointsman_operator.conditions import Transition
from pointsman_operator.observed import Key, Kind, read_object
from pointsman_operator.reconcile import Ref, SnapshotWrite, StatusWrite

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
AUTO = Key("default", "auto")
REF = Ref(Kind.POLICY, AUTO, "uid-1")


@pytest.fixture
async def cluster(api_server):  # noqa: ARG001 - it is what the kubeconfig names
    made = connect(())
    yield made
    await made.close()


def failing(status, message="no"):
    return lambda _: web.json_response({"kind": "Status", "message": message}, status=status)


async def test_lists_come_in_pages(api, api_server, cluster):
    for n in range(5):
        api_server.put(api.pod(f"pod-{n}"))
    api_server.page_size = 2
    found = await cluster.list_all(Kind.POD)
    assert [one["metadata"]["name"] for one in found] == [f"pod-{n}" for n in range(5)]
    assert len(api_server.requests) == 3
    assert all(query["limit"] == "500" for _, _, query, _ in api_server.requests)


async def test_pages_that_expire_are_followed_by_one_piece(api, api_server, cluster):
    for n in range(3):
        api_server.put(api.pod(f"pod-{n}"))
    api_server.page_size = 2
    api_server.fail = lambda request: failing(410)(request) if "continue" in request.query else None
    assert len(await cluster.list_all(Kind.POD)) == 3
    assert "limit" not in api_server.requests[-1][2]


async def test_a_kind_that_is_not_installed(cluster):
    assert await cluster.list_all(Kind.POOL) is None


async def test_only_our_config_maps_are_listed(api_server, cluster):
    await cluster.list_all(Kind.CONFIG_MAP)
    ((_, path, query, _),) = api_server.requests
    assert (path, query["labelSelector"]) == ("/api/v1/configmaps", "pointsman.dev/snapshot=true")


async def test_in_namespaced_mode_each_is_listed_by_itself(api_server):
    cluster = connect(("a", "b"))
    await cluster.list_all(Kind.EXPERT, "a")
    ((_, path, _, _),) = api_server.requests
    assert path == "/apis/pointsman.dev/v1alpha1/namespaces/a/llmexperts"
    await cluster.close()


async def test_a_snapshot_is_applied_and_read_back(api, api_server, cluster):
    (snapshot,) = api.reconcile(api.observe(api.policy(), api.expert())).snapshots
    await cluster.write_snapshot(SnapshotWrite(AUTO, "uid-1", snapshot))
    method, path, query, body = api_server.requests[-1]
    assert (method, path) == (
        "PATCH",
        "/api/v1/namespaces/default/configmaps/pointsman-snapshot-auto",
    )
    assert query == {"fieldManager": "pointsman-operator", "force": "true"}
    assert body["metadata"]["labels"] == {
        "pointsman.dev/snapshot": "true",
        "pointsman.dev/policy": "auto",
    }
    found = read_object(Kind.CONFIG_MAP, body)
    assert (found.snapshot, found.owner_uid) == (snapshot, "uid-1")


async def test_deleting_what_is_gone_is_no_error(api_server, cluster):
    await cluster.delete_snapshot(AUTO)
    assert api_server.requests[-1][0] == "DELETE"
    api_server.fail = failing(403)
    with pytest.raises(ClusterError, match="403: no"):
        await cluster.delete_snapshot(AUTO)


async def test_a_status_names_the_object_by_its_uid(api, api_server, cluster):
    api_server.put(api.policy())
    await cluster.write_status(StatusWrite(REF, {"experts": 1}))
    _, path, _, body = api_server.requests[-1]
    assert path == "/apis/pointsman.dev/v1alpha1/namespaces/default/routingpolicies/auto/status"
    assert body["metadata"] == {"name": "auto", "namespace": "default", "uid": "uid-1"}
    assert body["status"] == {"experts": 1}


async def test_an_event_is_posted(api_server, cluster):
    told = Transition(warning=True, reason="NoExperts", message="Ready: none")
    await cluster.post_event(REF, told, NOW)
    method, path, _, body = api_server.requests[-1]
    assert (method, path) == ("POST", "/api/v1/namespaces/default/events")
    assert (body["type"], body["reason"]) == ("Warning", "NoExperts")
    assert body["involvedObject"]["uid"] == "uid-1"
    assert body["lastTimestamp"] == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize("status", [404, 409])
async def test_an_object_that_is_gone(api_server, cluster, status):
    api_server.fail = failing(status)
    with pytest.raises(ClusterError) as raised:
        await cluster.write_status(StatusWrite(REF, {}))
    assert raised.value.object_is_gone


async def test_a_conflict_with_another_writer_is_tried_again(api_server, cluster):
    text = "Operation cannot be fulfilled on x: the object has been modified; please apply"
    api_server.fail = failing(409, text)
    with pytest.raises(ClusterError) as raised:
        await cluster.write_status(StatusWrite(REF, {}))
    assert not raised.value.object_is_gone
    assert not raised.value.refused


TERMINATING = {
    "kind": "Status",
    "message": "unable to create new content in namespace a because it is being terminated",
    "reason": "Forbidden",
    "details": {"causes": [{"reason": "NamespaceTerminating", "field": "metadata.namespace"}]},
}


async def test_a_namespace_that_ends_takes_its_objects_along(api_server, cluster):
    api_server.fail = lambda _: web.json_response(TERMINATING, status=403)
    with pytest.raises(ClusterError, match="being terminated") as raised:
        await cluster.post_event(REF, Transition(warning=False, reason="a", message="b"), NOW)
    assert raised.value.object_is_gone
    assert not raised.value.forbidden


@pytest.mark.parametrize("details", [None, {}, {"causes": []}, {"causes": None}, {"causes": [{}]}])
async def test_a_refusal_without_a_cause_is_a_missing_right(api_server, cluster, details):
    answer = {"kind": "Status", "message": "no", "details": details}
    api_server.fail = lambda _: web.json_response(answer, status=403)
    with pytest.raises(ClusterError) as raised:
        await cluster.write_status(StatusWrite(REF, {}))
    assert raised.value.forbidden
    assert not raised.value.object_is_gone


@pytest.mark.parametrize("refused", [None, "list", "watch"])
async def test_whether_a_kind_may_be_watched(api_server, cluster, refused):
    api_server.reviews = lambda asked: asked["verb"] != refused
    assert await cluster.may_watch(Kind.SLICE) is (refused is None)
    asked = [body["spec"]["resourceAttributes"] for *_, body in api_server.requests]
    resource = {"group": "discovery.k8s.io", "resource": "endpointslices", "namespace": ""}
    assert sorted(asked, key=lambda one: one["verb"]) == [
        resource | {"verb": "list"},
        resource | {"verb": "watch"},
    ]


async def test_in_namespaced_mode_a_kind_must_be_watchable_in_each(api_server):
    cluster = connect(("a", "b"))
    api_server.reviews = lambda asked: asked["namespace"] == "a"
    assert not await cluster.may_watch(Kind.POD)
    assert {body["spec"]["resourceAttributes"]["group"] for *_, body in api_server.requests} == {""}
    await cluster.close()


async def test_an_answer_that_is_no_json(api_server, cluster):
    api_server.fail = lambda _: web.Response(status=502, text="<html>")
    with pytest.raises(ClusterError, match="502: Bad Gateway"):
        await cluster.list_all(Kind.POD)


@pytest.mark.parametrize("text", ["<html>log in</html>", "[]", "{}"])
async def test_a_page_of_somebody_else_is_not_an_empty_list(api_server, cluster, text):
    api_server.fail = lambda _: web.Response(text=text, content_type="text/html")
    with pytest.raises(ClusterError, match="is no list of the Kubernetes API"):
        await cluster.list_all(Kind.POLICY)


async def test_a_connection_that_breaks(api_server, cluster):
    api_server.fail = lambda request: request.transport.abort()
    with pytest.raises(ClusterError) as raised:
        await cluster.list_all(Kind.POD)
    assert raised.value.status == 0


def test_without_any_configuration(monkeypatch, tmp_path):
    place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    import kubernetes.config

    assert kubernetes.config
    monkeypatch.setattr(place, str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match="neither in a cluster"):
        connect(())
