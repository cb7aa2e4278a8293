"""The Kubernetes API by the official client: full lists and writes.

The client blocks, so every call runs in a thread. Objects stay plain dicts: `observed`
reads them leniently, where the client's own models would refuse.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import orjson

from pointsman_core.resources import API_VERSION
from pointsman_core.snapshot import snapshot_json
from pointsman_operator.conditions import Transition, timestamp
from pointsman_operator.observed import (
    CONFIG_MAP_PREFIX,
    POLICY_LABEL,
    SNAPSHOT_KEY,
    SNAPSHOT_LABEL,
    JsonObject,
    Key,
    Kind,
)
from pointsman_operator.reconcile import Ref, SnapshotWrite, StatusWrite

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

FIELD_MANAGER: Final = "pointsman-operator"
PAGE: Final = 500
THREADS: Final = 8
CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0

_APPLY: Final = "application/apply-patch+yaml"
_FORBIDDEN, _NOT_FOUND, _CONFLICT, _GONE = 403, 404, 409, 410
_REFUSALS: Final = (400, _FORBIDDEN, 413, 422)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ApiPath:
    """Where a kind is served."""

    root: str
    plural: str
    selector: str = ""
    """Label selector of lists."""

    @property
    def group(self) -> str:
        """API group; empty for the core."""
        return self.root.split("/")[2] if self.root.startswith("/apis/") else ""

    @property
    def version(self) -> str:
        """API version without the group."""
        return self.root.rpartition("/")[2]

    def path(self, namespace: str = "", name: str = "", sub: str = "") -> str:
        """Of the collection, of one namespace's, or of one object."""
        parts = [self.root]
        if namespace:
            parts += ["namespaces", namespace]
        parts += [self.plural, *filter(None, (name, sub))]
        return "/".join(parts)


PATHS: Final[Mapping[Kind, ApiPath]] = {
    Kind.EXPERT: ApiPath(f"/apis/{API_VERSION}", "llmexperts"),
    Kind.POLICY: ApiPath(f"/apis/{API_VERSION}", "routingpolicies"),
    Kind.SERVICE: ApiPath("/api/v1", "services"),
    Kind.SLICE: ApiPath("/apis/discovery.k8s.io/v1", "endpointslices"),
    Kind.POD: ApiPath("/api/v1", "pods"),
    Kind.POOL: ApiPath("/apis/inference.networking.k8s.io/v1", "inferencepools"),
    Kind.CONFIG_MAP: ApiPath("/api/v1", "configmaps", f"{SNAPSHOT_LABEL}=true"),
}
_EVENTS: Final = ApiPath("/api/v1", "events")
_REVIEWS: Final = ApiPath("/apis/authorization.k8s.io/v1", "selfsubjectaccessreviews")
_NAMESPACE_TERMINATING: Final = "NamespaceTerminating"
_MODIFIED: Final = "the object has been modified"
"""A conflict with other writers, which another try mends; others are of the uid."""


class ClusterError(OSError):
    """The API server refused, failed, or could not be reached."""

    def __init__(self, message: str, *, status: int = 0, cause: str = "") -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; 0 if there was no answer."""
        self.cause = cause
        """The API's word for the cause, if it gave one."""

    @property
    def forbidden(self) -> bool:
        """The operator's role lacks the permission."""
        return self.status == _FORBIDDEN and self.cause != _NAMESPACE_TERMINATING

    @property
    def object_is_gone(self) -> bool:
        """It was deleted, is another one of the same name by now, or ends with its namespace."""
        replaced = self.status == _CONFLICT and _MODIFIED not in str(self)
        return self.status == _NOT_FOUND or replaced or self.cause == _NAMESPACE_TERMINATING

    @property
    def refused(self) -> bool:
        """The API server will not have it, such as for a quota: somebody must do something."""
        return self.status in _REFUSALS and not self.object_is_gone


class Cluster(Protocol):
    """What the operator does with the API. Every method raises `ClusterError`."""

    async def list_all(self, kind: Kind, namespace: str = "") -> Sequence[JsonObject] | None:
        """All objects of a kind, of one namespace or of all; ``None`` if the kind is not known."""

    async def may_watch(self, kind: Kind) -> bool:
        """Whether the operator's role lets it list and watch a kind."""

    async def write_snapshot(self, write: SnapshotWrite) -> None:
        """Create or change a policy's ConfigMap."""

    async def delete_snapshot(self, policy: Key) -> None:
        """Delete a policy's ConfigMap; not an error if it is gone."""

    async def write_status(self, write: StatusWrite) -> None:
        """Write an object's status."""

    async def post_event(self, ref: Ref, transition: Transition, now: datetime) -> None:
        """Tell of a transition as an Event."""

    async def close(self) -> None:
        """Let connections go."""


class KubernetesCluster:
    """A `Cluster` by the official client; ``namespaces``, which are watched, empty means all."""

    def __init__(self, client: "ApiClient", namespaces: Sequence[str] = ()) -> None:
        self._client = client
        self._namespaces = namespaces
        # Of its own: an API server that hangs must not take the threads of others.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kubernetes")

    async def list_all(self, kind: Kind, namespace: str = "") -> Sequence[JsonObject] | None:
        """All objects of a kind, of one namespace or of all; ``None`` if the kind is not known."""
        try:
            return await self._run(partial(self._list, PATHS[kind], namespace))
        except ClusterError as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    async def may_watch(self, kind: Kind) -> bool:
        """Whether the operator's role lets it list and watch a kind."""
        calls = [
            self._run(partial(self._call, "POST", _REVIEWS.path(), body=review(kind, verb, where)))
            for where in self._namespaces or ("",)
            for verb in ("list", "watch")
        ]
        answers = await asyncio.gather(*calls)
        # Only a plain no counts: who cannot tell lets the attempt tell.
        return all((one.get("status") or {}).get("allowed") is not False for one in answers)

    async def write_snapshot(self, write: SnapshotWrite) -> None:
        """Create or change a policy's ConfigMap."""
        body = config_map(write)
        meta = body["metadata"]
        await self._apply(PATHS[Kind.CONFIG_MAP].path(meta["namespace"], meta["name"]), body)

    async def delete_snapshot(self, policy: Key) -> None:
        """Delete a policy's ConfigMap; not an error if it is gone."""
        path = PATHS[Kind.CONFIG_MAP].path(policy.namespace, CONFIG_MAP_PREFIX + policy.name)
        try:
            await self._run(partial(self._call, "DELETE", path))
        except ClusterError as error:
            if error.status != _NOT_FOUND:
                raise

    async def write_status(self, write: StatusWrite) -> None:
        """Write an object's status."""
        ref = write.ref
        body = {
            "apiVersion": API_VERSION,
            "kind": str(ref.kind),
            # With the uid, a successor of the same name is not given this status.
            "metadata": {"name": ref.key.name, "namespace": ref.key.namespace, "uid": ref.uid},
            "status": write.status,
        }
        await self._apply(PATHS[ref.kind].path(ref.key.namespace, ref.key.name, "status"), body)

    async def post_event(self, ref: Ref, transition: Transition, now: datetime) -> None:
        """Tell of a transition as an Event."""
        path = _EVENTS.path(ref.key.namespace)
        body = event(ref, transition, now)
        await self._run(partial(self._call, "POST", path, body=body))

    async def close(self) -> None:
        """Let connections go."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    async def _apply(self, path: str, body: JsonObject) -> None:
        query = [("fieldManager", FIELD_MANAGER), ("force", "true")]
        await self._run(partial(self._call, "PATCH", path, query=query, body=body, content=_APPLY))

    async def _run(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _list(self, where: ApiPath, namespace: str) -> list[JsonObject]:
        """In pages; if the first ones expire on the way, in one piece."""
        try:
            return self._pages(where.path(namespace), where.selector, PAGE)
        except ClusterError as error:
            if error.status != _GONE:
                raise
        return self._pages(where.path(namespace), where.selector, 0)

    def _pages(self, path: str, selector: str, limit: int) -> list[JsonObject]:
        query = [("labelSelector", selector)] if selector else []
        if limit:
            query.append(("limit", str(limit)))
        items: list[JsonObject] = []
        token = ""
        while True:
            page = self._call(
                "GET", path, query=[*query, *([("continue", token)] if token else [])]
            )
            if "items" not in page:  # a proxy's page; an empty list would end all routing
                raise ClusterError(f"GET {path}: the answer is no list of the Kubernetes API")
            items += page["items"] or []
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return items

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: JsonObject | None = None,
        content: str = "application/json",
    ) -> JsonObject:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        request = self._client.param_serialize(
            method,
            path,
            query_params=list(query),
            header_params={"Accept": "application/json", "Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(
                *request, _request_timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
            )
            data = response.read()
        except (ApiException, HTTPError, OSError) as error:
            raise ClusterError(f"{method} {path}: {type(error).__name__}: {error}") from None
        try:
            answer = orjson.loads(data or b"{}")
        except orjson.JSONDecodeError:
            answer = {}
        if not 200 <= response.status < 300:
            message = answer.get("message") if isinstance(answer, dict) else None
            text = f"{method} {path}: {response.status}: {message or response.reason}"
            raise ClusterError(text, status=response.status, cause=_cause(answer))
        return answer if isinstance(answer, dict) else {}


def _cause(answer: object) -> str:
    """The first cause in the details of a ``Status``; empty if there is none."""
    try:
        return str(answer["details"]["causes"][0]["reason"])  # type: ignore[index]
    except (LookupError, TypeError):
        return ""


def connect(namespaces: Sequence[str]) -> KubernetesCluster:
    """By the pod's service account, else by the kubeconfig; raises `ClusterError` for neither."""
    from kubernetes import client, config
    from yaml import YAMLError

    configuration = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise ClusterError(f"neither in a cluster, nor a usable kubeconfig: {error}") from None
    except (YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        where = os.environ.get("KUBECONFIG") or "~/.kube/config"
        text = f"{where} is not a kubeconfig: {type(error).__name__}: {error}"
        raise ClusterError(" ".join(text.split())) from None
    configuration.connection_pool_maxsize = THREADS
    configuration.retries = 0  # every caller tries again by itself, and counts failures
    return KubernetesCluster(client.ApiClient(configuration), namespaces)


# --- objects ---------------------------------------------------------------------------


def config_map(write: SnapshotWrite) -> JsonObject:
    """The ConfigMap of a snapshot; it goes with its policy."""
    policy = write.policy
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": CONFIG_MAP_PREFIX + policy.name,
            "namespace": policy.namespace,
            "labels": {SNAPSHOT_LABEL: "true", POLICY_LABEL: policy.name},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": str(Kind.POLICY),
                    "name": policy.name,
                    "uid": write.owner_uid,
                    "controller": True,
                }
            ],
        },
        "data": {SNAPSHOT_KEY: snapshot_json(write.snapshot)},
    }


def review(kind: Kind, verb: str, namespace: str) -> JsonObject:
    """A question whether the operator itself may do something; an empty namespace means all."""
    where = PATHS[kind]
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {
            "resourceAttributes": {
                "group": where.group,
                "resource": where.plural,
                "verb": verb,
                "namespace": namespace,
            }
        },
    }


def event(ref: Ref, transition: Transition, now: datetime) -> JsonObject:
    """An Event as ``kubectl describe`` shows it."""
    at = timestamp(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{ref.key.name}.", "namespace": ref.key.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": str(ref.kind),
            "name": ref.key.name,
            "namespace": ref.key.namespace,
            "uid": ref.uid,
        },
        "type": "Warning" if transition.warning else "Normal",
        "reason": transition.reason,
        "message": transition.message,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
