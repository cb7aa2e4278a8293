"""The process's own tasks."""

import asyncio

from pointsman_policy.engines.probe import ScrapeError
from pointsman_policy.metrics import Metrics
from pointsman_policy.server import PolicyServer
from pointsman_policy.settings import ServerSettings

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


async def test_missed_ends_are_looked_for_again_after_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("pointsman_policy.server.EXPIRY_INTERVAL_S", 0)
    server = PolicyServer(ServerSettings(manifests=(tmp_path,), predictor="none"))
    looked, again = [], asyncio.Event()

    def reconcile(*, now_s):
        looked.append(now_s)
        if len(looked) == 1:
            raise RuntimeError("a bug")
        again.set()
        return 0

    monkeypatch.setattr(server.service.tracker, "reconcile", reconcile)
    task = asyncio.create_task(server._expire())
    await again.wait()
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert "a bug" in capsys.readouterr().out


def test_endpoints_that_are_gone_leave_no_metrics_behind():
    metrics = Metrics()
    for address in (A, B):
        for kind in (ScrapeError.TIMEOUT, ScrapeError.CONNECTION):
            metrics.scrape_errors.labels(address, str(kind)).inc()
    metrics.forget_endpoints(keep={B})
    (found,) = metrics.scrape_errors.collect()
    assert {sample.labels["endpoint"] for sample in found.samples} == {B}
    assert (
        metrics.registry.get_sample_value(
            "pointsman_scrape_errors_total", {"endpoint": B, "kind": "timeout"}
        )
        == 1
    )
