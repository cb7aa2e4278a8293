import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pointsman_core.resources import Admission
from pointsman_learning.evaluation import (
    BUILTIN,
    Composer,
    Contender,
    DeciderFailedError,
    Pace,
    Plan,
    Run,
    Window,
    collect,
    contenders,
    from_decider,
    register,
    registry,
    run_all,
)

COMPOSER = Composer(requests=60)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path_factory.mktemp("empty")))


@pytest.fixture
def small() -> Plan:
    return Plan(
        workloads=["poisson"],
        loads=[0.5],
        limits=["x1"],
        admissions=list(Admission),
        deciders=["Random", "ImpactGreedy"],
        seeds=[0, 1],
    )


def test_processes_change_nothing(small: Plan) -> None:
    here = collect(run_all(small.tasks(), COMPOSER, jobs=1), small)
    there = collect(run_all(small.tasks(), COMPOSER, jobs=2), small)
    assert len(here.runs) == len(small)
    assert here.runs.equals(there.runs)
    assert here.routing.equals(there.routing)


def test_deciders_meet_the_same_requests(small: Plan) -> None:
    runs = list(run_all(small.tasks(), COMPOSER))
    met: dict[int, set[object]] = {}
    for run in runs:
        assert run.prompts is not None
        asked = (tuple(run.prompts.rows), tuple(run.prompts.requests))
        arrivals = (run.timeline.bin_s, *run.timeline.requests)
        met.setdefault(run.task.window.seed, set()).add((asked, arrivals))
    assert [len(each) for each in met.values()] == [1, 1]
    assert met[0] != met[1]


def test_a_window_is_the_same_wherever_it_is_made() -> None:
    window = Window(workload="on-off", load=0.7, limit="mixed", seed=1)
    here = COMPOSER(window)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as elsewhere:
        there = elsewhere.submit(COMPOSER, window).result()
    for name in ("arrival_s", "prompt", "limit_s", "output_tokens", "predicted_quality"):
        assert np.array_equal(getattr(here, name), getattr(there, name))


def test_base_limits_are_drawn_and_told() -> None:
    window = Window(workload="poisson", load=0.5, limit="x2", seed=0)
    scenario = replace(COMPOSER, base_limits_ms=(30.0, 40.0))(window)
    assert set(scenario.limit_s.round(6)) == {0.06, 0.08}
    assert "limits x2 of 30, 40 ms/token" in scenario.description
    assert "limits x2 of 50, 70, 100 ms/token" in COMPOSER(window).description


def test_says_how_many_experts_the_predictor_knows(own_files: dict[str, Path]) -> None:
    scores = own_files["scores.csv"]
    scores.write_text(scores.read_text().replace(",coder,", ",Mistral-7B-Instruct-v0.3,"))
    site = own_files["site.yaml"]
    site.write_text(site.read_text().replace("model: coder", "model: Mistral-7B-Instruct-v0.3"))
    own = Composer(requests=20, predictor=BUILTIN, experts=site, quality_data=scores)
    window = Window(workload="poisson", load=0.5, limit="x1", seed=0)
    told = "builtin (1 of 2 experts learned, declared priors for the others)"
    assert own.predictor_note() == own.setting()["predictor"] == told
    assert f"quality predicted by {told}" in own(window).description


def test_admission_is_a_right_not_a_window(small: Plan) -> None:
    runs = list(run_all(replace(small, loads=[2.0]).tasks(), COMPOSER))
    rejected = {
        a: sum(r.metrics.rejected for r in runs if r.task.admission is a) for a in Admission
    }
    assert rejected[Admission.BEST_EFFORT] == 0
    assert rejected[Admission.REJECT] > 0


def test_closing_ends_the_workers(small: Plan) -> None:
    before = set(multiprocessing.active_children())
    with closing(run_all(replace(small, seeds=range(50)).tasks(), COMPOSER, jobs=2)) as runs:
        next(runs)
    assert set(multiprocessing.active_children()) == before


def test_a_broken_decider_is_an_error_not_its_fallback(
    small: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def score(self, _: object) -> None:
            raise ValueError("oh no")

    monkeypatch.setattr(registry, "_REGISTERED", {})
    register(from_decider("Broken", lambda *_: Broken()))  # type: ignore[arg-type,return-value]
    with pytest.raises(DeciderFailedError, match="oh no"):
        list(run_all(replace(small, deciders=["Broken"]).tasks(), COMPOSER))


def test_registry_knows_all_deciders_and_puts_bounds_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    known = contenders()
    assert {"Random", "ImpactGreedy", "LatencyQualityGreedy"} <= set(known)
    bounds = [one.bound for one in known.values()]
    assert bounds == sorted(bounds)
    register(Contender("HanDrl", known["Random"].play, baseline=False))
    assert not contenders()["HanDrl"].bound


def test_pace_learns_from_runs(plan: Plan, fakes: object) -> None:
    assert callable(fakes)
    runs: list[Run] = fakes(plan)
    pace = Pace(
        left=dict.fromkeys(plan.deciders, 48),  # type: ignore[arg-type]
        guess_s=dict.fromkeys(plan.deciders, 1.0),
        jobs=2,
    )
    assert pace.left_s == pytest.approx(4 * 48 / 2)
    pace.done(runs[0])  # took 0.1 s, so the others are thought to take as little
    assert pace.left_s == pytest.approx((4 * 48 - 1) * 0.1 / 2)
    for run in runs[1:]:
        pace.done(run)
    assert pace.left_s == 0


def test_windows_of_one_seed_share_their_prompts() -> None:
    def window(load: float, limit: str) -> Window:
        return Window(workload="poisson", load=load, limit=limit, seed=3)

    one, other = COMPOSER(window(0.5, "x1")), COMPOSER(window(0.9, "x5"))
    assert (one.score == other.score).all()
    assert one.arrival_s == pytest.approx(other.arrival_s * 0.9 / 0.5)
