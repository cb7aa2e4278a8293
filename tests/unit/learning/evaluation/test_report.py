import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from pointsman_learning.evaluation import (
    Plan,
    Run,
    as_markdown,
    collect,
    print_report,
    summarise,
)

Fake = Callable[[Plan], list[Run]]


def printed(plan: Plan, runs: list[Run], **options: bool | None) -> str:
    results = collect(runs, plan)
    summary = summarise(results.runs, disjoint={"azure-code": 2})
    console = Console(file=io.StringIO(), width=100)
    print_report(console, summary, descriptions=results.descriptions, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("detailed", [True, False])
def test_fits_into_100_columns_without_cutting(plan: Plan, fakes: Fake, detailed: bool) -> None:
    text = printed(plan, fakes(plan), detailed=detailed)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_details_of_few_cells_only(plan: Plan, fakes: Fake) -> None:
    text = printed(plan, fakes(plan))
    assert "poisson, load 0.5, limits x1, Reject" not in text
    assert "summary.parquet" in text
    small = replace(plan, workloads=["poisson"], loads=[0.5], limits=["x1"])
    text = printed(small, fakes(small))
    assert "poisson, load 0.5, limits x1, Reject" in text
    assert "12,345" in text
    assert "reference" in text
    assert "Average QoS" not in text  # one cell needs no overview


def test_bounds_stand_apart_below_and_are_explained(plan: Plan, fakes: Fake) -> None:
    text = printed(plan, fakes(plan))
    assert (
        text.index("ImpactGreedy") < text.index("bounds:") < text.index("  lookahead-true-quality")
    )
    assert "Bounds see what no router can" in text


def test_markdown_has_all_cells_bounds_last_and_notes(plan: Plan, fakes: Fake) -> None:
    results = collect(fakes(plan), plan)
    summary = summarise(results.runs, prompts=results.prompts)
    lines = as_markdown(summary, descriptions=results.descriptions).splitlines()
    start = lines.index("**Average QoS, limits x1, Reject**")
    header, rule, *rows = lines[start + 2 : start + 8]
    assert header == "| decider | poisson, 0.5 | poisson, 0.9 | azure-code, 0.5 | azure-code, 0.9 |"
    assert rule == "| --- | ---: | ---: | ---: | ---: |"
    assert [row.split(" | ")[0] for row in rows] == [
        "| Random",
        "| RoundRobin",
        "| ImpactGreedy",
        "| bound:lookahead-true-quality",
    ]
    assert rows[0].count("▼") == 4
    assert rows[2].count(" =") == 4
    assert any("over windows (bootstrap) and 50 prompts" in line for line in lines)
    assert lines[-1] == "- azure-code: made up, window 0"


def test_says_what_not_to_trust(plan: Plan, fakes: Fake) -> None:
    text = printed(plan, fakes(plan))
    assert "azure-code: 4 of the windows overlap" in text
    assert "poisson: 4 of" not in text
    assert "Fewer than 8 windows" in text
    assert "made up, window 0" in text


def test_few_windows_show_no_intervals(plan: Plan, fakes: Fake) -> None:
    single = replace(plan, seeds=[0, 1])
    text = printed(single, fakes(single), detailed=True)
    assert "±." not in text
    assert "▼" not in text.split("Average QoS")[0]
    assert "Fewer than 5 windows tell no intervals" in text
    assert "nan" not in text


def test_one_window_is_no_plural(plan: Plan, fakes: Fake) -> None:
    one = replace(plan, workloads=["azure-code"], loads=[0.5], limits=["x1"], seeds=range(1))
    assert "1 window each." in printed(one, fakes(one))
    three = replace(one, seeds=range(3))
    assert "1 of the windows overlaps others of the trace" in printed(three, fakes(three))
    assert "3 windows each." in printed(three, fakes(three))
