"""Iterations from a Prometheus server's history of one vLLM engine.

Each time step gives one row of means. Since a step mixes iterations of many kinds and an
iteration's time is not linear in its load, such a fit is rougher than `probe`'s; it needs no
access to the engine and no extra load.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from urllib3.util.retry import Retry

from pointsman_learning.calibration.measurements import (
    MIN_ROWS,
    CalibrationError,
    Measurement,
    Measurements,
)

MAX_STEPS = 11_000
"""Prometheus answers no more points a series."""
MIN_ITERATIONS = 20
"""Fewer iterations in a step are left out: their means are noise. Ours."""
TIMEOUT_S = 60
_RETRY_ON = (408, 429, 500, 502, 503, 504)

_QUERIES = {
    "iterations": "increase(vllm:iteration_tokens_total_count{{{of}}}[{step}s])",
    "generated": "increase(vllm:generation_tokens_total{{{of}}}[{step}s])",
    "prompted": "increase(vllm:prompt_tokens_total{{{of}}}[{step}s])",
    "cached": "increase(vllm:prompt_tokens_cached_total{{{of}}}[{step}s])",
    "waited": "increase(vllm:inter_token_latency_seconds_sum{{{of}}}[{step}s])",
    "tokens": "increase(vllm:inter_token_latency_seconds_count{{{of}}}[{step}s])",
    "running": "min_over_time(vllm:num_requests_running{{{of}}}[{step}s])",
    "kv_usage": "avg_over_time(vllm:kv_cache_usage_perc{{{of}}}[{step}s])",
}
_OPTIONAL = {"cached"}
"""Engines without prefix cache, and older ones, lack it."""
_CACHE = "vllm:cache_config_info{{{of}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """Which part of the history, and how finely."""

    hours: float
    step_s: int
    end: datetime | None = None
    """None: now."""

    def __post_init__(self) -> None:
        if not self.hours > 0 or self.step_s < 1:
            raise CalibrationError("hours and step must be above 0")
        if self.hours * 3600 / self.step_s > MAX_STEPS:
            least = math.ceil(self.hours * 3600 / MAX_STEPS)
            raise CalibrationError(
                f"{self.hours:g} hours in steps of {self.step_s} s are more than the {MAX_STEPS} "
                f"points that Prometheus answers: take steps of at least {least} s"
            )


@dataclass(frozen=True, slots=True)
class History:
    """What the history tells of one engine."""

    measurements: Measurements
    kv_capacity_tokens: int
    steps: int
    """Time steps looked at; those that were idle or thin are no rows."""


def read_history(
    url: str, *, model: str, instance: str | None, period: Period, retries: int = 3
) -> History:
    """Ask a Prometheus server for one engine's iterations.

    ``instance`` is its label of that name, needed where several engines serve the model.
    Raises `CalibrationError` if the server, the engine or a metric is not there.
    """
    of = f'model_name="{_quoted(model)}"'
    if instance is not None:
        of += f',instance="{_quoted(instance)}"'
    retry = Retry(total=retries, backoff_factor=1, status_forcelist=_RETRY_ON)
    with PrometheusConnect(url=url, timeout=TIMEOUT_S, retry=retry) as server:
        series = {
            name: _series(server, name, query.format(of=of, step=period.step_s), period)
            for name, query in _QUERIES.items()
        }
        capacity = _capacity(server, _CACHE.format(of=of))
    times = sorted(set.intersection(*(set(series[n]) for n in _QUERIES if n not in _OPTIONAL)))
    steps = [{name: values.get(at, 0.0) for name, values in series.items()} for at in times]
    rows = [row for step in steps if (row := _row(step, capacity)) is not None]
    if len(rows) < MIN_ROWS:
        raise CalibrationError(
            f"only {len(rows)} of {len(steps)} time steps were busy throughout with at least "
            f"{MIN_ITERATIONS} iterations (needs {MIN_ROWS}): take a longer or busier period, "
            "or other steps"
        )
    return History(Measurements.of(rows), capacity, len(steps))


def _row(step: Mapping[str, float], capacity: int) -> Measurement | None:
    """Means of one time step, if the engine was never seen idle in it."""
    iterations, tokens = step["iterations"], step["tokens"]
    busy = step["running"] >= 1 and iterations >= MIN_ITERATIONS and tokens > 0
    if not (busy and all(map(math.isfinite, step.values())) and step["waited"] > 0):
        return None
    return Measurement(
        batch=step["generated"] / iterations,
        context_tokens=step["kv_usage"] * capacity,
        prefill_tokens=max(step["prompted"] - step["cached"], 0.0) / iterations,
        # Between two tokens of a sequence lies one iteration; time without any is not in it.
        iteration_seconds=step["waited"] / tokens,
        iterations=iterations,
    )


def _series(server: PrometheusConnect, name: str, query: str, period: Period) -> dict[float, float]:
    """Values by time."""
    end = period.end or datetime.now(UTC)
    try:
        answer = server.custom_query_range(
            query,
            start_time=end - timedelta(hours=period.hours),
            end_time=end,
            step=str(period.step_s),
        )
    except (PrometheusApiClientException, requests.RequestException, ValueError) as error:
        raise CalibrationError(f"Prometheus: {_words(error)}") from error
    if not answer and name in _OPTIONAL:
        return {}
    return {float(at): float(value) for at, value in _only(answer, query)["values"]}


def _capacity(server: PrometheusConnect, query: str) -> int:
    try:
        answer = server.custom_query(query)
    except (PrometheusApiClientException, requests.RequestException, ValueError) as error:
        raise CalibrationError(f"Prometheus: {_words(error)}") from error
    labels = _only(answer, query)["metric"]
    try:
        size = float(labels["kv_cache_size_tokens"])
    except (KeyError, ValueError):
        try:
            size = float(labels["block_size"]) * float(labels["num_gpu_blocks"])
        except (KeyError, ValueError):
            size = math.nan
    if not (np.isfinite(size) and size >= 1):
        raise CalibrationError(f"{query} does not tell the size of the KV cache")
    return int(size)


def _only(answer: list[dict[str, Any]], query: str) -> dict[str, Any]:
    if not answer:
        raise CalibrationError(f"Prometheus has nothing for {query}")
    if len(answer) > 1:
        labels = sorted({str(entry["metric"].get("instance")) for entry in answer})
        raise CalibrationError(
            f"{len(answer)} engines answer {query}: choose an --instance of {', '.join(labels)}"
        )
    return answer[0]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _words(error: Exception) -> str:
    return str(error)[:300] or type(error).__name__
