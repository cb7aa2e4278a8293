"""From an expert's backend to addresses. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from pointsman_common.wording import listed
from pointsman_core.resources import Backend, LLMExpert
from pointsman_core.snapshot import canonical_address
from pointsman_operator.conditions import Reason
from pointsman_operator.observed import (
    EndpointSlice,
    Key,
    Kind,
    Observed,
    Pod,
    Service,
    ServicePort,
)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a backend stands for just now."""

    ready: tuple[str, ...] = ()
    """``ip:port`` of the endpoints that may get requests, sorted."""
    total: int = 0
    """All endpoints but those on their way out."""
    fault: Reason | None = None
    """Why the backend cannot be resolved at all."""
    message: str = ""
    """The fault, or why there is no endpoint, for people."""


class Resolver:
    """Looks backends up in one state of the cluster."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._slices: dict[Key, list[EndpointSlice]] = defaultdict(list)
        for one in observed.slices.values():
            self._slices[one.service].append(one)
        self._pods: dict[tuple[str, str, str], list[Pod]] = defaultdict(list)
        for pod in observed.pods.values():
            for label, value in pod.meta.labels.items():
                self._pods[(pod.meta.key.namespace, label, value)].append(pod)

    def resolve(self, expert: LLMExpert) -> Resolution:
        """The endpoints of an expert."""
        backend, namespace = expert.spec.backend, expert.metadata.namespace
        if (kind := self._unreadable(backend, namespace)) is not None:
            text = f"the operator is not permitted to list {kind}: see its role"
            return _fault(Reason.NOT_PERMITTED, text)
        if backend.service is not None:
            return self.by_service(Key(namespace, backend.service.name), str(backend.service.port))
        if backend.pod_selector is not None:
            selector = backend.pod_selector
            return self._by_pods(namespace, selector.match_labels, [selector.port])
        if backend.inference_pool is not None:
            return self._by_pool(Key(namespace, backend.inference_pool.name))
        # Once, however often and in whatever notation it is written.
        addresses = {canonical_address(one) for one in backend.addresses or ()}
        return Resolution(ready=tuple(sorted(addresses)), total=len(addresses))

    def service_endpoints(self, key: Key, port: ServicePort) -> dict[str, bool]:
        """Address to readiness of all endpoints of a Service that are not terminating."""
        service = self._observed.services[key]
        found: dict[str, bool] = {}
        for one in self._slices.get(key, ()):
            number = one.ports.get(port.name)
            if number is None or (service.family and one.family != service.family):
                continue
            for endpoint in one.endpoints:
                address = format_address(endpoint.ip, number)
                if address is not None and not endpoint.terminating:
                    # While slices are rearranged an endpoint may be in two of them.
                    found[address] = found.get(address, False) or endpoint.ready
        return found

    def _unreadable(self, backend: Backend, namespace: str) -> Kind | None:
        needed: tuple[Kind, ...] = ()
        if backend.service is not None:
            needed = (Kind.SERVICE, Kind.SLICE)
        elif backend.pod_selector is not None:
            needed = (Kind.POD,)
        elif backend.inference_pool is not None:
            needed = (Kind.POOL, Kind.POD)
        may_read = self._observed.may_read
        return next((kind for kind in needed if not may_read(kind, namespace)), None)

    def by_service(self, key: Key, wanted: str) -> Resolution:
        """The endpoints of a Service's port, by number or name."""
        service = self._observed.services.get(key)
        if service is None or service.meta.deleting:
            return _fault(Reason.SERVICE_NOT_FOUND, f"there is no Service {key}")
        if service.external:
            text = f"Service {key} is an ExternalName, which has no endpoints: write addresses"
            return _fault(Reason.SERVICE_NOT_SUPPORTED, text)
        port = find_port(service, wanted)
        if port is None:
            offered = ", ".join(str(one.number) for one in service.ports) or "none"
            text = f"Service {key} has no TCP port {wanted}; it has {offered}"
            return _fault(Reason.PORT_NOT_FOUND, text)
        found = self.service_endpoints(key, port)
        return _resolution(found, "" if found else self._why_none(service, port))

    def _why_none(self, service: Service, port: ServicePort) -> str:
        """Why a Service has no endpoint."""
        key = service.meta.key
        slices = [one for one in self._slices.get(key, ()) if one.endpoints]
        if not slices:
            return f"Service {key} has no endpoints: no pod with an address matches its selector"
        if not any(port.name in one.ports for one in slices):
            names = sorted({repr(name) for one in slices for name in one.ports}) or ["none"]
            return (
                f"the EndpointSlices of Service {key} have no TCP port named {port.name!r}; "
                f"they have {listed(names)}"
            )
        families = listed(sorted({one.family for one in slices}))
        if service.family and all(one.family != service.family for one in slices):
            return f"Service {key} is {service.family}, its endpoints are {families}"
        return f"all endpoints of Service {key} are terminating"

    def _by_pool(self, key: Key) -> Resolution:
        if not self._observed.pools_installed:
            text = "the CRD inferencepools.inference.networking.k8s.io/v1 is not installed"
            return _fault(Reason.POOL_NOT_INSTALLED, text)
        pool = self._observed.pools.get(key)
        if pool is None or pool.meta.deleting:
            return _fault(Reason.POOL_NOT_FOUND, f"there is no InferencePool {key}")
        return self._by_pods(
            key.namespace, pool.match_labels, pool.ports, of=f"InferencePool {key}"
        )

    def _by_pods(
        self, namespace: str, labels: Mapping[str, str], ports: Iterable[int], *, of: str = ""
    ) -> Resolution:
        found: dict[str, bool] = {}
        ports = tuple(ports)
        pods = self._select(namespace, labels)
        for pod in pods:
            addresses = () if pod.gone else (format_address(pod.ip, port) for port in ports)
            for address in addresses:
                if address is not None:
                    # Pods on their host's network share its address: the one that serves counts.
                    found[address] = found.get(address, False) or pod.ready
        wanted = ", ".join(f"{key}={value}" for key, value in labels.items()) or "no labels"
        where = f"with {wanted} in namespace {namespace}" + (f" ({of})" if of else "")
        text = f"there is no pod {where}"
        if waiting := [pod.meta.key.name for pod in pods if not pod.gone]:
            text = f"no pod {where} has an address yet: {listed(sorted(waiting))}"
        elif pods:
            text = f"all pods {where} have ended"
        return _resolution(found, "" if found else text)

    def _select(self, namespace: str, labels: Mapping[str, str]) -> list[Pod]:
        if not labels:
            return []  # an empty selector would mean every pod
        lists = [self._pods.get((namespace, *label), []) for label in labels.items()]
        wanted = labels.items()
        return [pod for pod in min(lists, key=len) if wanted <= pod.meta.labels.items()]


def find_port(service: Service, wanted: str) -> ServicePort | None:
    """The port of a Service by its number or its name."""
    for port in service.ports:
        if wanted in (str(port.number), port.name):
            return port
    return None


def format_address(ip: str, port: int) -> str | None:
    """``ip:port``, IPv6 in brackets; ``None`` for what is no IP, such as a host name."""
    try:
        parsed = ip_address(ip)
    except ValueError:
        return None
    return f"[{parsed}]:{port}" if parsed.version == 6 else f"{parsed}:{port}"


def _resolution(endpoints: Mapping[str, bool], message: str) -> Resolution:
    ready = sorted(address for address, ready in endpoints.items() if ready)
    return Resolution(ready=tuple(ready), total=len(endpoints), message=message)


def _fault(reason: Reason, message: str) -> Resolution:
    return Resolution(fault=reason, message=message)
