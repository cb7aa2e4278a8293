"""A Kubernetes API server to test against: our own, or the one of a kubeconfig."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from control_plane import binaries
from control_plane.certificates import Authority, Pair, write_key
from control_plane.daemons import Daemon, Folder, PortTakenError, free_port, guarded_folder

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

KUBECONFIG_VARIABLE = "POINTSMAN_KUBECONFIG"
KWOK_STAGES = Path(__file__).parents[1] / "kwok.yaml"
SERVICE_RANGE = "10.0.0.0/24"
ATTEMPTS = 3
"""To start on ports that nobody took in the meantime."""


@dataclass(slots=True)
class Cluster:
    """A cluster in which the tests may do everything."""

    kubeconfig: Path
    """Of an administrator."""
    folder: Path
    """For files of the run; removed with it."""
    kubectl_path: str

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        check: bool = True,
        kubeconfig: Path | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run kubectl, as the administrator by default.

        Raises AssertionError with its message if it fails, unless ``check`` is off.
        """
        config = kubeconfig or self.kubeconfig
        done = subprocess.run(
            [self.kubectl_path, f"--kubeconfig={config}", *arguments],
            input=stdin,
            env={**os.environ, "KUBECACHEDIR": str(self.folder / "kubectl-cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        shown = " ".join(arguments)
        assert not check or done.returncode == 0, f"kubectl {shown}:\n{done.stderr}{done.stdout}"
        return done

    def get(self, *arguments: str) -> Any:
        """What ``kubectl get … -o json`` prints, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json").stdout)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects on the server's side."""
        flags = ("--server-side", "--force-conflicts")
        self.kubectl("apply", *flags, "-f", "-", stdin=_listed(objects))

    def missing(self, *objects: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Those that are not there."""
        done = self.kubectl("get", "--ignore-not-found", *_FROM_STDIN, stdin=_listed(objects))
        found = json.loads(done.stdout or '{"items": []}')
        there = {_name(one) for one in found.get("items", [found])}
        return [one for one in objects if _name(one) not in there]

    def delete(self, *objects: Mapping[str, Any], wait: bool = True) -> None:
        """Delete objects, those that are there."""
        if objects:
            flags = ("--ignore-not-found", f"--wait={str(wait).lower()}", "--timeout=60s")
            self.kubectl("delete", *flags, "-f", "-", stdin=_listed(objects))

    def api_client(self, kubeconfig: Path | None = None) -> "ApiClient":
        """The official client, as the administrator by default; use it as a context manager."""
        from kubernetes import config

        client: ApiClient = config.new_client_from_config(str(kubeconfig or self.kubeconfig))
        return client

    def kubeconfig_of(self, service_account: str, *, namespace: str) -> Path:
        """A kubeconfig by which a service account that exists signs in, for an hour."""
        done = self.kubectl("create", "token", service_account, f"--namespace={namespace}")
        document = yaml.safe_load(self.kubectl("config", "view", "--minify", "--raw").stdout)
        (user,) = document["users"]
        user["user"] = {"token": done.stdout.strip()}
        (context,) = document["contexts"]
        context["context"]["namespace"] = namespace
        path = self.folder / f"{namespace}-{service_account}.kubeconfig"
        _write_private(path, document)
        return path

    def ensure_controllers(self) -> None:
        """Have controllers act on what the API server holds."""

    def ensure_nodes(self) -> None:
        """Have at least one node, and pods on it that seem to run."""


_FROM_STDIN = ("-o", "json", "-f", "-")


def _listed(objects: Sequence[Mapping[str, Any]]) -> str:
    # JSON: kubectl and PyYAML disagree on which plain words are text.
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def _name(one: Mapping[str, Any]) -> tuple[str, str, str]:
    """Among all; of objects that kubectl puts into no namespace by itself."""
    meta = one["metadata"]
    return one["kind"], meta.get("namespace", ""), meta["name"]


@dataclass(slots=True)
class ControlPlane(Cluster):
    """Our own: etcd and API server, and more on request; each can be broken."""

    run: Folder
    authority: Authority
    etcd: Daemon
    api_server: Daemon
    controller_manager: Daemon
    scheduler: Daemon
    kwok: Daemon
    url: str
    etcd_url: str
    daemons: list[Daemon] = field(init=False)

    def __post_init__(self) -> None:
        self.daemons = [
            *(self.kwok, self.scheduler, self.controller_manager, self.api_server, self.etcd)
        ]

    def ensure_controllers(self) -> None:
        """Start kube-controller-manager: EndpointSlices, garbage collection, namespaces."""
        if not self.controller_manager.running:
            binaries.ensure(["kube-controller-manager"])
            self.controller_manager.start()

    def ensure_nodes(self) -> None:
        """Start kube-scheduler and kwok, which plays a kubelet, with one node."""
        self.ensure_controllers()
        if not self.kwok.running:
            binaries.ensure(["kube-scheduler", "kwok"])
            self.scheduler.launch()
            self.kwok.launch()
            self.scheduler.wait_until_ready()
            self.kwok.wait_until_ready()
            self.apply(NODE)
            self.kubectl("wait", "--for=condition=Ready", "node/kwok", "--timeout=60s")


NODE: Mapping[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {
        "name": "kwok",
        "annotations": {"kwok.x-k8s.io/node": "fake"},
        "labels": {"kubernetes.io/hostname": "kwok", "kubernetes.io/os": "linux"},
    },
}


@contextlib.contextmanager
def existing_cluster(kubeconfig: Path) -> Iterator[Cluster]:
    """The cluster of a kubeconfig, as it is; kubectl from PATH, else our own."""
    if not kubeconfig.is_file():
        raise FileNotFoundError(f"{KUBECONFIG_VARIABLE}={kubeconfig} is not a file")
    found = shutil.which("kubectl") or str(binaries.ensure(["kubectl"])["kubectl"])
    with guarded_folder() as folder:
        yield Cluster(kubeconfig=kubeconfig.resolve(), folder=folder.path, kubectl_path=found)


@contextlib.contextmanager
def control_plane() -> Iterator[ControlPlane]:
    """A new control plane of our own, ready.

    Raises BinariesError where its programs cannot be had, StartError when one does not start.
    """
    paths = binaries.ensure(["etcd", "kube-apiserver", "kubectl"])
    for attempt in range(1, ATTEMPTS + 1):
        with guarded_folder() as folder:
            plane = _lay_out(folder, kubectl=str(paths["kubectl"]))
            try:
                try:
                    _start(plane)
                except PortTakenError:
                    if attempt == ATTEMPTS:
                        raise
                    continue
                yield plane
                return
            finally:
                for daemon in plane.daemons:
                    daemon.kill()


def _start(plane: ControlPlane) -> None:
    # Together: the API server waits for etcd by itself.
    plane.etcd.launch()
    plane.api_server.launch()
    plane.etcd.wait_until_ready()
    plane.api_server.wait_until_ready()


def _lay_out(folder: Folder, *, kubectl: str) -> ControlPlane:
    """Certificates, settings and commands; nothing is started."""
    path = folder.path
    authority = Authority(path)
    serving = authority.server("kube-apiserver", hosts=("127.0.0.1", "localhost"))
    admin = authority.client("admin", groups=("system:masters",))
    write_key(path / "service-accounts.key")
    etcd_url = f"http://127.0.0.1:{free_port()}"
    url = f"https://127.0.0.1:{free_port()}"
    kubeconfig = path / "admin.kubeconfig"
    _write_private(kubeconfig, _kubeconfig(url, authority.path, admin))
    context = ssl.create_default_context(cafile=str(authority.path))
    context.load_cert_chain(admin.certificate, admin.key)

    def daemon(name: str, arguments: Sequence[str], ready_url: str) -> Daemon:
        command = [str(binaries.binary_path(name)), *arguments]
        return Daemon(name, command, folder, lambda: answers(ready_url, context))

    manager, scheduler, kwok = free_port(), free_port(), free_port()
    return ControlPlane(
        kubeconfig=kubeconfig,
        folder=path,
        kubectl_path=kubectl,
        run=folder,
        authority=authority,
        url=url,
        etcd_url=etcd_url,
        etcd=daemon("etcd", _etcd(path, etcd_url), f"{etcd_url}/readyz"),
        api_server=daemon(
            "kube-apiserver",
            _api_server(path, url=url, etcd_url=etcd_url, serving=serving),
            # Exists a moment after /readyz says yes, and answers with 404 before.
            f"{url}/api/v1/namespaces/default",
        ),
        controller_manager=daemon(
            "kube-controller-manager",
            _controller_manager(path, kubeconfig=kubeconfig, port=manager, serving=serving),
            # Its first visible work; pods cannot be created before.
            f"{url}/api/v1/namespaces/default/serviceaccounts/default",
        ),
        scheduler=daemon(
            "kube-scheduler",
            _scheduler(kubeconfig=kubeconfig, port=scheduler, serving=serving),
            f"https://127.0.0.1:{scheduler}/readyz",
        ),
        kwok=daemon(
            "kwok",
            [
                f"--kubeconfig={kubeconfig}",
                f"--config={KWOK_STAGES}",
                "--manage-all-nodes=true",
                f"--server-address=127.0.0.1:{kwok}",
                "--cidr=10.0.8.0/22",
            ],
            f"http://127.0.0.1:{kwok}/healthz",
        ),
    )


def _etcd(path: Path, url: str) -> list[str]:
    peers = f"http://127.0.0.1:{free_port()}"
    return [
        f"--data-dir={path / 'etcd'}",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        # The data need not outlive the machine's power.
        "--unsafe-no-fsync",
    ]


def _api_server(path: Path, *, url: str, etcd_url: str, serving: Pair) -> list[str]:
    key = path / "service-accounts.key"
    return [
        f"--etcd-servers={etcd_url}",
        "--bind-address=127.0.0.1",
        f"--secure-port={url.rpartition(':')[2]}",
        f"--tls-cert-file={serving.certificate}",
        f"--tls-private-key-file={serving.key}",
        f"--client-ca-file={path / 'ca.crt'}",
        "--authorization-mode=Node,RBAC",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--service-account-key-file={key}",
        f"--service-account-signing-key-file={key}",
        "--service-account-issuer=https://kubernetes.default.svc",
        # Loopback is no address for the Service `kubernetes`, and no pod would use it.
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        "--allow-privileged=true",
    ]


def _controller_manager(path: Path, *, kubeconfig: Path, port: int, serving: Pair) -> list[str]:
    return [
        f"--service-account-private-key-file={path / 'service-accounts.key'}",
        f"--root-ca-file={path / 'ca.crt'}",
        "--use-service-account-credentials=true",
        # By default its client waits for seconds in order to be kind to a big cluster.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        *_component(kubeconfig=kubeconfig, port=port, serving=serving),
    ]


def _scheduler(*, kubeconfig: Path, port: int, serving: Pair) -> list[str]:
    return _component(kubeconfig=kubeconfig, port=port, serving=serving)


def _component(*, kubeconfig: Path, port: int, serving: Pair) -> list[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--tls-cert-file={serving.certificate}",
        f"--tls-private-key-file={serving.key}",
    ]


def answers(url: str, context: ssl.SSLContext) -> bool:
    """Whether a GET brings 200. Raises OSError while nothing listens."""
    verified = context if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(url, context=verified, timeout=5) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as refused:
        refused.close()
        return False


def _kubeconfig(url: str, authority: Path, client: Pair) -> dict[str, Any]:
    cluster = {"server": url, "certificate-authority": str(authority)}
    user = {"client-certificate": str(client.certificate), "client-key": str(client.key)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "admin", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    }


def _write_private(path: Path, document: Mapping[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document))
