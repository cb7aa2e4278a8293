"""The fixtures by which tests get a cluster; a pytest plugin that tests/conftest.py loads."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from control_plane import binaries
from control_plane.cluster import (
    KUBECONFIG_VARIABLE,
    Cluster,
    ControlPlane,
    control_plane,
    existing_cluster,
)

CRDS = Path(__file__).parents[3] / "crds"

PROGRAMS = {
    "cluster": ("etcd", "kube-apiserver", "kubectl"),
    "programs": ("etcd", "kube-apiserver", "kubectl"),
    "controllers": ("kube-controller-manager",),
    "nodes": ("kube-scheduler", "kwok"),
}
"""What a test needs that uses a fixture."""

UNAVAILABLE = pytest.StashKey[str]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the selected tests need, before any of their timeouts begins."""
    config = session.config
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    needed = [name for fixture in PROGRAMS for name in PROGRAMS[fixture] if fixture in used]
    if os.environ.get(KUBECONFIG_VARIABLE) and "programs" not in used:
        needed = []
    if not needed or config.option.collectonly:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        try:
            binaries.ensure(list(dict.fromkeys(needed)))
        except binaries.BinariesError as error:
            config.stash[UNAVAILABLE] = str(error)


@pytest.fixture(scope="session")
def programs(pytestconfig: pytest.Config) -> None:
    """For tests that start a control plane by themselves."""
    if reason := pytestconfig.stash.get(UNAVAILABLE, ""):
        pytest.skip(f"no test control plane: {reason}")


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """An API server with RBAC, shared by the whole session: use a `namespace` of your own.

    POINTSMAN_KUBECONFIG names another cluster to use instead.
    """
    if kubeconfig := os.environ.get(KUBECONFIG_VARIABLE):
        with existing_cluster(Path(kubeconfig)) as existing:
            yield existing
        return
    request.getfixturevalue("programs")
    with control_plane() as plane:
        yield plane


@pytest.fixture(scope="session")
def controllers(cluster: Cluster) -> Cluster:
    """The same with kube-controller-manager: EndpointSlices, ReplicaSets, garbage collection."""
    cluster.ensure_controllers()
    return cluster


@pytest.fixture(scope="session")
def nodes(controllers: Cluster) -> Cluster:
    """The same with a scheduler and a node whose pods become ready without running anything."""
    controllers.ensure_nodes()
    return controllers


@pytest.fixture
def private_control_plane(programs: None) -> Iterator[ControlPlane]:  # noqa: ARG001
    """A control plane of the test's own, to break; never the one of POINTSMAN_KUBECONFIG."""
    with control_plane() as plane:
        yield plane


@pytest.fixture(scope="session")
def crds(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with Pointsman's kinds; somebody else's loses them again if it had none."""
    definitions = [yaml.safe_load(one.read_text()) for one in sorted(CRDS.glob("*.yaml"))]
    ours = [] if isinstance(cluster, ControlPlane) else cluster.missing(*definitions)
    install_crds(cluster)
    yield cluster
    cluster.delete(*ours)


def install_crds(cluster: Cluster) -> None:
    """Apply ``crds/`` as a user would, and wait until the API server serves them."""
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRDS))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(CRDS))


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """An empty namespace."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
