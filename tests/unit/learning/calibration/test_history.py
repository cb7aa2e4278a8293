"""The fit from a Prometheus server's history, against a fake server."""

import json
import re
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from pointsman_learning.calibration.fit import Times, fit
from pointsman_learning.calibration.history import Period, read_history
from pointsman_learning.calibration.measurements import CalibrationError

TRUE = Times(overhead_s=0.002, compute_s_per_token=5e-5, weights_s=0.018, context_s_per_token=3e-7)
CAPACITY = 100_000
END = datetime(2026, 1, 2, tzinfo=UTC)
PERIOD = Period(hours=1, step_s=60, end=END)
STEPS = 60


class FakePrometheus:
    """Answers by metric name; each series is a value per time step."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        batch = generator.uniform(1, 24, STEPS)
        usage = np.minimum(batch * generator.uniform(300, 3000, STEPS) / CAPACITY, 0.9)
        prefill = generator.choice([0, 50, 500, 1500], STEPS)
        tokens = batch + prefill
        memory = TRUE.weights_s + TRUE.context_s_per_token * usage * CAPACITY
        seconds = TRUE.overhead_s + np.maximum(TRUE.compute_s_per_token * tokens, memory)
        iterations = 60 / seconds
        self.series = {
            "iteration_tokens_total_count": iterations,
            "generation_tokens_total": batch * iterations,
            "prompt_tokens_total": (prefill + 10) * iterations,
            "prompt_tokens_cached_total": 10 * iterations,
            "inter_token_latency_seconds_sum": seconds * batch * iterations,
            "inter_token_latency_seconds_count": batch * iterations,
            "num_requests_running": np.ones(STEPS),
            "kv_cache_usage_perc": usage,
        }
        self.cache = {"kv_cache_size_tokens": str(CAPACITY)}
        self.instances = ["10.0.0.1:8000"]
        self.queries: list[str] = []

    def answer(self, path: str, query: str, start: float):
        name = re.search(r"vllm:(\w+)\{", query).group(1)
        self.queries.append(query)
        wanted = re.search(r'instance="([^"]+)"', query)
        instances = [i for i in self.instances if not wanted or i == wanted.group(1)]
        if path.endswith("/query"):
            return [{"metric": {"instance": i} | self.cache, "value": [0, "1"]} for i in instances]
        if name not in self.series:
            return []
        values = [[start + 60 * k, str(v)] for k, v in enumerate(self.series[name])]
        return [{"metric": {"instance": i}, "values": values} for i in instances]


@contextmanager
def serving(fake):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path)
            given = parse_qs(parts.query)
            result = fake.answer(parts.path, given["query"][0], float(given.get("start", [0])[0]))
            body = json.dumps({"status": "success", "data": {"result": result}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def read(fake, *, instance=None, period=PERIOD):
    with serving(fake) as url:
        return read_history(url, model='my "model"', instance=instance, period=period)


def test_the_history_gives_back_the_times():
    fake = FakePrometheus()
    history = read(fake)
    assert (len(history.measurements), history.steps) == (STEPS, STEPS)
    assert history.kv_capacity_tokens == CAPACITY
    times = fit(history.measurements).times
    assert times.overhead_s + times.weights_s == pytest.approx(0.020, rel=0.01)
    assert times.compute_s_per_token == pytest.approx(TRUE.compute_s_per_token, rel=0.05)
    assert times.context_s_per_token == pytest.approx(TRUE.context_s_per_token, rel=0.05)
    assert all(r'{model_name="my \"model\""}' in query for query in fake.queries)


def test_idle_thin_and_unknown_steps_are_left_out():
    fake = FakePrometheus()
    fake.series["num_requests_running"][:10] = 0
    fake.series["iteration_tokens_total_count"][10:20] = 5
    fake.series["inter_token_latency_seconds_sum"][20:30] = np.nan
    history = read(fake)
    assert (len(history.measurements), history.steps) == (30, 60)


def test_an_engine_without_prefix_cache_is_read_too():
    fake = FakePrometheus()
    del fake.series["prompt_tokens_cached_total"]
    assert read(fake).measurements.prefill_tokens.min() == pytest.approx(10)


def test_the_cache_of_older_engines_is_told_in_blocks():
    fake = FakePrometheus()
    fake.cache = {"block_size": "16", "num_gpu_blocks": "100"}
    assert read(fake).kv_capacity_tokens == 1600


def test_one_of_several_engines_is_chosen():
    fake = FakePrometheus()
    fake.instances = ["10.0.0.1:8000", "10.0.0.2:8000"]
    with pytest.raises(
        CalibrationError, match=r"2 engines .* of 10\.0\.0\.1:8000, 10\.0\.0\.2:8000"
    ):
        read(fake)
    assert len(read(fake, instance="10.0.0.2:8000").measurements) == STEPS


def test_what_is_missing_is_named():
    fake = FakePrometheus()
    del fake.series["inter_token_latency_seconds_sum"]
    with pytest.raises(CalibrationError, match=r"nothing for .*inter_token_latency_seconds_sum"):
        read(fake)
    fake = FakePrometheus()
    fake.cache = {"block_size": "16", "num_gpu_blocks": "None"}
    with pytest.raises(CalibrationError, match="does not tell the size of the KV cache"):
        read(fake)
    fake = FakePrometheus()
    fake.series["num_requests_running"][3:] = 0
    with pytest.raises(CalibrationError, match="only 3 of 60 time steps were busy"):
        read(fake)


def test_no_server_is_an_error(unused_tcp_port):
    with pytest.raises(CalibrationError, match=r"Prometheus: .*127\.0\.0\.1"):
        read_history(
            f"http://127.0.0.1:{unused_tcp_port}",
            model="m",
            instance=None,
            period=PERIOD,
            retries=0,
        )


def test_a_period_that_prometheus_would_refuse_is_refused():
    with pytest.raises(CalibrationError, match="take steps of at least 8 s"):
        Period(hours=24, step_s=1)
    with pytest.raises(CalibrationError, match="above 0"):
        Period(hours=0, step_s=1)
