from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pointsman_core.workload import WorkloadError
from pointsman_learning.evaluation import BUILTIN, Composer, DrawnPools, Plan, Window, collect
from pointsman_learning.evaluation.drawn import STREAM
from pointsman_learning.evaluation.runner import run
from pointsman_learning.simulator import Change
from pointsman_learning.training.domain import DRAW, Domain
from pointsman_learning.workloads import BOARDS, UNSEEN_BOARDS

WINDOW = Window(workload="poisson", load=0.5, limit="x1", seed=0)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("POINTSMAN_DATA", str(tmp_path_factory.mktemp("empty")))


def composer(pool: str, requests: int = 40) -> Composer:
    return Composer(requests=requests, drawn=DrawnPools.parse(pool))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("edge-site", None),
        (" Edge-Site", None),
        ("random:24", DrawnPools("random", 24, 24)),
        ("Random:20-32", DrawnPools("random", 20, 32)),
        ("unseen-boards:8", DrawnPools("unseen-boards", 8, 8)),
    ],
)
def test_grammar(text: str, found: DrawnPools | None) -> None:
    assert DrawnPools.parse(text) == found
    if found is not None:
        assert DrawnPools.parse(found.name) == found


@pytest.mark.parametrize("text", ["", "random", "random:", "random:a", "random:-4", "site:3"])
def test_what_is_no_pool(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"must be edge-site, random:N, unseen-boards:N or a"):
        DrawnPools.parse(text)


@pytest.mark.parametrize("text", ["random:1", "random:0-4", "random:9-8", "unseen-boards:255"])
def test_pools_that_cannot_be(text: str) -> None:
    with pytest.raises(WorkloadError, match="must have 2 to 254 endpoints"):
        DrawnPools.parse(text)


def test_each_seed_draws_its_own() -> None:
    pools = DrawnPools("random", 20, 32)
    versions = {pools.draw(seed).snapshot.version for seed in range(8)}
    sizes = {len(pools.draw(seed).snapshot.candidates) for seed in range(8)}
    assert len(versions) == 8
    assert sizes <= set(range(20, 33))
    assert len(sizes) > 1
    assert len(DrawnPools("random", 254, 254).draw(0).snapshot.candidates) == 254


def test_no_pool_is_one_of_trainings() -> None:
    """Another stream, so that equal seeds do not give equal pools."""
    assert STREAM != DRAW
    pools = DrawnPools("random", 2, 16)
    drawn = {pools.draw(seed).snapshot.version for seed in range(20)}
    domain = Domain(site_share=0.0, predictors={"declared": 1.0}, processes={"poisson": 1.0})
    trained = {domain.draw(n, requests=5).scenario.snapshot.version for n in range(20)}
    assert len(trained) == 20
    assert not drawn & trained


def test_boards_of_a_window() -> None:
    def boards(pool: str) -> set[float]:
        scenario = composer(pool)(WINDOW)
        return {c.profile.peak_tflops for c in scenario.snapshot.candidates}

    assert boards("unseen-boards:12") <= {board.tflops for board in UNSEEN_BOARDS}
    assert boards("random:12") <= {board.tflops for board in BOARDS}


def test_windows_of_one_seed_share_their_pool() -> None:
    own = composer("random:6")
    one, other = own(WINDOW), own(replace(WINDOW, load=0.9, limit="x5"))
    assert one.snapshot == other.snapshot
    assert own(replace(WINDOW, seed=1)).snapshot != one.snapshot


def test_the_site_is_as_it_was() -> None:
    plain, named = Composer(requests=40), composer("edge-site")
    assert plain == named
    assert "pool" not in plain.setting()
    assert "endpoints:" not in plain(WINDOW).description


def test_it_is_told_what_was_drawn() -> None:
    own = composer("unseen-boards:8-9")
    setting = own.setting()
    assert (setting["site"], setting["endpoints"]) == ("unseen-boards:8-9", "8 to 9")
    assert setting["pool"]["boards"] == [board.name for board in UNSEEN_BOARDS]
    scenario = own(WINDOW)
    told = f"endpoints: unseen-boards:8-9, drawn anew by each seed ({scenario.endpoints} here)"
    assert scenario.description.endswith(told)


def test_predicted_quality_of_known_experts_and_mixtures() -> None:
    own = replace(composer("random:40"), predictor=BUILTIN)
    assert "6 of 6 experts learned, mixtures for models without scores" in own.predictor_note()
    scenario, corpus, said = own(WINDOW), own.corpus(), own.said()
    assert own.drawn is not None
    assert said is not None
    assert scenario.prompt is not None
    pool = own.drawn.draw(WINDOW.seed)
    assert 1 <= len(pool.blends) < 40
    for endpoint, candidate in enumerate(pool.snapshot.candidates):
        blend = pool.blends.get(candidate.expert)
        if blend is None:
            told = said.quality[:, corpus.column(candidate.model)]
        else:
            first = said.quality[:, corpus.column(blend.first)]
            second = said.quality[:, corpus.column(blend.second)]
            told = (1 - blend.share) * first + blend.share * second
        np.testing.assert_allclose(
            scenario.predicted_quality[:, endpoint], told[scenario.prompt], atol=1e-12
        )


def test_an_endpoint_is_lost_and_one_added_in_each() -> None:
    own = replace(composer("random:12"), outages=True)
    for seed in range(3):
        changes = own(replace(WINDOW, seed=seed)).availability
        assert [change.change for change in changes].count(Change.FAIL) == 1
        assert [change.change for change in changes].count(Change.JOIN) == 1
        assert all(change.endpoint < 12 for change in changes)


def test_experts_of_ones_own_are_not_drawn_from(own_files: dict[str, Path]) -> None:
    own = replace(composer("random:4"), experts=own_files["site.yaml"])
    with pytest.raises(WorkloadError, match="has experts of its own: random pools are drawn from"):
        own.pool()


def test_deciders_meet_the_same_pool(plan: Plan) -> None:
    own = composer("random:24", requests=30)
    small = replace(
        plan,
        workloads=["poisson"],
        loads=[0.5],
        limits=["x1"],
        deciders=["Random", "HanDrl"],
        seeds=[0, 1],
    )
    runs = [run(task, own) for task in small.tasks()]
    results = collect(runs, small, setting=own.setting())
    assert results.descriptions["poisson"].endswith("(24 here)")
    met = {(one.task.window.seed, one.routing.experts) for one in runs}
    assert len(met) == 2
