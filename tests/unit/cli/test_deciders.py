import pytest
import typer

from pointsman_cli.deciders import parse_deciders
from pointsman_core.resources import Algorithm


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", tuple(Algorithm)),
        ("None", ()),
        ("leastload, Random,random", (Algorithm.LEAST_LOAD, Algorithm.RANDOM)),
    ],
)
def test_deciders_by_name(text, expected):
    assert parse_deciders(text, none_allowed=True) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Random,Best", "best: choose from Random, .*, or all, or none$"),
        ("", "nothing: choose from"),
        ("none,all", "none, all"),
    ],
)
def test_unknown_deciders(text, message):
    with pytest.raises(typer.BadParameter, match=message):
        parse_deciders(text, none_allowed=True)


def test_none_only_where_it_makes_sense():
    with pytest.raises(typer.BadParameter, match=r"none: choose from .*, or all$"):
        parse_deciders("none")
