"""Measuring a running engine: designed loads, iterations counted by the engine itself.

Engines that do not count their iterations are measured by the chunks of their streams: a
sequence gets one token per iteration.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from pointsman_learning.calibration.client import Counters, EngineClient, Stream
from pointsman_learning.calibration.design import (
    KV_SHARE,
    SHORT_PROMPT,
    WARM_UP,
    Arrival,
    EngineLimits,
    Load,
    design,
)
from pointsman_learning.calibration.measurements import (
    CalibrationError,
    Measurement,
    Measurements,
)

ARRIVALS = 12
"""Prompts of one kind that join a batch one after another."""
BUDGET_TOKENS = 16_384
"""Prompt tokens of the burst by which the token budget is found; less where they do not fit."""
BURST_PROMPT = 2048
"""Tokens of one of its prompts; more where there are too few places."""
BURSTS = 3
FEW_ITERATIONS = 10
TOO_FEW_ITERATIONS = 5
"""Fewer say little about the budget."""
MISCOUNT_BURST = 1
DEFAULT_BUDGET = 512
DEFAULT_CONTEXT = 4096
DEFAULT_KV_TOKENS = 65_536
IDLE_POLL_S = 0.02
IDLE_WAIT_S = 60.0
BLIND_PAUSE_S = 0.5
"""Between two loads, where the engine does not tell how many requests it has."""

TRIES = 3
MISCOUNT = 3
COUNT_SHARE = 0.1
"""Iterations, or their share, by which two counts of a window may differ."""

Note = Callable[[str], None]


class NotMeasuredError(CalibrationError):
    """One load that could not be measured; the others still can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """What a user may tell of the engine; None: found out, or a default."""

    concurrency: int = 32
    context_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    max_batched_tokens: int | None = None
    iterations: int = 48
    """In one window."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Probed:
    """What was measured, and within which limits."""

    limits: EngineLimits
    measurements: Measurements


async def probe(client: EngineClient, options: ProbeOptions, *, note: Note) -> Probed:
    """Measure a running engine that has nothing else to do.

    ``note`` gets a line for each load. Raises `CalibrationError` for an engine that cannot
    be measured: not there, busy, or without exact output lengths.
    """
    seen = await client.counters()
    if seen.running or seen.waiting:
        raise CalibrationError(
            f"the engine is busy: {seen.running:g} requests run and {seen.waiting or 0:g} wait"
        )
    context = await client.max_model_len()
    await _warm_up(client)
    budget = options.max_batched_tokens
    context = min(context or DEFAULT_CONTEXT, options.context_tokens or 10**9)
    kv_tokens = options.kv_capacity_tokens or seen.kv_capacity_tokens or DEFAULT_KV_TOKENS
    if budget is None:
        budget = await _find_budget(
            client,
            context_tokens=context,
            concurrency=options.concurrency,
            kv_capacity_tokens=kv_tokens,
            note=note,
        )
    limits = EngineLimits(
        context_tokens=context,
        concurrency=options.concurrency,
        kv_capacity_tokens=kv_tokens,
        max_batched_tokens=budget,
    )
    rows: list[Measurement] = []
    loads = design(limits, iterations=options.iterations, seed=options.seed)
    for number, load in enumerate(loads, start=1):
        found = await _measure(client, load, iterations=options.iterations, note=note)
        rows += found
        times = ", ".join(f"{1e3 * row.iteration_seconds:.2f}" for row in found) or "nothing"
        note(f"{number}/{len(loads)}: {load.batch} x {load.prompt_tokens} tokens: {times} ms")
    return Probed(limits, Measurements.of(rows))


async def _warm_up(client: EngineClient) -> None:
    streams = [Stream(SHORT_PROMPT, WARM_UP) for _ in range(2)]
    await asyncio.gather(*map(client.complete, streams))
    for stream in streams:
        stream.check()


async def _find_budget(
    client: EngineClient,
    *,
    context_tokens: int,
    concurrency: int,
    kv_capacity_tokens: int,
    note: Note,
) -> int:
    """Tokens that the engine computes in one iteration, from bursts of prompts.

    One sequence decodes meanwhile: vLLM does not count an iteration that yields no token.
    Iterations without any prompt, while requests are on their way, are known from as many
    requests of one token. Disturbances only add iterations, so the fewest count.
    """
    if concurrency < 2:
        note(f"with --concurrency 1 maxBatchedTokens is not measured: {DEFAULT_BUDGET} is assumed")
        return DEFAULT_BUDGET
    for size in (BUDGET_TOKENS, 4 * BUDGET_TOKENS):
        tokens = min(size, int(KV_SHARE * kv_capacity_tokens) - SHORT_PROMPT)
        places = concurrency - 1
        length = min(max(BURST_PROMPT, -(-tokens // places)), context_tokens - 1, tokens)
        count = min(places, tokens // length)
        idle = await _burst(client, count, 1, context_tokens=context_tokens)
        whole = await _burst(client, count, length, context_tokens=context_tokens)
        if idle is None or whole is None:
            note(
                "the engine does not count its iterations: the chunks of its streams are"
                f" counted, and maxBatchedTokens {DEFAULT_BUDGET} is assumed"
            )
            return DEFAULT_BUDGET
        iterations = max(whole - idle + 1, 1)
        if iterations >= FEW_ITERATIONS:
            break
    budget = roundest(count * length + iterations, iterations)
    note(f"{count} prompts of {length} tokens took {iterations} iterations: {budget} each")
    if iterations < TOO_FEW_ITERATIONS or (budget % 512 and budget.bit_count() > 1):
        note(f"maxBatchedTokens {budget} is uncertain: give --max-batched-tokens if you know it")
    return budget


async def _burst(
    client: EngineClient, count: int, length: int, *, context_tokens: int
) -> int | None:
    """Fewest iterations in which so many prompts were served; None: the engine counts none."""
    beside = Load(batch=1, prompt_tokens=SHORT_PROMPT, output_tokens=context_tokens - SHORT_PROMPT)

    async def end() -> None:
        await asyncio.gather(*(client.complete(Stream(length, 1)) for _ in range(count)))

    fewest: list[float] = []
    for _ in range(BURSTS):
        async with _decoding(client, beside) as batch:
            window = await _window(client, batch, end)
        if not window.counted:
            return None
        fewest.append(window.iterations)
    return int(min(fewest))


def roundest(tokens: int, iterations: int) -> int:
    """The budget per iteration that explains a burst: of all the roundest number.

    The count may be off by `MISCOUNT_BURST`, and the last iteration may not be full.
    """
    low = -(-tokens // (iterations + MISCOUNT_BURST))
    high = max(low, tokens // max(iterations - 1 - MISCOUNT_BURST, 1))
    unit = 1
    while -(-low // (2 * unit)) * 2 * unit <= high:
        unit *= 2
    return -(-low // unit) * unit


# --- One load --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Window:
    seconds: float
    iterations: float
    context_tokens: float
    counted: bool
    """Whether by the engine itself."""

    @property
    def iteration_seconds(self) -> float:
        return self.seconds / self.iterations


class _Batch:
    """Sequences that decode together."""

    def __init__(self, streams: Sequence[Stream], tasks: Sequence[asyncio.Task[None]]) -> None:
        self.streams = streams
        self._tasks = tasks
        self._news = asyncio.Event()
        for stream in streams:
            stream.watchers.append(self._news.set)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for chunks until the condition holds, at the moment of one."""
        while True:
            self._news.clear()
            waiter = asyncio.ensure_future(self._news.wait())
            await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise NotMeasuredError(
                        "a sequence ended too soon: does the engine serve fewer at once?"
                    )
            if condition():
                return

    @property
    def tokens(self) -> float:
        """Mean number of tokens that a sequence has had."""
        return sum(stream.tokens for stream in self.streams) / len(self.streams)

    @property
    def context_tokens(self) -> float:
        """Tokens in the KV cache."""
        return sum(stream.prompt_tokens + stream.tokens for stream in self.streams)


@asynccontextmanager
async def _decoding(client: EngineClient, load: Load) -> AsyncIterator[_Batch]:
    """Keep the load's sequences decoding; on entry all have begun, on exit all are gone."""
    streams = [Stream(load.prompt_tokens, load.output_tokens) for _ in range(load.batch)]
    tasks = [asyncio.create_task(client.complete(stream)) for stream in streams]
    batch = _Batch(streams, tasks)
    try:
        await batch.until(lambda: all(stream.tokens for stream in streams))
        yield batch
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError, CalibrationError):
                await task
        await _idle(client)


async def _idle(client: EngineClient) -> None:
    try:
        async with asyncio.timeout(IDLE_WAIT_S):
            while (seen := await client.counters()).running or seen.waiting:  # noqa: ASYNC110
                await asyncio.sleep(IDLE_POLL_S)  # the page tells nobody when it changes
    except TimeoutError:
        raise CalibrationError(
            f"the engine still runs requests {IDLE_WAIT_S:g} s after their clients went away"
        ) from None
    if seen.running is None:
        await asyncio.sleep(BLIND_PAUSE_S)


async def _measure(
    client: EngineClient, load: Load, *, iterations: int, note: Note
) -> list[Measurement]:
    """Rows of one load; what could not be measured is noted and left out."""
    rows: list[Measurement] = []
    try:
        async with _decoding(client, load) as batch:
            rows.append(_row(load, await _decode(client, batch, iterations)))
            for arrival in load.arrivals:
                row = await _mixed(client, batch, load, arrival, iterations // 2)
                if row is None:
                    note(f"{arrival.prompt_tokens} prompt tokens were lost in the noise")
                else:
                    rows.append(row)
    except NotMeasuredError as error:
        note(f"{load.batch} x {load.prompt_tokens} tokens: {error}")
    return rows


async def _decode(client: EngineClient, batch: _Batch, iterations: int) -> _Window:
    async def end() -> None:
        wanted = batch.tokens + iterations
        await batch.until(lambda: batch.tokens >= wanted)

    start = batch.tokens + WARM_UP
    await batch.until(lambda: batch.tokens >= start)
    return await _window(client, batch, end)


async def _mixed(
    client: EngineClient, batch: _Batch, load: Load, arrival: Arrival, iterations: int
) -> Measurement | None:
    """Iterations that also prefill: what they take beyond those that only decode."""
    decode = await _decode(client, batch, iterations)

    async def end() -> None:
        for _ in range(ARRIVALS):
            await client.complete(Stream(arrival.prompt_tokens, 1))

    window = await _window(client, batch, end)
    mixed = ARRIVALS * arrival.chunks
    seconds = window.seconds - (window.iterations - mixed) * decode.iteration_seconds
    if window.iterations < mixed or seconds <= 0:
        return None
    held = arrival.tokens * (arrival.chunks + 1) / 2
    return Measurement(
        batch=load.batch,
        context_tokens=window.context_tokens + held,
        prefill_tokens=arrival.tokens,
        iteration_seconds=seconds / mixed,
        iterations=mixed,
    )


async def _window(
    client: EngineClient, batch: _Batch, end: Callable[[], Awaitable[None]]
) -> _Window:
    """Count and time iterations from now until ``end`` is over.

    The engine's count and that of the tokens received must agree. They do not when a busy
    machine let the client or the engine's API server fall behind; then once more.
    """
    for _ in range(TRIES):
        tokens, context = batch.tokens, batch.context_tokens
        before = await client.counters()
        await end()
        after = await client.counters()
        received = batch.tokens - tokens
        counted = _iterations(before, after)
        if counted is None or abs(counted - received) <= max(MISCOUNT, COUNT_SHARE * counted):
            return _Window(
                seconds=after.at_s - before.at_s,
                iterations=received if counted is None else counted,
                context_tokens=(context + batch.context_tokens) / 2,
                counted=counted is not None,
            )
    raise NotMeasuredError(
        f"{counted:g} iterations were counted, but {received:g} tokens of each sequence received: "
        "the machine is too busy"
    )


def _iterations(before: Counters, after: Counters) -> float | None:
    if before.iterations is None or after.iterations is None:
        return None
    return after.iterations - before.iterations


def _row(load: Load, window: _Window) -> Measurement:
    return Measurement(
        batch=load.batch,
        context_tokens=window.context_tokens,
        prefill_tokens=0,
        iteration_seconds=window.iteration_seconds,
        iterations=window.iterations,
    )
