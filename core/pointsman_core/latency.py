"""Predicted latency per token, with and without the arriving request.

A fluid approximation of continuous batching on the roofline cost model (ours). It counts in
*steps* of each endpoint: a running sequence gets one token per step, so after its prefill a
request needs as many steps as it has tokens left, however long a step takes.

1. Requests are served in order of arrival. Those beyond the batch (or beyond what fits into
   the KV cache, at their mean size) start when enough of the others have ended.
2. The batch stays as full as it is: whoever ends is replaced. Of the prefill of those to
   come, the share `INTERFERENCE` slows the steps of those present.
3. While prompts that are there are prefilled in chunks, steps last as long as an iteration
   with a chunk.

More load, and a slower board, do not make the forecast better, with four exceptions:

- Where the KV cache is scarce, sequences that run are counted by their mean size. More large
  ones make fewer run, and the steps of those are shorter.
- A request that just has no place left waits for an end and is then prefilled alone; one that
  got the last place shares its steps with all the prefill under way, and may look later.
- In a full batch, a small new request takes the place of a mean one: that helps the others.
- Prefill under way that outlasts the new request's wait counts as slower steps twice, so that
  ``resident_after_s`` may be a trifle better where decoding alone is slower.

Letting the batch drain instead predicted worse at every load that was tried, as did taking
the later prefill in full: see docs/deciders.md. Arrays are (E,) or (R,), see `Observation`.
"""

import numpy as np

from pointsman_core.observation import Observation
from pointsman_core.records import record
from pointsman_core.state import BoolArray, FloatArray

INTERFERENCE = 0.3
"""Share of the prefill of requests to come that delays those present; fitted."""

# As arrays: NumPy would make them of Python's numbers at each of many calls.
_ZERO, _HALF, _ONE = np.array(0.0), np.array(0.5), np.array(1.0)


@record
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

    def keeps_limits(self, seen: Observation, *, margin: float = 1.0) -> BoolArray:
        """(E,) the new request keeps its limits and makes no present one lose its own.

        Predictions count ``margin`` times.
        """
        own = self.per_token_s <= seen.limit_s / margin
        own &= self.first_token_s <= seen.first_token_limit_s / margin
        limit = seen.resident_limit_s / margin
        harmed = (self.resident_before_s <= limit) & (self.resident_after_s > limit)
        result: BoolArray = own & (seen.per_candidate(harmed) == 0)
        return result


def forecast(seen: Observation, *, interference: float = INTERFERENCE) -> LatencyForecast:
    """Predict latencies for each choice."""
    load = _Load.of(seen)
    where = seen.resident_candidate
    left = seen.resident_expected_output - np.maximum(seen.resident_output_tokens, _ONE)
    # Mostly every batch has a place left, for the new request too: then terms drop out.
    starts = _starts(seen, load, left) if load.overfull else None

    # Prefill under way, and the new request's: with the former if that can start at once.
    together = load.to_prefill if starts is None else load.to_prefill * (starts[0] == _ZERO)
    pace = _Pace.of(seen, load, together + seen.prompt_tokens, interference)
    # Row by row: taking an array apart makes an iterator, which takes longer.
    before, after = pace.step_s[0], pace.step_s[1]
    early_steps, late_steps = pace.prefill_steps[0], pace.prefill_steps[1]
    early_slower, late_slower = pace.slower_s[0], pace.slower_s[1]
    early = early_steps[where]

    first, lead, end = late_steps, seen.waited_s, left
    if starts is not None:
        own_start, start = starts
        kept = early_steps * (own_start != _ZERO)
        first = own_start + first
        lead = lead + own_start * before + np.minimum(own_start, kept) * early_slower
        end = start + end
    last = first + np.maximum(seen.output_tokens - _ONE, _ZERO)
    first_token = lead + late_steps * (after + late_slower)
    total = first_token + (last - first) * after

    end = end + early * load.waits
    elapsed = seen.resident_elapsed_s + end * before[where]
    slower = early_slower[where]
    shared = np.minimum(end, last[where])
    if starts is not None:
        shared = np.maximum(shared - own_start[where], _ZERO)
    joined = elapsed + shared * (after - before)[where]
    if starts is not None:
        joined += np.minimum(end, kept[where]) * slower
    joined += np.minimum(shared, late_steps[where]) * late_slower[where]
    alone = elapsed + np.minimum(end, early) * slower
    return LatencyForecast(
        first_token_s=first_token,
        per_token_s=total / seen.output_tokens,
        resident_before_s=alone / seen.resident_expected_output,
        resident_after_s=joined / seen.resident_expected_output,
    )


@record
class _Load:
    """What is on each endpoint; all (E,), or (2, E): without the new request, and with it."""

    own: FloatArray
    """Requests of ours."""
    waits: BoolArray
    """(R,) requests of ours without a token yet."""
    present: FloatArray
    """(2, E)"""
    slots: FloatArray
    """Sequences that run at once."""
    overfull: bool
    """Whether that is too few somewhere, once the new request is there."""
    running: FloatArray
    """(2, E) those of the present that do."""
    context: FloatArray
    """(2, E) their tokens of context: on average over the rest of the lives of those that run,
    and while the new request runs."""
    to_prefill: FloatArray
    """Tokens of prompts that are not computed yet."""
    mean_prompt: FloatArray
    """Tokens."""
    rate: FloatArray
    """Requests that end per step, were all of ours to run."""
    room: FloatArray
    """Tokens of prompt that fit into an iteration beside the decodes."""

    @classmethod
    def of(cls, seen: Observation) -> "_Load":
        own = seen.present()
        some = np.maximum(own, _ONE)
        present = np.empty((2, len(own)))
        here = np.add(own, seen.foreign, present[0])
        np.add(here, _ONE, present[1])

        new_context = seen.prompt_tokens + _HALF * seen.output_tokens
        so_far, expected = seen.resident_output_tokens, seen.resident_expected_output
        prompt = seen.resident_prompt_tokens
        waits = so_far == _ZERO
        held = seen.per_candidate(prompt + _HALF * (so_far + expected))
        if np.count_nonzero(seen.foreign):
            # Where only foreign requests are, they are taken to be like the new one.
            held = np.where(own > _ZERO, held * _share(own, here), seen.foreign * new_context)

        fit = seen.cost.kv_capacity_tokens * present[1] / (held + new_context)
        slots = np.floor(np.maximum(np.minimum(seen.cost.max_sequences, fit), _ONE))
        overfull = bool(np.count_nonzero(present[1] > slots))
        running = np.minimum(present, slots) if overfull else present
        mean_held = held / np.maximum(here, _ONE)
        context = np.empty_like(present)
        np.multiply(mean_held, running[0], context[0])
        np.add(mean_held * (running[1] - _ONE), new_context, context[1])
        return cls(
            own=own,
            waits=waits,
            present=present,
            slots=slots,
            overfull=overfull,
            running=running,
            context=context,
            to_prefill=seen.per_candidate(prompt * waits),
            mean_prompt=seen.per_candidate(prompt) / some,
            rate=own * here / np.maximum(seen.per_candidate(expected), _ONE),
            room=np.maximum(seen.cost.max_batched_tokens - running[0], _ONE),
        )


def _share(own: FloatArray, here: FloatArray) -> FloatArray:
    """(E,) present requests per one of ours: foreign ones are taken to be like ours."""
    return np.where(own > _ZERO, here / np.maximum(own, _ONE), _ONE)


@record
class _Pace:
    """How long steps last; all (2, E): without the new request, and with it."""

    step_s: FloatArray
    """Seconds of a step without the prefill of those that are there."""
    prefill_steps: FloatArray
    """Steps that carry a chunk of a prompt, of one that is there or the new one."""
    slower_s: FloatArray
    """How much longer such a step is."""

    @classmethod
    def of(
        cls, seen: Observation, load: _Load, late_tokens: FloatArray, interference: float
    ) -> "_Pace":
        """``late_tokens`` (E,) are to be prefilled once the new request has started."""
        room = load.room
        tokens = np.empty_like(load.present)
        tokens[0] = load.to_prefill
        tokens[1] = late_tokens
        # Iterations that only decode, with a chunk of those to come, with one of these tokens:
        # one call for all of them costs little more than one for each.
        batch = np.empty((3, *tokens.shape))
        batch[0] = load.running
        np.add(load.running, np.minimum(load.mean_prompt, room), batch[1])
        np.add(load.running[0], np.minimum(tokens, room), batch[2])
        held = np.minimum(load.context, seen.cost.kv_capacity_tokens)
        seconds = seen.cost.iteration_s(tokens=batch, context_tokens=held)
        decode, coming, chunk = seconds[0], seconds[1], seconds[2]
        # Requests to come: as many per step as will have left, each with the mean prompt.
        chunks = np.maximum(load.mean_prompt / room, _ONE)
        mixed = interference * np.minimum(load.rate * chunks, _ONE)
        step = decode + mixed * (coming - decode)
        return cls(
            step_s=step,
            prefill_steps=np.maximum(tokens / room, tokens > _ZERO),  # one at least, if any
            slower_s=np.maximum(chunk - step, _ZERO),
        )


def _starts(seen: Observation, load: _Load, left: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Steps until each request starts: the new one (E,), and those present (R,).

    Where requests wait, each start is the lesser of two upper bounds: all the work ahead
    shared by the whole batch, and, for the k-th to wait, the k-th end of those that run.
    """
    own, others = np.zeros(len(load.own)), np.zeros(len(left))
    # Only full endpoints are looked at: the longest queue pads all columns below.
    full = load.present[1] > load.slots
    there = np.flatnonzero(full[seen.resident_candidate])
    lane = (np.cumsum(full) - 1)[seen.resident_candidate[there]]
    share, slots = _share(load.own, load.present[0])[full], load.slots[full]
    count = load.own[full].astype(np.int64)
    order = np.lexsort((-seen.resident_elapsed_s[there], lane))
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - (np.cumsum(count) - count)[lane[order]]
    # One column per endpoint, the oldest first; the last row is for the new request.
    work = np.zeros((int(count.max(initial=0)) + 1, len(count)))
    work[place, lane] = left[there]
    number = np.arange(len(work))[:, None]
    runs = (number < count) & (number * share < slots)
    ends = np.sort(np.where(runs, work, np.inf), axis=0)
    kth = np.clip(number - runs.sum(axis=0), 0, None)
    ahead = (np.cumsum(work, axis=0) - work) * share / slots
    soonest = np.minimum(np.take_along_axis(ends, kth, axis=0), ahead)
    start = np.where(number * share < slots, 0.0, soonest)
    # Of foreign requests nothing is known: each that is too many waits for one to end.
    too_many = np.maximum(load.present[1][full] - slots, 0.0)
    only_foreign = too_many * seen.output_tokens[full]
    own[full] = np.where(count > 0, start[count, np.arange(len(count))], only_foreign / slots)
    others[there] = start[place, lane]
    return own, others


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
