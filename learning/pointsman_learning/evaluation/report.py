"""The summary as tables for a terminal of 100 columns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pointsman_common.wording import counted, ranged
from pointsman_learning.evaluation.registry import BOUND
from pointsman_learning.evaluation.results import CELL, Row
from pointsman_learning.evaluation.statistics import FEW_WINDOWS, MIN_WINDOWS

DETAILED_CELLS = 6
"""With more cells than this only the overview is printed. Ours."""
COLUMNS_PER_TABLE = 4
"""Cells side by side in the overview: what fits into 100 columns."""


def print_report(
    console: Console,
    summary: Sequence[Row],
    *,
    descriptions: Mapping[str, str] | None = None,
    detailed: bool | None = None,
) -> None:
    """Print the tables.

    Args:
        console: where to.
        summary: rows of `summarise`.
        descriptions: by workload or decider, where its parts come from.
        detailed: with all metrics of every cell; None: where there are few cells.

    """
    cells = list({tuple(row[name] for name in CELL) for row in summary})
    if detailed is None:
        detailed = len(cells) <= DETAILED_CELLS
    if detailed:
        for cell, rows in groupby(summary, key=lambda row: tuple(row[name] for name in CELL)):
            console.print(_details(cell, list(rows)))
    if len(cells) > 1 or not detailed:
        for (limit, admission), alike in _by_rights(summary):
            for table in _overviews(limit, admission, alike):
                console.print(table)
    for note in _notes(summary, detailed=detailed):
        console.print(note, style="dim", highlight=False, markup=False)
    for workload, text in (descriptions or {}).items():
        console.print(f"{workload}: {text}", style="dim", highlight=False, markup=False)


def as_markdown(summary: Sequence[Row], *, descriptions: Mapping[str, str] | None = None) -> str:
    """Average QoS of all cells and the notes, for a page of documentation."""
    lines: list[str] = []
    for (limit, admission), rows in _by_rights(summary):
        cells = list(dict.fromkeys((row["workload"], row["load"]) for row in rows))
        known = {(row["decider"], row["workload"], row["load"]): row for row in rows}
        header = ["decider", *(f"{workload}, {load:g}" for workload, load in cells)]
        lines += [f"**Average QoS, limits {limit}, {admission}**", "", _line(header)]
        lines.append(_line(["---", *["---:"] * len(cells)]))
        first = {row["decider"]: row for row in rows}
        for name in sorted(first, key=lambda name: first[name]["bound"]):  # stable: bounds last
            found = [known.get((name, *cell)) for cell in cells]
            values = ["" if one is None else _mean(one) + _mark(one).rstrip() for one in found]
            lines.append(_line([name, *values]))
        lines.append("")
    lines += [f"- {note}" for note in _notes(summary, detailed=False)]
    lines += [f"- {workload}: {text}" for workload, text in (descriptions or {}).items()]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_rights(summary: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in summary:
        grouped.setdefault((row["limit"], row["admission"]), []).append(row)
    return list(grouped.items())


# --- One cell in full ------------------------------------------------------------------


def _details(cell: tuple[Any, ...], rows: Sequence[Row]) -> Table:
    workload, load, limit, admission = cell
    table = _table(f"{workload}, load {load:g}, limits {limit}, {admission}")
    table.add_column("decider", no_wrap=True)
    failures = any(row["failed"] > 0 for row in rows)
    headers = ["QoS", "difference", "quality", "late", "rej."]
    headers += ["fail"] if failures else []
    headers += ["p50 ms", "p95 ms", "p99 ms", "QoS/s"]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for label, row in _bounds_last(rows, table):
        numbers = [
            _mean(row),
            _difference(row),
            _share(row["quality"]),
            _percent(row["violation_rate"]),
            _percent(row["rejected"]),
            *([_percent(row["failed"])] if failures else []),
            *(_milliseconds(row[f"latency_{p}_ms"]) for p in ("p50", "p95", "p99")),
            _share(row["resource_efficiency"]),
        ]
        table.add_row(label, *numbers, style=_style(row))
    return table


def _bounds_last(rows: Sequence[Row], table: Table) -> Iterable[tuple[str, Row]]:
    """Labels and rows: deciders, then under a heading of their own bounds."""
    yield from ((row["decider"], row) for row in rows if not row["bound"])
    bounds = [row for row in rows if row["bound"]]
    if bounds:
        table.add_section()
        table.add_row("bounds:", style="dim")
        yield from ((f"  {row['decider'].removeprefix(BOUND)}", row) for row in bounds)


# --- All cells side by side ------------------------------------------------------------


def _overviews(limit: str, admission: str, rows: Sequence[Row]) -> list[Table]:
    columns = list(dict.fromkeys((row["workload"], row["load"]) for row in rows))
    tables = []
    for start in range(0, len(columns), COLUMNS_PER_TABLE):
        part = columns[start : start + COLUMNS_PER_TABLE]
        tables.append(_overview(f"Average QoS, limits {limit}, {admission}", part, rows))
    return tables


def _overview(title: str, columns: Sequence[tuple[str, float]], rows: Sequence[Row]) -> Table:
    table = _table(title)
    table.add_column("decider", no_wrap=True)
    for workload, load in columns:
        table.add_column(f"{workload}\n{load:g}", justify="right", no_wrap=True)
    known = {(row["decider"], row["workload"], row["load"]): row for row in rows}
    first = {row["decider"]: row for row in rows}
    for label, row in _bounds_last(list(first.values()), table):
        found = [known.get((row["decider"], *column)) for column in columns]
        cells = ["" if one is None else _mean(one) + _mark(one) for one in found]
        table.add_row(label, *cells, style="dim" if row["bound"] else "")
    return table


def _mark(row: Row) -> str:
    """How a decider stands to the reference; blank where that is not clear."""
    if row["decider"] == row["reference"]:
        return " ="
    if row["difference_low"] > 0:
        return " ▲"
    if row["difference_high"] < 0:
        return " ▼"
    return "  "


# --- Parts -----------------------------------------------------------------------------


def _notes(summary: Sequence[Row], *, detailed: bool) -> Iterable[str]:
    windows = [row["windows"] for row in summary]
    fewest, most = min(windows), max(windows)
    windows_each = ranged(fewest, most, "window")
    prompts = [row["prompts"] for row in summary]
    if fewest >= MIN_WINDOWS:
        yield (
            f"{windows_each} each; ± is half the 95 % interval of the mean, over"
            + (
                " windows (bootstrap), given these prompts."
                if None in prompts
                else f" windows (bootstrap) and {counted(max(prompts), 'prompt')}."
            )
        )
    else:
        yield f"{windows_each} each."
    if detailed:
        yield "late: answered late, or failed; rej.: rejected; p50 to p99: latency per token."
    if any(row["reference"] for row in summary):
        yield "= reference; ▲ ▼ better, worse with an interval of the paired difference clear of 0."
    if any(row["bound"] for row in summary):
        yield "Bounds see what no router can (true quality, lengths, the future): not deciders."
    for workload in dict.fromkeys(row["workload"] for row in summary):
        extra = max(row["overlapping_windows"] for row in summary if row["workload"] == workload)
        if extra:
            yield (
                f"{workload}: {extra} of the windows {'overlaps' if extra == 1 else 'overlap'}"
                " others of the trace, so its intervals"
                " are too narrow; fewer --requests give more windows apart."
            )
    if fewest < MIN_WINDOWS:
        yield f"Fewer than {MIN_WINDOWS} windows tell no intervals; use --seeds 20 to conclude."
    elif fewest < FEW_WINDOWS:
        yield f"Fewer than {FEW_WINDOWS} windows: intervals are rough; use --seeds 20 to conclude."
    if not detailed:
        yield "Latencies, violations, rejections and differences of each cell: summary.parquet."


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )


def _style(row: Row) -> str:
    if row["bound"]:
        return "dim"
    return "bold" if row["decider"] == row["reference"] else ""


def _mean(row: Row) -> str:
    low, high = row["average_qos_low"], row["average_qos_high"]
    return f"{row['average_qos']:.3f}{_plus_minus(low, high)}"


def _difference(row: Row) -> str:
    if row["decider"] == row["reference"]:
        return "reference"
    if math.isnan(row["difference"]):
        return ""
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['difference']:+.3f}{_plus_minus(low, high)}{_mark(row)}"


def _plus_minus(low: float, high: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f" ±{(high - low) / 2:.3f}".replace("0.", ".")


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.0995 else f"{value:.0%}"


def _milliseconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
