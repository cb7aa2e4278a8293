"""Settings that differ between a run and what is to go on with it."""

import pytest

from pointsman_learning.resumed import differences


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ({"a": 1}, {"a": 1.0}, []),
        (
            {"a": 1, "b": {"c": [1, 2]}},
            {"a": 2, "b": {"c": [1]}},
            ["a: 1 → 2", "b.c: [1, 2] → [1]"],
        ),
        ({"a": None}, {"a": "trace.csv"}, ["a: null → trace.csv"]),
        ({"a": {"b": 1}}, {"a": {}, "d": True}, ["a.b: 1 → not set", "d: not set → true"]),
        ({"a": {"b": 1}}, {"a": 1}, ['a: {"b": 1} → 1']),
    ],
)
def test_each_is_named(was, now, told):
    assert differences(was, now) == told
