"""When the process should be restarted, and when not."""

from pointsman_operator.health import STUCK_AFTER_S, Health
from pointsman_operator.observed import Kind


def test_a_fresh_process_is_alive():
    assert Health().problems(now=1e9) == []


def test_a_loop_that_does_not_come_round():
    health = Health()
    health.beat("writes", now=0.0)
    health.beat("snapshots", now=10.0)
    assert health.problems(now=STUCK_AFTER_S) == []
    assert health.problems(now=STUCK_AFTER_S + 1) == ["writes has not come round for 121 s"]
    health.beat("writes", now=STUCK_AFTER_S)
    assert health.problems(now=STUCK_AFTER_S + 1) == []


def listed(health, events, missed):
    health.listed({Kind.POD: events}, {Kind.POD: missed})


def test_a_watch_that_stays_silent_while_things_change():
    health = Health()
    listed(health, 5, 0)
    listed(health, 5, 2)
    assert health.problems(now=0.0) == []
    listed(health, 5, 1)
    assert health.problems(now=0.0) == ["the watch of Pod misses changes"]
    listed(health, 6, 1)
    assert health.problems(now=0.0) == []


def test_a_quiet_cluster_is_no_stale_watch():
    health = Health()
    for _ in range(10):
        listed(health, 5, 0)
    assert health.problems(now=0.0) == []
