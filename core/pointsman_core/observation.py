"""What a decider sees: one request, the candidates, and the requests already there.

This is the only place that turns live state into arrays for deciding; the simulator, the
evaluation and the policy server all call `observe`. It holds only what a router can know
when the request arrives: predicted quality and length, never the true ones.

Shapes: E candidates of the policy, R requests in flight on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from pointsman_core.cost import CostModel
from pointsman_core.prediction import DeclaredPriors, Predictor
from pointsman_core.records import record
from pointsman_core.snapshot import Candidate, Snapshot
from pointsman_core.state import BoolArray, FloatArray, IntArray, Residents, StateView


@record
class Request:
    """An arriving request as far as a router knows it."""

    prompt: str
    prompt_tokens: int
    """Estimated from the prompt's length; the router has no tokenizer."""
    arrival_s: float
    limit_s: float
    """Limit of its latency per token, in seconds."""
    first_token_limit_s: float = float("inf")
    max_output_tokens: int | None = None
    streams: bool = True
    """Whether the answer is streamed, so that its tokens can be counted as they come."""


# NumPy's own type allows for integers, which there are only without weights.
_sum_by = cast("Callable[[IntArray, FloatArray | BoolArray, int], FloatArray]", np.bincount)


@dataclass(frozen=True)
class CostColumns:
    """The candidates' cost models as columns of shape (E,); see `CostModel` for units."""

    overhead_s: FloatArray
    compute_s_per_token: FloatArray
    weights_s: FloatArray
    context_s_per_token: FloatArray
    kv_capacity_tokens: FloatArray
    max_sequences: FloatArray
    max_batched_tokens: FloatArray

    @classmethod
    def of(cls, candidates: tuple[Candidate, ...]) -> "CostColumns":
        """One entry per candidate."""
        models = [CostModel.from_profile(c.profile, c.limits) for c in candidates]
        columns = {
            name: np.array([getattr(m, name) for m in models], np.float64)
            for name in cls.__dataclass_fields__
        }
        return cls(**columns)

    @cached_property  # for which this class has no slots
    def extremes(self) -> "Extremes":
        """What does not depend on load; worked out once."""
        arithmetic = self.compute_s_per_token * self.max_sequences
        memory = self.weights_s + self.context_s_per_token * self.kv_capacity_tokens
        full = self.overhead_s + np.maximum(arithmetic, memory)
        return Extremes(np.array([self.overhead_s + self.weights_s, full]), arithmetic / full)

    def iteration_s(self, *, tokens: FloatArray, context_tokens: FloatArray) -> FloatArray:
        """(…, E) seconds of one iteration; the formula of `CostModel.iteration_seconds`."""
        compute = self.compute_s_per_token * tokens
        memory = self.weights_s + self.context_s_per_token * context_tokens
        return self.overhead_s + np.maximum(compute, memory)


@dataclass(frozen=True, slots=True)
class Extremes:
    """Iterations of an empty and of a full batch."""

    steps_s: FloatArray
    """(2, E) seconds of an iteration of an empty batch, and of a full one on a full KV cache."""
    arithmetic: FloatArray
    """(E,) share of the arithmetic of a full batch in its iteration."""


class RoutingTable:
    """A snapshot prepared for deciding: columns that do not change between requests."""

    def __init__(
        self, snapshot: Snapshot, state: StateView, predictor: Predictor | None = None
    ) -> None:
        self.snapshot = snapshot
        self.candidates = snapshot.candidates
        self.predictor = predictor or DeclaredPriors(snapshot)
        self.rows: IntArray = np.array([state.row(c.address) for c in self.candidates], np.int64)
        self.cost = CostColumns.of(self.candidates)
        self.context_limit = np.array(
            [c.limits.context_tokens for c in self.candidates], np.float64
        )
        self._layers = _candidate_layers(self.rows)

    def residents_of(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Match requests to candidates: (entry of ``rows``, candidate), each (R,).

        A request counts once for every candidate on its endpoint, as when one Ollama
        serves several experts; requests elsewhere do not occur.
        """
        entries, candidates = [], []
        for layer in self._layers:
            found = layer.take(rows, mode="clip")
            hit = (found >= 0).nonzero()[0]
            entries.append(hit)
            candidates.append(found[hit])
        if len(entries) == 1:
            return entries[0], candidates[0]
        return np.concatenate(entries), np.concatenate(candidates)


def _candidate_layers(rows: IntArray) -> list[IntArray]:
    """Arrays row -> candidate (-1: none); a further layer for each endpoint shared again.

    Their last entry is -1 and stands for all rows from there on.
    """
    layers: list[IntArray] = [np.full(int(rows.max(initial=-1)) + 2, -1, np.int64)]
    for candidate, row in enumerate(rows):
        layer = next((la for la in layers if la[row] < 0), None)
        if layer is None:
            layer = np.full_like(layers[0], -1)
            layers.append(layer)
        layer[row] = candidate
    return layers


@record
class Observation:
    """All that deciders look at."""

    prompt_tokens: float
    waited_s: float
    """Time since arrival."""
    limit_s: float
    first_token_limit_s: float

    eligible: BoolArray
    """(E,) ready, and the prompt fits."""
    quality: FloatArray
    """(E,) predicted quality."""
    output_tokens: FloatArray
    """(E,) predicted length of the answer."""
    foreign: FloatArray
    """(E,) requests there that did not come through this server."""
    kv_usage: FloatArray
    """(E,) scraped share of the KV cache in use; NaN unknown."""
    cost: CostColumns

    resident_candidate: IntArray
    """(R,) candidate on which the request is."""
    resident_elapsed_s: FloatArray
    resident_prompt_tokens: FloatArray
    resident_expected_output: FloatArray
    """(R,) predicted length, at least one token more than seen so far."""
    resident_output_tokens: FloatArray
    """(R,) tokens so far, estimated where not streamed; 0 means waiting or in prefill."""
    resident_limit_s: FloatArray
    resident_quality: FloatArray

    learned: BoolArray | None = None
    """(E,) whether ``quality`` was learned from data; else, and by None, it was declared."""

    def present(self) -> FloatArray:
        """(E,) requests there."""
        return np.bincount(self.resident_candidate, minlength=len(self.quality)).astype(np.float64)

    def per_candidate(self, values: FloatArray | BoolArray) -> FloatArray:
        """(R,) values of the requests there, summed to (E,)."""
        if not len(values):  # NumPy would answer integers
            return np.zeros(len(self.quality))
        return _sum_by(self.resident_candidate, values, len(self.quality))


def observe(
    table: RoutingTable, state: StateView, request: Request, *, now_s: float
) -> Observation:
    """Turn live state into what a decider sees. Pure: changes nothing."""
    residents = state.residents()
    entry, candidate = table.residents_of(residents.row)
    elapsed = now_s - residents.arrival_s[entry]
    seen = _tokens_so_far(table, residents, entry, candidate, elapsed)
    expected = table.predictor.predict(request.prompt)
    output = expected.output_tokens
    if request.max_output_tokens is not None:
        output = np.minimum(output, request.max_output_tokens)
    return Observation(
        prompt_tokens=float(request.prompt_tokens),
        waited_s=now_s - request.arrival_s,
        limit_s=request.limit_s,
        first_token_limit_s=request.first_token_limit_s,
        eligible=_eligible(table, state, request),
        quality=expected.quality,
        output_tokens=output,
        foreign=state.foreign(now_s=now_s)[table.rows],
        kv_usage=state.kv_usage(now_s=now_s)[table.rows],
        cost=table.cost,
        resident_candidate=candidate,
        resident_elapsed_s=elapsed,
        resident_prompt_tokens=residents.prompt_tokens[entry],
        resident_expected_output=np.maximum(residents.expected_output_tokens[entry], seen + 1.0),
        resident_output_tokens=seen,
        resident_limit_s=residents.limit_s[entry],
        resident_quality=residents.quality[entry],
        learned=expected.learned,
    )


def _tokens_so_far(
    table: RoutingTable,
    residents: Residents,
    entry: IntArray,
    candidate: IntArray,
    elapsed_s: FloatArray,
) -> FloatArray:
    """(R,) tokens each request has got.

    Those of an answer that comes whole are estimated from the time it has had, at the pace
    that the cost model gives for its endpoint's present batch.
    """
    seen = residents.output_tokens[entry]
    whole = (residents.streams[entry] == 0) & (seen == 0)
    if not np.count_nonzero(whole):
        return seen
    size = len(table.candidates)
    batch = np.bincount(candidate, minlength=size).astype(np.float64)
    prompts = residents.prompt_tokens[entry]
    context: FloatArray = np.bincount(candidate, weights=prompts, minlength=size).astype(np.float64)
    step = table.cost.iteration_s(tokens=batch, context_tokens=context)[candidate]
    prefill = prompts * table.cost.compute_s_per_token[candidate]
    guess = np.floor(np.maximum(elapsed_s - prefill, 0.0) / step)
    guess = np.minimum(guess, residents.expected_output_tokens[entry] - 1.0)
    return np.where(whole, np.maximum(guess, 0.0), seen)


def _eligible(table: RoutingTable, state: StateView, request: Request) -> BoolArray:
    """(E,) ready endpoints whose context holds the request.

    The prompt's length is an estimate, so when it fits nowhere the roomiest endpoints stay
    eligible and the engine, which counts exactly, has the last word.
    """
    ready: BoolArray = state.ready()[table.rows]
    needed = request.prompt_tokens + (request.max_output_tokens or 1)
    fits = ready & (table.context_limit >= needed)
    if np.count_nonzero(fits) or not np.count_nonzero(ready):
        return fits
    roomiest: BoolArray = ready & (table.context_limit == table.context_limit[ready].max())
    return roomiest
