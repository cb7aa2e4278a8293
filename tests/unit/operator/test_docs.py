"""docs/operator.md says what the code says."""

import re
from pathlib import Path

import typer.main

from pointsman_operator.cli import operator
from pointsman_operator.conditions import MEANINGS, Reason, Type, reference
from pointsman_operator.metrics import Metrics

PAGE = (Path(__file__).parents[3] / "docs" / "operator.md").read_text()


def test_the_conditions_are_those_of_the_code():
    start, _, rest = PAGE.partition("conditions.reference() -->\n")
    assert start
    assert rest.partition("<!-- end -->")[0] == reference()


def test_every_reason_and_type_is_told():
    assert {m.reason for m in MEANINGS} == set(Reason)
    assert {m.type for m in MEANINGS} == set(Type)


def test_every_option_is_told():
    app = typer.Typer()
    app.command()(operator)
    command = typer.main.get_command(app)
    options = {name for one in command.params for name in one.opts if name.startswith("--")}
    told = set(re.findall(r"`(--[a-z-]+)`", PAGE))
    assert options - {"--install-completion", "--show-completion", "--help"} <= told


def test_every_metric_is_told():
    told = set(re.findall(r"pointsman_operator_\w+", PAGE))
    for metric in Metrics().registry.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        assert name in told
