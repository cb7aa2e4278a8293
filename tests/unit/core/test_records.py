"""Records of the request path."""

import dataclasses

import pytest

from pointsman_core.records import record


@record
class Point:
    """Two numbers."""

    x: int
    y: int = 2
    more: list[int] = dataclasses.field(default_factory=list)


def test_are_dataclasses_with_slots():
    point = Point(1)
    assert dataclasses.asdict(point) == {"x": 1, "y": 2, "more": []}
    assert dataclasses.replace(point, y=3) == Point(1, 3)
    with pytest.raises(AttributeError, match="has no attribute 'z'"):
        point.z = 1


def test_are_not_hashed_by_what_might_change():
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point(1))
