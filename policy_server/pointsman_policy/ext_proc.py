"""The gRPC transport of Envoy's external processing, for both filters."""

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

_Context = grpc.aio.ServicerContext[ProcessingRequest, ProcessingResponse]
log = structlog.get_logger(__name__)


class ExtProcServicer(ExternalProcessorServicer):  # type: ignore[misc]
    """Serves ``decide`` and ``observe`` streams, one per HTTP request each."""

    def __init__(self, service: RoutingService, *, body_limit_bytes: int) -> None:
        self._service = service
        self._body_limit = body_limit_bytes

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
        finally:  # also when Envoy resets the stream, which cancels this coroutine
            stream.close()


def _filter_of(context: _Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == FILTER_KEY:
            return value if isinstance(value, str) else value.decode()
    return "decide"
