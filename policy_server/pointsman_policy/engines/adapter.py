"""The engines' metric names, and how several series become one load.

One endpoint may publish a metric several times. Series that count different requests
(data-parallel ranks, models) are added up, because decisions choose the endpoint as a
whole. Series in which several workers report the same requests (tensor- and
pipeline-parallel ranks) count once: the highest value, as a rank may lag. The use of the
KV cache is the mean over ranks: their caches are equally large.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.samples import Sample

from pointsman_core.resources import EngineType
from pointsman_core.state import EngineLoad
from pointsman_policy.engines.errors import MetricsError
from pointsman_policy.engines.exposition import read_samples

_MAX_COUNT: Final = 2.0**53
"""Above it a float no longer counts by ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One engine's metric names."""

    engine: EngineType
    running: str
    waiting: str
    kv_usage: tuple[str, ...]
    """The first of these that is there is read: current name first, then older ones."""
    prompt_tokens: str
    generation_tokens: str
    shared_labels: frozenset[str] = frozenset()
    """Labels that tell workers apart which all report the same requests."""
    breakdown_label: str | None = None
    """A label whose empty value marks the total; its other values are parts of that."""

    def parse(self, text: str) -> EngineLoad:
        """Read a Prometheus page.

        Raises :class:`MetricsError` if running or waiting requests are missing, or if a
        value is malformed.
        """
        samples = read_samples(text, self.names)
        return EngineLoad(
            running=self._required(samples, self.running),
            waiting=self._required(samples, self.waiting),
            kv_usage=self._usage(samples),
            prompt_tokens_total=self._count(samples, self.prompt_tokens),
            generation_tokens_total=self._count(samples, self.generation_tokens),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics that are read."""
        return (
            self.running,
            self.waiting,
            *self.kv_usage,
            self.prompt_tokens,
            self.generation_tokens,
        )

    def _required(self, samples: Mapping[str, list[Sample]], name: str) -> int:
        value = self._count(samples, name)
        if value is None:
            raise MetricsError(
                f"{name} is not on the page: not a page of {self.engine.value}, or too old"
            )
        return value

    def _count(self, samples: Mapping[str, list[Sample]], name: str) -> int | None:
        values = self._series(samples.get(name, ()))
        if not values:
            return None
        total = math.fsum(values)
        if not 0 <= total < _MAX_COUNT:  # false for NaN as well
            raise MetricsError(f"{name} is {total}: expected a count")
        return round(total)

    def _usage(self, samples: Mapping[str, list[Sample]]) -> float | None:
        values = next((v for n in self.kv_usage if (v := self._series(samples.get(n, ())))), [])
        if not values or not all(math.isfinite(value) for value in values):
            return None
        # Some engines overshoot 1 by a block or so.
        return min(max(math.fsum(values) / len(values), 0.0), 1.0)

    def _series(self, samples: Iterable[Sample]) -> list[float]:
        """Values to add up: one for each group of series that report the same requests."""
        groups: dict[tuple[tuple[str, str], ...], float] = {}
        for sample in samples:
            labels = sample.labels
            if self.breakdown_label is not None and labels.get(self.breakdown_label):
                continue
            key = tuple(sorted(kv for kv in labels.items() if kv[0] not in self.shared_labels))
            groups[key] = _highest(groups.get(key), float(sample.value))
        return list(groups.values())


def _highest(known: float | None, value: float) -> float:
    """The higher value, NaN if either is NaN: what is unreadable must not pass as a count."""
    if known is None or math.isnan(value):
        return value
    return known if math.isnan(known) else max(known, value)


VLLM: Final = Adapter(
    engine=EngineType.VLLM,
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    kv_usage=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    prompt_tokens="vllm:prompt_tokens_total",
    generation_tokens="vllm:generation_tokens_total",
)
"""vLLM; the `engine` label is the data-parallel rank."""

SGLANG: Final = Adapter(
    engine=EngineType.SGLANG,
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    kv_usage=("sglang:token_usage",),
    prompt_tokens="sglang:prompt_tokens_total",
    generation_tokens="sglang:generation_tokens_total",
    shared_labels=frozenset({"tp_rank", "pp_rank", "moe_ep_rank"}),
    breakdown_label="priority",
)
"""SGLang with `--enable-metrics`; `dp_rank` tells data-parallel ranks apart."""

LLAMACPP: Final = Adapter(
    engine=EngineType.LLAMACPP,
    running="llamacpp:requests_processing",
    waiting="llamacpp:requests_deferred",
    kv_usage=("llamacpp:kv_cache_usage_ratio",),
    prompt_tokens="llamacpp:prompt_tokens_total",
    generation_tokens="llamacpp:tokens_predicted_total",
)
"""llama-server with `--metrics`; builds since 2025 no longer tell the KV cache's use."""

ADAPTERS: Final[Mapping[EngineType, Adapter]] = {
    adapter.engine: adapter for adapter in (VLLM, SGLANG, LLAMACPP)
}


def adapter_for(engine: EngineType) -> Adapter | None:
    """The adapter of an engine, or ``None`` where it publishes no metrics."""
    return ADAPTERS.get(engine)
