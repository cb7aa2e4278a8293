"""HTTP server round an `Engine`."""

import asyncio
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from pointsman_engine_sim.answers import Answer
from pointsman_engine_sim.engine import Engine, Generation
from pointsman_engine_sim.metrics import EngineMetrics
from pointsman_engine_sim.protocol import (
    CHAT,
    COMPLETION,
    APIError,
    ChatRequest,
    CompletionRequest,
    Dialect,
    Reply,
    parse,
)
from pointsman_engine_sim.settings import EngineSettings

SIMULATED_HEADER = "x-simulated-engine"
DRAIN_SECONDS = 5.0
"""How long running requests may take to finish after the order to stop."""
_MAX_BODY_BYTES = 64 * 2**20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(settings: EngineSettings) -> web.Application:
    """Build the server; its engine runs from start-up to clean-up of the application.

    Run it with ``handler_cancellation=True``, or requests whose client has gone stay in
    the batch until they are complete.
    """
    metrics = EngineMetrics(settings)
    routes = _Routes(settings, metrics)
    app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_errors_as_json])
    app.cleanup_ctx.append(routes.run_engine)
    app.on_response_prepare.append(_mark_as_simulated)
    app.on_shutdown.append(routes.drain)
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_post("/v1/completions", routes.completion)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    return app


@asynccontextmanager
async def running(settings: EngineSettings) -> AsyncIterator[str]:
    """Run an engine in this event loop; gives its base URL, without a slash at the end.

    At the end it stops accepting and waits up to `DRAIN_SECONDS` for running requests.
    """
    runner = web.AppRunner(
        build_app(settings),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=1.0,  # by then _Routes.drain has waited
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
        host, port = runner.addresses[0][:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def serve(settings: EngineSettings, *, on_ready: Callable[[str], None]) -> None:
    """Run an engine until SIGTERM or SIGINT; ``on_ready`` gets its base URL."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings) as url:
        on_ready(url)
        await stop.wait()


class _Routes:
    """Handlers of one application."""

    def __init__(self, settings: EngineSettings, metrics: EngineMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engine = Engine(settings, metrics)
        self._faults = random.Random(settings.seed)
        self._started = int(time.time())
        self._engine_alive: Callable[[], bool] = lambda: False
        self._answering: set[asyncio.Task[Any]] = set()

    async def run_engine(self, _: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._engine.run(), name="engine")
        self._engine_alive = lambda: not task.done()
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def drain(self, _: web.Application) -> None:
        """Let running requests finish, but only for so long."""
        if self._answering:
            waited = await asyncio.wait(self._answering, timeout=DRAIN_SECONDS)
            for task in waited[1]:
                task.cancel()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = parse(ChatRequest, await request.read())
        return await self._answer(request, body, CHAT)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        body = parse(CompletionRequest, await request.read())
        return await self._answer(request, body, COMPLETION)

    async def models(self, _: web.Request) -> web.Response:
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "pointsman-engine-sim",
                "root": self._settings.model,
                "parent": None,
                "max_model_len": self._settings.max_model_len,
            }
            for name in self._settings.served_models
        ]
        return _json(orjson.dumps({"object": "list", "data": cards}))

    async def health(self, _: web.Request) -> web.Response:
        if self._engine_alive():
            return web.Response()
        raise APIError(HTTPStatus.SERVICE_UNAVAILABLE, "The engine has stopped.")

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.page(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    async def _answer(
        self, request: web.Request, body: ChatRequest | CompletionRequest, dialect: Dialect
    ) -> web.StreamResponse:
        self._check_model(body)
        reply = self._plan(request, body, dialect)
        self._hold_open()
        await self._misbehave()
        generation = self._engine.submit(
            prompt_tokens=reply.prompt_tokens,
            output_tokens=reply.output_tokens,
            finish_reason=reply.finish_reason,
        )
        try:
            if body.stream:
                return await self._stream(
                    request, reply, generation, include_usage=body.include_usage
                )
            return await self._whole(request, reply, generation)
        finally:
            self._engine.cancel(generation)

    def _hold_open(self) -> None:
        """Make `drain` wait until this handler's response is out."""
        task = asyncio.current_task()
        if task is not None:
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    def _check_model(self, body: ChatRequest | CompletionRequest) -> None:
        if body.model is not None and body.model not in self._settings.served_models:
            message = f"The model `{body.model}` does not exist."
            raise APIError(HTTPStatus.NOT_FOUND, message, param="model")

    def _plan(
        self, request: web.Request, body: ChatRequest | CompletionRequest, dialect: Dialect
    ) -> Reply:
        """Settle length and text of the answer; raises `APIError` if it can not fit."""
        settings = self._settings
        answer = Answer(model=settings.model, prompt=body.prompt_text, seed=settings.seed)
        room = self._room(body)
        limit = room if body.limit is None else body.limit
        natural = answer.natural_tokens(settings.expected_output_tokens)
        wanted = max(natural, body.min_tokens)
        stops = wanted <= limit and not body.ignore_eos
        tokens = wanted if stops else limit
        cut = answer.stopped(tokens, body.stop, least=body.min_tokens) if body.stop else None
        return Reply(
            dialect=dialect,
            request_id=request.headers.get("x-request-id") or uuid.uuid4().hex,
            model=settings.model,
            created=int(time.time()),
            answer=answer,
            prompt_tokens=body.prompt_tokens,
            output_tokens=cut.tokens if cut else tokens,
            finish_reason="stop" if stops or cut else "length",
            cut=cut,
        )

    def _room(self, body: ChatRequest | CompletionRequest) -> int:
        """Tokens that the context leaves for the answer."""
        context = self._settings.max_model_len
        prompt = body.prompt_tokens
        room = context - prompt
        if room < 1:
            raise APIError(
                HTTPStatus.BAD_REQUEST,
                f"This model's maximum context length is {context} tokens. However, your "
                f"request has {prompt} input tokens. Please reduce the length of the input.",
                param="input_tokens",
            )
        if body.limit is not None and body.limit > room:
            raise APIError(
                HTTPStatus.BAD_REQUEST,
                f"'max_tokens' or 'max_completion_tokens' is too large: {body.limit}. This "
                f"model's maximum context length is {context} tokens and your request has "
                f"{prompt} input tokens ({body.limit} > {context} - {prompt}).",
                param="max_tokens",
            )
        return room

    async def _misbehave(self) -> None:
        if self._settings.faults.stall:
            await asyncio.Event().wait()  # until the client goes away
        if self._faults.random() < self._settings.faults.error_rate:
            self._metrics.success["error"].inc()
            raise APIError(HTTPStatus.INTERNAL_SERVER_ERROR, "Simulated engine error.")

    async def _stream(
        self, request: web.Request, reply: Reply, generation: Generation, *, include_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        total, dropped = self._fate(reply)
        sent = 0
        pending = reply.opening()  # goes with the first token, as vLLM does it
        while sent < total:
            ready = min(await generation.at_least(sent + 1), total)
            await response.write(pending + reply.tokens(sent, ready))
            sent, pending = ready, b""
        if dropped:
            _drop_connection(request)
        else:
            await response.write_eof(reply.closing(include_usage=include_usage))
        return response

    async def _whole(
        self, request: web.Request, reply: Reply, generation: Generation
    ) -> web.StreamResponse:
        total, dropped = self._fate(reply)
        await generation.at_least(total)
        response = _json(reply.body())
        if dropped:
            _drop_connection(request)
        return response

    def _fate(self, reply: Reply) -> tuple[int, bool]:
        """Tokens to hand out, and whether the connection is dropped then."""
        after = self._settings.faults.fail_after_tokens
        if after is None or after >= reply.output_tokens:
            return reply.output_tokens, False
        return after, True


def _drop_connection(request: web.Request) -> None:
    """Close the connection; what the handler returns then goes nowhere."""
    if request.transport is not None:
        request.transport.close()


def _json(body: bytes, *, status: int = HTTPStatus.OK) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except APIError as error:
        return _json(error.body(), status=error.status)
    except web.HTTPException as error:  # unknown path, wrong method, body too large
        status = HTTPStatus(error.status)
        return _json(APIError(status, status.phrase).body(), status=status)


async def _mark_as_simulated(_: web.Request, response: web.StreamResponse) -> None:
    response.headers[SIMULATED_HEADER] = "true"
