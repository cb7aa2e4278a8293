"""All runs of an evaluation as tables, their summary, and the files they go to."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from pointsman_core.state import FloatArray
from pointsman_learning.evaluation.metrics import Metrics
from pointsman_learning.evaluation.plan import Plan
from pointsman_learning.evaluation.registry import BOUND
from pointsman_learning.evaluation.runner import Run
from pointsman_learning.evaluation.statistics import (
    Interval,
    mean_intervals,
    over_prompts,
    paired_differences,
)

BEST_BASELINE = "best"
"""As a reference: in each cell the baseline with the highest average QoS there."""
CELL = ("workload", "load", "limit", "admission")
"""What is compared: all deciders under the same circumstances and the same rights."""
MEANT = tuple(name for name in Metrics.__dataclass_fields__ if name != "average_qos")
"""Metrics whose plain mean over windows stands in the summary."""
RATIO_FLOOR = 0.02
"""Differences are told in percent only of references above this: else they mean nothing. Ours."""


Row = Mapping[str, Any]
"""A row of the summary."""


@dataclass(frozen=True, slots=True)
class Results:
    """Tables of one evaluation."""

    runs: pl.DataFrame
    """One row per run: the cell, decider, seed and all `Metrics`."""
    routing: pl.DataFrame
    """Requests and QoS by run, domain and expert; expert is null where rejected."""
    timeline: pl.DataFrame
    """Requests and QoS by run and stretch of time."""
    prompts: pl.DataFrame
    """One row per run: lists of the prompts asked, how often, and the sum of their QoS."""
    descriptions: Mapping[str, str]
    """By workload: where the parts of its first window come from."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """What all runs share: predictor, site, requests and so on."""

    @property
    def models(self) -> dict[str, str]:
        """By decider: which file a trained model is."""
        models = self.setting.get("models", {})
        return {n: f"{one['file']}, SHA-256 {one['sha256']}" for n, one in models.items()}

    @property
    def notes(self) -> dict[str, str]:
        """By workload or decider: where it comes from, to stand below tables."""
        return {**self.descriptions, **self.models}


def collect(
    runs: Iterable[Run], plan: Plan, *, setting: Mapping[str, Any] | None = None
) -> Results:
    """Put runs into tables, in the plan's order whatever the order they came in.

    ``setting`` is what they share, see `Composer.setting`. Raises ValueError when there are none.
    """

    def key(run: Run) -> tuple[Any, ...]:
        task, window = run.task, run.task.window
        return (
            plan.workloads.index(window.workload),
            window.load or 0.0,
            plan.limits.index(window.limit),
            plan.admissions.index(task.admission),
            plan.deciders.index(task.decider),
            window.seed,
        )

    ordered = sorted(runs, key=key)
    if not ordered:
        raise ValueError("no run was finished")
    descriptions: dict[str, str] = {}
    for run in ordered:
        descriptions.setdefault(run.task.window.workload, run.description)
    own_load: list[dict[str, Any]] = [{} for _ in ordered]
    if plan.as_recorded:
        own_load = [{"window_load": run.load} for run in ordered]
        ordered = _with_loads(ordered, descriptions)
    return Results(
        runs=_frame(
            [
                _labels(run) | own | asdict(run.metrics)
                for run, own in zip(ordered, own_load, strict=True)
            ]
        ),
        routing=_frame([row for run in ordered for row in _routing_rows(run)]),
        timeline=_frame([row for run in ordered for row in _timeline_rows(run)]),
        prompts=_frame([row for run in ordered for row in _prompt_rows(run)]),
        descriptions=descriptions,
        setting=dict(setting or {}),
    )


def _with_loads(runs: Sequence[Run], descriptions: dict[str, str]) -> list[Run]:
    """Runs of windows as recorded under their workload's mean load; described by all of them."""
    by_workload: dict[str, dict[int, float]] = {}
    for run in runs:
        window = run.task.window
        own = math.nan if run.load is None else run.load
        by_workload.setdefault(window.workload, {})[window.seed] = own
    means = {name: round(float(np.mean(list(o.values()))), 3) for name, o in by_workload.items()}
    for name, own_loads in by_workload.items():
        low, high = min(own_loads.values()), max(own_loads.values())
        spread = f", its windows {low:.3g} to {high:.3g}" if len(own_loads) > 1 else ""
        descriptions[name] += f"; as recorded its load is {means[name]:g}{spread}"
    found = []
    for run in runs:
        window = replace(run.task.window, load=means[run.task.window.workload])
        found.append(replace(run, task=replace(run.task, window=window)))
    return found


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, infer_schema_length=None)


def _labels(run: Run) -> dict[str, Any]:
    window = run.task.window
    return {
        "workload": window.workload,
        "load": window.load,
        "limit": window.limit,
        "admission": run.task.admission.value,
        "decider": run.task.decider,
        "seed": window.seed,
    }


def _routing_rows(run: Run) -> Iterable[dict[str, Any]]:
    labels, routing = _labels(run), run.routing
    experts = (*routing.experts, None)
    for d, x in np.argwhere(routing.requests):
        yield labels | {
            "domain": routing.domains[d],
            "expert": experts[x],
            "requests": int(routing.requests[d, x]),
            "qos": float(routing.qos[d, x]),
        }


def _prompt_rows(run: Run) -> Iterable[dict[str, Any]]:
    if run.prompts is not None:
        yield _labels(run) | {
            "prompt": run.prompts.rows.tolist(),
            "requests": run.prompts.requests.tolist(),
            "qos": run.prompts.qos.tolist(),
        }


def _timeline_rows(run: Run) -> Iterable[dict[str, Any]]:
    labels, line = _labels(run), run.timeline
    for number, (requests, qos) in enumerate(zip(line.requests, line.qos, strict=True)):
        yield labels | {
            "start_s": number * line.bin_s,
            "end_s": (number + 1) * line.bin_s,
            "requests": int(requests),
            "qos": float(qos),
        }


def limit_factor(limit: str) -> float | None:
    """The number in a name such as ``x2.5``; None for other names."""
    try:
        return float(limit.removeprefix("x"))
    except ValueError:
        return None


# --- Summary -----------------------------------------------------------------------------


def summarise(
    runs: pl.DataFrame,
    *,
    reference: str = BEST_BASELINE,
    baselines: Iterable[str] = (),
    disjoint: Mapping[str, int | None] | None = None,
    prompts: pl.DataFrame | None = None,
) -> list[dict[str, Any]]:
    """One row per cell and decider: means over windows, intervals, difference to a reference.

    Args:
        runs: as in `Results.runs`; windows that some decider has not finished are left out
            for all, so that means are over the same requests.
        reference: a decider, or `BEST_BASELINE`.
        baselines: deciders among which the best baseline is chosen; none: all but bounds.
        disjoint: by workload, how many windows do not overlap; None or left out: all.
        prompts: as in `Results.prompts`; without it intervals are given the prompts asked.

    """
    rows: list[dict[str, Any]] = []
    known = {} if prompts is None or prompts.is_empty() else _by_cell(prompts)
    for key, cell in _by_cell(runs).items():
        rows += _summary_of_cell(cell, known.get(key), reference, frozenset(baselines))
    for row in rows:
        limit = (disjoint or {}).get(row["workload"])
        row["overlapping_windows"] = 0 if limit is None else max(0, row["windows"] - limit)
    return rows


def _by_cell(table: pl.DataFrame) -> dict[tuple[Any, ...], pl.DataFrame]:
    return table.partition_by(*CELL, maintain_order=True, as_dict=True)


def _summary_of_cell(
    cell: pl.DataFrame,
    prompts: pl.DataFrame | None,
    reference: str,
    baselines: frozenset[str],
) -> list[dict[str, Any]]:
    deciders = cell["decider"].unique(maintain_order=True).to_list()
    complete = cell.group_by("seed").len().filter(pl.col("len") == len(deciders))["seed"].to_list()
    cell = cell.filter(pl.col("seed").is_in(complete)).sort("seed", maintain_order=True)
    if cell.is_empty():
        return []
    qos = np.array([cell.filter(decider=name)["average_qos"].to_numpy() for name in deciders])
    chosen = _reference(deciders, qos, reference, baselines)
    told = None if prompts is None else _qos_by_prompt(prompts, deciders, complete)
    base = None if chosen is None else deciders.index(chosen)
    means = _means(qos, told)
    gains = [_UNKNOWN] * len(deciders) if base is None else _gains(qos, told, base)
    labels = {name: cell[name][0] for name in CELL}
    return [
        labels
        | {
            "decider": name,
            "bound": name.startswith(BOUND),
            "windows": len(complete),
            "prompts": None if told is None else told.asked.shape[1],
        }
        | _interval("average_qos", means[number].any_prompts)
        | _ends("average_qos_given_prompts", means[number].these_prompts)
        | _difference(
            _UNKNOWN if number == base else gains[number],
            reference=chosen,
            base=math.nan if base is None else float(qos[base].mean()),
        )
        | _plain_means(cell.filter(decider=name))
        for number, name in enumerate(deciders)
    ]


def _reference(
    deciders: Sequence[str], qos: FloatArray, reference: str, baselines: frozenset[str]
) -> str | None:
    if reference != BEST_BASELINE:
        return reference if reference in deciders else None
    allowed = [
        number
        for number, name in enumerate(deciders)
        if (name in baselines if baselines else not name.startswith(BOUND))
    ]
    if not allowed:
        return None
    return deciders[max(allowed, key=lambda number: float(qos[number].mean()))]


class _ByPrompt(NamedTuple):
    qos: FloatArray
    """(R, W, P) sum of the QoS by decider, window and prompt."""
    asked: FloatArray
    """(W, P) how often each window asked each prompt."""


class _Intervals(NamedTuple):
    any_prompts: Interval
    """Over windows and prompts; where prompts are not told, the same as the other."""
    these_prompts: Interval
    """Over windows, given the prompts."""


_UNKNOWN = _Intervals(*[Interval(math.nan, math.nan, math.nan)] * 2)


def _means(qos: FloatArray, told: _ByPrompt | None) -> list[_Intervals]:
    return _widened(mean_intervals(qos), told)


def _gains(qos: FloatArray, told: _ByPrompt | None, base: int) -> list[_Intervals]:
    if told is not None:
        told = told._replace(qos=told.qos - told.qos[base])
    return _widened(paired_differences(qos, qos[base]), told)


def _widened(given: list[Interval], told: _ByPrompt | None) -> list[_Intervals]:
    wide = given if told is None else over_prompts(given, told.qos, told.asked)
    return [_Intervals(*both) for both in zip(wide, given, strict=True)]


def _qos_by_prompt(
    prompts: pl.DataFrame, deciders: Sequence[str], seeds: Sequence[int]
) -> _ByPrompt:
    kept = prompts.filter(pl.col("seed").is_in(seeds))
    names = np.unique(kept["prompt"].explode().to_numpy())
    place = {seed: number for number, seed in enumerate(seeds)}
    qos = np.zeros((len(deciders), len(seeds), len(names)))
    asked = np.zeros(qos.shape[1:])
    for row in kept.iter_rows(named=True):
        window = place[row["seed"]]
        columns = np.searchsorted(names, row["prompt"])
        qos[deciders.index(row["decider"]), window, columns] = row["qos"]
        asked[window, columns] = row["requests"]
    return _ByPrompt(qos, asked)


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean} | _ends(name, interval)


def _ends(name: str, interval: Interval) -> dict[str, float]:
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _difference(gain: _Intervals, *, reference: str | None, base: float) -> dict[str, Any]:
    percent = 100 * gain.any_prompts.mean / base if base >= RATIO_FLOOR else math.nan
    return {
        "reference": reference,
        **_interval("difference", gain.any_prompts),
        **_ends("difference_given_prompts", gain.these_prompts),
        "difference_percent": percent,
    }


def _plain_means(runs: pl.DataFrame) -> dict[str, float]:
    """Means over windows; windows in which a metric is not defined are left out."""
    return {name: _mean(runs[name].to_numpy().astype(np.float64)) for name in MEANT}


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


# --- Files -------------------------------------------------------------------------------


def write_parquet(results: Results, summary: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write all tables and the summary as Parquet files, which it returns.

    Each holds the setting and the descriptions as JSON, under ``pointsman`` of its metadata.
    """
    tables = {
        "runs": results.runs,
        "summary": _frame(summary),
        "routing": results.routing,
        "timeline": results.timeline,
        "prompts": results.prompts,
    }
    metadata = {"pointsman": json.dumps(_setting(results))}
    files = []
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        table.write_parquet(path, metadata=metadata)
        files.append(path)
    return files


def as_document(results: Results, summary: list[dict[str, Any]]) -> dict[str, Any]:
    """For JSON: ``setting``, ``runs`` and ``summary``; what is not defined is null."""
    return {
        "runs": [_without_nan(row) for row in results.runs.iter_rows(named=True)],
        "summary": [_without_nan(row) for row in summary],
        "setting": _setting(results),
    }


def _setting(results: Results) -> dict[str, Any]:
    return {**results.setting, "composed": dict(results.descriptions)}


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
