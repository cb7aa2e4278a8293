"""Counts and lists as people write them."""

import pytest

from pointsman_operator.wording import counted, listed, share


@pytest.mark.parametrize(("number", "text"), [(0, "0 experts"), (1, "1 expert"), (2, "2 experts")])
def test_counts(number, text):
    assert counted(number, "expert") == text


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
