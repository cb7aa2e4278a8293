"""Endpoint discovery for Envoy: which endpoints exist, and what they serve.

State-of-the-world xDS, as
https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol describes it. Versions
and nonces are kept by :class:`SotwStream`, which knows nothing of gRPC or of endpoints.
"""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

import grpc
import structlog
from envoy.config.core.v3 import address_pb2, base_pb2, health_check_pb2
from envoy.config.endpoint.v3 import endpoint_components_pb2, endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message

from pointsman_policy.addresses import split_address

log = structlog.get_logger(__name__)

CLUSTER: Final = "experts"
"""The one cluster that has endpoints."""
METADATA_NAMESPACE: Final = "pointsman"
"""Filter metadata of every endpoint: ``served_models`` and ``expert``, both strings."""
LB_NAMESPACE: Final = "envoy.lb"
"""Metadata of endpoints and of requests by which Envoy balances."""
POLICY_KEY: Final = "pointsman-policy"
"""In it: the policies that select an endpoint, and the one that decided a request. So a retry
beyond the picks stays with the policy's endpoints."""
TYPE_URL: Final = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

_OVERPROVISIONING_PERCENT: Final = 1_000_000
"""Makes one ready endpoint of up to ten thousand enough to get all traffic. Envoy's default of 140
would send some to those that are not ready as soon as more than two of seven are not."""


@dataclass(frozen=True, slots=True)
class EdsEndpoint:
    """One endpoint as Envoy is told of it."""

    address: str
    """``ip:port``, an IPv6 address in brackets."""
    served_models: tuple[str, ...]
    """Model names that it answers to, the preferred one first."""
    expert: str
    ready: bool = True
    """Not ready: Envoy uses it only where no ready endpoint is alive by Envoy's own checks."""
    policies: tuple[str, ...] = ()
    """Full names of the policies whose requests may go there."""


# --- Protocol ----------------------------------------------------------------------------


class Reaction(StrEnum):
    """What a discovery request means."""

    SUBSCRIBED = "subscribed"
    ACK = "ack"
    NACK = "nack"
    STALE = "stale"


class SotwStream:
    """Versions and nonces of one state-of-the-world stream, for one type of resource.

    A response is due when the client asked for names and has not been sent this version
    for them. A rejected version is not sent again; the next version is.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sent: str | None = None
        self._nonce = ""
        self._nonces = itertools.count(1)

    @property
    def names(self) -> tuple[str, ...]:
        """The resources that the client wants."""
        return self._names

    @property
    def sent_version(self) -> str | None:
        """The version last sent for the wanted resources."""
        return self._sent

    def receive(self, *, names: Sequence[str], nonce: str, rejected: bool) -> Reaction:
        """Take in a request: its resource names, response nonce, and if it has an error."""
        if nonce != self._nonce:
            # It answers a response that a newer one has replaced, or one of another
            # stream: the answer to the newest is still to come and carries all names.
            return Reaction.STALE
        more = not set(names) <= set(self._names)
        self._names = tuple(dict.fromkeys(names))
        if more:
            self._sent = None
        if rejected:
            return Reaction.NACK
        return Reaction.SUBSCRIBED if more else Reaction.ACK

    def due(self, version: str | None) -> bool:
        """Whether a response with this version is to be sent; ``None``: there is none yet."""
        return version is not None and bool(self._names) and version != self._sent

    def send(self, version: str) -> str:
        """Note that a response is sent; its nonce."""
        self._sent = version
        self._nonce = str(next(self._nonces))
        return self._nonce


# --- Resources ---------------------------------------------------------------------------


def merge_endpoints(endpoints: Iterable[EdsEndpoint]) -> tuple[EdsEndpoint, ...]:
    """One entry per address, sorted by address.

    Experts that share an address share an engine: it serves the models of all of them,
    and is ready if any of them says so. Raises ``ValueError`` for an address that is no
    ``ip:port``, and for a comma in a name.
    """
    merged: dict[str, EdsEndpoint] = {}
    for endpoint in endpoints:
        if split_address(endpoint.address)[1] == 0:
            raise ValueError(f"{endpoint.address!r} has no port")
        if any("," in name for name in (*endpoint.served_models, endpoint.expert)):
            raise ValueError(f"comma in a name of {endpoint.address}")
        known = merged.get(endpoint.address)
        merged[endpoint.address] = endpoint if known is None else _join(known, endpoint)
    return tuple(merged[address] for address in sorted(merged))


def _join(first: EdsEndpoint, second: EdsEndpoint) -> EdsEndpoint:
    experts = dict.fromkeys([*first.expert.split(","), second.expert])
    return replace(
        first,
        served_models=tuple(dict.fromkeys(first.served_models + second.served_models)),
        expert=",".join(experts),
        policies=tuple(dict.fromkeys(first.policies + second.policies)),
        ready=first.ready or second.ready,
    )


def load_assignment(cluster: str, endpoints: Sequence[EdsEndpoint]) -> Message:
    """The ClusterLoadAssignment message of merged endpoints."""
    groups = [
        endpoint_components_pb2.LocalityLbEndpoints(
            lb_endpoints=[_lb_endpoint(endpoint) for endpoint in endpoints]
        )
    ]
    policy = endpoint_pb2.ClusterLoadAssignment.Policy()
    policy.overprovisioning_factor.value = _OVERPROVISIONING_PERCENT
    assignment: Message = endpoint_pb2.ClusterLoadAssignment(
        cluster_name=cluster, endpoints=groups if endpoints else [], policy=policy
    )
    return assignment


def _lb_endpoint(endpoint: EdsEndpoint) -> Message:
    ip, port = split_address(endpoint.address)
    metadata = base_pb2.Metadata()
    metadata.filter_metadata[METADATA_NAMESPACE].update(
        {"served_models": ",".join(endpoint.served_models), "expert": endpoint.expert}
    )
    if endpoint.policies:
        metadata.filter_metadata[LB_NAMESPACE].update({POLICY_KEY: list(endpoint.policies)})
    # Not UNHEALTHY: that would keep out, while nobody is there to take it back, also an endpoint
    # that lives again. Envoy's own checks tell the dead ones.
    status = health_check_pb2.UNKNOWN if endpoint.ready else health_check_pb2.DEGRADED
    lb_endpoint: Message = endpoint_components_pb2.LbEndpoint(
        endpoint=endpoint_components_pb2.Endpoint(
            address=address_pb2.Address(
                socket_address=address_pb2.SocketAddress(address=ip, port_value=port)
            )
        ),
        health_status=status,
        metadata=metadata,
    )
    return lb_endpoint


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Resources by name, and the version of them all."""

    version: str
    resources: Mapping[str, Message]


def _snapshot(endpoints: tuple[EdsEndpoint, ...]) -> _Snapshot:
    # Equal content has an equal version in every replica and after a restart.
    digest = hashlib.sha256(repr(endpoints).encode()).hexdigest()
    return _Snapshot(digest[:16], {CLUSTER: load_assignment(CLUSTER, endpoints)})


# --- Transport ---------------------------------------------------------------------------

OnNack = Callable[[str, str], None]
"""``on_nack(version, message)``: Envoy refused a version."""


class EdsServer(eds_pb2_grpc.EndpointDiscoveryServiceServicer):  # type: ignore[misc]
    """Serves the endpoints of the cluster ``experts`` to any number of Envoys.

    Other cluster names get an empty assignment, so that Envoy does not wait for them.
    Only the state-of-the-world stream is served. All methods belong to the event loop's
    thread.
    """

    def __init__(self, *, on_nack: OnNack | None = None) -> None:
        self._on_nack = on_nack
        self._current: _Snapshot | None = None
        self._wakers: set[asyncio.Event] = set()
        self._closed = False

    @property
    def version(self) -> str | None:
        """Version of the endpoints in force; ``None`` before the first ones."""
        return None if self._current is None else self._current.version

    @property
    def streams(self) -> int:
        """Number of Envoys connected."""
        return len(self._wakers)

    def set_endpoints(self, endpoints: Sequence[EdsEndpoint]) -> None:
        """Put endpoints in force and push them to all streams, if they differ.

        Raises:
            ValueError: as :func:`merge_endpoints`; the former endpoints stay in force.

        """
        snapshot = _snapshot(merge_endpoints(endpoints))
        if snapshot.version == self.version:
            return
        self._current = snapshot
        log.info("endpoints changed", version=snapshot.version, endpoints=len(endpoints))
        self._wake_all()

    def close(self) -> None:
        """End all streams, so that a server's graceful stop need not wait for them."""
        self._closed = True
        self._wake_all()

    async def StreamEndpoints(  # noqa: N802, the name is gRPC's
        self,
        request_iterator: AsyncIterator[discovery_pb2.DiscoveryRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Message]:
        """Serve one Envoy until it leaves, or until :meth:`close`."""
        stream, wake = SotwStream(), asyncio.Event()
        reader = asyncio.create_task(self._read(request_iterator, stream, wake))
        reader.add_done_callback(lambda _: wake.set())
        self._wakers.add(wake)
        try:
            while not (self._closed or reader.done()):
                current = self._current
                if current is not None and stream.due(current.version):
                    yield _response(stream, current)
                    continue
                await wake.wait()
                wake.clear()
            if reader.done():
                await _finish(reader, context)
        finally:
            self._wakers.discard(wake)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[discovery_pb2.DiscoveryRequest],
        stream: SotwStream,
        wake: asyncio.Event,
    ) -> None:
        async for request in requests:
            self._receive(request, stream)
            wake.set()

    def _receive(self, request: discovery_pb2.DiscoveryRequest, stream: SotwStream) -> None:
        if request.type_url not in ("", TYPE_URL):
            raise ValueError(f"this service has no {request.type_url}")
        rejected = request.HasField("error_detail")
        sent = stream.sent_version or ""
        reaction = stream.receive(
            names=request.resource_names, nonce=request.response_nonce, rejected=rejected
        )
        message = request.error_detail.message if rejected else ""
        if reaction is not Reaction.NACK:
            log.debug("discovery request", reaction=reaction, node=request.node.id)
            return
        log.error("Envoy refused the endpoints", version=sent, message=message)
        if self._on_nack is not None:
            self._on_nack(sent, message)

    def _wake_all(self) -> None:
        for wake in self._wakers:
            wake.set()


def _response(stream: SotwStream, snapshot: _Snapshot) -> Message:
    resources = []
    for name in stream.names:
        known = snapshot.resources.get(name)
        packed = any_pb2.Any()
        packed.Pack(load_assignment(name, ()) if known is None else known)
        resources.append(packed)
    response: Message = discovery_pb2.DiscoveryResponse(
        version_info=snapshot.version,
        type_url=TYPE_URL,
        nonce=stream.send(snapshot.version),
        resources=resources,
    )
    return response


async def _finish(reader: asyncio.Task[None], context: grpc.aio.ServicerContext[Any, Any]) -> None:
    error = reader.exception() if not reader.cancelled() else None
    if isinstance(error, ValueError):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if error is not None:
        raise error
