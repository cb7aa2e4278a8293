"""The closing table and the JSON file."""

import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pointsman_cli.demo.results import DemoReport, ModelReport, RunResult
from pointsman_common.wording import counted

SHOWN_DIGITS = 12
"""Of a model's SHA-256; the whole one is in the JSON."""


def write_json(report: DemoReport, path: Path) -> None:
    """Write the report where scripts find it."""
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def print_report(console: Console, report: DemoReport) -> None:
    """Show the results, then what limits them."""
    console.print(results_table(report))
    console.print()
    console.print(experts_table(report))
    if report.comparison:
        console.print()
        console.print(comparison_table(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def results_table(report: DemoReport) -> Table:
    """One line per decider; the best average QoS and those level with it stand out."""
    workload = report.workload
    table = _table(
        f"{counted(workload.requests, 'request')} at {workload.rate:.2g}/s, each decider in turn",
        caption=(
            f"QoS: score of an answer within {workload.limit_ms_per_token:g} ms per token, else 0;"
            " over all requests, ± 95 % if they were independent. Late: of all requests, failed"
            f" ones included.{_level_line(report)} {workload.description}."
            + (" Engines are simulated." if report.simulated else "")
            + ("" if report.model is None else f" {model_line(report.model)}.")
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
        level = "green" if run.decider in report.level_with_best else None
        table.add_row(*_cells(run), style="bold green" if run.average_qos == best else level)
    return table


def _level_line(report: DemoReport) -> str:
    if not report.level_with_best:
        return ""
    best = max(report.runs, key=lambda run: run.average_qos).decider
    others = ", ".join(report.level_with_best)
    return f" Too few requests to tell {best} from {others} (95 %, paired by request)."


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


def model_line(model: ModelReport) -> str:
    """Tell people by which model HanDrl decides."""
    if not model.sha256:
        return f"HanDrl has no model, its fallback decides: {model.error}"
    state = "trained" if model.trained else "untrained (it decides as ImpactGreedy does)"
    return f"HanDrl decides by {model.source}, SHA-256 {model.sha256[:SHOWN_DIGITS]}…, {state}"


def comparison_table(report: DemoReport) -> Table:
    """Each run beside the simulation of the same requests."""
    gaps = [abs(one.difference) for one in report.comparison]
    table = _table(
        "the same requests in the data plane and in the laboratory's simulator",
        caption=(
            "Difference: data plane less simulator, ± 95 % over paired requests if they were"
            " independent; mean of its absolute values"
            f" {sum(gaps) / len(gaps):.3f}. Same: requests that the same expert answered."
        ),
    )
    table.add_column("decider", no_wrap=True)
    for heading in (
        "QoS data\nplane",
        "QoS\nsimul.",
        "difference",
        "late data\nplane",
        "late\nsimul.",
        "same",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for run, one in zip(report.runs, report.comparison, strict=True):
        table.add_row(
            run.decider,
            f"{run.average_qos:.3f}",
            f"{one.simulator.average_qos:.3f}",
            f"{one.difference:+.3f}±{one.difference_95:.3f}",
            f"{run.violation_rate:.1%}",
            f"{one.simulator.violation_rate:.1%}",
            f"{one.same_expert:.0%}",
        )
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
