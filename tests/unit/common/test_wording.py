"""Counts and lists as people write them."""

import pytest

from pointsman_common.wording import counted, listed, ranged, share


@pytest.mark.parametrize(("number", "text"), [(0, "0 experts"), (1, "1 expert"), (2, "2 experts")])
def test_counts(number, text):
    assert counted(number, "expert") == text


def test_large_and_irregular_counts():
    assert counted(2000, "expert") == "2,000 experts"
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]


def test_ranges():
    assert ranged(5, 6, "window") == "5 to 6 windows"
    assert ranged(1, 1, "window") == "1 window"


@pytest.mark.parametrize(
    ("number", "total", "text"),
    [
        (0, 0, "0 of 0 endpoints are"),
        (0, 1, "0 of 1 endpoint is"),
        (1, 1, "1 of 1 endpoint is"),
        (0, 2, "0 of 2 endpoints are"),
        (1, 2, "1 of 2 endpoints is"),
        (2, 2, "2 of 2 endpoints are"),
    ],
)
def test_shares(number, total, text):
    assert share(number, total, "endpoint") == text


def test_another_verb():
    assert share(1, 2, "endpoint", one="answers", many="answer") == "1 of 2 endpoints answers"


def test_lists_are_cut_short():
    assert listed(()) == ""
    assert listed("abc") == "a, b, c"
    assert listed("abcd") == "a, b, c and 1 more"
