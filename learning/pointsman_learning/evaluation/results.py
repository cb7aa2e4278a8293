"""All runs of an evaluation as tables, their summary, and the files they go to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pointsman_core.state import FloatArray
from pointsman_learning.evaluation.metrics import Metrics
from pointsman_learning.evaluation.plan import Plan
from pointsman_learning.evaluation.registry import BOUND
from pointsman_learning.evaluation.runner import Run
from pointsman_learning.evaluation.statistics import Interval, mean_intervals, paired_differences

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
    descriptions: Mapping[str, str]
    """By workload: where the parts of its first window come from."""


def collect(runs: Iterable[Run], plan: Plan) -> Results:
    """Put runs into tables, in the plan's order whatever the order they came in.

    Raises ValueError when there are none.
    """

    def key(run: Run) -> tuple[Any, ...]:
        task, window = run.task, run.task.window
        return (
            plan.workloads.index(window.workload),
            window.load,
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
    return Results(
        runs=_frame([_labels(run) | asdict(run.metrics) for run in ordered]),
        routing=_frame([row for run in ordered for row in _routing_rows(run)]),
        timeline=_frame([row for run in ordered for row in _timeline_rows(run)]),
        descriptions=descriptions,
    )


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
) -> list[dict[str, Any]]:
    """One row per cell and decider: means over windows, intervals, difference to a reference.

    Args:
        runs: as in `Results.runs`; windows that some decider has not finished are left out
            for all, so that means are over the same requests.
        reference: a decider, or `BEST_BASELINE`.
        baselines: deciders among which the best baseline is chosen; none: all but bounds.
        disjoint: by workload, how many windows do not overlap; None or left out: all.

    """
    rows: list[dict[str, Any]] = []
    for cell in runs.partition_by(*CELL, maintain_order=True):
        rows += _summary_of_cell(cell, reference, frozenset(baselines))
    for row in rows:
        limit = (disjoint or {}).get(row["workload"])
        row["overlapping_windows"] = 0 if limit is None else max(0, row["windows"] - limit)
    return rows


def _summary_of_cell(
    cell: pl.DataFrame, reference: str, baselines: frozenset[str]
) -> list[dict[str, Any]]:
    deciders = cell["decider"].unique(maintain_order=True).to_list()
    complete = cell.group_by("seed").len().filter(pl.col("len") == len(deciders))["seed"].to_list()
    cell = cell.filter(pl.col("seed").is_in(complete)).sort("seed", maintain_order=True)
    if cell.is_empty():
        return []
    qos = np.array([cell.filter(decider=name)["average_qos"].to_numpy() for name in deciders])
    chosen = _reference(deciders, qos, reference, baselines)
    means = mean_intervals(qos)
    gains = None if chosen is None else paired_differences(qos, qos[deciders.index(chosen)])
    labels = {name: cell[name][0] for name in CELL}
    return [
        labels
        | {"decider": name, "bound": name.startswith(BOUND), "windows": len(complete)}
        | _interval("average_qos", means[number])
        | _difference(None if gains is None else gains[number], name, chosen, means, deciders)
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


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _difference(
    gain: Interval | None,
    name: str,
    reference: str | None,
    means: Sequence[Interval],
    deciders: Sequence[str],
) -> dict[str, Any]:
    nothing = Interval(math.nan, math.nan, math.nan)
    if gain is None or reference is None or name == reference:
        return {"reference": reference, **_interval("difference", nothing)} | {
            "difference_percent": math.nan
        }
    base = means[deciders.index(reference)].mean
    percent = 100 * gain.mean / base if base >= RATIO_FLOOR else math.nan
    return {
        "reference": reference,
        **_interval("difference", gain),
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
    """Write ``runs``, ``summary``, ``routing`` and ``timeline`` as Parquet; returns the files."""
    tables = {
        "runs": results.runs,
        "summary": _frame(summary),
        "routing": results.routing,
        "timeline": results.timeline,
    }
    files = []
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        table.write_parquet(path)
        files.append(path)
    return files


def as_document(results: Results, summary: list[dict[str, Any]]) -> dict[str, Any]:
    """For JSON: ``runs`` and ``summary``; what is not defined is null."""
    return {
        "runs": [_without_nan(row) for row in results.runs.iter_rows(named=True)],
        "summary": [_without_nan(row) for row in summary],
    }


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
