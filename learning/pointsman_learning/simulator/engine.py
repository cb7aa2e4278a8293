"""The inner loop: `pointsman_core.batching`'s rules for all endpoints, in simulated time.

Compiled by numba from plain loops over flat arrays, so that a simulation is copied by copying
a few arrays. No fast-math, and every float operation in core's order: equal to core's
`Batcher` and `CostModel` to the last bit (`reference.py` is what it is compared with).

Within an endpoint the batch, and behind it the queue, are always in order of submission
(see `Batcher`), so the batch is an array and the queue a linked list through the requests.

When things happen (ours):

- An iteration is planned when it begins: it takes in what was submitted up to that very
  time. Its tokens are given out, and the blocks of finished requests are freed, at its end.
- At equal times iterations end first, then gauges are read, then availability changes, then
  requests are submitted, then iterations begin.

Shapes: N requests, E endpoints, S places in the largest batch, K gauge readings kept.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_core.state import FloatArray, IntArray

F = TypeVar("F", bound=Callable[..., Any])

# Columns of ``requests`` (N, 8): one cache line per request.
PROMPT, OUTPUT, COMPUTED, GENERATED, BLOCKS, CHUNK, NEXT, PREEMPTIONS = range(8)
REQUEST_COLUMNS = 8
# Columns of ``times`` (N, 2), seconds; inf where it has not happened.
FIRST_TOKEN, FINISH = range(2)
# Columns of ``counts`` (E, 12).
(
    RUNNING,
    WAITING,
    HEAD,  # first of the queue, -1: none
    TAIL,
    FREE_BLOCKS,
    TOTAL_BLOCKS,
    BUDGET,
    PLACES,
    ITERATIONS,
    READINGS,  # gauge readings taken so far
    STATUS,
    LISTED,  # 1: the router takes it for ready
) = range(12)
COUNT_COLUMNS = 12
# Columns of ``clocks`` (E, 8), seconds.
(
    START,  # when the iteration in progress began or the next begins; inf: idle
    END,  # end of the iteration in progress; inf: none is
    SECONDS,  # its time by the cost model
    BUSY,
    OVERHEAD,
    COMPUTE,
    WEIGHTS,
    CONTEXT,
) = range(8)
CLOCK_COLUMNS = 8
# Values of STATUS.
READY, DRAINING, FAILED = range(3)
NOBODY = -1


def kernel(function: F) -> F:
    """Compile without fast-math; the machine code is kept between processes."""
    return cast("F", njit(cache=True, nogil=True, error_model="numpy")(function))


@kernel
def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


@kernel
def plan(
    requests: IntArray, running: IntArray, counts: IntArray, clocks: FloatArray, e: int
) -> None:
    """Begin an iteration of endpoint ``e`` at its START; what `Batcher.step` plans."""
    batch, budget, free = counts[e, RUNNING], counts[e, BUDGET], counts[e, FREE_BLOCKS]
    prefill, decode, context, preempted = 0, 0, 0, False
    index = 0
    while index < batch:
        r = running[e, index]
        pending = requests[r, PROMPT] + requests[r, GENERATED] - requests[r, COMPUTED]
        tokens = min(pending, budget)
        missing = blocks_of(requests[r, COMPUTED] + tokens) - requests[r, BLOCKS]
        gone = False
        while missing > free and not gone:
            batch -= 1
            victim = running[e, batch]
            free += requests[victim, BLOCKS]
            requests[victim, BLOCKS] = 0
            requests[victim, COMPUTED] = 0
            requests[victim, PREEMPTIONS] += 1
            requests[victim, NEXT] = counts[e, HEAD]
            counts[e, HEAD] = victim
            if counts[e, WAITING] == 0:
                counts[e, TAIL] = victim
            counts[e, WAITING] += 1
            preempted = True
            gone = victim == r
        if gone:
            break
        requests[r, BLOCKS] += missing
        free -= missing
        requests[r, CHUNK] = tokens
        budget -= tokens
        if requests[r, GENERATED] > 0 and pending == 1:
            decode += 1
        else:
            prefill += tokens
        context += requests[r, COMPUTED] + tokens
        index += 1
    while not preempted and counts[e, WAITING] > 0 and budget > 0 and batch < counts[e, PLACES]:
        r = counts[e, HEAD]
        known = requests[r, PROMPT] + requests[r, GENERATED]
        if blocks_of(known) > free:
            break
        tokens = min(known, budget)
        requests[r, BLOCKS] = blocks_of(tokens)
        free -= requests[r, BLOCKS]
        requests[r, CHUNK] = tokens
        budget -= tokens
        prefill += tokens
        context += tokens
        counts[e, HEAD] = requests[r, NEXT]
        requests[r, NEXT] = NOBODY
        counts[e, WAITING] -= 1
        running[e, batch] = r
        batch += 1
    counts[e, RUNNING], counts[e, FREE_BLOCKS] = batch, free
    # The same operations in the same order as CostModel.iteration_seconds.
    compute = clocks[e, COMPUTE] * (prefill + decode)
    memory = clocks[e, WEIGHTS] + clocks[e, CONTEXT] * context
    clocks[e, SECONDS] = clocks[e, OVERHEAD] + max(compute, memory)
    clocks[e, END] = clocks[e, START] + clocks[e, SECONDS]


@kernel
def complete(
    requests: IntArray,
    times: FloatArray,
    finished: IntArray,
    running: IntArray,
    counts: IntArray,
    clocks: FloatArray,
    token_s: FloatArray,
    token_offset: IntArray,
    e: int,
) -> None:
    """End the iteration of endpoint ``e``: give out its tokens."""
    end = clocks[e, END]
    kept = 0
    for index in range(counts[e, RUNNING]):
        r = running[e, index]
        requests[r, COMPUTED] += requests[r, CHUNK]
        if requests[r, COMPUTED] == requests[r, PROMPT] + requests[r, GENERATED]:
            if requests[r, GENERATED] == 0:
                times[r, FIRST_TOKEN] = end
            if len(token_s) > 0:
                token_s[token_offset[r] + requests[r, GENERATED]] = end
            requests[r, GENERATED] += 1
            if requests[r, GENERATED] == requests[r, OUTPUT]:
                times[r, FINISH] = end
                counts[e, FREE_BLOCKS] += requests[r, BLOCKS]
                requests[r, BLOCKS] = 0
                finished[finished[0]] = r
                finished[0] += 1
                continue
        running[e, kept] = r
        kept += 1
    counts[e, RUNNING] = kept
    counts[e, ITERATIONS] += 1
    clocks[e, BUSY] += clocks[e, SECONDS]
    clocks[e, START] = end if kept > 0 or counts[e, WAITING] > 0 else np.inf
    clocks[e, END] = np.inf


@kernel
def read_gauges(
    counts: IntArray, readings: FloatArray, gauges: FloatArray, e: int, until: float, open_end: bool
) -> None:
    """Note the KV usage at every reading time up to ``until`` (before it if ``open_end``)."""
    period, lag = gauges[0], gauges[1]
    while True:
        when = counts[e, READINGS] * period - lag
        if when > until or (open_end and when == until):
            return
        used = counts[e, TOTAL_BLOCKS] - counts[e, FREE_BLOCKS]
        value = used / counts[e, TOTAL_BLOCKS] if counts[e, STATUS] != FAILED else np.nan
        readings[e, counts[e, READINGS] % readings.shape[1]] = value
        counts[e, READINGS] += 1


@kernel
def advance(
    requests: IntArray,
    times: FloatArray,
    finished: IntArray,
    running: IntArray,
    counts: IntArray,
    clocks: FloatArray,
    readings: FloatArray,
    gauges: FloatArray,
    token_s: FloatArray,
    token_offset: IntArray,
    until: float,
) -> None:
    """Run all endpoints: iterations that end by ``until``, begun before it."""
    for e in range(counts.shape[0]):
        while True:
            if clocks[e, END] < np.inf:
                if clocks[e, END] > until:
                    break
                read_gauges(counts, readings, gauges, e, clocks[e, END], True)
                complete(
                    requests, times, finished, running, counts, clocks, token_s, token_offset, e
                )
            else:
                # One that begins at ``until`` waits: requests may still be submitted then.
                if clocks[e, START] >= until:
                    break
                read_gauges(counts, readings, gauges, e, clocks[e, START], False)
                plan(requests, running, counts, clocks, e)
        if until < np.inf:
            read_gauges(counts, readings, gauges, e, until, False)


@kernel
def submit(
    requests: IntArray,
    counts: IntArray,
    clocks: FloatArray,
    r: int,
    e: int,
    output_tokens: int,
    now: float,
) -> None:
    """Put request ``r`` at the end of the queue of endpoint ``e``."""
    requests[r, OUTPUT] = output_tokens
    if counts[e, WAITING] == 0:
        counts[e, HEAD] = r
    else:
        requests[counts[e, TAIL], NEXT] = r
    counts[e, TAIL] = r
    counts[e, WAITING] += 1
    if clocks[e, START] == np.inf:
        clocks[e, START] = now


@kernel
def fail(
    requests: IntArray,
    running: IntArray,
    counts: IntArray,
    clocks: FloatArray,
    e: int,
    now: float,
) -> None:
    """Lose all requests of endpoint ``e`` and the iteration in progress."""
    for index in range(counts[e, RUNNING]):
        requests[running[e, index], BLOCKS] = 0
    if clocks[e, END] < np.inf:
        clocks[e, BUSY] += now - clocks[e, START]
    counts[e, RUNNING] = counts[e, WAITING] = 0
    counts[e, HEAD] = counts[e, TAIL] = NOBODY
    counts[e, FREE_BLOCKS] = counts[e, TOTAL_BLOCKS]
    clocks[e, START] = clocks[e, END] = np.inf


@kernel
def collect(
    requests: IntArray,
    running: IntArray,
    counts: IntArray,
    facts: FloatArray,
    predicted_quality: FloatArray,
    predicted_output: FloatArray,
    row: IntArray,
    columns: FloatArray,
) -> None:
    """List the requests in flight: endpoint by endpoint, batch before queue.

    Into ``row`` (R,) and ``columns`` (7, R), in the order of `Residents`; ``facts`` (N, 3) are
    arrival, prompt tokens and limit.
    """
    entry = 0
    for e in range(counts.shape[0]):
        r = counts[e, HEAD]
        for index in range(counts[e, RUNNING] + counts[e, WAITING]):
            if index < counts[e, RUNNING]:
                request = running[e, index]
            else:
                request = r
                r = requests[r, NEXT]
            row[entry] = e
            columns[0, entry] = facts[request, 0]
            columns[1, entry] = facts[request, 1]
            columns[2, entry] = predicted_output[request, e]
            columns[3, entry] = requests[request, GENERATED]
            columns[4, entry] = 1.0
            columns[5, entry] = facts[request, 2]
            columns[6, entry] = predicted_quality[request, e]
            entry += 1
