"""``pointsman bench simulator``: how fast simulated time passes, and whether it is right.

Speeds are per second of this process's CPU time: it has one thread, and machines are shared.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from pointsman_cli.bench import site
from pointsman_common.wording import counted
from pointsman_core.capacity import capacity
from pointsman_core.cost import CostModel
from pointsman_core.observation import RoutingTable, observe
from pointsman_core.resources import Algorithm
from pointsman_core.snapshot import Snapshot, compile_snapshot
from pointsman_core.state import IntArray
from pointsman_learning.simulator import (
    ReplayPredictor,
    Scenario,
    Simulation,
    core_request,
    simulate,
)
from pointsman_learning.simulator.environment import RoutingEnv
from pointsman_learning.simulator.reference import Compared

T = TypeVar("T")

INPUT = (928.0, 1.0)
"""Median and log-spread of prompts, near those of the Azure conversation trace. Ours."""
OUTPUT = (129.0, 0.8)
"""Median and log-spread of answers, likewise."""
LONGEST = (4096, 1024)
"""Longest prompt and answer."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One setting's speeds, each per second of CPU time unless it says otherwise."""

    endpoints: int
    load: float
    requests: int
    in_flight: float
    """Mean number of requests in flight at an arrival."""
    simulated_requests: float
    """Requests decided by a counter: `advance` and `submit` from Python."""
    iterations: float
    """Engine iterations in that run."""
    environment_steps: float
    """Steps of `RoutingEnv` with full observations."""
    decisions: float
    """Requests decided by core's router with LatencyQualityGreedy."""
    observe_us: float
    """Microseconds of core's `observe`."""
    clone_us: float
    """Microseconds of `Simulation.clone` halfway."""


def run(
    *, endpoints: Sequence[int], loads: Sequence[float], requests: int, seed: int = 0
) -> list[Speed]:
    """Measure every setting, after a run that compiles the loops."""
    _measure(make_scenario(endpoints=2, load=0.5, requests=20, seed=seed), load=0.5)
    return [
        _measure(make_scenario(endpoints=e, load=load, requests=requests, seed=seed), load=load)
        for e in endpoints
        for load in loads
    ]


def make_scenario(*, endpoints: int, load: float, requests: int, seed: int) -> Scenario:
    """Poisson arrivals at a share of the capacity, lengths like those of conversations."""
    rng = np.random.default_rng(seed)
    shape = (requests, endpoints)
    prompts = _lengths(rng, INPUT, LONGEST[0], requests)
    answers = _lengths(rng, OUTPUT, LONGEST[1], requests)
    snapshot = _snapshot(endpoints)
    models = [CostModel.from_profile(c.profile, c.limits) for c in snapshot.candidates]
    mean_answer, mean_prompt = float(answers.mean()), float(prompts.mean())
    rate = load * capacity(((m, mean_answer) for m in models), input_tokens=mean_prompt)
    return Scenario(
        snapshot=snapshot,
        arrival_s=np.cumsum(rng.exponential(1.0 / rate, requests)),
        prompt_tokens=prompts,
        limit_s=rng.choice([0.05, 0.07, 0.1], requests),
        score=rng.random(shape),
        output_tokens=np.repeat(answers[:, None], endpoints, axis=1),
        predicted_quality=rng.random(shape),
        predicted_output_tokens=np.full(shape, mean_answer),
        seed=seed,
        description="made up to measure the simulator's speed",
    )


def _lengths(
    rng: np.random.Generator, median_and_spread: tuple[float, float], longest: int, count: int
) -> IntArray:
    median, spread = median_and_spread
    drawn = rng.lognormal(np.log(median), spread, count)
    return np.clip(np.rint(drawn), 1, longest).astype(np.int64)


def _snapshot(endpoints: int) -> Snapshot:
    addresses = [f"10.0.{i // 250}.{i % 250 + 1}:8000" for i in range(endpoints)]
    experts = site.experts(addresses)
    where = {e.metadata.name: tuple(e.spec.backend.addresses or ()) for e in experts}
    return compile_snapshot(site.policy(Algorithm.LATENCY_QUALITY_GREEDY), experts, where)


def _measure(scenario: Scenario, *, load: float) -> Speed:
    n = len(scenario)
    trivial_s, simulation = _timed(lambda: _in_turn(scenario))
    steps_s, present = _timed(lambda: _steps(scenario))
    decisions_s, _ = _timed(lambda: simulate(scenario))
    observe_s, clone_s = _halfway(scenario)
    return Speed(
        endpoints=scenario.endpoints,
        load=load,
        requests=n,
        in_flight=round(present, 1),
        simulated_requests=round(n / trivial_s),
        iterations=round(int(simulation.iterations.sum()) / trivial_s),
        environment_steps=round(n / steps_s),
        decisions=round(n / decisions_s),
        observe_us=round(observe_s * 1e6, 1),
        clone_us=round(clone_s * 1e6, 1),
    )


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    before = time.process_time()
    result = work()
    return max(time.process_time() - before, 1e-9), result


def _in_turn(scenario: Scenario) -> Simulation:
    simulation = Simulation(scenario)
    for i, arrival in enumerate(scenario.arrival_s.tolist()):
        simulation.advance(arrival)
        simulation.submit(i, i % scenario.endpoints)
    simulation.finish()
    return simulation


def _steps(scenario: Scenario) -> float:
    """Walk through an episode; returns the mean number of requests in flight."""
    environment = RoutingEnv.of(scenario, in_flight=512)
    environment.reset(seed=0)
    present = 0
    for i in range(len(scenario)):
        present += len(environment.observed.resident_candidate)
        environment.step(np.int64(i % scenario.endpoints))
    return present / len(scenario)


def _halfway(scenario: Scenario, *, repeat: int = 200) -> tuple[float, float]:
    """Seconds of `observe` and of `clone` in the middle of a run."""
    simulation = Simulation(scenario)
    middle = len(scenario) // 2
    for i, arrival in enumerate(scenario.arrival_s[:middle].tolist()):
        simulation.advance(arrival)
        simulation.submit(i, i % scenario.endpoints)
    simulation.advance(float(scenario.arrival_s[middle]))
    table = RoutingTable(scenario.snapshot, simulation.state, ReplayPredictor(scenario))
    request = core_request(scenario, middle)

    def look() -> None:
        for _ in range(repeat):
            simulation.state.forget()
            observe(table, simulation.state, request, now_s=simulation.now_s)

    def copy() -> None:
        for _ in range(repeat):
            simulation.clone()

    return _timed(look)[0] / repeat, _timed(copy)[0] / repeat


# --- Report ----------------------------------------------------------------------------

_SHOWN = {
    "endpoints": "E",
    "load": "load",
    "in_flight": "present",
    "simulated_requests": "req/s",
    "iterations": "iter/s",
    "environment_steps": "env/s",
    "decisions": "greedy/s",
    "observe_us": "observe",
    "clone_us": "clone",
}


def show(
    speeds: Sequence[Speed], compared: Compared | None, *, as_json: bool, setting: dict[str, Any]
) -> None:
    """Print tables to standard error, or the JSON document to standard output."""
    if as_json:
        document = {
            "runs": [asdict(speed) for speed in speeds],
            "verified": asdict(compared) if compared else None,
            "setting": setting,
        }
        sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
        return
    console = Console(stderr=True)
    if compared:
        console.print(describe(compared))
    if speeds:
        console.print(_table(speeds))


def describe(compared: Compared) -> str:
    """One sentence on what was found equal."""
    return (
        f"Equal to the reference to the last bit on {counted(compared.cases, 'random case')}:"
        f" {counted(compared.requests, 'request')}, {compared.tokens:,} token times,"
        f" {compared.iterations:,} iterations, {compared.preemptions:,} preemptions,"
        f" {compared.lost:,} requests lost with their endpoints."
    )


def _table(speeds: Sequence[Speed]) -> Table:
    table = Table(
        title=f"Simulator on one core, {counted(speeds[0].requests, 'request')} a run",
        caption="Per second of CPU time: requests decided in turn, engine iterations, steps of the"
        " environment, decisions of LatencyQualityGreedy. Microseconds: observe, clone.",
    )
    for heading in _SHOWN.values():
        table.add_column(heading, justify="right")
    for speed in speeds:
        values = asdict(speed)
        table.add_row(*(_text(values[name]) for name in _SHOWN))
    return table


def _text(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.0f}k" if value >= 1e4 else f"{value:,}"
