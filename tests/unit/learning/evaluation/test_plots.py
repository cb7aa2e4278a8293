from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pointsman_learning.evaluation import Plan, Run, collect, draw_all, summarise

Fake = Callable[[Plan], list[Run]]
PNG = b"\x89PNG"


def drawn(plan: Plan, runs: list[Run], folder: Path) -> set[str]:
    results = collect(runs, plan)
    files = draw_all(results, summarise(results.runs), folder)
    assert all(path.read_bytes().startswith(PNG) for path in files)
    return {path.name for path in files}


def test_all_plots(plan: Plan, fakes: Fake, tmp_path: Path) -> None:
    names = drawn(plan, fakes(plan), tmp_path)
    assert names == {"qos-by-load.png", "qos-by-limit.png", "burst.png", "routing.png"}


def test_no_curve_over_a_single_value(plan: Plan, fakes: Fake, tmp_path: Path) -> None:
    small = replace(plan, loads=[0.5], limits=["mixed"], seeds=[0])
    assert drawn(small, fakes(small), tmp_path) == {"burst.png", "routing.png"}
