"""Predicted latency per token, with and without the arriving request.

A fluid approximation of continuous batching on the roofline cost model (ours): every
sequence present decodes at the pace of the current batch, prompts that are still to be
prefilled go first in chunks, and what exceeds the batch or the KV cache waits until
enough of the present requests have ended. All arrays are (E,) or (R,), see `Observation`.
"""

from dataclasses import dataclass

import numpy as np

from pointsman_core.observation import Observation
from pointsman_core.state import BoolArray, FloatArray


@dataclass(frozen=True, slots=True)
class LatencyForecast:
    """What each choice would do, in seconds."""

    first_token_s: FloatArray
    """(E,) arrival to first token of the new request."""
    per_token_s: FloatArray
    """(E,) latency per token of the new request."""
    resident_before_s: FloatArray
    """(R,) latency per token of a present request if the new one goes elsewhere."""
    resident_after_s: FloatArray
    """(R,) the same if the new one joins its endpoint."""

    def keeps_limits(self, seen: Observation) -> BoolArray:
        """(E,) the new request keeps its limits and makes no present one lose its own."""
        own = (self.per_token_s <= seen.limit_s) & (self.first_token_s <= seen.first_token_limit_s)
        limit = seen.resident_limit_s
        harmed = (self.resident_before_s <= limit) & (self.resident_after_s > limit)
        result: BoolArray = own & (seen.per_candidate(harmed) == 0)
        return result


def forecast(seen: Observation) -> LatencyForecast:
    """Predict latencies for each choice."""
    started = seen.resident_output_tokens > 0
    remaining = seen.resident_expected_output - seen.resident_output_tokens
    context = seen.resident_prompt_tokens + seen.resident_output_tokens
    own = seen.per_candidate(np.ones_like(context))
    present = own + seen.foreign
    # Requests from elsewhere are taken to be like the average one of ours.
    share = np.where(own > 0, present / np.maximum(own, 1.0), 1.0)
    unknown = np.where(own > 0, 0.0, seen.foreign)
    held = seen.per_candidate(context + 0.5 * remaining) * share
    held += unknown * (seen.prompt_tokens + 0.5 * seen.output_tokens)
    to_prefill = seen.per_candidate(np.where(started, 0.0, seen.resident_prompt_tokens))
    left = seen.per_candidate(remaining) * share + unknown * seen.output_tokens

    joined = held + seen.prompt_tokens + 0.5 * seen.output_tokens
    step_before = _step_s(seen, present, held)
    step_after = _step_s(seen, present + 1.0, joined)
    prefill_before = _prefill_s(seen, to_prefill, present, held)
    prefill_after = _prefill_s(seen, to_prefill + seen.prompt_tokens, present, joined)
    wait = _wait_s(seen, present + 1.0, joined, left / np.maximum(present, 1.0), step_after)

    first_token = seen.waited_s + wait + prefill_after
    total = first_token + seen.output_tokens * step_after
    where = seen.resident_candidate

    def resident(prefill: FloatArray, step: FloatArray) -> FloatArray:
        finish = seen.resident_elapsed_s + prefill[where] + remaining * step[where]
        result: FloatArray = finish / seen.resident_expected_output
        return result

    return LatencyForecast(
        first_token_s=first_token,
        per_token_s=total / seen.output_tokens,
        resident_before_s=resident(prefill_before, step_before),
        resident_after_s=resident(prefill_after, step_after),
    )


def drain_s(seen: Observation) -> FloatArray:
    """(E,) time to finish all that is there: queued and in-flight tokens over speed.

    Never less than the longest request there needs, however many short ones share its batch.
    """
    started = seen.resident_output_tokens > 0
    remaining = seen.resident_expected_output - seen.resident_output_tokens
    own = seen.per_candidate(np.ones_like(remaining))
    present = own + seen.foreign
    tokens = seen.per_candidate(remaining) + seen.foreign * seen.output_tokens
    prompts = seen.per_candidate(np.where(started, 0.0, seen.resident_prompt_tokens))
    context = seen.per_candidate(seen.resident_prompt_tokens + seen.resident_output_tokens)
    batch = np.clip(present, 1.0, seen.cost.max_sequences)
    longest = np.zeros_like(tokens)
    np.maximum.at(longest, seen.resident_candidate, remaining)
    steps = np.maximum(tokens / batch, longest)
    step = _step_s(seen, batch, context)
    result: FloatArray = _prefill_s(seen, prompts, present, context) + steps * step
    return result


def _step_s(seen: Observation, sequences: FloatArray, context: FloatArray) -> FloatArray:
    """(E,) one decode iteration of the batch that fits."""
    batch = np.minimum(sequences, seen.cost.max_sequences)
    held = np.minimum(context, seen.cost.kv_capacity_tokens)
    return seen.cost.iteration_s(tokens=batch, context_tokens=held)


def _prefill_s(
    seen: Observation, tokens: FloatArray, sequences: FloatArray, context: FloatArray
) -> FloatArray:
    """(E,) prefill of ``tokens`` in chunks beside the decodes; 0 where there are none."""
    budget = seen.cost.max_batched_tokens
    room = np.maximum(budget - np.minimum(sequences, seen.cost.max_sequences), 1.0)
    chunk = np.minimum(tokens, room)
    decodes = np.minimum(sequences, seen.cost.max_sequences)
    held = np.minimum(context, seen.cost.kv_capacity_tokens)
    iteration = seen.cost.iteration_s(tokens=chunk + decodes, context_tokens=held)
    result: FloatArray = np.where(tokens > 0, np.maximum(tokens / room, 1.0), 0.0) * iteration
    return result


def _wait_s(
    seen: Observation,
    sequences: FloatArray,
    context: FloatArray,
    mean_remaining: FloatArray,
    step: FloatArray,
) -> FloatArray:
    """(E,) time until enough present requests have ended for the new one to start."""
    no_slot = np.maximum(sequences - seen.cost.max_sequences, 0.0)
    per_sequence = context / sequences
    no_memory = np.maximum(context - seen.cost.kv_capacity_tokens, 0.0) / per_sequence
    served = np.maximum(np.minimum(sequences, seen.cost.max_sequences), 1.0)
    result: FloatArray = np.maximum(no_slot, no_memory) * mean_remaining * step / served
    return result
