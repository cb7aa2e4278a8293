"""The simulator's benchmark: its options and report; not its numbers."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from pointsman_cli.bench import simulator as bench
from pointsman_cli.bench.cli import app
from pointsman_learning.simulator import check, reference

SMALL = ["simulator", "--endpoints", "2,3", "--loads", "0.5", "--requests", "20"]


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_reports_json_on_standard_output():
    done = invoke(*SMALL, "--verify", "3", "--json")
    assert done.exit_code == 0
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert [run["endpoints"] for run in document["runs"]] == [2, 3]
    for run in document["runs"]:
        assert (run["load"], run["requests"]) == (0.5, 20)
        speeds = (
            "simulated_requests",
            "iterations",
            "environment_steps",
            "decisions",
            "observe_us",
        )
        assert all(run[name] > 0 for name in speeds)
    assert document["verified"]["cases"] == 3
    assert document["verified"]["tokens"] > 0
    assert document["setting"]["seed"] == 0


def test_reports_a_table_on_standard_error():
    done = invoke(*SMALL)
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "Simulator on one core, 20 requests a run" in done.stderr


def test_verifies_without_measuring():
    done = invoke("simulator", "--no-speed", "--verify", "2", "--seed", "7")
    assert done.exit_code == 0
    text = " ".join(done.stderr.split())
    assert "Equal to the reference to the last bit on 2 random cases" in text
    assert "Simulator on one core" not in text


def test_a_difference_is_an_error(monkeypatch):
    compare = reference.compare

    def wrong(scenario, choose):
        compare(scenario, choose)
        raise reference.MismatchError("tokens of request 1: 2, the reference has 3")

    monkeypatch.setattr(reference, "compare", wrong)
    done = invoke("simulator", "--no-speed", "--verify", "2")
    assert done.exit_code == 1
    assert "the simulator differs from the reference: case 0 of seed 0: tokens of" in done.stderr


def test_without_the_learning_extra_it_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pointsman_learning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    done = invoke(*SMALL)
    assert done.exit_code == 2
    assert "needs the learning extra: pip install 'pointsman[learning]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--endpoints", "0"], "'0' is not a list of numbers from 1 to 256"),
        (["--endpoints", "4,x"], "'4,x' is not a list of numbers from 1 to 256"),
        (["--loads", "-1"], "'-1' is not a list of numbers from 0.01 to 10"),
        (["--loads", ""], "'' is not a list of numbers from 0.01 to 10"),
    ],
)
def test_a_wrong_option_is_told_in_words(arguments, want):
    done = invoke("simulator", *arguments)
    assert done.exit_code == 2
    assert want in " ".join(done.stderr.replace("│", " ").split())


def test_its_workload_is_what_it_says():
    scenario = bench.make_scenario(endpoints=4, load=0.9, requests=4000, seed=1)
    check(scenario)
    assert len(scenario) == 4000
    assert np.median(scenario.prompt_tokens) == pytest.approx(928, rel=0.1)
    assert np.median(scenario.output_tokens[:, 0]) == pytest.approx(129, rel=0.1)
    again = bench.make_scenario(endpoints=4, load=0.9, requests=4000, seed=1)
    assert np.array_equal(scenario.arrival_s, again.arrival_s)
    half = bench.make_scenario(endpoints=4, load=0.45, requests=4000, seed=1)
    np.testing.assert_allclose(half.arrival_s, 2 * scenario.arrival_s)
