"""Against what queueing theory says; seeded, so they pass or fail for good."""

import numpy as np
import pytest

from pointsman_core.cost import CostModel
from pointsman_learning.simulator import Simulation

ONE_AT_A_TIME = {"concurrency": 1}
COMPUTE_BOUND = {
    "parameters_billions": 0.5,
    "peak_tflops": 1.0,
    "compute_efficiency": 1.0,  # 1 ms per token
    "memory_bandwidth_gbps": 1e6,
    "bandwidth_efficiency": 1.0,
    "kv_bytes_per_token": 1,
    "kv_cache_gib": 1.0,
    "iteration_overhead_ms": 0.0,
    "max_batched_tokens": 2**20,
}
"""An iteration takes 1 ms per token, whatever else: processor sharing in steps of a token."""
TOKEN_S = 1e-3


def poisson(rng, rate, count):
    return np.cumsum(rng.exponential(1.0 / rate, count))


def batch_means(values, batches=30):
    """Mean and its standard error, from means of consecutive batches (after a warm-up)."""
    means = [part.mean() for part in np.array_split(values[len(values) // 10 :], batches)]
    return np.mean(means), np.std(means, ddof=1) / np.sqrt(batches)


def run(lab, snapshot, arrival, prompts, outputs):
    requests = zip(arrival.tolist(), prompts, outputs, strict=True)
    simulation = Simulation(lab.scenario(*requests, snapshot=snapshot))
    lab.play(simulation)
    return simulation, simulation.finish()


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_waiting_of_m_d_1(lab, load):
    """Pollaczek-Khinchine: mean wait = load x service / (2 (1 - load)) for constant service."""
    rng = np.random.default_rng(1)
    count, prompt, output = 60_000, 20, 4
    snapshot = lab.snapshot(limits=ONE_AT_A_TIME)
    _, alone = run(lab, snapshot, np.zeros(1), [prompt], [output])
    service = float(alone.finish_s[0])
    arrival = poisson(rng, load / service, count)
    _, outcome = run(lab, snapshot, arrival, [prompt] * count, [output] * count)
    wait, error = batch_means(outcome.finish_s - arrival - service)
    want = load * service / (2.0 * (1.0 - load))
    assert error < 0.15 * want
    assert wait == pytest.approx(want, abs=3.0 * error)


@pytest.mark.parametrize("lengths", ["constant", "geometric"])
@pytest.mark.parametrize("load", [0.5, 0.7])
def test_sojourn_of_processor_sharing(lab, load, lengths):
    """Mean sojourn = service / (1 - load), whatever the distribution of the work."""
    rng = np.random.default_rng(2)
    count, mean = 30_000, 60
    drawn = rng.geometric(1.0 / mean, count) if lengths == "geometric" else np.full(count, mean)
    snapshot = lab.snapshot(
        profile=COMPUTE_BOUND, limits={"concurrency": 4096, "context_tokens": 10**6}
    )
    arrival = poisson(rng, load / (mean * TOKEN_S), count)
    _, outcome = run(lab, snapshot, arrival, [1] * count, drawn.tolist())
    sojourn, error = batch_means(outcome.finish_s - arrival)
    want = mean * TOKEN_S / (1.0 - load)
    # A newcomer waits for the iteration in progress: at most one token of everyone present.
    step = want / mean
    assert sojourn == pytest.approx(want + step / 2, abs=3.0 * error + step)
    assert error < 0.05 * want


def test_slowdown_of_processor_sharing_is_the_same_for_short_and_long(lab):
    rng = np.random.default_rng(3)
    count, load = 30_000, 0.7
    drawn = rng.choice([40, 160], count)
    snapshot = lab.snapshot(
        profile=COMPUTE_BOUND, limits={"concurrency": 4096, "context_tokens": 10**6}
    )
    arrival = poisson(rng, load / (drawn.mean() * TOKEN_S), count)
    _, outcome = run(lab, snapshot, arrival, [1] * count, drawn.tolist())
    for length in (40, 160):
        chosen = drawn == length
        slowdown, error = batch_means((outcome.finish_s - arrival)[chosen] / (length * TOKEN_S))
        want = 1.0 / (1.0 - load)
        assert slowdown == pytest.approx(want, abs=3.0 * error + 2.0 * want / length)


def test_a_busy_period_ends_when_its_work_is_done(lab):
    """A work-conserving server is never idle while there is work, whatever it does first."""
    rng = np.random.default_rng(4)
    count = 400
    outputs = rng.integers(1, 100, count)
    snapshot = lab.snapshot(
        profile=COMPUTE_BOUND, limits={"concurrency": 4096, "context_tokens": 10**6}
    )
    arrival = poisson(rng, 0.9 / (outputs.mean() * TOKEN_S), count)
    _, outcome = run(lab, snapshot, arrival, [1] * count, outputs.tolist())
    free_at = 0.0  # Lindley's recursion on the work alone
    for at, output in zip(arrival, outputs, strict=True):
        free_at = max(free_at, at) + output * TOKEN_S
    assert outcome.finish_s.max() == pytest.approx(free_at, rel=1e-9)


def test_work_and_tokens_are_conserved(lab):
    rng = np.random.default_rng(5)
    count = 500
    prompts, outputs = rng.integers(1, 300, count), rng.integers(1, 60, count)
    snapshot = lab.snapshot(
        3, profile=COMPUTE_BOUND | {"iteration_overhead_ms": 2.0}, limits={"concurrency": 16}
    )
    requests = zip(
        poisson(rng, 60.0, count).tolist(), prompts.tolist(), outputs.tolist(), strict=True
    )
    simulation = Simulation(lab.scenario(*requests, snapshot=snapshot), trace=True)
    outcome = lab.play(simulation).finish()
    assert outcome.preemptions.sum() == 0
    cost = CostModel.from_profile(snapshot.candidates[0].profile, snapshot.candidates[0].limits)
    for e in range(3):
        mine = outcome.endpoint == e
        # Each token but the last of an answer is computed exactly once.
        computed = int((prompts + outputs - 1)[mine].sum())
        overhead = cost.overhead_s * simulation.iterations[e]
        want = overhead + cost.compute_s_per_token * computed
        assert outcome.busy_s[e] == pytest.approx(want, rel=1e-9)
    for i in range(count):
        times = simulation.token_times(i)
        assert len(times) == outputs[i]
        assert (np.diff(times) > 0).all()
