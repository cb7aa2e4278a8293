"""Endpoint discovery over real gRPC, with a client that acts as Envoy does."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc
from google.rpc import status_pb2

from pointsman_policy.eds import TYPE_URL, EdsEndpoint, EdsServer

pytestmark = pytest.mark.integration

A = EdsEndpoint("10.0.0.1:8000", ("a",), "expert-a")
B = EdsEndpoint("[fd00::2]:8000", ("b",), "expert-b")


class Client:
    """One discovery stream."""

    def __init__(self, channel: grpc.aio.Channel):
        self.call = eds_pb2_grpc.EndpointDiscoveryServiceStub(channel).StreamEndpoints()

    async def ask(
        self,
        names: Sequence[str] = ("experts",),
        *,
        answer_to: discovery_pb2.DiscoveryResponse | None = None,
        error: str = "",
        type_url: str = TYPE_URL,
    ) -> None:
        request = discovery_pb2.DiscoveryRequest(resource_names=names, type_url=type_url)
        if answer_to is not None:
            request.response_nonce = answer_to.nonce
            request.version_info = "" if error else answer_to.version_info
        if error:
            request.error_detail.CopyFrom(status_pb2.Status(code=3, message=error))
        await self.call.write(request)

    async def response(self) -> discovery_pb2.DiscoveryResponse:
        response = await self.call.read()
        assert response is not grpc.aio.EOF
        return response

    async def acked(self) -> dict[str, list[str]]:
        """Addresses by cluster of the next response, which is acknowledged."""
        response = await self.response()
        await self.ask([name for name, _ in clusters(response)], answer_to=response)
        return dict(clusters(response))


def clusters(response: discovery_pb2.DiscoveryResponse) -> list[tuple[str, list[str]]]:
    result = []
    for resource in response.resources:
        assignment = endpoint_pb2.ClusterLoadAssignment()
        assert resource.Unpack(assignment)
        hosts = [
            host.endpoint.address.socket_address.address
            for group in assignment.endpoints
            for host in group.lb_endpoints
        ]
        result.append((assignment.cluster_name, hosts))
    return result


@pytest.fixture
async def nacks() -> asyncio.Queue[tuple[str, str]]:
    return asyncio.Queue()


@pytest.fixture
async def eds(nacks: asyncio.Queue[tuple[str, str]]) -> EdsServer:
    return EdsServer(on_nack=lambda *nack: nacks.put_nowait(nack))


@asynccontextmanager
async def serving(eds: EdsServer) -> AsyncIterator[tuple[grpc.aio.Server, grpc.aio.Channel]]:
    server = grpc.aio.server()
    eds_pb2_grpc.add_EndpointDiscoveryServiceServicer_to_server(eds, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, channel
    await server.stop(None)


@pytest.fixture
async def channel(eds: EdsServer) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(eds) as (_, channel):
        yield channel


async def test_endpoints_are_sent_and_pushed_when_they_change(
    eds: EdsServer, channel: grpc.aio.Channel
):
    eds.set_endpoints([A])
    client = Client(channel)
    await client.ask()
    assert await client.acked() == {"experts": ["10.0.0.1"]}
    eds.set_endpoints([A])  # nothing new: no push
    eds.set_endpoints([B, A])
    assert await client.acked() == {"experts": ["10.0.0.1", "fd00::2"]}
    eds.set_endpoints([])
    assert await client.acked() == {"experts": []}


async def test_a_stream_waits_for_the_first_endpoints(eds: EdsServer, channel: grpc.aio.Channel):
    client = Client(channel)
    await client.ask()
    answer = asyncio.create_task(client.acked())
    probe = Client(channel)  # a second stream's round trip: the first has been read by then
    await probe.ask(type_url="nonsense")
    await probe.call.code()
    assert not answer.done()
    eds.set_endpoints([A])
    assert await answer == {"experts": ["10.0.0.1"]}


async def test_every_envoy_gets_the_push(eds: EdsServer, channel: grpc.aio.Channel):
    eds.set_endpoints([A])
    clients = [Client(channel) for _ in range(3)]
    for client in clients:
        await client.ask()
        await client.acked()
    assert eds.streams == 3
    eds.set_endpoints([B])
    for client in clients:
        assert await client.acked() == {"experts": ["fd00::2"]}


async def test_unknown_clusters_are_answered_with_nothing(
    eds: EdsServer, channel: grpc.aio.Channel
):
    eds.set_endpoints([A])
    client = Client(channel)
    await client.ask(["other", "experts"])
    assert await client.acked() == {"other": [], "experts": ["10.0.0.1"]}


async def test_a_name_added_later_is_answered(eds: EdsServer, channel: grpc.aio.Channel):
    eds.set_endpoints([A])
    client = Client(channel)
    await client.ask(["other"])
    response = await client.response()
    await client.ask(["other", "experts"], answer_to=response)
    assert await client.acked() == {"other": [], "experts": ["10.0.0.1"]}


async def test_a_refused_version_is_counted_and_not_sent_again(
    eds: EdsServer, channel: grpc.aio.Channel, nacks: asyncio.Queue[tuple[str, str]]
):
    eds.set_endpoints([A])
    client = Client(channel)
    await client.ask()
    refused = await client.response()
    await client.ask(answer_to=refused, error="bad host")
    assert await nacks.get() == (refused.version_info, "bad host")
    eds.set_endpoints([B])
    later = await client.response()
    assert clusters(later) == [("experts", ["fd00::2"])]
    assert later.version_info != refused.version_info
    assert later.nonce != refused.nonce
    assert nacks.empty()


async def test_a_new_stream_gets_the_version_that_it_may_have_already(
    eds: EdsServer, channel: grpc.aio.Channel
):
    eds.set_endpoints([A])
    for _ in range(2):
        client = Client(channel)
        request = discovery_pb2.DiscoveryRequest(
            resource_names=["experts"], type_url=TYPE_URL, version_info=eds.version
        )
        await client.call.write(request)
        assert await client.acked() == {"experts": ["10.0.0.1"]}


async def test_another_type_is_refused(channel: grpc.aio.Channel):
    client = Client(channel)
    await client.ask(type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster")
    with pytest.raises(
        grpc.aio.AioRpcError, match=r"no type\.googleapis\.com/envoy\.config\.cluster"
    ):
        await client.call.read()
    assert await client.call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_streams_that_end_leave_nothing_behind(eds: EdsServer, channel: grpc.aio.Channel):
    eds.set_endpoints([A])
    half_closed, cancelled = Client(channel), Client(channel)
    for client in (half_closed, cancelled):
        await client.ask()
        await client.acked()
    await half_closed.call.done_writing()
    assert await half_closed.call.read() is grpc.aio.EOF
    assert await half_closed.call.code() is grpc.StatusCode.OK
    cancelled.call.cancel()
    while eds.streams:
        last = Client(channel)  # each round trip lets the server see the cancellation
        await last.ask()
        await last.acked()
        await last.call.done_writing()
        await last.call.code()


async def test_close_ends_the_streams_so_that_a_graceful_stop_is_quick(eds: EdsServer):
    eds.set_endpoints([A])
    async with serving(eds) as (server, channel):
        client = Client(channel)
        await client.ask()
        await client.acked()
        eds.close()
        await server.stop(grace=60)
        assert await client.call.read() is grpc.aio.EOF
        assert await client.call.code() is grpc.StatusCode.OK
