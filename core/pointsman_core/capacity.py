"""How many requests per second endpoints can serve, by the cost model.

A fluid estimate (ours): every endpoint runs its largest batch all the time, with requests of
mean length. It defines what a load of 1 is and chooses default rates; it is not a result.
"""

import math
from collections.abc import Iterable

from pointsman_core.cost import CostModel


def capacity(
    endpoints: Iterable[tuple[CostModel, float]],
    *,
    input_tokens: float,
    limit_s: float = math.inf,
) -> float:
    """Requests per second of all endpoints together, each at its own full rate.

    ``endpoints`` are cost models, each with the mean length of answers there, in tokens;
    prompts are ``input_tokens`` long everywhere.
    """
    return sum(
        endpoint_capacity(
            cost, input_tokens=input_tokens, output_tokens=output_tokens, limit_s=limit_s
        )
        for cost, output_tokens in endpoints
    )


def endpoint_capacity(
    cost: CostModel, *, input_tokens: float, output_tokens: float, limit_s: float = math.inf
) -> float:
    """Requests per second of one endpoint; 0 when it is too slow even for one at a time.

    ``limit_s`` is the latency per token that must be kept, in seconds.
    """
    best = 0.0
    for batch in range(1, cost.max_sequences + 1):
        context = batch * (input_tokens + output_tokens / 2)
        if batch > 1 and context > cost.kv_capacity_tokens:
            break
        cycle, prefill = _cycle_seconds(cost, batch, input_tokens, output_tokens)
        if (cycle + prefill) / output_tokens <= limit_s:
            best = max(best, batch / cycle)
    return best


def _cycle_seconds(
    cost: CostModel, batch: int, input_tokens: float, output_tokens: float
) -> tuple[float, float]:
    """Seconds in which a batch is answered once, and those of one request's own prefill.

    Chunks of prefill ride on iterations that also decode, so they only add iterations when
    there are more chunks than answer tokens.
    """
    context = round(batch * (input_tokens + output_tokens / 2))
    chunk = max(1, cost.max_batched_tokens - batch)
    chunks = input_tokens / chunk
    plain_s = cost.iteration_seconds(
        prefill_tokens=0, decode_sequences=batch, context_tokens=context
    )
    chunk_s = cost.iteration_seconds(
        prefill_tokens=chunk, decode_sequences=batch, context_tokens=context
    )
    prefill_s = chunks * chunk_s
    plain = max(0.0, output_tokens - batch * chunks)
    return batch * prefill_s + plain * plain_s, prefill_s
