"""One decision as a heterogeneous graph: what the learned decider is given.

Nodes: the arriving request, the endpoints (E), requests that run on them (R1) and requests
that wait there (R2). Training and serving both call `encode`, so they cannot drift apart.

All features are ours. They hold only what a router knows when the request arrives, are free
of units (ratios to a limit, to a capacity, to a natural count) and pass through `bounded`,
so that neither another pool nor nonsense in a gauge moves them out of a known range.
Endpoints that cannot be chosen are not in the graph: nothing that they carry counts.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pointsman_core.deciders.impact import TUNED, Impact, ImpactParameters, expected_impact
from pointsman_core.observation import Observation
from pointsman_core.records import record
from pointsman_core.state import BoolArray, FloatArray, IntArray

Float32Array = NDArray[np.float32]

BOUND: Final = 4.0
"""No feature exceeds it, but for differences of two."""
TOKENS: Final = 256.0
"""Natural unit of a count of tokens."""
ENDPOINTS: Final = 8.0
"""Natural unit of a count of endpoints."""
FINE: Final = 10.0
"""Small differences count so many times, to be seen at all."""
MOST: Final = 1e9
"""Stands for a limit that is none."""

ENDPOINT_FEATURES: Final[Mapping[str, str]] = {
    "prefill": "arithmetic of the prompt / (limit x predicted tokens)",
    "first token": "predicted time to first token / (limit x predicted tokens)",
    "drain": "predicted tokens left / slots x full step / (limit x predicted tokens)",
    "idle step": "iteration of an empty batch / limit",
    "full step": "iteration of a full batch on a full KV cache / limit",
    "latency": "predicted latency per token / limit",
    "running": "requests of ours that run / slots",
    "waiting": "requests of ours without a token yet / slots",
    "recent": "requests that came a moment ago, weighted by exp(-8 x share of time used) / slots",
    "at stake": "expected QoS of those there / slots",
    "in danger": "the same x 4 (1 - chance in time) / slots",
    "quality": "predicted quality of its answer",
    "base": "ImpactGreedy's value",
    "own": "quality x chance",
    "impact": "ImpactGreedy's change of the expected QoS of those there",
    "chance": "ImpactGreedy's chance that the new request is in time",
    "foreign": "requests that did not come through this server / slots",
    "context": "tokens of context of ours / KV capacity",
    "KV use": "scraped share of the KV cache in use, 0 where unknown",
    "KV known": "1 where that is known",
    "slots": "sequences that run at once / 256",
    "output": "predicted tokens of its answer / 256",
    "arithmetic": "arithmetic of a full batch / its iteration",
    "chunks": "prompt tokens / token budget of an iteration",
    "first token limit": "predicted time to first token / its limit, 0 where there is none",
    "regret": "largest 'quality' of the graph's endpoints less its own",
    "behind": "largest 'base' of the graph's endpoints less its own",
}
"""Of an endpoint. "Limit" is that of the arriving request's latency per token."""

POOLED: Final = tuple(ENDPOINT_FEATURES)[5:13]
"""Endpoint features whose mean and maximum over the graph describe the request's situation."""

REQUEST_FEATURES: Final[Mapping[str, str]] = {
    "prompt": "prompt tokens / 256",
    "waited": "time since arrival / limit",
    "first token limit": "limit / limit of the time to the first token, 0 where there is none",
    "endpoints": "endpoints that can be chosen / 8",
    **{f"mean {name}": f"mean of the endpoints' {name!r}" for name in POOLED},
    **{f"most {name}": f"largest of the endpoints' {name!r}" for name in POOLED},
}
"""Of the arriving request."""

RESIDENT_FEATURES: Final[Mapping[str, str]] = {
    "quality": "predicted quality of its answer",
    "limit": "its limit / the arriving request's",
    "used": "time since its arrival / (its limit x its predicted tokens)",
    "progress": "tokens so far / predicted tokens",
    "left": "predicted tokens left / 256",
    "prompt": "its prompt tokens / 256",
    "latency": "predicted latency per token without the new request / its limit",
    "slower": "10 x what the new request would add to that, if put on its endpoint",
    "chance": "ImpactGreedy's chance that it is in time without the new request",
    "loss": "10 x what the new request would take from that chance",
}
"""Of a request that runs, and of one that waits."""

FEATURES: Final[Mapping[str, Mapping[str, str]]] = {
    "request": REQUEST_FEATURES,
    "endpoint": ENDPOINT_FEATURES,
    "running": RESIDENT_FEATURES,
    "waiting": RESIDENT_FEATURES,
}
"""Names and meanings of each node type's features, in order."""

ANALYTIC_FEATURES: Final[Mapping[str, tuple[str, ...]]] = {
    "request": ("mean base", "most base"),
    "endpoint": ("chance", "own", "impact", "base", "behind", "at stake", "in danger"),
    "running": ("chance", "loss", "slower"),
    "waiting": ("chance", "loss", "slower"),
}
"""Those that come from ImpactGreedy's estimates; left out by an ablation."""

# As arrays: NumPy would make them of Python's numbers at each of many calls.
_ZERO, _ONE, _FOUR, _SOON = np.array(0.0), np.array(1.0), np.array(4.0), np.array(-8.0)
_MOST, _PER_BOUND, _TOKENS, _FINE = (np.array(value) for value in (MOST, 1 / BOUND, TOKENS, FINE))
_LEAST: Final = np.array(-BOUND)


def schema_hash() -> str:
    """SHA-256 of all that gives features their meaning; a model works with one such only."""
    text = repr(
        (BOUND, TOKENS, ENDPOINTS, FINE, {kind: dict(names) for kind, names in FEATURES.items()})
    )
    return hashlib.sha256(text.encode()).hexdigest()


def bounded(values: FloatArray) -> FloatArray:
    """Squash in place to [-BOUND, BOUND]: x / (1 + |x| / BOUND), nearly x where x is small."""
    scale = np.abs(values)
    scale *= _PER_BOUND
    scale += _ONE
    values /= scale
    return values


def _squashed(value: float) -> float:
    """One number `bounded`, to the last bit; NumPy takes far longer for one."""
    return value / (abs(value) * (1.0 / BOUND) + 1.0)


@record
class GraphArrays:
    """One decision's graph, or G of them side by side (see `encode`)."""

    request: Float32Array
    """(G, F_r); G is 1 but for `encode` with groups."""
    endpoint: Float32Array
    """(E, F_e)"""
    running: Float32Array
    """(R1, F_q)"""
    waiting: Float32Array
    """(R2, F_q)"""
    running_endpoint: IntArray
    """(R1,) the endpoint on which each is."""
    waiting_endpoint: IntArray
    """(R2,)"""
    eligible: BoolArray
    """(E,) endpoints that can be chosen; the others are not in the graph."""
    analytic: Float32Array
    """(E, 3) ImpactGreedy's chance in time, impact on those there, and value."""

    @property
    def base(self) -> Float32Array:
        """(E,) ImpactGreedy's value of each choice."""
        return self.analytic[:, 2]

    def split(self) -> "list[GraphArrays]":
        """The G graphs one by one."""
        groups = len(self.request)
        if groups == 1:
            return [self]
        size = len(self.endpoint) // groups
        return [self._part(group, size) for group in range(groups)]

    def _part(self, group: int, size: int) -> "GraphArrays":
        mine = slice(group * size, (group + 1) * size)
        runs = self.running_endpoint // size == group
        waits = self.waiting_endpoint // size == group
        return GraphArrays(
            request=self.request[group : group + 1],
            endpoint=self.endpoint[mine],
            running=self.running[runs],
            waiting=self.waiting[waits],
            running_endpoint=self.running_endpoint[runs] - group * size,
            waiting_endpoint=self.waiting_endpoint[waits] - group * size,
            eligible=self.eligible[mine],
            analytic=self.analytic[mine],
        )


def encode(
    seen: Observation,
    impact: Impact | None = None,
    *,
    parameters: ImpactParameters = TUNED,
    groups: int = 1,
) -> GraphArrays:
    """Turn what a decider sees into the graph.

    ``impact`` is ``expected_impact(seen, parameters)`` where the caller has it already.
    With ``groups`` the candidates are those of so many pools of equal size, one after the
    other, which see the same request: the branches of a rollout are encoded in one call.
    """
    if impact is None:
        impact = expected_impact(seen, parameters)
    value = impact.own + parameters.impact_weight * impact.others
    # Without a limit a ratio to it is 0, as far as one can tell.
    limit = min(max(seen.limit_s, 1.0 / MOST), MOST)
    used = seen.resident_elapsed_s / np.minimum(
        seen.resident_limit_s * seen.resident_expected_output, _MOST
    )
    left = seen.resident_expected_output - seen.resident_output_tokens
    runs = seen.resident_output_tokens > _ZERO
    waits = ~runs

    sums = _sums(seen, impact, runs=runs, waits=waits, left=left, used=used)
    endpoint = _endpoints(seen, impact, sums, value=value, limit=limit)
    request = _requests(seen, endpoint, limit=limit, groups=groups)
    resident = _residents(seen, impact, left=left, used=used, limit=limit)
    running, waiting = runs.nonzero()[0], waits.nonzero()[0]
    where = seen.resident_candidate
    analytic = np.empty((len(value), 3), np.float32)
    analytic[:, 0], analytic[:, 1], analytic[:, 2] = impact.in_time, impact.others, value
    return GraphArrays(
        request=request,
        endpoint=_rows(endpoint),
        running=resident.take(running, axis=0),
        waiting=resident.take(waiting, axis=0),
        running_endpoint=where[running],
        waiting_endpoint=where[waiting],
        eligible=seen.eligible,
        analytic=analytic,
    )


def _rows(columns: FloatArray) -> Float32Array:
    """(F, N) in double precision to (N, F) in single."""
    rows = np.empty(columns.shape[::-1], np.float32)
    rows[:] = columns.T  # in one go; NumPy's functions for it take twice as long
    return rows


def _sums(
    seen: Observation,
    impact: Impact,
    *,
    runs: BoolArray,
    waits: BoolArray,
    left: FloatArray,
    used: FloatArray,
) -> FloatArray:
    """(7, E) sums over those present, in the order below."""
    expected = seen.resident_quality * impact.before
    sums = np.empty((7, len(seen.quality)))
    sums[0] = seen.per_candidate(runs)
    sums[1] = seen.per_candidate(waits)
    sums[2] = seen.per_candidate(np.exp(_SOON * used))
    sums[3] = seen.per_candidate(expected)
    sums[4] = seen.per_candidate(expected * (_FOUR - _FOUR * impact.before))
    sums[5] = seen.per_candidate(left)
    sums[6] = seen.per_candidate(seen.resident_prompt_tokens + seen.resident_output_tokens)
    return sums


def _endpoints(
    seen: Observation, impact: Impact, sums: FloatArray, *, value: FloatArray, limit: float
) -> FloatArray:
    """(F_e, E) bounded features; `_requests` fills in the last two, which look at all."""
    cost, predicted = seen.cost, impact.forecast
    slots, extremes = cost.max_sequences, cost.extremes

    x = np.empty((len(ENDPOINT_FEATURES), len(slots)))
    np.multiply(cost.compute_s_per_token, seen.prompt_tokens, x[0])
    x[1] = predicted.first_token_s
    np.multiply(sums[5] / slots, extremes.steps_s[1], x[2])
    x[:3] /= seen.output_tokens
    x[3:5] = extremes.steps_s
    x[5] = predicted.per_token_s
    x[:6] /= limit
    np.divide(sums[:5], slots, x[6:11])
    x[11] = seen.quality
    x[12] = value
    x[13] = impact.own
    x[14] = impact.others
    x[15] = impact.in_time
    np.divide(seen.foreign, slots, x[16])
    np.divide(sums[6], cost.kv_capacity_tokens, x[17])
    known = np.isfinite(seen.kv_usage)
    x[18] = np.where(known, seen.kv_usage, _ZERO)
    x[19] = known
    np.divide(slots, _TOKENS, x[20])
    np.divide(seen.output_tokens, _TOKENS, x[21])
    x[22] = extremes.arithmetic
    np.divide(seen.prompt_tokens, cost.max_batched_tokens, x[23])
    np.divide(predicted.first_token_s, seen.first_token_limit_s, x[24])
    bounded(x[:25])
    return x


def _requests(
    seen: Observation, endpoint: FloatArray, *, limit: float, groups: int
) -> Float32Array:
    """(G, F_r), and the endpoints' last two features."""
    pooled = endpoint[5:13].reshape(len(POOLED), groups, -1)
    eligible = seen.eligible.reshape(groups, -1)
    counts = [max(sum(group), 1) for group in eligible.tolist()]
    most = np.maximum.reduce(np.where(eligible, pooled, _LEAST), axis=2)
    share = eligible / np.array(counts, np.float64)[:, None]
    x = np.empty((groups, len(REQUEST_FEATURES)), np.float32)
    x[:, 0] = _squashed(seen.prompt_tokens / TOKENS)
    x[:, 1] = _squashed(seen.waited_s / limit)
    x[:, 2] = _squashed(limit / seen.first_token_limit_s)
    x[:, 3] = [_squashed(count / ENDPOINTS) for count in counts]
    x[:, 4:12] = (pooled.swapaxes(0, 1) @ share[:, :, None])[..., 0]
    x[:, 12:] = most.T
    np.subtract(most[6:, :, None], pooled[6:], endpoint[25:].reshape(2, groups, -1))
    return x


def _residents(
    seen: Observation, impact: Impact, *, left: FloatArray, used: FloatArray, limit: float
) -> Float32Array:
    """(R, F_q) features of those present."""
    predicted, own_limit = impact.forecast, seen.resident_limit_s
    before = predicted.resident_before_s
    x = np.empty((len(RESIDENT_FEATURES), len(used)))
    x[0] = seen.resident_quality
    np.divide(np.minimum(own_limit, _MOST), limit, x[1])
    x[2] = used
    np.divide(seen.resident_output_tokens, seen.resident_expected_output, x[3])
    np.divide(left, _TOKENS, x[4])
    np.divide(seen.resident_prompt_tokens, _TOKENS, x[5])
    np.divide(before, own_limit, x[6])
    np.multiply((predicted.resident_after_s - before) / own_limit, _FINE, x[7])
    x[8] = impact.before
    np.multiply(impact.after - impact.before, _FINE, x[9])
    return _rows(bounded(x))
