"""How the streams of Envoy's filters end, over real gRPC connections."""

import asyncio
import contextlib

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.service.ext_proc.v3.external_processor_pb2 import HttpHeaders, ProcessingRequest
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import (
    ExternalProcessorStub,
    add_ExternalProcessorServicer_to_server,
)

from pointsman_policy.ext_proc import FILTER_KEY, ExtProcServicer
from pointsman_policy.observe_stream import SILENT_BEFORE_CLOSE_S
from pointsman_policy.openai_api import parse_completion
from pointsman_policy.server import grpc_options
from pointsman_policy.service import Limits

POLICY = "default/auto"


@contextlib.asynccontextmanager
async def serving(service, **options):
    """The address of an ext_proc server."""
    server = grpc.aio.server(options=grpc_options(1024, **options))
    servicer = ExtProcServicer(service, body_limit_bytes=1024)
    add_ExternalProcessorServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


async def observed(service, channel, request_id="r1"):
    """An ``observe`` stream in the middle of a request."""
    known = len(service.tracker)
    call = ExternalProcessorStub(channel).Process(metadata=((FILTER_KEY, "observe"),))
    headers = HeaderMap(headers=[HeaderValue(key="x-request-id", raw_value=request_id.encode())])
    await call.write(ProcessingRequest(request_headers=HttpHeaders(headers=headers)))
    await until(lambda: len(service.tracker) > known)
    completion = parse_completion(b'{"model": "auto", "prompt": "x"}')
    service.route(completion, Limits(), request_id=request_id, arrival_s=service.clock())
    return call


async def until(holds):
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - the tracker tells nobody
            await asyncio.sleep(0.01)


def outcomes(service):
    """Requests that ended, by how."""
    (family,) = service.metrics.completions.collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}


@pytest.fixture
async def channel(service):
    async with serving(service) as address, grpc.aio.insecure_channel(address) as channel:
        yield channel


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_a_silent_stream_that_ends_early_was_aborted(how, service, channel):
    """So Envoy ends it, some time after the client went away or the engine died."""
    call = await observed(service, channel)
    service.clock.now += 2 * SILENT_BEFORE_CLOSE_S
    if how == "closed":
        await call.done_writing()
    else:
        call.cancel()
    await until(lambda: not len(service.tracker))
    assert outcomes(service) == {"aborted": 1}
    assert len(service.state) == 0
    assert service.statistics.totals(POLICY, now_s=service.clock()).failed == 1


async def test_streams_that_are_cut_off_together_while_one_speaks_are_no_failures(service, channel):
    """The connection was lost; the answers may well go on."""
    await observed(service, channel, "silent")
    service.clock.now += 2 * SILENT_BEFORE_CLOSE_S
    await observed(service, channel, "speaking")
    await channel.close()
    await until(lambda: not len(service.tracker))
    assert outcomes(service) == {"unknown": 2}
    assert len(service.state) == 0
    assert service.statistics.totals(POLICY, now_s=service.clock()).requests == 0


@contextlib.asynccontextmanager
async def network(address):
    """A way to an address, and what makes it silent: connections stay, nothing passes."""
    pipes, writers = [], []

    async def pass_on(reader, writer):
        while data := await reader.read(65_536):
            writer.write(data)

    async def connect(reader, writer):
        back, forth = await asyncio.open_connection(*address.split(":"))
        writers.extend((writer, forth))
        pairs = ((reader, forth), (back, writer))
        pipes.extend(asyncio.create_task(pass_on(*pair)) for pair in pairs)

    def silence():
        for pipe in pipes:
            pipe.cancel()

    front = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        host, port = front.sockets[0].getsockname()
        yield f"{host}:{port}", silence
    finally:
        front.close()
        silence()
        await asyncio.gather(*pipes, return_exceptions=True)
        for writer in writers:
            writer.close()


async def test_an_envoy_whose_host_vanishes_leaves_nothing_behind(service):
    async with (
        serving(service, ping_after_s=0.1, ping_timeout_s=0.1) as address,
        network(address) as (way, silence),
        grpc.aio.insecure_channel(way) as channel,
    ):
        call = await observed(service, channel)
        silence()
        await until(lambda: not len(service.tracker))
        assert outcomes(service) == {"unknown": 1}
        call.cancel()
