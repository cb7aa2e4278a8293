import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import polars as pl
import pytest

from pointsman_learning.evaluation import (
    Plan,
    Run,
    as_document,
    collect,
    summarise,
    write_parquet,
)

Fake = Callable[[Plan], list[Run]]


def test_order_of_arrival_does_not_matter(plan: Plan, fakes: Fake) -> None:
    runs = fakes(plan)
    one, other = collect(runs, plan), collect(reversed(runs), plan)
    for name in ("runs", "routing", "timeline"):
        assert getattr(one, name).equals(getattr(other, name))
    assert one.descriptions == other.descriptions
    assert len(one.runs) == len(plan) == len(runs)
    assert one.runs["decider"].unique(maintain_order=True).to_list() == list(plan.deciders)
    assert one.runs["workload"].unique(maintain_order=True).to_list() == ["poisson", "azure-code"]


def test_nothing_finished(plan: Plan) -> None:
    with pytest.raises(ValueError, match="no run was finished"):
        collect([], plan)


def test_best_baseline_is_the_reference_and_never_a_bound(plan: Plan, fakes: Fake) -> None:
    summary = summarise(collect(fakes(plan), plan).runs)
    assert len(summary) == 2 * 2 * 2 * 4
    assert {row["reference"] for row in summary} == {"ImpactGreedy"}
    rows = {row["decider"]: row for row in summary[:4]}
    assert math.isnan(rows["ImpactGreedy"]["difference"])
    assert rows["Random"]["difference_high"] < 0
    assert rows["Random"]["difference"] == pytest.approx(-0.3, abs=0.02)
    assert rows["bound:lookahead-true-quality"]["bound"]
    assert rows["bound:lookahead-true-quality"]["difference_low"] > 0
    assert rows["Random"]["windows"] == 6


def test_baselines_restrict_the_best(plan: Plan, fakes: Fake) -> None:
    summary = summarise(collect(fakes(plan), plan).runs, baselines=["Random", "RoundRobin"])
    assert {row["reference"] for row in summary} == {"RoundRobin"}


def test_a_named_reference(plan: Plan, fakes: Fake) -> None:
    summary = summarise(collect(fakes(plan), plan).runs, reference="Random")
    row = next(row for row in summary if row["decider"] == "ImpactGreedy")
    assert row["reference"] == "Random"
    base = next(row for row in summary if row["decider"] == "Random")["average_qos"]
    assert row["difference_percent"] == pytest.approx(100 * row["difference"] / base)


def test_no_percentages_of_next_to_nothing(plan: Plan, fakes: Fake) -> None:
    runs = collect(fakes(plan), plan).runs.with_columns(
        average_qos=pl.when(decider="Random").then(0.001).otherwise(pl.col("average_qos"))
    )
    summary = summarise(runs, reference="Random")
    assert all(math.isnan(row["difference_percent"]) for row in summary)
    assert not math.isnan(summary[-1]["difference"])


def test_intervals_are_over_prompts_too_and_given_them_apart(plan: Plan, fakes: Fake) -> None:
    results = collect(fakes(plan), plan)
    wide = summarise(results.runs, reference="Random", prompts=results.prompts)
    given = summarise(results.runs, reference="Random")
    for one, other in zip(wide, given, strict=True):
        assert (one["prompts"], other["prompts"]) == (50, None)
        for name in ("average_qos", "difference"):
            if one["decider"] == "Random" and name == "difference":
                continue
            low, high = one[f"{name}_low"], one[f"{name}_high"]
            assert low < one[f"{name}_given_prompts_low"] == other[f"{name}_low"]
            assert high > one[f"{name}_given_prompts_high"] == other[f"{name}_high"]
            assert one[name] == other[name]


def test_unfinished_windows_count_for_nobody(plan: Plan, fakes: Fake) -> None:
    runs = fakes(plan)
    last = runs[-1].task
    assert last.window.seed == 5
    summary = summarise(collect(runs[:-1], plan).runs)
    for row in summary:
        same = (row["workload"], row["load"], row["limit"]) == ("azure-code", 0.9, "x2.5")
        assert row["windows"] == (5 if same else 6)


def test_overlapping_windows_are_counted(plan: Plan, fakes: Fake) -> None:
    runs = collect(fakes(plan), plan).runs
    summary = summarise(runs, disjoint={"azure-code": 2, "poisson": None})
    found = {row["workload"]: row["overlapping_windows"] for row in summary}
    assert found == {"poisson": 0, "azure-code": 4}


def test_parquet_and_json_hold_the_same(plan: Plan, fakes: Fake, tmp_path: Path) -> None:
    results = collect(fakes(plan), plan, setting={"site": "a site"})
    summary = summarise(results.runs, prompts=results.prompts)
    files = write_parquet(results, summary, tmp_path)
    assert {json.loads(pl.read_parquet_metadata(path)["pointsman"])["site"] for path in files} == {
        "a site"
    }
    assert {path.name for path in files} == {
        "runs.parquet",
        "summary.parquet",
        "routing.parquet",
        "timeline.parquet",
        "prompts.parquet",
    }
    assert pl.read_parquet(tmp_path / "runs.parquet").equals(results.runs)
    routing = pl.read_parquet(tmp_path / "routing.parquet")
    assert routing["requests"].sum() == 100 * len(plan)
    assert routing.filter(pl.col("expert").is_null())["requests"].sum() == 10 * len(plan)

    document = orjson.loads(orjson.dumps(as_document(results, summary)))
    assert list(document) == ["runs", "summary", "setting"]
    assert document["setting"]["site"] == "a site"
    assert document["setting"]["composed"]["poisson"] == "made up, window 0"
    prompts = pl.read_parquet(tmp_path / "prompts.parquet")
    assert prompts["requests"].list.sum().to_list() == [100] * len(plan)
    run = document["runs"][0]
    assert {"workload", "load", "decider", "seed", "average_qos"} <= set(run)
    assert run["resource_efficiency"] is None
    assert len(document["summary"]) == len(summary)


def test_a_run_of_an_unknown_decider_is_an_error(plan: Plan, fakes: Fake) -> None:
    with pytest.raises(ValueError, match="not in"):
        collect(fakes(plan), replace(plan, deciders=["Random"]))
