"""The closing table and the JSON file."""

import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pointsman_cli.demo.results import DemoReport, RunResult


def write_json(report: DemoReport, path: Path) -> None:
    """Write the report where scripts find it."""
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def print_report(console: Console, report: DemoReport) -> None:
    """Show the results, then what limits them."""
    console.print(results_table(report))
    console.print()
    console.print(experts_table(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def results_table(report: DemoReport) -> Table:
    """One line per decider; the best average QoS stands out."""
    workload = report.workload
    table = _table(
        f"{workload.requests} requests at {workload.rate:.2g}/s, each decider in turn",
        caption=(
            f"QoS: score of an answer within {workload.limit_ms_per_token:g} ms per token, else 0;"
            " over all requests, ± 95 % if they were independent. Late: of all requests, failed"
            f" ones included. {workload.description}."
            + (" Engines are simulated." if report.simulated else "")
        ),
    )
    table.add_column("decider", no_wrap=True)
    for heading in (
        "average\nQoS",
        "late",
        "p50 ms\n/token",
        "p99 ms\n/token",
        "mean\nscore",
        "failed",
        "rejected",
        "token\n/s",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max((run.average_qos for run in report.runs), default=0.0)
    for run in report.runs:
        table.add_row(*_cells(run), style="bold green" if run.average_qos == best else None)
    return table


def _cells(run: RunResult) -> tuple[str, ...]:
    return (
        run.decider,
        f"{run.average_qos:.3f}±{run.average_qos_95:.2f}",
        f"{run.violation_rate:.1%}",
        _milliseconds(run.p50_ms_per_token),
        _milliseconds(run.p99_ms_per_token),
        "-" if run.mean_quality is None else f"{run.mean_quality:.3f}",
        str(run.failed),
        str(run.rejected),
        f"{run.output_tokens_per_second:.0f}",
    )


def experts_table(report: DemoReport) -> Table:
    """Requests that each expert answered, and how many of them late."""
    names = sorted({name for run in report.runs for name in run.experts})
    table = _table("answers by expert (late ones in brackets)")
    table.add_column("expert", no_wrap=True)
    for run in report.runs:
        heading = _CAMEL_CASE.sub("\n", run.decider)
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        shares = [run.experts.get(name) for run in report.runs]
        cells = [f"{share.requests} ({share.late})" if share else "0" for share in shares]
        table.add_row(name, *cells)
    return table


_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])")


def _table(title: str, *, caption: str | None = None) -> Table:
    """A table narrow enough for 80 columns."""
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title_style="bold",
        caption_justify="left",
    )


def _milliseconds(value: float | None) -> str:
    """At most six characters, for a column has no more."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
