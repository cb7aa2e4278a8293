"""The ``pointsman calibrate`` commands: an expert's profile from measurements."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pointsman_cli.extras import needs_extra
from pointsman_common.files import readable_file, reason, told, writable_file

if TYPE_CHECKING:
    from pointsman_learning.calibration.check import Comparison
    from pointsman_learning.calibration.design import EngineLimits
    from pointsman_learning.calibration.fit import Errors, Fit
    from pointsman_learning.calibration.measurements import Measurements
    from pointsman_learning.calibration.probe import Probed, ProbeOptions

app = typer.Typer(
    no_args_is_help=True,
    help="Fit the cost model to a real engine; prints limits and profile for its LLMExpert.",
)

_Url = Annotated[str, typer.Argument(metavar="URL", help="For example http://10.0.0.1:8000.")]
_Model = Annotated[str, typer.Option(help="Name under which the engine serves the model.")]
_Json = Annotated[bool, typer.Option("--json", help="The whole report, as JSON, instead.")]
_Csv = Annotated[
    Path | None,
    typer.Option(help="Write the measured iterations to this file.", callback=writable_file),
]
_Seed = Annotated[int, typer.Option(help="Start of all that is drawn.")]
_Concurrency = Annotated[
    int, typer.Option(min=1, max=65_536, help="Requests that the engine serves in one batch.")
]
_CONTEXT = {"min": 64, "max": 10_000_000, "help": "Prompt and answer together."}
_KV = {"min": 64, "max": 2**40, "help": "Tokens that the KV cache holds."}
_BUDGET = {"min": 1, "max": 2**20, "help": "Token budget of one iteration."}
_Found = typer.Option


@app.command()
def engine(
    url: _Url,
    *,
    model: _Model,
    concurrency: _Concurrency = 32,
    context_tokens: Annotated[
        int | None, _Found(show_default="as the engine says", **_CONTEXT)
    ] = None,
    kv_tokens: Annotated[int | None, _Found(show_default="as the engine says", **_KV)] = None,
    max_batched_tokens: Annotated[int | None, _Found(show_default="as measured", **_BUDGET)] = None,
    iterations: Annotated[int, typer.Option(min=8, help="Iterations in one window.")] = 48,
    check: Annotated[
        int, typer.Option(min=0, help="Requests of the held-out check; 0: no check.")
    ] = 150,
    check_load: Annotated[
        float, typer.Option(min=0.01, help="Its load, as a share of the engine's capacity.")
    ] = 0.5,
    seed: _Seed = 0,
    csv: _Csv = None,
    as_json: _Json = False,
) -> None:
    """Measure a running engine that nobody else uses. Takes some minutes.

    The engine must serve /v1/completions, take token ids as prompt and honour ignore_eos or
    min_tokens; vLLM does.
    """
    import asyncio

    with _expected_errors():
        from pointsman_learning.calibration.probe import ProbeOptions

        options = ProbeOptions(
            concurrency=concurrency,
            context_tokens=context_tokens,
            kv_capacity_tokens=kv_tokens,
            max_batched_tokens=max_batched_tokens,
            iterations=iterations,
            seed=seed,
        )
        probed, found, comparison = asyncio.run(
            _engine(url, model, options, check=check, check_load=check_load)
        )
        _finish(found, probed.limits, probed.measurements, csv, comparison, as_json=as_json)


@app.command()
def prometheus(
    url: _Url,
    *,
    model: _Model,
    instance: Annotated[
        str | None, typer.Option(help="Its label, where several engines serve the model.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="How far back.")] = 24.0,
    step: Annotated[int, typer.Option(min=1, help="Seconds averaged to one measurement.")] = 60,
    concurrency: _Concurrency = 32,
    context_tokens: Annotated[int, _Found(**_CONTEXT)] = 8192,
    max_batched_tokens: Annotated[int, _Found(**_BUDGET)] = 2048,
    csv: _Csv = None,
    as_json: _Json = False,
) -> None:
    """Use what a Prometheus server recorded of a vLLM engine. Rougher, but without load."""
    with _expected_errors():
        from pointsman_learning.calibration.design import EngineLimits
        from pointsman_learning.calibration.fit import fit
        from pointsman_learning.calibration.history import Period, read_history

        period = Period(hours=hours, step_s=step)
        history = read_history(url, model=model, instance=instance, period=period)
        rows = history.measurements
        typer.echo(f"{len(rows)} of {history.steps} time steps were busy throughout", err=True)
        limits = EngineLimits(
            context_tokens=context_tokens,
            concurrency=concurrency,
            kv_capacity_tokens=history.kv_capacity_tokens,
            max_batched_tokens=max_batched_tokens,
        )
        _finish(fit(rows), limits, rows, csv, None, as_json=as_json)


@app.command()
def file(
    measurements: Annotated[
        Path,
        typer.Argument(metavar="CSV", help="Measured iterations.", callback=readable_file),
    ],
    *,
    concurrency: _Concurrency = 32,
    context_tokens: Annotated[int, _Found(**_CONTEXT)] = 8192,
    kv_tokens: Annotated[int, _Found(**_KV)] = 65_536,
    max_batched_tokens: Annotated[int, _Found(**_BUDGET)] = 512,
    as_json: _Json = False,
) -> None:
    """Use a CSV: batch,context_tokens,prefill_tokens,iteration_seconds[,iterations]."""
    with _expected_errors():
        from pointsman_learning.calibration.design import EngineLimits
        from pointsman_learning.calibration.fit import fit
        from pointsman_learning.calibration.measurements import CalibrationError, read_csv

        limits = EngineLimits(
            context_tokens=context_tokens,
            concurrency=concurrency,
            kv_capacity_tokens=kv_tokens,
            max_batched_tokens=max_batched_tokens,
        )
        try:
            text = measurements.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{measurements}: {reason(error)}") from None
        rows = read_csv(text, source=str(measurements))
        _finish(fit(rows), limits, rows, None, None, as_json=as_json)


async def _engine(
    url: str, model: str, options: "ProbeOptions", *, check: int, check_load: float
) -> "tuple[Probed, Fit, Comparison | None]":
    from pointsman_learning.calibration.check import compare, held_out_load
    from pointsman_learning.calibration.client import connect
    from pointsman_learning.calibration.fit import fit
    from pointsman_learning.calibration.probe import probe
    from pointsman_learning.calibration.profile import profile_fields

    async with connect(url, model=model, seed=options.seed) as client:
        probed = await probe(client, options, note=lambda text: typer.echo(text, err=True))
        found = fit(probed.measurements)
        if not check:
            return probed, found, None
        fields = profile_fields(found.times, probed.limits)
        load = held_out_load(fields, requests=check, load=check_load, seed=options.seed + 1)
        typer.echo(
            f"check: {check} requests, {load.rate:.2f}/s for {load.arrival_s[-1]:.0f} s", err=True
        )
        return probed, found, await compare(client, fields, load)


@contextmanager
def _expected_errors() -> Iterator[None]:
    """Messages, not tracebacks, for what is wrong with the input or the installation."""
    with needs_extra():
        from pointsman_learning.calibration.measurements import CalibrationError

        try:
            yield
        except (CalibrationError, OSError) as error:
            typer.echo(f"calibrate: {told(error)}", err=True)
            raise typer.Exit(1) from error


# --- What is shown ---------------------------------------------------------------------


def _finish(
    found: "Fit",
    limits: "EngineLimits",
    rows: "Measurements",
    csv: Path | None,
    comparison: "Comparison | None",
    *,
    as_json: bool,
) -> None:
    from rich.console import Console

    from pointsman_learning.calibration.measurements import write_csv
    from pointsman_learning.calibration.profile import profile_fields, profile_yaml

    if csv is not None:
        csv.write_text(write_csv(rows), "utf-8")
    checked = comparison.report() if comparison else None
    Console(stderr=True).print(*_tables(found, rows, checked), sep="\n")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        fields = profile_fields(found.times, limits)
        typer.echo(_json(fields, found, rows, checked))
    else:
        typer.echo(profile_yaml(found.times, limits), nl=False)


def _json(
    fields: dict[str, Any], found: "Fit", rows: "Measurements", checked: dict[str, Any] | None
) -> str:
    import json
    from dataclasses import asdict

    document = {
        **fields,
        "fit": {
            "measurements": len(rows),
            "held_out": asdict(found.held_out),
            "fitted": asdict(found.fitted),
            "warnings": found.warnings,
        },
        "check": checked,
    }
    return json.dumps(document, indent=2)


def _tables(found: "Fit", rows: "Measurements", checked: dict[str, Any] | None) -> list[Any]:
    from rich.table import Table

    table = Table(title=f"Fit to {len(rows)} measurements")
    for name in ("", "R²", "MAPE", "p90", "worst", "at"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("held out", *_error_cells(found.held_out, rows))
    table.add_row("all", *_error_cells(found.fitted, rows))
    return [table, *([_check_table(checked)] if checked else [])]


def _error_cells(errors: "Errors", rows: "Measurements") -> list[str]:
    worst = errors.worst_row
    where = (
        f"batch {rows.batch[worst]:.0f}, prefill {rows.prefill_tokens[worst]:.0f}, "
        f"context {rows.context_tokens[worst]:.0f}"
    )
    shares = (errors.mape, errors.p90, errors.worst)
    return [f"{errors.r2:.3f}", *(f"{share:.1%}" for share in shares), where]


def _check_table(checked: dict[str, Any]) -> Any:  # noqa: ANN401 - rich is imported late
    from rich.table import Table

    table = Table(
        title=f"{checked['requests']} held-out requests, {checked['rate_per_s']:.2f}/s, "
        "real engine against simulator"
    )
    for name in ("", "measured", "predicted", "median err.", "p90 err.", "bias"):
        table.add_column(name, justify="right" if name else "left")
    for label, name in (
        ("ms per token", "latency_per_token"),
        ("ms to first token", "first_token"),
    ):
        errors = checked[name]
        table.add_row(
            label,
            f"{errors['median_measured_ms']:.1f}",
            f"{errors['median_predicted_ms']:.1f}",
            f"{errors['median_ape']:.1%}",
            f"{errors['p90_ape']:.1%}",
            f"{errors['bias']:+.1%}",
        )
    for verdict in checked["in_time"]:
        table.add_row(
            f"in time at {verdict['limit_ms']:.1f} ms",
            f"{verdict['measured']:.0%}",
            f"{verdict['predicted']:.0%}",
            f"{1 - verdict['agree']:.0%} differ",
        )
    return table
