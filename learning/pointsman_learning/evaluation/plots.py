"""The plots: QoS against load, against limits, through a burst, and where requests go."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pointsman_common.wording import counted
from pointsman_core.state import FloatArray
from pointsman_learning.evaluation.registry import BOUND
from pointsman_learning.evaluation.results import Results, Row, limit_factor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind too; dashes and markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*", "<", ">")
BOUND_COLOUR = "#888888"

BURST_DECIDERS = 5
"""Lines in the plot of a burst: the best deciders there. More could not be read."""
NOTE_POINTS = 7.0
"""Size of the note below a plot."""
BURST_BINS = 14
"""Stretches of time shown to either side of a burst's peak."""


def draw_all(results: Results, summary: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the results allow; returns the PNG files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    style = Style([str(row["decider"]) for row in summary])
    figures: dict[str, Figure | None] = {
        # Loads as recorded are one for each workload, and no curve.
        "qos-by-load": None
        if results.setting.get("as_recorded")
        else _by_number(summary, style, over="load"),
        "qos-by-limit": _by_number(summary, style, over="limit"),
        "burst": _burst(results.timeline, style),
        # Pools that are drawn anew have no experts in common.
        "routing": None if "pool" in results.setting else _routing(results.routing),
    }
    files = []
    for name, figure in figures.items():
        if figure is None:
            continue
        path = folder / f"{name}.png"
        _footer(figure, results)
        figure.savefig(path, dpi=130)
        files.append(path)
    return files


def _footer(figure: "Figure", results: Results) -> None:
    """Say below the plots what they are composed of; the figure grows by it."""
    width, height = figure.get_size_inches()
    characters = int(width * 72 / (0.55 * NOTE_POINTS))
    composed = results.descriptions.items()
    notes = [f"first window of {name}: {text}" for name, text in composed if text]
    notes += [f"{name}: {text}" for name, text in results.models.items()]
    lines = [line for note in notes for line in textwrap.wrap(note, characters)]
    if not lines:
        return
    room = (1.3 * len(lines) + 1) * NOTE_POINTS / 72
    figure.set_size_inches(width, height + room)
    share = room / (height + room)
    figure.set_layout_engine("constrained", rect=(0, share, 1, 1 - share))
    text = "\n".join(lines)
    figure.text(0.01, 0.9 * share, text, fontsize=NOTE_POINTS, color="#555555", va="top")


class Style:
    """One look per decider, the same in all plots."""

    def __init__(self, names: Sequence[str]) -> None:
        distinct = dict.fromkeys(names)
        self._number = {n: i for i, n in enumerate(d for d in distinct if not _is_bound(d))}
        self._bound = {n: i for i, n in enumerate(d for d in distinct if _is_bound(d))}

    def of(self, name: str) -> dict[str, object]:
        """Keywords for ``Axes.plot``."""
        bound = _is_bound(name)
        number = self._bound[name] if bound else self._number[name]
        return {
            "color": BOUND_COLOUR if bound else COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[(number // len(COLOURS) + (2 if bound else 0)) % len(DASHES)],
            "marker": MARKERS[number % len(MARKERS)],
            "markerfacecolor": "white" if bound else None,
            "linewidth": 1.2 if bound else 1.7,
            "markersize": 5.5,
            "label": name,
        }


def _is_bound(name: str) -> bool:
    return name.startswith(BOUND)


# --- QoS against a number ----------------------------------------------------------------


def _by_number(summary: Sequence[Row], style: Style, *, over: str) -> "Figure | None":
    """Panels of average QoS against load or limit; None where there is only one value."""
    from matplotlib.figure import Figure

    other = "limit" if over == "load" else "load"
    points = [row for row in summary if _position(row, over) is not None]
    if len({row[over] for row in points}) < 2:
        return None
    workloads = list(dict.fromkeys(row["workload"] for row in points))
    lines = list(dict.fromkeys((row["admission"], row[other]) for row in points))
    figure = Figure(
        figsize=(3.6 * len(workloads) + 2.4, 2.9 * len(lines) + 0.9), layout="constrained"
    )
    grid = figure.subplots(len(lines), len(workloads), squeeze=False, sharex=True, sharey="row")
    for r, (admission, held) in enumerate(lines):
        for c, workload in enumerate(workloads):
            rows = [
                row
                for row in points
                if (row["workload"], row["admission"], row[other]) == (workload, admission, held)
            ]
            _curves(grid[r][c], rows, style, over)
            what = f"limits {held}" if other == "limit" else f"load {held:g}"
            grid[r][c].set_title(f"{workload}, {admission}, {what}", fontsize=9)
        grid[r][0].set_ylabel("average QoS")
    for axes in grid[-1]:
        axes.set_xlabel(
            "load (share of capacity)"
            if over == "load"
            else "limits, in multiples of the base limit"
        )
    _legend(figure, grid[0][0])
    return figure


def _position(row: Row, over: str) -> float | None:
    return float(row["load"]) if over == "load" else limit_factor(row["limit"])


def _curves(axes: "Axes", rows: Sequence[Row], style: Style, over: str) -> None:
    for name in dict.fromkeys(row["decider"] for row in rows):
        mine = sorted(
            (row for row in rows if row["decider"] == name),
            key=lambda row: _position(row, over) or 0.0,
        )
        x = [_position(row, over) for row in mine]
        low, high = ([row[f"average_qos_{end}"] for row in mine] for end in ("low", "high"))
        look = style.of(name)
        axes.plot(x, [row["average_qos"] for row in mine], **look)  # type: ignore[arg-type]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)  # type: ignore[arg-type]
    if over == "limit":
        axes.set_xscale("log")
        ticks = sorted({_position(row, over) or 0.0 for row in rows})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.25)


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right upper", fontsize=8, handlelength=3.5, frameon=False
    )


# --- Through a burst ---------------------------------------------------------------------


def _burst(timeline: pl.DataFrame, style: Style) -> "Figure | None":
    """QoS around the highest peak of each window, averaged over windows, per workload."""
    from matplotlib.figure import Figure

    cells = _middle_cells(timeline)
    if not cells:
        return None
    figure = Figure(figsize=(11, 3.0 * len(cells) + 0.6), layout="constrained")
    grid = figure.subplots(len(cells), 1, squeeze=False)
    for axes, cell in zip(grid[:, 0], cells, strict=True):
        _draw_burst(axes, cell, style)
    grid[-1, 0].set_xlabel("stretches of time before and after the peak of arrivals")
    return figure


def _middle_cells(timeline: pl.DataFrame) -> list[pl.DataFrame]:
    """Of each workload the cell with middle load and limit, under the last admission rule."""
    cells = []
    for workload in timeline["workload"].unique(maintain_order=True):
        cell = timeline.filter(workload=workload)
        for name in ("load", "limit", "admission"):
            values = cell[name].unique(maintain_order=True).to_list()
            chosen = values[-1] if name == "admission" else values[len(values) // 2]
            cell = cell.filter(pl.col(name) == chosen)
        cells.append(cell)
    return cells


def _draw_burst(axes: "Axes", cell: pl.DataFrame, style: Style) -> None:
    offsets = np.arange(-BURST_BINS, BURST_BINS + 1)
    arrivals, qos = _aligned(cell)
    total = np.nansum(arrivals, axis=0)
    windows = len(arrivals)
    length = float((cell["end_s"] - cell["start_s"]).mean() or 0.0)  # type: ignore[arg-type]
    back = axes.twinx()
    back.bar(offsets, total / (windows * length), width=0.9, color="#DDDDDD", zorder=0)
    back.set_ylabel("arrivals/s", color="#888888")
    back.tick_params(axis="y", colors="#888888")
    axes.set_zorder(back.get_zorder() + 1)
    axes.patch.set_visible(False)
    with np.errstate(invalid="ignore", divide="ignore"):
        curves = {name: np.nansum(sums, axis=0) / total for name, sums in qos.items()}
    best = sorted(
        (name for name in curves if not _is_bound(name)),
        key=lambda name: -float(np.nansum(qos[name])),
    )[:BURST_DECIDERS]
    for name in [*best, *(name for name in curves if _is_bound(name))]:
        axes.plot(offsets, curves[name], **style.of(name))  # type: ignore[arg-type]
    axes.set_ylim(bottom=0)
    axes.set_ylabel("QoS of the requests\narriving then")
    first = cell.row(0, named=True)
    axes.set_title(
        f"{first['workload']}, load {first['load']:g}, limits {first['limit']},"
        f" {first['admission']}: around the highest peak, mean of {counted(windows, 'window')},"
        f" stretches of {length:.3g} s",
        fontsize=9,
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.07, 0.5), fontsize=8, handlelength=3.5)


def _aligned(cell: pl.DataFrame) -> tuple[FloatArray, dict[str, FloatArray]]:
    """(windows, 2 BURST_BINS + 1) arrivals, and QoS sums by decider; NaN outside a window."""
    arrivals: list[FloatArray] = []
    qos: dict[str, list[FloatArray]] = {}
    for window in cell.partition_by("seed", maintain_order=True):
        runs = window.partition_by("decider", maintain_order=True)
        requests = runs[0]["requests"].to_numpy().astype(np.float64)
        peak = int(requests.argmax())
        arrivals.append(_around(requests, peak))
        for run in runs:
            qos.setdefault(run["decider"][0], []).append(_around(run["qos"].to_numpy(), peak))
    return np.array(arrivals), {name: np.array(sums) for name, sums in qos.items()}


def _around(values: FloatArray, peak: int) -> FloatArray:
    padded = np.pad(values.astype(np.float64), BURST_BINS, constant_values=np.nan)
    return padded[peak : peak + 2 * BURST_BINS + 1]


# --- Where requests go -------------------------------------------------------------------


def _routing(routing: pl.DataFrame) -> "Figure | None":
    """Per decider: share of each domain's requests by expert, over all runs."""
    from matplotlib.figure import Figure

    deciders = routing["decider"].unique(maintain_order=True).to_list()
    domains = sorted(routing["domain"].unique().to_list())
    experts = sorted(e for e in routing["expert"].unique().to_list() if e is not None)
    columns = min(3, len(deciders))
    lines = math.ceil(len(deciders) / columns)
    height = 0.24 * len(domains) + 0.75
    figure = Figure(
        figsize=(1.6 + columns * (0.52 * (len(experts) + 1) + 0.5), lines * height + 1.9),
        layout="constrained",
    )
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    image = None
    for number, (axes, name) in enumerate(zip(grid.flat, deciders, strict=False)):
        shares = _shares(routing.filter(decider=name), domains, experts)
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (d, x), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.55 else "black"
                axes.text(x, d, f"{share:.0%}", ha="center", va="center", fontsize=6, color=colour)
        axes.set_title(name, fontsize=9)
        axes.set_yticks(range(len(domains)), domains, fontsize=7)
        lowest = number + columns >= len(deciders)
        labels = [*experts, "rejected"] if lowest else [""] * (len(experts) + 1)
        axes.set_xticks(range(len(labels)), labels, rotation=55, ha="right", fontsize=7)
        axes.axvline(len(experts) - 0.5, color="#888888", linewidth=0.8)
    for axes in grid.flat[len(deciders) :]:
        axes.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=grid, label="share of the domain's requests", fraction=0.03)
    figure.suptitle("Where each decider sends which domain (all runs together)", fontsize=10)
    return figure


def _shares(rows: pl.DataFrame, domains: Sequence[str], experts: Sequence[str]) -> FloatArray:
    column = {name: number for number, name in enumerate([*experts, None])}
    counts = np.zeros((len(domains), len(experts) + 1))
    for row in rows.iter_rows(named=True):
        counts[domains.index(row["domain"]), column[row["expert"]]] += row["requests"]
    shares: FloatArray = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares
