"""The closing plot: what became of the requests, and how fast the answers were."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pointsman_cli.demo.results import DemoReport, RunResult
from pointsman_common.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by the colour-blind too.
PARTS = (
    ("quality_in_time", "quality delivered in time (= average QoS)", "#009E73", ""),
    ("missing_in_time", "in time, quality missing", "#56B4E9", ""),
    ("late", "late", "#E69F00", "//"),
    ("rejected", "rejected", "#CCCCCC", ".."),
    ("failed", "failed", "#D55E00", "xx"),
)
# Colour, dashes and marker all differ, so that any one of them tells the lines apart.
LINES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#000000", (0, (8, 2, 1, 2, 1, 2)), "v"),
    ("#56B4E9", (0, (2, 2)), "X"),
    ("#E69F00", (0, (5, 1)), "P"),
    ("#882255", (0, (3, 1, 1, 1)), "<"),
    ("#777777", (0, (1, 1)), "*"),
    ("#117733", (0, (6, 2, 2, 2)), ">"),
)
MAX_TICKS = 12
TICK_DIGITS = (
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 3),
    (1,),
)
"""Leading digits of labelled ticks, the densest first."""


def draw(report: DemoReport, path: Path) -> None:
    """Write the plot as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.2), layout="constrained", dpi=130)
    bars, curves = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_shares(bars, report.runs)
    _draw_latencies(curves, report.runs, report.workload.limit_ms_per_token)
    workload = report.workload
    figure.suptitle(
        f"{counted(workload.requests, 'request')} at {workload.rate:.2g}/s under each decider,"
        f" limit {workload.limit_ms_per_token:g} ms per token\n{workload.description}"
        + (" · simulated engines" if report.simulated else ""),
        fontsize=10,
    )
    figure.savefig(path)


def _draw_shares(axes: "Axes", runs: Sequence[RunResult]) -> None:
    rows = np.arange(len(runs))
    left = np.zeros(len(runs))
    for name, label, colour, hatch in PARTS:
        width = np.array([getattr(run.shares, name) for run in runs])
        if not width.any():
            continue
        axes.barh(rows, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=label)
        left += width
    for row, run in enumerate(runs):
        axes.text(
            0.008,
            row,
            f"QoS {run.average_qos:.3f}",
            va="center",
            color="black",
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )
    axes.set_yticks(rows, [run.decider for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of all requests that arrived")
    axes.set_title("What became of the requests")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)


def _draw_latencies(axes: "Axes", runs: Sequence[RunResult], limit_ms: float) -> None:
    for number, run in enumerate(runs):
        if not run.ms_per_token:
            continue
        colour, style, marker = LINES[number % len(LINES)]
        share = np.arange(1, len(run.ms_per_token) + 1) / run.requests
        axes.step(
            run.ms_per_token,
            share,
            where="post",
            color=colour,
            linestyle=style,
            linewidth=1.8,
            marker=marker,
            # By distance on the page, and apart from the other lines' markers.
            markevery=(0.02 * number, 0.14),
            markersize=6,
            label=run.decider,
        )
    axes.axvline(limit_ms, color="#555555", linewidth=1)
    axes.text(limit_ms, 1.005, f"limit {limit_ms:g} ms", ha="center", va="bottom", fontsize=9)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = latency_ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("latency per output token (ms, logarithmic)")
    axes.set_ylabel("requests answered at least this fast")
    axes.set_title("How fast the answers were", pad=18)
    axes.grid(visible=True, alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", handlelength=4)


def latency_ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high`` for a logarithmic axis, as many as have room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in TICK_DIGITS:
        every = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in every if low <= tick <= high]
        if len(ticks) <= MAX_TICKS:
            break
    return ticks
