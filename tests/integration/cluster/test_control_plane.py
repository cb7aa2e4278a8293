"""The control plane that other tests stand on: real, breakable, and gone afterwards."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from control_plane.binaries import GO_FOLDER, pinned_version
from control_plane.cluster import ControlPlane
from control_plane.fixtures import CRDS

pytestmark = pytest.mark.integration

CLUSTER_FOLDER = GO_FOLDER.parent
CONFIG_MAP = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}

KILLED = """
import sys
import uuid
from control_plane.cluster import control_plane
with control_plane() as plane:
    running = [daemon.process.pid for daemon in plane.daemons if daemon.running]
    print(plane.folder, *running, flush=True)
    sys.stdin.read()
"""


def test_the_server_is_the_pinned_one(cluster):
    version = yaml.safe_load(cluster.kubectl("version", "-o", "yaml").stdout)
    pinned = pinned_version(GO_FOLDER / "kubernetes" / "go.mod", "k8s.io/kubernetes")
    assert version["serverVersion"]["gitVersion"].startswith("v1.")
    if isinstance(cluster, ControlPlane):
        assert version["serverVersion"]["gitVersion"] == pinned
        assert version["clientVersion"]["gitVersion"] == pinned


def test_a_service_account_may_do_what_its_role_says(cluster, namespace):
    cluster.kubectl("create", "serviceaccount", "reader", f"--namespace={namespace}")
    config = cluster.kubeconfig_of("reader", namespace=namespace)

    def allowed(*arguments):
        return cluster.kubectl(*arguments, kubeconfig=config, check=False).returncode == 0

    assert not allowed("get", "configmaps")
    arguments = ("--verb=get,list", "--resource=configmaps", f"--namespace={namespace}")
    cluster.kubectl("create", "role", "reader", *arguments)
    cluster.kubectl(
        *("create", "rolebinding", "reader", f"--namespace={namespace}"),
        *("--role=reader", f"--serviceaccount={namespace}:reader"),
    )
    assert allowed("get", "configmaps")
    assert not allowed("create", "configmap", "x")
    assert not allowed("get", "configmaps", "--namespace=default")


def test_the_official_client_is_an_administrator(cluster):
    from kubernetes.client import CoreV1Api

    with cluster.api_client() as client:
        names = [item.metadata.name for item in CoreV1Api(client).list_namespace().items]
    assert {"default", "kube-system"} <= set(names)


@pytest.fixture
def node(controllers):
    """A node that does nothing; controllers pass over pods whose node they do not know."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    controllers.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    yield name
    controllers.kubectl("delete", "node", name)


def test_controllers_act(controllers, namespace, node):
    """A Service's addresses come from endpointslice-controller alone."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", "namespace": namespace, "labels": {"app": "x"}},
        # Bound by hand: there is no scheduler, and no kubelet either.
        "spec": {"nodeName": node, "containers": [{"name": "x", "image": "x"}]},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "x", "namespace": namespace},
        "spec": {"selector": {"app": "x"}, "ports": [{"port": 80}]},
    }
    controllers.kubectl(
        *("wait", f"--namespace={namespace}", "serviceaccount/default", "--for=create"),
        "--timeout=30s",
    )
    controllers.apply(pod, service)
    status = {
        "podIP": "10.1.2.3",
        "podIPs": [{"ip": "10.1.2.3"}],
        "conditions": [{"type": "Ready", "status": "True"}],
        "phase": "Running",
    }
    controllers.kubectl(
        *("patch", "pod", "x", f"--namespace={namespace}", "--subresource=status"),
        *("--type=merge", f"--patch={json.dumps({'status': status})}"),
    )
    controllers.kubectl(
        *("wait", f"--namespace={namespace}", "endpointslice", "--timeout=30s"),
        *("-l", "kubernetes.io/service-name=x"),
        "--for=jsonpath={.endpoints[0].addresses[0]}=10.1.2.3",
    )


def test_the_servers_can_be_ended_and_come_back(private_control_plane: ControlPlane):
    plane = private_control_plane
    plane.apply(CONFIG_MAP | {"metadata": {"name": "x", "namespace": "default"}})
    plane.api_server.kill()
    refused = plane.kubectl("get", "configmap", "x", check=False)
    assert "refused" in refused.stderr
    plane.etcd.kill()
    plane.etcd.start()
    plane.api_server.start()
    assert plane.get("configmap", "x")["metadata"]["name"] == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's process descriptors")
@pytest.mark.usefixtures("programs")
def test_nothing_is_left_after_a_hard_kill():
    # The guard holds our end of the output open until it has cleaned up.
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env={**os.environ, "PYTHONPATH": str(CLUSTER_FOLDER)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        folder, *pids = run.stdout.readline().split()
        assert len(pids) == 2
        assert Path(folder).is_dir()
        run.send_signal(signal.SIGKILL)
        assert run.stdout.read() == ""
    assert not Path(folder).exists()
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # A machine whose process 1 reaps nobody keeps the dead as zombies.
    return state != "Z"


SHARED = """
def test_what_the_run_finds(crds):
    found = crds.kubectl("get", "crd", "-o", "name").stdout.split()
    assert len(found) == 2
"""


@pytest.mark.parametrize("before", [(), ("pointsman.dev_llmexperts.yaml",)], ids=["bare", "used"])
def test_a_cluster_of_somebody_else_keeps_what_it_had_and_nothing_more(
    private_control_plane, tmp_path, before
):
    """As with POINTSMAN_KUBECONFIG."""
    plane = private_control_plane
    for name in before:
        plane.kubectl("apply", "--server-side", "-f", str(CRDS / name))
    there = plane.kubectl("get", "crd", "-o", "name").stdout
    (tmp_path / "test_shared.py").write_text(SHARED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "control_plane.fixtures", str(tmp_path)],
        env={
            **os.environ,
            "POINTSMAN_KUBECONFIG": str(plane.kubeconfig),
            "PYTHONPATH": str(CLUSTER_FOLDER),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert plane.kubectl("get", "crd", "-o", "name").stdout == there


def test_only_what_is_missing_is_named(cluster, namespace):
    objects = [
        CONFIG_MAP | {"metadata": {"name": name, "namespace": namespace}} for name in ("x", "y")
    ]
    assert cluster.missing(*objects) == objects
    cluster.apply(objects[0])
    assert cluster.missing(*objects) == [objects[1]]
    cluster.apply(objects[1])
    assert cluster.missing(*objects) == []
    cluster.delete(*objects)
    assert cluster.missing(*objects) == objects
