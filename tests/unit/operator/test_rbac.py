"""What the operator may do: least privilege, and the same rights in both modes."""

from pathlib import Path

import pytest
import yaml

from pointsman_operator.cluster import PATHS

MANIFESTS = Path(__file__).parents[3] / "operator" / "manifests"


def documents(name):
    return list(yaml.safe_load_all((MANIFESTS / name).read_text()))


def rules(name, kind):
    (role,) = (one for one in documents(name) if one["kind"] == kind)
    return role["rules"]


def allowed(name, kind):
    return {
        (group, resource, verb)
        for rule in rules(name, kind)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


MODES = [("rbac.yaml", "ClusterRole"), ("namespaced.yaml", "Role")]


@pytest.mark.parametrize(("name", "kind"), MODES)
def test_every_kind_can_be_listed(name, kind):
    rights = allowed(name, kind)
    for path in PATHS.values():
        group = path.root.removeprefix("/apis/").split("/")[0] if "/apis/" in path.root else ""
        assert (group, path.plural, "list") in rights
        assert path.selector or (group, path.plural, "watch") in rights


@pytest.mark.parametrize(("name", "kind"), MODES)
def test_only_statuses_config_maps_and_events_are_written(name, kind):
    writes = {right for right in allowed(name, kind) if right[2] not in ("list", "watch")}
    assert writes == {
        ("pointsman.dev", "llmexperts/status", "patch"),
        ("pointsman.dev", "routingpolicies/status", "patch"),
        ("", "configmaps", "create"),
        ("", "configmaps", "patch"),
        ("", "configmaps", "delete"),
        ("", "events", "create"),
    }
    assert "*" not in {part for right in allowed(name, kind) for part in right}


def test_the_namespaced_mode_lacks_only_what_belongs_to_the_cluster():
    cluster = "customresourcedefinitions"
    whole = allowed("rbac.yaml", "ClusterRole")
    assert {right for right in whole if right[1] != cluster} == allowed("namespaced.yaml", "Role")


@pytest.mark.parametrize("name", ["rbac.yaml", "namespaced.yaml"])
def test_the_role_is_bound_to_the_service_account(name):
    found = {one["kind"].removeprefix("Cluster"): one for one in documents(name)}
    account, binding = found["ServiceAccount"]["metadata"], found["RoleBinding"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert binding["roleRef"]["name"] == found["Role"]["metadata"]["name"]
