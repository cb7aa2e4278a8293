"""The metrics page of a simulated engine: names, labels and buckets of vLLM's.

All latencies are measured in simulated time, so that a busy host does not show in them;
``simulated_engine_lag_seconds`` tells how late the host delivered.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_engine_sim.settings import EngineSettings

FinishedReason = Literal["stop", "length", "abort", "error", "repetition"]

_FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class EngineMetrics:
    """The metrics of one engine, in a registry of their own."""

    def __init__(self, settings: EngineSettings) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"engine": "0", "model_name": settings.model}
        self.running = self._gauge("vllm:num_requests_running", "Requests in the batch.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc", "KV cache in use, 0 to 1.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.preemptions = self._counter("vllm:num_preemptions", "Preemptions.")
        self.success = self._outcomes()
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens.", _TOKEN_BUCKETS
        )
        self.request = self._histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS
        )
        self.iteration_tokens = self._histogram(
            "vllm:iteration_tokens_total", "Tokens computed by an iteration.", _ITERATION_BUCKETS
        )
        self.busy = self._counter("simulated_engine_busy_seconds", "Time of all iterations.")
        self.lag = self._histogram(
            "simulated_engine_lag_seconds", "Iterations' ends behind their time.", _LAG_BUCKETS
        )
        self._add_cache_info(settings)

    def page(self) -> bytes:
        """Render in the Prometheus text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(name, text, tuple(self._labels), registry=self._registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, tuple(self._labels), registry=self._registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            name, text, tuple(self._labels), buckets=buckets, registry=self._registry
        )
        return histogram.labels(**self._labels)

    def _outcomes(self) -> dict[FinishedReason, Counter]:
        names = (*self._labels, "finished_reason")
        counter = Counter("vllm:request_success", "Requests.", names, registry=self._registry)
        return {
            reason: counter.labels(**self._labels, finished_reason=reason)
            for reason in get_args(FinishedReason)
        }

    def _add_cache_info(self, settings: EngineSettings) -> None:
        labels = {
            "engine": "0",
            "block_size": str(BLOCK_TOKENS),
            "kv_cache_size_tokens": str(settings.kv_tokens),
            "num_gpu_blocks": str(settings.kv_blocks),
        }
        name = "vllm:cache_config_info"
        info = Gauge(name, "The KV cache.", tuple(labels), registry=self._registry)
        info.labels(**labels).set(1)
