"""Prometheus metrics of the policy server. Names follow the project's vocabulary."""

from collections.abc import Container
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_DECISION_BUCKETS = (
    0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05,
)  # fmt: skip
_PER_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 1, 5)
_FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """All metrics, on a registry of their own so that tests do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.decisions = Counter(
            "pointsman_decisions", "Decisions made.",
            ["policy", "algorithm", "expert"], registry=r,
        )  # fmt: skip
        self.rejections = Counter(
            "pointsman_rejections", "Requests for which no endpoint was chosen.",
            ["policy", "reason"], registry=r,
        )  # fmt: skip
        self.quality_sources = Counter(
            "pointsman_quality_sources",
            "Decisions by where the chosen expert's expected quality came from.",
            ["policy", "source"], registry=r,
        )  # fmt: skip
        self.fallbacks = Counter(
            "pointsman_fallbacks", "Decisions made by the fallback algorithm.",
            ["policy", "algorithm"], registry=r,
        )  # fmt: skip
        self.model_info = Gauge(
            "pointsman_model_info", "HanDrl's model that each policy decides by.",
            ["policy", "sha256"], registry=r,
        )  # fmt: skip
        self.model_failures = Counter(
            "pointsman_model_failures", "Models that a policy named and that were refused.",
            ["policy"], registry=r,
        )  # fmt: skip
        self.refusals = Counter(
            "pointsman_refusals", "Requests that the server answered by an error of its own.",
            ["code"], registry=r,
        )  # fmt: skip
        self.decision_seconds = Histogram(
            "pointsman_decision_seconds", "Time of one decision inside the server.",
            ["algorithm"], buckets=_DECISION_BUCKETS, registry=r,
        )  # fmt: skip
        self.completions = Counter(
            "pointsman_completions", "Requests that ended, by how.",
            ["policy", "expert", "outcome"], registry=r,
        )  # fmt: skip
        self.violations = Counter(
            "pointsman_latency_violations", "Completed requests over their latency limit.",
            ["policy", "expert"], registry=r,
        )  # fmt: skip
        self.qos_requests = Counter(
            "pointsman_qos_requests", "Requests that predicted QoS was counted of.",
            ["policy"], registry=r,
        )  # fmt: skip
        self.predicted_qos = Counter(
            "pointsman_predicted_qos", "Predicted quality of answers in time, 0 for all others.",
            ["policy"], registry=r,
        )  # fmt: skip
        self.retries = Counter(
            "pointsman_rerouted", "Requests that another endpoint served than was chosen.",
            ["policy"], registry=r,
        )  # fmt: skip
        self.untracked = Counter(
            "pointsman_untracked", "Decisions not counted in flight: no usable x-request-id.",
            registry=r,
        )  # fmt: skip
        self.undecided = Counter(
            "pointsman_undecided", "Requests served without a decision: Envoy failed open.",
            registry=r,
        )  # fmt: skip
        self.expired = Counter(
            "pointsman_expired", "In-flight entries dropped because no end was ever seen.",
            ["reason"], registry=r,
        )  # fmt: skip
        self.latency_per_token = Histogram(
            "pointsman_latency_per_token_seconds", "(Last token - arrival) / output tokens.",
            ["policy", "expert"], buckets=_PER_TOKEN_BUCKETS, registry=r,
        )  # fmt: skip
        self.time_to_first_token = Histogram(
            "pointsman_time_to_first_token_seconds", "First token - arrival, streamed answers.",
            ["policy", "expert"], buckets=_FIRST_TOKEN_BUCKETS, registry=r,
        )  # fmt: skip
        self.output_tokens = Counter(
            "pointsman_output_tokens", "Tokens of completed answers.",
            ["policy", "expert"], registry=r,
        )  # fmt: skip
        self.in_flight = Gauge(
            "pointsman_in_flight", "Requests in the in-flight table.",
            ["endpoint", "expert"], registry=r,
        )  # fmt: skip
        self.endpoint_ready = Gauge(
            "pointsman_endpoint_ready", "1 where decisions may choose the endpoint.",
            ["endpoint", "expert"], registry=r,
        )  # fmt: skip
        self.pauses = Counter(
            "pointsman_pauses", "Times that an endpoint got no decisions since it only failed.",
            ["expert"], registry=r,
        )  # fmt: skip
        self.scrape_errors = Counter(
            "pointsman_scrape_errors", "Failed scrapes of engines.",
            ["endpoint", "kind"], registry=r,
        )  # fmt: skip
        self.snapshot_info = Gauge(
            "pointsman_snapshot_info", "1 for the snapshot in force of each policy.",
            ["policy", "version", "generation"], registry=r,
        )  # fmt: skip
        self.reloads = Counter(
            "pointsman_reloads", "Times that changed files were read.", ["result"], registry=r
        )
        self.publishes = Counter(
            "pointsman_publishes", "Sets of snapshots that operators sent.",
            ["result"], registry=r,
        )  # fmt: skip
        self.tls_reloads = Counter(
            "pointsman_tls_reloads", "Times that changed certificates were read.",
            ["result"], registry=r,
        )  # fmt: skip
        self.internal_errors = Counter(
            "pointsman_internal_errors", "Streams that a bug ended; Envoy then fails open.",
            ["filter"], registry=r,
        )  # fmt: skip
        self.eds_nacks = Counter(
            "pointsman_eds_nacks", "Endpoint lists that Envoy refused.", registry=r
        )

        # Finding a series by its labels takes longer than counting: these are asked each time.
        self._time_of = cache(self.decision_seconds.labels)
        self._decisions_of = cache(self.decisions.labels)
        self._sources_of = cache(self.quality_sources.labels)

    def forget_endpoints(self, *, keep: Container[str]) -> None:
        """Drop what is counted by endpoint of all others: pods come and go for years."""
        for metric in self.scrape_errors.collect():
            for labels in [s.labels for s in metric.samples if s.name.endswith("_total")]:
                if labels["endpoint"] not in keep:
                    self.scrape_errors.remove(labels["endpoint"], labels["kind"])

    def count_decision(
        self, policy: str, algorithm: str, expert: str, *, learned: bool, seconds: float
    ) -> None:
        """Count a request for which an endpoint was chosen, and what choosing took."""
        self._time_of(algorithm).observe(seconds)
        self._decisions_of(policy, algorithm, expert).inc()
        self._sources_of(policy, "learned" if learned else "declared").inc()

    def expect(self, policy: str) -> None:
        """Show the counters of a policy before its first request, as rates need them."""
        self.qos_requests.labels(policy)
        self.predicted_qos.labels(policy)

    def count_qos(self, policy: str, predicted: float) -> None:
        """Count one request, whose predicted QoS is 0 unless it was answered in time."""
        self.qos_requests.labels(policy).inc()
        self.predicted_qos.labels(policy).inc(predicted)

    def count_tls_reload(self, ok: bool) -> None:
        """Count that changed certificates were read, and whether they could be used."""
        self.tls_reloads.labels("ok" if ok else "failed").inc()
