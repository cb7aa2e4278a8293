"""Open-loop load: each request starts at its own time, however slow the answers are."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import aiohttp
import orjson

from pointsman_cli.demo.stream import AnswerMeter
from pointsman_core.workload import Workload

CHARACTERS_PER_TOKEN = 4
"""Rule of thumb by which prompts are lengthened; the engine simulator counts the same."""
REQUEST_TIMEOUT_S = 120.0
"""A client gives up then; the request counts as failed."""
REJECTION_CODES = frozenset({"over_limit"})
"""Codes of error objects by which the policy server refuses a request on purpose."""
FALLBACK_MARK = "(fallback: "
"""How the policy server tells, in the reason of a decision, that the algorithm had failed."""
PADDING = "\n\n(padding up to the input length of the trace)\n"


class Ending(StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REJECTED = "rejected"
    """Refused by the router with a reason."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a run."""

    at_s: float
    """Seconds after the start of the run."""
    body: bytes


@dataclass(slots=True)
class Outcome:
    """What became of one request; seconds count from the start of the run."""

    index: int
    arrival_s: float
    """When it was due; a late sender must not make latencies look better."""
    ending: Ending = Ending.FAILED
    reason: str = ""
    """Why it was rejected or failed."""
    expert: str | None = None
    """Name of the expert that really answered; None: the gateway did not say."""
    endpoint: str | None = None
    decided: bool = False
    """Whether the policy server chose; False: Envoy's fallback did."""
    fell_back: bool = False
    """Whether the policy's fallback chose, its own algorithm having failed."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0

    @property
    def ms_per_token(self) -> float | None:
        """(Last token - arrival) / output tokens, in milliseconds; None if unanswered."""
        if self.ending is not Ending.ANSWERED or self.last_token_s is None:
            return None
        return (self.last_token_s - self.arrival_s) * 1e3 / max(1, self.output_tokens)

    @property
    def ms_to_first_token(self) -> float | None:
        """First token - arrival, in milliseconds; None if unanswered."""
        if self.ending is not Ending.ANSWERED or self.first_token_s is None:
            return None
        return (self.first_token_s - self.arrival_s) * 1e3


@dataclass(slots=True)
class Progress:
    """What the live view shows of a run under way."""

    total: int
    sent: int = 0
    finished: list[Outcome] = field(default_factory=list)
    endings: Counter[Ending] = field(default_factory=Counter)

    @property
    def in_flight(self) -> int:
        """Requests sent and not ended."""
        return self.sent - len(self.finished)


def plan(
    workload: Workload, *, model: str, max_tokens: int, max_input_tokens: int
) -> list[Planned]:
    """Bodies and times of all requests of a workload.

    Prompts shorter than the trace's input are padded behind their text, up to
    ``max_input_tokens``; longer ones stay whole.
    """
    arrivals = workload.arrivals
    return [
        Planned(float(at), _body(model, prompt, min(int(tokens), max_input_tokens), max_tokens))
        for at, tokens, prompt in zip(
            arrivals.seconds, arrivals.input_tokens, workload.prompts, strict=True
        )
    ]


def _body(model: str, prompt: str, input_tokens: int, max_tokens: int) -> bytes:
    return orjson.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": padded(prompt, input_tokens)}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def padded(prompt: str, input_tokens: int) -> str:
    """The prompt, lengthened to about ``input_tokens`` tokens.

    Dots, since no keyword rule of a policy can take them for a domain's word.
    """
    missing = input_tokens * CHARACTERS_PER_TOKEN - len(prompt) - len(PADDING)
    return prompt + PADDING + ". " * (missing // 2) if missing > 0 else prompt


async def drive(
    session: aiohttp.ClientSession,
    url: str,
    requests: Sequence[Planned],
    progress: Progress,
    *,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> list[Outcome]:
    """Send all requests at their times and wait for all answers, in order of arrival."""
    # Not the event loop's clock: uvloop's has a resolution of 1 ms.
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, request in enumerate(requests):
            await asyncio.sleep(request.at_s - clock())
            outcome = Outcome(index=index, arrival_s=request.at_s)
            progress.sent += 1
            tasks.append(
                group.create_task(
                    _send(session, url, request.body, outcome, clock, progress, timeout_s)
                )
            )
    return [task.result() for task in tasks]


async def _send(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    outcome: Outcome,
    clock: Callable[[], float],
    progress: Progress,
    timeout_s: float,
) -> Outcome:
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(session, url, body, outcome, clock)
    except TimeoutError:
        outcome.reason = f"no end of the answer within {timeout_s:.0f} s"
    except aiohttp.ClientError as error:
        outcome.reason = f"connection: {type(error).__name__}"
    progress.finished.append(outcome)
    progress.endings[outcome.ending] += 1
    return outcome


async def _exchange(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    outcome: Outcome,
    clock: Callable[[], float],
) -> None:
    headers = {"content-type": "application/json"}
    async with session.post(url, data=body, headers=headers) as response:
        outcome.expert = response.headers.get("x-pointsman-expert")
        outcome.endpoint = response.headers.get("x-pointsman-endpoint")
        why = response.headers.get("x-pointsman-why", "")
        outcome.decided, outcome.fell_back = bool(why), FALLBACK_MARK in why
        if response.status != 200:
            _refused(outcome, response.status, await response.read())
            return
        meter = AnswerMeter()
        async for chunk in response.content.iter_any():
            meter.feed(chunk, clock())
    _answered(outcome, meter)


def _answered(outcome: Outcome, meter: AnswerMeter) -> None:
    outcome.first_token_s = meter.first_token_s
    outcome.last_token_s = meter.last_token_s
    outcome.output_tokens = meter.output_tokens
    if meter.complete and meter.last_token_s is not None:
        outcome.ending = Ending.ANSWERED
    else:
        outcome.reason = meter.error or "the stream ended early"


def _refused(outcome: Outcome, status: int, body: bytes) -> None:
    """Tell a rejection by the router from a failure; the error object says which."""
    try:
        error = orjson.loads(body).get("error", {})
        code, message = error.get("code"), str(error.get("message") or "")
    except (orjson.JSONDecodeError, AttributeError):
        code, message = None, body[:80].decode(errors="replace")
    outcome.ending = Ending.REJECTED if code in REJECTION_CODES else Ending.FAILED
    outcome.reason = f"HTTP {status}: {message}"[:200]
