"""A toy policy server: the least that Envoy needs, told by the test what to answer.

Stays apart from the real policy server on purpose: it shows what Envoy does, and records every
message as it came. Also a program, for tests that freeze or kill a process.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.endpoint.v3 import eds_pb2_grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as ext_proc_grpc
from envoy.type.v3 import http_status_pb2
from google.protobuf import any_pb2, struct_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pointsman_policy.eds import CLUSTER, POLICY_KEY, EdsEndpoint, load_assignment

PICK = "x-gateway-destination-endpoint"


@dataclass(frozen=True)
class Target:
    """One endpoint as EDS announces it."""

    address: str
    models: tuple[str, ...]
    expert: str
    ready: bool = True
    policies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What `decide` answers to a body."""

    model: str | None = None
    picks: tuple[str, ...] = ()
    explain: bool = False
    why: str = "because"
    policy: str | None = None


@dataclass
class Stream:
    """All messages of one ext_proc stream, in order, and how it ended."""

    metadata: dict[str, str]
    messages: list[ext_proc.ProcessingRequest] = field(default_factory=list)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    end: str = ""

    @property
    def kinds(self) -> list[str]:
        return [str(message.WhichOneof("request")) for message in self.messages]

    def headers(self, kind: str = "request_headers") -> dict[str, str]:
        for message in self.messages:
            if message.WhichOneof("request") == kind:
                headers = getattr(message, kind).headers.headers
                return {h.key: h.raw_value.decode() or h.value for h in headers}
        return {}

    async def wait_for(self, condition: Callable[["Stream"], bool]) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: condition(self))


class ToyPolicy(
    ext_proc_grpc.ExternalProcessorServicer, eds_pb2_grpc.EndpointDiscoveryServiceServicer
):
    def __init__(self) -> None:
        self.targets: tuple[Target, ...] = ()
        self.decision = Decision()
        self.decisions: dict[str, Decision] = {}
        self.immediate: ext_proc.ImmediateResponse | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.streams: list[Stream] = []
        self.order: list[tuple[str, str]] = []
        self._new_stream = asyncio.Condition()
        self._changed = asyncio.Condition()
        self._version = 1
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self, address: str = "127.0.0.1:0") -> None:
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", 64 << 20), ("grpc.so_reuseport", 0)]
        )
        ext_proc_grpc.add_ExternalProcessorServicer_to_server(self, server)
        eds_pb2_grpc.add_EndpointDiscoveryServiceServicer_to_server(self, server)
        servicer = health.aio.HealthServicer()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = server.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def announce(self, targets: Sequence[Target]) -> None:
        async with self._changed:
            self.targets = tuple(targets)
            self._version += 1
            self._changed.notify_all()

    def of(self, filter_name: str) -> list[Stream]:
        return [s for s in self.streams if s.metadata.get("x-pointsman-filter") == filter_name]

    async def stream(self, filter_name: str, index: int = 0) -> Stream:
        """Return the stream number `index` of that filter, waiting until it exists."""
        async with self._new_stream:
            await self._new_stream.wait_for(lambda: len(self.of(filter_name)) > index)
        return self.of(filter_name)[index]

    async def StreamEndpoints(self, request_iterator, _context):  # noqa: N802
        await anext(request_iterator)
        acks = asyncio.create_task(_drain(request_iterator))
        sent = 0
        try:
            while not acks.done():
                async with self._changed:
                    await self._changed.wait_for(lambda seen=sent: self._version != seen)
                    sent = self._version
                yield _discovery_response(self.targets, str(sent))
        finally:
            acks.cancel()

    async def Process(self, request_iterator, context):  # noqa: N802
        stream = Stream({key: str(value) for key, value in context.invocation_metadata()})
        name = stream.metadata.get("x-pointsman-filter", "?")
        async with self._new_stream:
            self.streams.append(stream)
            self._new_stream.notify_all()
        try:
            async for message in request_iterator:
                async with stream.arrived:
                    stream.messages.append(message)
                    self.order.append((name, str(message.WhichOneof("request"))))
                    stream.arrived.notify_all()
                if name == "decide":
                    await self.go_on.wait()
                    yield self._answer(message, stream)
            stream.end = "half-closed"
        except asyncio.CancelledError:
            stream.end = "cancelled"
            raise
        finally:
            stream.ended.set()

    def _answer(self, message, stream: Stream) -> ext_proc.ProcessingResponse:
        if self.immediate is not None:
            return ext_proc.ProcessingResponse(immediate_response=self.immediate)
        if message.WhichOneof("request") == "request_headers":
            return ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
        decision = self.decisions.get(stream.headers().get(":path", ""), self.decision)
        return answer_body(message.request_body.body, decision)


def answer_body(body: bytes, decision: Decision) -> ext_proc.ProcessingResponse:
    common = ext_proc.CommonResponse()
    if decision.model is not None:
        changed = json.dumps(json.loads(body) | {"model": decision.model}).encode()
        common.body_mutation.body = changed
        length = common.header_mutation.set_headers.add()
        length.header.key, length.header.raw_value = "content-length", str(len(changed)).encode()
    response = ext_proc.ProcessingResponse(
        request_body=ext_proc.BodyResponse(response=common), dynamic_metadata=struct_pb2.Struct()
    )
    pointsman = {
        "policy": "auto",
        "expert": "picked-expert",
        "endpoint": decision.picks[0] if decision.picks else "",
        "why": decision.why,
        "explain": decision.explain,
        "decision_id": "d-1",
    }
    response.dynamic_metadata.update({"pointsman": pointsman})
    balancing = {PICK: ",".join(decision.picks)} if decision.picks else {}
    if decision.policy is not None:
        balancing[POLICY_KEY] = decision.policy
    if balancing:
        response.dynamic_metadata.update({"envoy.lb": balancing})
    return response


def immediate(status: int, body: str) -> ext_proc.ImmediateResponse:
    answer = ext_proc.ImmediateResponse(
        status=http_status_pb2.HttpStatus(code=status), body=body.encode(), details="pointsman"
    )
    header = answer.headers.set_headers.add()
    header.header.key, header.header.raw_value = "content-type", b"application/json"
    return answer


async def _drain(iterator) -> None:
    async for _ in iterator:
        pass


def _discovery_response(targets: Sequence[Target], version: str):
    # Health and weights are what Envoy is tested with: the product's own message.
    endpoints = [EdsEndpoint(t.address, t.models, t.expert, t.ready, t.policies) for t in targets]
    assignment = load_assignment(CLUSTER, endpoints)
    resource = any_pb2.Any()
    resource.Pack(assignment)
    return discovery_pb2.DiscoveryResponse(
        version_info=version, resources=[resource], type_url=resource.type_url, nonce=version
    )


async def main(arguments: str) -> None:
    """Serve until killed: `{"targets": [[address, [model…], expert]…], "model", "picks"}`."""
    wanted = json.loads(arguments)
    policy = ToyPolicy()
    policy.decision = Decision(model=wanted["model"], picks=tuple(wanted["picks"]))
    await policy.announce([Target(a, tuple(m), e) for a, m, e in wanted["targets"]])
    await policy.start()
    print(policy.address, flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
