"""How measurements are shown: a table for people, JSON for machines."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from pointsman_common.wording import counted


@dataclass(frozen=True, slots=True)
class Timing:
    """Latencies of one series, in milliseconds, and its throughput."""

    p50_ms: float
    p99_ms: float
    mean_ms: float
    max_ms: float
    per_second: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float], *, wall_s: float) -> "Timing":
        """Summarise latencies in seconds that were measured within ``wall_s``."""
        ms = np.asarray(seconds) * 1e3
        p50, p99 = np.percentile(ms, [50, 99])
        return cls(
            p50_ms=round(float(p50), 4),
            p99_ms=round(float(p99), 4),
            mean_ms=round(float(ms.mean()), 4),
            max_ms=round(float(ms.max()), 4),
            per_second=round(len(ms) / wall_s, 1),
            count=len(ms),
        )


def row(labels: dict[str, Any], timing: Timing) -> dict[str, Any]:
    """One run of the report."""
    return labels | asdict(timing)


def show(runs: list[dict[str, Any]], *, title: str, as_json: bool, setting: dict[str, Any]) -> None:
    """Print the table to standard error, or the JSON document to standard output."""
    if as_json:
        document = {"runs": runs, "setting": setting}
        sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
        return
    title = f"{title}: {_constants(runs)}"
    # Narrow enough for 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    columns = [name for name in runs[0] if name in _SHOWN]
    for name in columns:
        justify: JustifyMethod = "left" if name == "decider" else "right"
        table.add_column(_SHOWN[name], justify=justify, no_wrap=True)
    for run in runs:
        table.add_row(*(_text(run[name]) for name in columns))
    Console(stderr=True).print(table)


_SHOWN = {
    "decider": "decider",
    "concurrency": "clients",
    "followed": "followed",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "max_ms": "max ms",
    "per_second": "per s",
    "server_cpu_us": "CPU µs",
}


def _constants(runs: list[dict[str, Any]]) -> str:
    first = runs[0]
    return f"{counted(first['endpoints'], 'endpoint')}, {first['in_flight']} in flight"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    return str(value)
