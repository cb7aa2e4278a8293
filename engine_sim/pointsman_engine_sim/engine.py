"""A `Batcher` run in real time.

One task runs iteration after iteration on a clock of its own, the *simulated time*. An
iteration starts when the one before it ended, not when the host got round to it, and a
request joins no iteration that started before it arrived. So the simulated times are those
of an ideal host: delays of the real one shift deliveries, and are made up for later.
"""

import asyncio
from collections import deque
from itertools import count

from pointsman_core.batching import Batcher, Iteration
from pointsman_engine_sim.metrics import EngineMetrics, FinishedReason
from pointsman_engine_sim.settings import EngineSettings


class Generation:
    """One request inside the engine."""

    __slots__ = (
        "_delivered",
        "_wanted",
        "arrival",
        "emitted",
        "finish_reason",
        "last_token",
        "output_tokens",
        "prompt_tokens",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        *,
        prompt_tokens: int,
        output_tokens: int,
        finish_reason: FinishedReason,
        arrival: float,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.finish_reason: FinishedReason = finish_reason
        self.arrival = arrival
        self.last_token = arrival
        self.emitted = 0
        self._wanted = 0
        self._delivered = asyncio.Event()

    async def at_least(self, tokens: int) -> int:
        """Wait until that many tokens are out; return how many are."""
        while self.emitted < tokens:
            self._wanted = tokens
            self._delivered.clear()
            await self._delivered.wait()
        return self.emitted

    def emit(self, now: float) -> None:
        """Note one more token, at simulated time ``now``."""
        self.last_token = now
        self.emitted += 1
        if self.emitted == self._wanted:
            self._delivered.set()


class Engine:
    """Batch, queue and clock of one simulated engine."""

    def __init__(self, settings: EngineSettings, metrics: EngineMetrics) -> None:
        self._batcher = Batcher(settings.cost)
        self._metrics = metrics
        self._ids = count()
        self._active: dict[str, Generation] = {}
        self._arrivals: deque[Generation] = deque()
        self._arrived = asyncio.Event()
        self._time = 0.0

    def submit(
        self, *, prompt_tokens: int, output_tokens: int, finish_reason: FinishedReason
    ) -> Generation:
        """Let a request arrive now; prompt and answer must fit into the context."""
        generation = Generation(
            str(next(self._ids)),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            finish_reason=finish_reason,
            arrival=asyncio.get_running_loop().time(),
        )
        self._active[generation.request_id] = generation
        self._arrivals.append(generation)
        self._arrived.set()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Drop a request and free its KV cache; nothing happens if it is done."""
        if self._active.pop(generation.request_id, None) is None:
            return
        if not self._batcher.cancel(generation.request_id) and generation in self._arrivals:
            self._arrivals.remove(generation)
        self._metrics.success["abort"].inc()
        self._publish_gauges()

    async def run(self) -> None:
        """Serve until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            self._let_arrive()
            iteration = self._batcher.step()
            if iteration is None:
                await self._next_arrival()
                continue
            self._time += iteration.seconds
            await asyncio.sleep(max(0.0, self._time - clock()))
            self._metrics.lag.observe(max(0.0, clock() - self._time))
            self._deliver(iteration)

    async def _next_arrival(self) -> None:
        if not self._arrivals:
            self._arrived.clear()
            await self._arrived.wait()
        if self._arrivals:  # unless it was cancelled in between
            self._time = max(self._time, self._arrivals[0].arrival)

    def _let_arrive(self) -> None:
        while self._arrivals and self._arrivals[0].arrival <= self._time:
            generation = self._arrivals.popleft()
            self._batcher.submit(
                generation.request_id,
                prompt_tokens=generation.prompt_tokens,
                output_tokens=generation.output_tokens,
            )

    def _deliver(self, iteration: Iteration) -> None:
        metrics = self._metrics
        for request_id in iteration.tokens:
            generation = self._active.get(request_id)
            if generation is not None:  # not cancelled meanwhile
                self._deliver_token(generation)
        for request_id in iteration.finished:
            generation = self._active.pop(request_id, None)
            if generation is not None:
                metrics.success[generation.finish_reason].inc()
                metrics.request.observe(self._time - generation.arrival)
        metrics.generation_tokens.inc(len(iteration.tokens))
        metrics.iteration_tokens.observe(iteration.prefill_tokens + iteration.decode_tokens)
        metrics.busy.inc(iteration.seconds)
        if iteration.preempted:
            metrics.preemptions.inc(len(iteration.preempted))
        self._publish_gauges()

    def _deliver_token(self, generation: Generation) -> None:
        if generation.emitted:
            self._metrics.inter_token.observe(self._time - generation.last_token)
        else:
            self._metrics.first_token.observe(self._time - generation.arrival)
            self._metrics.prompt_tokens.inc(generation.prompt_tokens)
        generation.emit(self._time)

    def _publish_gauges(self) -> None:
        # Like vLLM's, the gauges change when an iteration ends: they do not see what
        # arrived since it began.
        self._metrics.running.set(self._batcher.running)
        self._metrics.waiting.set(self._batcher.waiting)
        self._metrics.kv_usage.set(self._batcher.kv_usage)
