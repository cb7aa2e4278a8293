"""How many requests per second a site can serve within its limit, by the cost model.

A fluid estimate (ours) for choosing a default rate, not a result: every endpoint runs its
largest batch that still keeps the limit, with requests of mean length all the time.
"""

from collections.abc import Iterable

from pointsman_core.cost import CostModel
from pointsman_core.resources import LLMExpert


def site_capacity(
    experts: Iterable[LLMExpert], *, input_tokens: float, max_output_tokens: int, limit_ms: float
) -> float:
    """Requests per second of all endpoints together; prompts are ``input_tokens`` long."""
    total = 0.0
    for expert in experts:
        cost = CostModel.from_profile(expert.spec.profile, expert.spec.limits)
        output = min(expert.spec.expected_output_tokens, max_output_tokens)
        rate = endpoint_capacity(
            cost, input_tokens=input_tokens, output_tokens=output, limit_s=limit_ms / 1e3
        )
        total += rate * len(expert.spec.backend.addresses or ())
    return total


def endpoint_capacity(
    cost: CostModel, *, input_tokens: float, output_tokens: float, limit_s: float
) -> float:
    """Requests per second of one endpoint; 0 when it is too slow even for one at a time."""
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
