"""Prometheus metrics of the operator."""

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """All metrics, on a registry of their own so that tests do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.reconciles = Counter(
            "pointsman_operator_reconciles", "Reconciliations.", ["result"], registry=r
        )
        self.reconcile_seconds = Histogram(
            "pointsman_operator_reconcile_seconds", "Time of one reconciliation.",
            buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self.snapshot_age = Gauge(
            "pointsman_operator_snapshot_age_seconds", "Since the snapshot last changed.",
            ["policy"], registry=r,
        )  # fmt: skip
        self.snapshot_bytes = Gauge(
            "pointsman_operator_snapshot_bytes", "Size of the snapshot as a ConfigMap holds it.",
            ["policy"], registry=r,
        )  # fmt: skip
        self.pushes = Counter(
            "pointsman_operator_pushes", "Sets sent to policy servers.",
            ["server", "result"], registry=r,
        )  # fmt: skip
        self.push_seconds = Histogram(
            "pointsman_operator_push_seconds", "From sending a set to its acknowledgement.",
            buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self.foreign_publishes = Counter(
            "pointsman_operator_foreign_publishes",
            "Times a policy server was found with what somebody else has published.",
            ["server"], registry=r,
        )  # fmt: skip
        self.watch_age = Gauge(
            "pointsman_operator_watch_age_seconds", "Since the last watch event.",
            ["kind"], registry=r,
        )  # fmt: skip
        self.resyncs = Counter(
            "pointsman_operator_resyncs", "Full lists of everything.", ["result"], registry=r
        )
        self.resync_corrections = Counter(
            "pointsman_operator_resync_corrections",
            "Changes that a full list found and the watch had missed.",
            ["kind"], registry=r,
        )  # fmt: skip
        self.writes = Counter(
            "pointsman_operator_writes", "Writes to the API server.",
            ["what", "result"], registry=r,
        )  # fmt: skip

    def forget_server(self, server: str) -> None:
        """Of a policy server that is gone; each pod of it had an address of its own."""
        for metric, labels in (
            (self.pushes, (server, "ok")),
            (self.pushes, (server, "failed")),
            (self.foreign_publishes, (server,)),
        ):
            with contextlib.suppress(KeyError):  # older releases raise it where there is none
                metric.remove(*labels)
