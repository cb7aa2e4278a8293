"""Talking to an OpenAI-compatible engine: exact loads, streams timed token by token, counters."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pointsman_learning.calibration.measurements import CalibrationError

ITERATIONS = "vllm:iteration_tokens_total_count"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE = "vllm:cache_config_info"
_WANTED = (ITERATIONS, RUNNING, WAITING, CACHE)

TOKEN_IDS = range(10, 1000)
"""Ids that every vocabulary has; drawn anew for each prompt, so that no prefix is cached."""
CONNECT_S = 10.0
SILENCE_S = 300.0
"""No engine under these loads is silent for so long, unless it hangs."""


def now() -> float:
    """Seconds on the running event loop's clock."""
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class Stream:
    """One request under way; times are those of `now`."""

    prompt_tokens: int
    output_tokens: int
    """As asked for."""
    sent_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    chunks: int = 0
    """Chunks so far; an engine that falls behind sends several tokens in one."""
    usage_tokens: int | None = None
    """Tokens so far by the engine's own count, where it tells."""
    finish_reason: str | None = None
    watchers: list[Callable[[], None]] = field(default_factory=list)
    """Called after each chunk and at the end."""

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self.chunks if self.usage_tokens is None else self.usage_tokens

    @property
    def per_token_s(self) -> float:
        """Time from sending to last token over output tokens."""
        if self.last_token_s is None:
            return float("inf")
        return (self.last_token_s - self.sent_s) / self.output_tokens

    def take(self, event: dict[str, Any], now_s: float) -> None:
        """Note one server-sent event."""
        tokens = self.tokens
        for choice in event.get("choices") or ():
            finished = choice.get("finish_reason")
            self.finish_reason = finished or self.finish_reason
            # The last token may be without text; some engines end with an empty chunk.
            if choice.get("text") or not finished or not self.chunks:
                self.chunks += 1
        usage = event.get("usage")
        if isinstance(usage, dict):
            self.usage_tokens = int(usage.get("completion_tokens") or 0)
        if event.get("choices") and self.tokens > tokens:
            self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = now_s

    def check(self) -> None:
        """Raise `CalibrationError` if the answer has not the length that was asked for."""
        if self.tokens != self.output_tokens:
            raise CalibrationError(
                f"asked for exactly {self.output_tokens} tokens, the engine answered "
                f"{self.tokens}: it must honour ignore_eos or min_tokens for a calibration"
            )


@dataclass(frozen=True, slots=True)
class Counters:
    """The engine's own counts at one moment."""

    at_s: float
    iterations: float | None
    """None: the engine does not tell."""
    running: float | None
    waiting: float | None
    kv_capacity_tokens: int | None


class EngineClient:
    """An engine and one model of it."""

    def __init__(self, http: httpx.AsyncClient, *, model: str, seed: int = 0) -> None:
        self._http = http
        self._url = str(http.base_url).rstrip("/")
        self._model = model
        self._random = random.Random(seed)

    async def max_model_len(self) -> int | None:
        """Limit on prompt and answer, where the engine tells it.

        Raises `CalibrationError` if it does not serve the model.
        """
        response = await self._get("/v1/models")
        served = {str(entry.get("id")): entry for entry in response.json().get("data", ())}
        if self._model not in served:
            raise CalibrationError(
                f"the engine serves {', '.join(served) or 'nothing'}, not {self._model}"
            )
        length = served[self._model].get("max_model_len")
        return int(length) if length else None

    async def counters(self) -> Counters:
        """Read the metrics page; whatever it lacks is None."""
        try:
            response = await self._http.get("/metrics")
        except httpx.HTTPError as error:
            raise CalibrationError(f"{self._url}/metrics: {_words(error)}") from error
        page = response.text if response.status_code == httpx.codes.OK else ""
        found = _samples(page)
        capacity = found.get(CACHE)
        return Counters(
            at_s=now(),
            iterations=found.get(ITERATIONS),
            running=found.get(RUNNING),
            waiting=found.get(WAITING),
            kv_capacity_tokens=None if capacity is None else int(capacity),
        )

    async def complete(self, stream: Stream) -> None:
        """Send the request and read its whole answer into ``stream``."""
        body = {
            "model": self._model,
            "prompt": self._random.choices(TOKEN_IDS, k=stream.prompt_tokens),
            "max_tokens": stream.output_tokens,
            "min_tokens": stream.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            # vLLM's own second option: with each chunk, for when it falls behind.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        stream.sent_s = now()
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode(errors="replace")
                    raise CalibrationError(
                        f"the engine answered {response.status_code}: {text[:300]}"
                    )
                async for line in response.aiter_lines():
                    _take_line(stream, line)
        except httpx.HTTPError as error:
            raise CalibrationError(f"{self._url}: {_words(error)}") from error
        _call(stream.watchers)

    async def _get(self, path: str) -> httpx.Response:
        try:
            response = await self._http.get(path)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise CalibrationError(f"{self._url}: {_words(error)}") from error
        return response


@asynccontextmanager
async def connect(url: str, *, model: str, seed: int = 0) -> AsyncIterator[EngineClient]:
    """Open a client for the engine at ``url`` (with or without ``/v1``)."""
    base = url.rstrip("/").removesuffix("/v1")
    timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, timeout=timeout, limits=limits) as http:
        yield EngineClient(http, model=model, seed=seed)


def _take_line(stream: Stream, line: str) -> None:
    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
        return
    now_s = now()
    try:
        event = json.loads(data)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"not JSON in the engine's stream: {data[:80]!r}") from error
    if not isinstance(event, dict) or event.get("error"):
        raise CalibrationError(f"an error came inside the engine's stream: {data[:300]}")
    stream.take(event, now_s)
    _call(stream.watchers)


def _call(watchers: list[Callable[[], None]]) -> None:
    for watcher in watchers:
        watcher()


def _samples(page: str) -> dict[str, float]:
    """Sums of the wanted samples; of the cache's description its size in tokens."""
    lines = "\n".join(line for line in page.splitlines() if line.startswith(_WANTED))
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            value = sample.value
            if sample.name == CACHE:
                value = float(sample.labels.get("kv_cache_size_tokens") or "nan")
            if value == value:  # not NaN
                found[sample.name] = found.get(sample.name, 0.0) + value
    return found


def _words(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
