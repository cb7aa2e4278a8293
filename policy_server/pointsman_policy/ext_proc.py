"""The gRPC transport of Envoy's external processing, for both filters."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorServicer

from pointsman_policy.decide_stream import DecideStream
from pointsman_policy.observe_stream import ObserveStream
from pointsman_policy.service import RoutingService

FILTER_KEY = "x-pointsman-filter"
"""gRPC metadata by which Envoy's configuration tells the two filters apart."""

TOGETHER_S = 0.1
"""Streams of one connection that end without an end within this time end for one reason."""

_Context = grpc.aio.ServicerContext[ProcessingRequest, ProcessingResponse]
log = structlog.get_logger(__name__)


class ExtProcServicer(ExternalProcessorServicer):  # type: ignore[misc]
    """Serves ``decide`` and ``observe`` streams, one per HTTP request each."""

    def __init__(self, service: RoutingService, *, body_limit_bytes: int) -> None:
        self._service = service
        self._body_limit = body_limit_bytes
        self._endings = _Endings()

    async def Process(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[ProcessingRequest], context: _Context
    ) -> None:
        """Serve one HTTP request. Ends early: Envoy then goes on without asking again."""
        del request_iterator  # read() is the faster API
        name = _filter_of(context)
        try:
            if name == "observe":
                await self._observe(context)
            else:
                await self._decide(context)
        except Exception:
            self._service.metrics.internal_errors.labels(name).inc()
            log.exception("ext_proc stream failed", filter=name)
            raise

    async def _decide(self, context: _Context) -> None:
        stream = DecideStream(self._service, body_limit_bytes=self._body_limit)
        while not stream.done:
            message: Any = await context.read()
            if message is grpc.aio.EOF:
                return
            answer = stream.handle(message)
            if answer is not None:
                await context.write(answer)

    async def _observe(self, context: _Context) -> None:
        stream = ObserveStream(self._service)
        try:
            while not stream.done:
                message: Any = await context.read()
                if message is grpc.aio.EOF:
                    return
                stream.handle(message)
        finally:  # also when the stream is reset, which cancels this coroutine
            if not stream.done:
                self._endings.add(context.peer(), stream)


class _Endings:
    """Streams that ended before their request did, put right together.

    Envoy closes and resets such a stream at once, and where a connection is lost gRPC shows the
    same. But what Envoy closes was silent for a while before; so one stream that was not proves
    that the connection was lost, and with it all that ended in that moment.
    """

    def __init__(self) -> None:
        self._by_peer: dict[str, list[ObserveStream]] = {}

    def add(self, peer: str, stream: ObserveStream) -> None:
        """Take in one that ended just now, and end it soon."""
        if peer not in self._by_peer:
            self._by_peer[peer] = []
            asyncio.get_running_loop().call_later(TOGETHER_S, self._end, peer)
        stream.cut()
        self._by_peer[peer].append(stream)

    def _end(self, peer: str) -> None:
        streams = self._by_peer.pop(peer)
        lost = any(stream.was_speaking for stream in streams)
        for stream in streams:
            if lost:
                stream.lose()
            else:
                stream.close()


def _filter_of(context: _Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == FILTER_KEY:
            return value if isinstance(value, str) else value.decode()
    return "decide"
