"""Objects of the API are read leniently: rubbish gives little, never an exception."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman_operator.cluster import config_map
from pointsman_operator.observed import Key, Kind, read_meta, read_object
from pointsman_operator.reconcile import SnapshotWrite

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["spec", "status", "ports", "endpoints", "addressType", "data", "labels", "conditions",
     "targetPorts", "selector", "ipFamilies", "podIP", "backend", "models"]
)  # fmt: skip


@given(
    kind=st.sampled_from(list(Kind)),
    content=st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS, JSON)),
    meta=JSON | st.dictionaries(FIELDS, JSON),
)
def test_rubbish_is_survived(kind, content, meta):
    read_object(kind, content | {"metadata": meta})
    if isinstance(meta, dict):
        read_object(kind, content | {"metadata": meta | {"name": "x", "namespace": "y"}})


@pytest.mark.parametrize("body", [None, [], "x", {}, {"metadata": None}, {"metadata": {"name": 1}}])
def test_without_a_name_there_is_no_object(body):
    assert read_object(Kind.POD, body) is None


def test_metadata(api):
    body = api.pod(meta={"labels": {"a": "b", "c": 1}, "generation": 3})
    meta = read_meta(body)
    assert meta.key == Key("default", "pod")
    assert str(meta.key) == "default/pod"
    assert meta.labels == {"a": "b"}
    assert meta.generation == 3
    assert not meta.deleting


def test_only_tcp_ports_count(api):
    service = api.service()
    service["spec"]["ports"] += [
        {"port": 53, "protocol": "UDP", "name": "dns"},
        {"port": 443, "name": "https"},
        {"port": "80", "name": "text"},
        {"port": True},
        {"port": 0},
        None,
    ]
    assert [port.number for port in read_object(Kind.SERVICE, service).ports] == [80, 443]


def test_an_invalid_expert_tells_every_problem(api):
    body = api.expert(spec={"limits": {"concurrency": 0, "contextTokens": "x"}})
    found = read_object(Kind.EXPERT, body)
    assert found.resource is None
    assert [text.split(":")[0] for text in found.problems] == [
        "spec.limits.contextTokens",
        "spec.limits.concurrency",
    ]


def test_unknown_fields_and_other_errors_at_once(api):
    body = api.expert(spec={"novel": 1, "model": ""})
    found = read_object(Kind.EXPERT, body)
    assert found.resource is None
    assert found.ignored == ("spec.novel",)
    assert found.problems


def stored(api):
    outcome = api.reconcile(api.observe(api.policy(), api.expert()))
    (snapshot,) = outcome.snapshots
    return config_map(SnapshotWrite(Key("default", "auto"), "owner", snapshot)), snapshot


def test_a_snapshot_comes_back_from_its_config_map(api):
    body, snapshot = stored(api)
    found = read_object(Kind.CONFIG_MAP, body)
    assert (found.policy, found.snapshot, found.owner_uid) == (
        Key("default", "auto"),
        snapshot,
        "owner",
    )


def test_a_config_map_that_was_tampered_with_holds_no_snapshot(api):
    body, _ = stored(api)
    document = json.loads(body["data"]["snapshot.json"])
    for wrong in ("", "{", json.dumps(document | {"generation": 9})):
        body["data"] = {"snapshot.json": wrong}
        assert read_object(Kind.CONFIG_MAP, body).snapshot is None
    renamed, _ = stored(api)
    renamed["metadata"]["namespace"] = "other"
    assert read_object(Kind.CONFIG_MAP, renamed).snapshot is None


def test_a_config_map_of_another_name_is_somebody_elses(api):
    body, _ = stored(api)
    body["metadata"]["name"] = "mine"
    assert read_object(Kind.CONFIG_MAP, body) is None
    del body["metadata"]["labels"]["pointsman.dev/policy"]
    assert read_object(Kind.CONFIG_MAP, body) is None


def test_a_config_map_without_owner(api):
    body, _ = stored(api)
    del body["metadata"]["ownerReferences"]
    assert read_object(Kind.CONFIG_MAP, body).owner_uid == ""


def test_problems_quote_no_pattern(api):
    """A newer CRD may let through what this version does not know."""
    found = read_object(Kind.EXPERT, api.expert(spec={"model": "qwen 7b"}))
    assert found.problems == (
        "spec.model: must be letters, digits and any of . _ : / @ + -, starting alphanumeric or "
        'by / (got "qwen 7b")',
    )
