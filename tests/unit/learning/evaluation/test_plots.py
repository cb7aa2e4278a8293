from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

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


def test_every_plot_says_what_it_is_composed_of(
    plan: Plan, fakes: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def keep(figure: Figure, *_: object, **__: object) -> None:
        said.append(" ".join(text.get_text() for text in figure.texts).replace("\n", " "))

    monkeypatch.setattr(Figure, "savefig", keep)
    results = collect(fakes(plan), plan)
    descriptions = {name: f"composed: {name} of " + "parts, " * 60 for name in plan.workloads}
    draw_all(replace(results, descriptions=descriptions), summarise(results.runs), tmp_path)
    assert len(said) == 4
    for text in said:
        for name, note in descriptions.items():
            assert f"first window of {name}: {note.strip()}" in text


def test_no_curve_over_a_single_value(plan: Plan, fakes: Fake, tmp_path: Path) -> None:
    small = replace(plan, loads=[0.5], limits=["mixed"], seeds=[0])
    assert drawn(small, fakes(small), tmp_path) == {"burst.png", "routing.png"}
