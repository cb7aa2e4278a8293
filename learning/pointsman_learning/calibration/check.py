"""Whole requests on the real engine and in the simulator: how well the model predicts them.

The load is held out: its arrivals (Poisson) and lengths (lognormal) are unlike those of the
calibration. The simulator is given the moments at which requests really were sent.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointsman_core.capacity import endpoint_capacity
from pointsman_core.resources import (
    Backend,
    LLMExpert,
    LLMExpertSpec,
    ObjectMeta,
    RoutingPolicy,
    RoutingPolicySpec,
)
from pointsman_core.snapshot import Snapshot, compile_snapshot
from pointsman_learning.calibration.client import EngineClient, Stream, now
from pointsman_learning.calibration.measurements import CalibrationError, FloatArray
from pointsman_learning.calibration.profile import cost_model
from pointsman_learning.simulator.scenario import Outcome, Scenario
from pointsman_learning.simulator.simulation import Simulation

PROMPT_TOKENS = (200.0, 0.9)
"""Median and log-spread, in the manner of chats; ours."""
OUTPUT_TOKENS = (60.0, 0.6)
MAX_OUTPUT_TOKENS = 300
LIMIT_QUANTILES = (0.25, 0.5, 0.75, 0.9)
"""Limits for the verdicts are these quantiles of the measured latencies."""

_NOWHERE = "127.0.0.1:1"
IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutLoad:
    """Requests to send; arrays of shape (requests,)."""

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    rate: float
    """Mean requests per second."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Measured and predicted latencies of the same requests, each (requests,), in seconds."""

    load: HeldOutLoad
    """As it was really sent."""
    measured_per_token_s: FloatArray
    predicted_per_token_s: FloatArray
    measured_first_token_s: FloatArray
    predicted_first_token_s: FloatArray

    def report(self) -> dict[str, Any]:
        """Errors as shares of the measured latency, and agreement on who is in time."""
        measured, predicted = self.measured_per_token_s, self.predicted_per_token_s
        limits = [float(np.quantile(measured, q)) for q in LIMIT_QUANTILES]
        return {
            "requests": len(measured),
            "rate_per_s": self.load.rate,
            "latency_per_token": _errors(predicted, measured),
            "first_token": _errors(self.predicted_first_token_s, self.measured_first_token_s),
            "in_time": [
                {
                    "limit_ms": 1e3 * limit,
                    "measured": float((measured <= limit).mean()),
                    "predicted": float((predicted <= limit).mean()),
                    "agree": float(((measured <= limit) == (predicted <= limit)).mean()),
                }
                for limit in limits
            ],
        }


def _errors(predicted: FloatArray, measured: FloatArray) -> dict[str, float]:
    error = predicted / measured - 1.0
    return {
        "median_measured_ms": 1e3 * float(np.median(measured)),
        "median_predicted_ms": 1e3 * float(np.median(predicted)),
        "median_ape": float(np.median(np.abs(error))),
        "p90_ape": float(np.quantile(np.abs(error), 0.9)),
        "bias": float(np.median(error)),
    }


def held_out_load(fields: dict[str, Any], *, requests: int, load: float, seed: int) -> HeldOutLoad:
    """Draw requests at a share ``load`` of the fitted engine's capacity, as core has it.

    ``fields`` are those of `profile_fields`. Raises `CalibrationError` without requests or load.
    """
    if requests < 1 or not load > 0:
        raise CalibrationError("a check needs at least one request and a load above 0")
    generator = np.random.default_rng(seed)
    context = int(fields["limits"]["contextTokens"])
    most = min(MAX_OUTPUT_TOKENS, context // 4)
    prompts = _lengths(generator, PROMPT_TOKENS, requests, most=context // 2)
    outputs = _lengths(generator, OUTPUT_TOKENS, requests, most=most)
    cost = cost_model(fields)
    rate = load * endpoint_capacity(
        cost, input_tokens=float(prompts.mean()), output_tokens=float(outputs.mean())
    )
    arrivals = np.cumsum(generator.exponential(1.0 / rate, requests))
    return HeldOutLoad(arrivals - arrivals[0], prompts, outputs, rate)


def _lengths(
    generator: np.random.Generator, median_and_spread: tuple[float, float], count: int, *, most: int
) -> IntArray:
    median, spread = median_and_spread
    drawn = generator.lognormal(np.log(median), spread, count)
    return np.clip(np.rint(drawn), 1, max(most, 1)).astype(np.int64)


async def compare(client: EngineClient, fields: dict[str, Any], load: HeldOutLoad) -> Comparison:
    """Send the load to the engine, and simulate what was sent."""
    streams = [
        Stream(int(prompt), int(output))
        for prompt, output in zip(load.prompt_tokens, load.output_tokens, strict=True)
    ]
    start_s = now()

    async def one(stream: Stream, arrival_s: float) -> None:
        await asyncio.sleep(start_s + arrival_s - now())
        await client.complete(stream)
        stream.check()

    await asyncio.gather(*map(one, streams, load.arrival_s.tolist()))
    sent = np.array([stream.sent_s for stream in streams])
    order = np.argsort(sent, kind="stable")
    really = HeldOutLoad(
        sent[order] - sent.min(), load.prompt_tokens[order], load.output_tokens[order], load.rate
    )
    outcome = simulate_load(fields, really)
    first = np.array([stream.first_token_s or np.inf for stream in streams])
    return Comparison(
        load=really,
        measured_per_token_s=np.array([stream.per_token_s for stream in streams])[order],
        predicted_per_token_s=outcome.latency_per_token_s,
        measured_first_token_s=(first - sent)[order],
        predicted_first_token_s=outcome.first_token_s - really.arrival_s,
    )


def simulate_load(fields: dict[str, Any], load: HeldOutLoad) -> Outcome:
    """The same requests on one simulated engine with these ``limits`` and ``profile``."""
    count = len(load.arrival_s)
    nothing = np.zeros((count, 1))
    scenario = Scenario(
        snapshot=_snapshot(fields),
        arrival_s=load.arrival_s,
        prompt_tokens=load.prompt_tokens,
        limit_s=np.ones(count),
        score=nothing,
        output_tokens=load.output_tokens[:, None],
        predicted_quality=nothing,
        predicted_output_tokens=load.output_tokens[:, None].astype(float),
        description="the held-out load of a calibration",
    )
    simulation = Simulation(scenario)
    for request, arrival in enumerate(load.arrival_s.tolist()):
        simulation.advance(arrival)
        simulation.submit(request, 0)
    return simulation.finish()


def _snapshot(fields: dict[str, Any]) -> Snapshot:
    backend = Backend(addresses=[_NOWHERE])
    spec = LLMExpertSpec.model_validate({"model": "calibrated", "backend": backend, **fields})
    expert = LLMExpert(metadata=ObjectMeta(name="calibrated"), spec=spec)
    policy = RoutingPolicy(
        metadata=ObjectMeta(name="check"), spec=RoutingPolicySpec(models=["calibrated"])
    )
    return compile_snapshot(policy, [expert], {"calibrated": (_NOWHERE,)})
