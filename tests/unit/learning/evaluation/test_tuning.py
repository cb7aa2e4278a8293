"""The search, on made-up measures; and one short search on synthetic requests."""

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pointsman_cli.main import app
from pointsman_core.resources import Admission, Algorithm
from pointsman_learning.evaluation import tuning
from pointsman_learning.evaluation.tuning import (
    LIMITS,
    LOADS,
    RANDOM_POOL,
    SITES,
    WORKLOADS,
    Effort,
    Journal,
    Range,
    spaces,
    training_windows,
    tune,
)
from pointsman_learning.simulator import simulate
from pointsman_learning.workloads import make_scenario, random_pool, synthetic_corpus

EFFORT = Effort(windows=24, first_windows=6, candidates_per_parameter=10)
WINDOWS = training_windows(24, requests=50)


@pytest.mark.parametrize(
    ("given", "share", "value"),
    [
        (Range(1.0, 3.0), 0.5, 2.0),
        (Range(1.0, 4.0, logarithmic=True), 0.5, 2.0),
        (Range(1.0, 3.0), 0.0, 1.0),
        (Range(1.0, 3.0), 1.0, 3.0),
    ],
)
def test_a_range_goes_both_ways(given, share, value):
    assert given.at(share) == pytest.approx(value)
    assert given.share(value) == pytest.approx(share)


def test_what_lies_outside_a_range_counts_as_its_end():
    assert Range(1.0, 2.0).at(1.3) == 2.0
    assert Range(1.0, 2.0, logarithmic=True).share(0.5) == 0.0


class TestSpaces:
    def test_every_decider_without_a_model_has_one(self):
        assert set(spaces()) == set(Algorithm) - {Algorithm.HAN_DRL}

    @pytest.mark.parametrize("algorithm", list(spaces()))
    def test_makes_deciders_anywhere_in_its_ranges(self, algorithm):
        space = spaces()[algorithm]
        assert space.values(space.shares(space.start)).keys() == space.start.keys()
        for share in (0.05, 0.5, 1.0):
            space.make(space.values([share] * len(space.ranges)), np.random.default_rng())


class TestWindows:
    def test_cover_everything_in_every_72(self):
        windows = training_windows(144, requests=10)
        cells = [(w.workload, w.load, w.limit) for w in windows]
        assert set(cells[:72]) == set(cells[72:])
        assert len(set(cells[:72])) == 72 == len(WORKLOADS) * len(LOADS) * len(LIMITS)

    def test_each_site_meets_every_admission_rule(self):
        windows = training_windows(96, requests=10)
        met = Counter((window.site, i % 2) for i, window in enumerate(windows))
        assert met == dict.fromkeys(product(SITES, (0, 1)), 24)

    @pytest.mark.usefixtures("no_data")
    def test_random_pools_differ_from_window_to_window(self):
        windows = training_windows(8, requests=10, workloads=("poisson",))
        windows = [window for window in windows if window.site == RANDOM_POOL]
        pools = [window.scenario().snapshot for window in windows]
        assert len({pool.version for pool in pools}) == len(pools)

    def test_are_the_same_however_many_and_have_seeds_of_their_own(self):
        assert training_windows(10, requests=10) == training_windows(96, requests=10)[:10]
        windows = training_windows(96, requests=10)
        assert len({w.seed for w in windows}) == 96
        others = training_windows(96, requests=10, seed=1)
        assert not {w.seed for w in windows} & {w.seed for w in others}


SIMPLE = [a for a in spaces() if a not in (Algorithm.IMPACT_GREEDY, Algorithm.HAN_DRL)]


@pytest.fixture(scope="module")
def unseen():
    """Scenarios of a site with two experts that nothing was tuned on."""
    return [
        make_scenario(
            pool_snapshot=random_pool(np.random.default_rng(1_000_003), 2),
            process="poisson",
            load=0.7,
            split="test",
            requests=300,
            seed=seed,
            corpus=synthetic_corpus("test"),
        )
        for seed in range(2)
    ]


@pytest.mark.parametrize("algorithm", SIMPLE)
def test_reject_is_not_far_below_best_effort_on_an_unseen_site(algorithm, unseen):
    def average(admission):
        return np.mean([simulate(_under(s, algorithm, admission)).qos.mean() for s in unseen])

    assert average(Admission.REJECT) > average(Admission.BEST_EFFORT) - 0.03


def _under(scenario, algorithm, admission):
    policy = {"algorithm": algorithm, "admission": admission}
    return replace(scenario, snapshot=scenario.snapshot.model_copy(update=policy))


def bowl(best, noise=0.02):
    """A measure that is best at some values, and noisy in the same way for all candidates."""

    def measure(values, window, admission):
        distance = sum((np.log(values[name] / at)) ** 2 for name, at in best.items())
        luck = np.random.default_rng([window.seed, admission is Admission.REJECT]).normal()
        return 0.5 - 0.1 * distance + noise * luck

    return measure


class TestSearch:
    def test_finds_the_best_of_one_parameter(self):
        space = spaces()[Algorithm.LATENCY_QUALITY_GREEDY]
        got = tune(space, WINDOWS, effort=EFFORT, measure=bowl({"margin": 1.7}))
        assert got.values["margin"] == pytest.approx(1.7, rel=0.05)
        assert got.score > got.start_score

    def test_gets_near_the_best_of_several(self):
        space = spaces()[Algorithm.IMPACT_GREEDY]
        best = {"margin": 0.9, "softness": 0.1, "impact_weight": 3.0}
        got = tune(space, WINDOWS, effort=EFFORT, measure=bowl(best))
        for name, value in best.items():
            assert got.values[name] == pytest.approx(value, rel=0.5), name

    def test_keeps_the_start_where_nothing_is_better(self):
        space = spaces()[Algorithm.LATENCY_QUALITY_GREEDY]
        got = tune(space, WINDOWS, effort=EFFORT, measure=bowl(dict(space.start)))
        assert got.values == space.start
        assert got.score == got.start_score

    def test_repeats_itself(self):
        space = spaces()[Algorithm.IMPACT_GREEDY]
        measure = bowl({"margin": 0.9})
        first, again = (tune(space, WINDOWS, effort=EFFORT, measure=measure) for _ in range(2))
        assert first == again

    def test_the_common_check_is_tuned_under_reject_only(self):
        asked = set()

        def measure(values, _, admission):
            asked.add(admission)
            return values["admission_margin"]

        tune(spaces()[Algorithm.RANDOM], WINDOWS, effort=EFFORT, measure=measure)
        assert asked == {Admission.REJECT}


def test_a_search_that_broke_off_goes_on(tmp_path, monkeypatch):
    space = spaces()[Algorithm.LATENCY_QUALITY_GREEDY]
    plays = []

    def play(_, values, window, admission):
        plays.append(values)
        if len(plays) == 30:
            raise KeyboardInterrupt
        return bowl({"margin": 1.7})(values, window, admission)

    monkeypatch.setattr(tuning, "play", play)
    file = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tune(space, WINDOWS, effort=EFFORT, measure=Journal(file).measured(space))
    assert len(file.read_text().splitlines()) == 29
    whole = tune(space, WINDOWS, effort=EFFORT, measure=bowl({"margin": 1.7}))
    assert tune(space, WINDOWS, effort=EFFORT, measure=Journal(file).measured(space)) == whole
    played = len(plays)
    tune(space, WINDOWS, effort=EFFORT, measure=Journal(file).measured(space))
    assert len(plays) == played


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """Synthetic requests only."""
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path))
    for cached in (tuning._corpus, tuning._predicted, tuning._scenario):
        cached.cache_clear()
    yield
    for cached in (tuning._corpus, tuning._predicted, tuning._scenario):
        cached.cache_clear()


@pytest.mark.usefixtures("no_data")
def test_the_command_tells_the_result_and_where_it_comes_from(tmp_path):
    output, journal = tmp_path / "tuned.json", tmp_path / "runs.jsonl"
    arguments = ["tune", "--deciders", "LatencyQualityGreedy", "--windows", "2"]
    arguments += ["--requests", "20", "--candidates", "2"]
    arguments += ["--journal", str(journal), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    assert json.loads(result.stdout) == document
    got = document["deciders"]["LatencyQualityGreedy"]
    provenance = got["provenance"]
    assert provenance["command"] == (
        "pointsman tune --deciders LatencyQualityGreedy --windows 2 --requests 20"
        " --candidates 2 --seed 0"
    )
    assert provenance["windows"] == 2
    assert provenance["workloads"] == ["on-off", "poisson"]
    assert provenance["effort"] == asdict(
        Effort(windows=2, first_windows=2, candidates_per_parameter=2)
    )
    assert "composed: " in provenance["example"]
    assert got["average_qos"] >= got["from_average_qos"] > 0
    assert journal.read_text()


def test_an_unknown_decider_is_refused():
    result = CliRunner().invoke(app, ["tune", "--deciders", "Fastest"])
    assert result.exit_code == 2
    assert "fastest" in result.output


def test_a_folder_that_is_none_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path / "none"))
    result = CliRunner().invoke(app, ["tune", "--deciders", "Random"])
    assert result.exit_code == 1
    assert "is not a folder" in result.output


def test_core_has_the_values_that_were_found():
    found = json.loads((Path(tuning.__file__).parent / "tuned.json").read_text())["deciders"]
    assert set(found) == {algorithm.value for algorithm in spaces()}
    for algorithm, space in spaces().items():
        want = found[algorithm.value]["parameters"]
        got = dict(space.start)
        if algorithm is Algorithm.WEIGHTED_SCORE:
            total = sum(want[name] for name in ("quality", "latency", "load"))
            want |= {name: want[name] / total for name in ("quality", "latency", "load")}
        # Rounded: the third digit says nothing.
        assert got == pytest.approx(want, rel=0.02, abs=0.002), algorithm
