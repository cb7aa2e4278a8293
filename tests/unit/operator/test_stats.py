"""Averages for statuses."""

from pointsman_operator import stats
from pointsman_operator.observed import Key, Performance
from pointsman_operator.publisher import PolicyCounts

AUTO, IDLE = Key("default", "auto"), Key("default", "idle")


def test_servers_are_added_up():
    servers = [
        {AUTO: PolicyCounts(10, 1, 4.0), IDLE: PolicyCounts(0, 0, 0.0)},
        {AUTO: PolicyCounts(30, 9, 16.0)},
        {},
    ]
    assert stats.from_servers(servers) == {AUTO: Performance(0.5, 0.25)}


def test_averages_are_rounded():
    assert stats.from_servers([{AUTO: PolicyCounts(3, 1, 1.0)}]) == {AUTO: Performance(0.33, 0.33)}


def test_rows_of_prometheus():
    rows = [
        {"metric": {"policy": "default/auto"}, "value": [0, "0.256"]},
        {"metric": {"policy": "default/idle"}, "value": [0, "NaN"]},
        {"metric": {"policy": "nameless"}, "value": [0, "1"]},
        {"metric": {}, "value": [0, "1"]},
        {"metric": {"policy": "a/b"}, "value": []},
        {"metric": {"policy": "a/b"}, "value": [0, "x"]},
        "rubbish",
    ]
    assert stats.by_policy(rows) == {AUTO: 0.26}
    assert stats.by_policy(None) == {}
