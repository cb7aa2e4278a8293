"""The engine on a clock that only moves when the engine waits: no real time passes."""

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pointsman_core.batching import Batcher
from pointsman_core.cost import CostModel
from pointsman_engine_sim.engine import Engine
from pointsman_engine_sim.metrics import EngineMetrics
from pointsman_engine_sim.settings import EngineSettings

COST = CostModel(
    overhead_s=0.25,
    compute_s_per_token=0.125,
    weights_s=0.5,
    context_s_per_token=2**-10,
    kv_capacity_tokens=1024,
    max_sequences=2,
    max_batched_tokens=64,
)


class InstantLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.slowness = 0.0
        """Seconds by which every timer comes late."""

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when + self.slowness)
        super()._run_once()


class Bench:
    def __init__(self) -> None:
        settings = EngineSettings(model="tiny", cost=COST, context_tokens=1024)
        self.metrics = EngineMetrics(settings)
        self.engine = Engine(settings, self.metrics)

    def submit(self, prompt, output):
        return self.engine.submit(
            prompt_tokens=prompt, output_tokens=output, finish_reason="length"
        )

    def value(self, name, **labels):
        families = text_string_to_metric_families(self.metrics.page().decode())
        (value,) = (
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
        return value


def play(scenario: Callable, *, slowness: float = 0.0) -> Bench:
    """Run a scenario beside the engine until it returns."""
    bench = Bench()

    async def main() -> None:
        task = asyncio.create_task(bench.engine.run())
        await scenario(bench)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with asyncio.Runner(loop_factory=InstantLoop) as runner:
        runner.get_loop().slowness = slowness
        runner.run(main())
    return bench


def expected_seconds(*requests):
    batcher = Batcher(COST)
    for index, (prompt, output) in enumerate(requests):
        batcher.submit(str(index), prompt_tokens=prompt, output_tokens=output)
    while batcher.step():
        pass
    return batcher.busy_seconds


async def answer_three(bench):
    generations = [bench.submit(prompt, output) for prompt, output in [(100, 5), (30, 9), (7, 2)]]
    for generation in generations:
        assert await generation.at_least(generation.output_tokens) == generation.output_tokens


def test_requests_take_as_long_as_the_batcher_says():
    bench = play(answer_three)
    total = expected_seconds((100, 5), (30, 9), (7, 2))
    assert bench.value("simulated_engine_busy_seconds_total") == pytest.approx(total)
    assert bench.value("vllm:generation_tokens_total") == 16
    assert bench.value("vllm:prompt_tokens_total") == 137
    assert bench.value("vllm:request_success_total", finished_reason="length") == 3
    assert bench.value("vllm:time_to_first_token_seconds_count") == 3
    assert bench.value("vllm:inter_token_latency_seconds_count") == 13
    assert bench.value("vllm:num_requests_running") == 0
    assert bench.value("vllm:kv_cache_usage_perc") == 0


def test_slow_host_changes_no_simulated_time():
    ideal, slow = play(answer_three), play(answer_three, slowness=3.0)
    for name in (
        "simulated_engine_busy_seconds_total",
        "vllm:time_to_first_token_seconds_sum",
        "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_sum",
        "vllm:iteration_tokens_total_sum",
    ):
        assert slow.value(name) == pytest.approx(ideal.value(name)), name
    assert slow.value("simulated_engine_lag_seconds_sum") > 0
    assert ideal.value("simulated_engine_lag_seconds_sum") == pytest.approx(0)


def test_idle_time_does_not_count():
    async def scenario(bench):
        for _ in range(2):
            await asyncio.sleep(50)
            generation = bench.submit(10, 3)
            await generation.at_least(3)

    bench = play(scenario)
    latency = expected_seconds((10, 3))
    assert bench.value("vllm:e2e_request_latency_seconds_sum") == pytest.approx(2 * latency)


def test_request_joins_no_iteration_that_began_before_it():
    async def scenario(bench):
        first = bench.submit(64, 2)  # an iteration of 0.25 + 64 / 8 seconds
        await asyncio.sleep(1)
        second = bench.submit(8, 1)
        await first.at_least(1)
        assert second.emitted == 0
        await second.at_least(1)

    bench = play(scenario)
    second = 0.25 + 9 / 8
    expected = 8.25 + (8.25 - 1 + second)
    assert bench.value("vllm:time_to_first_token_seconds_sum") == pytest.approx(expected)


def test_gauges_show_the_batch_at_the_end_of_an_iteration():
    async def scenario(bench):
        generations = [bench.submit(10, 4) for _ in range(3)]
        await generations[0].at_least(1)
        assert bench.value("vllm:num_requests_running") == 2
        assert bench.value("vllm:num_requests_waiting") == 1
        assert bench.value("vllm:kv_cache_usage_perc") == pytest.approx(2 / 64)
        await generations[2].at_least(4)

    play(scenario)


def test_preemptions_are_counted():
    async def scenario(bench):
        generations = [bench.submit(510, 20) for _ in range(2)]
        for generation in generations:
            await generation.at_least(20)

    assert play(scenario).value("vllm:num_preemptions_total") == 1


class TestCancel:
    async def _settle(self, bench):
        generation = bench.submit(1, 1)
        await generation.at_least(1)

    def check(self, bench, *, aborted):
        assert bench.value("vllm:num_requests_running") == 0
        assert bench.value("vllm:num_requests_waiting") == 0
        assert bench.value("vllm:kv_cache_usage_perc") == 0
        assert bench.value("vllm:request_success_total", finished_reason="abort") == aborted

    def test_running(self):
        async def scenario(bench):
            generation = bench.submit(10, 500)
            await generation.at_least(3)
            bench.engine.cancel(generation)
            await self._settle(bench)
            assert generation.emitted == 3

        self.check(play(scenario), aborted=1)

    def test_waiting(self):
        async def scenario(bench):
            generations = [bench.submit(10, 5) for _ in range(3)]
            await generations[0].at_least(1)
            bench.engine.cancel(generations[2])
            await generations[1].at_least(5)
            await self._settle(bench)

        self.check(play(scenario), aborted=1)

    def test_before_the_engine_saw_it(self):
        async def scenario(bench):
            bench.engine.cancel(bench.submit(10, 5))
            await self._settle(bench)

        bench = play(scenario)
        self.check(bench, aborted=1)
        assert bench.value("vllm:generation_tokens_total") == 1

    def test_between_its_last_iteration_and_delivery(self):
        async def scenario(bench):
            generation = bench.submit(10, 1)
            await asyncio.sleep(0.5)
            bench.engine.cancel(generation)
            await self._settle(bench)

        self.check(play(scenario), aborted=1)

    def test_finished(self):
        async def scenario(bench):
            generation = bench.submit(10, 1)
            await generation.at_least(1)
            bench.engine.cancel(generation)

        self.check(play(scenario), aborted=0)
