"""The command ``pointsman evaluate``."""

import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pointsman_cli.extras import needs_extra
from pointsman_common.files import (
    must_be_readable,
    readable,
    readable_file,
    told,
    writable_file,
    writable_folder,
)
from pointsman_common.wording import counted, share

if TYPE_CHECKING:
    from rich.console import Console

    from pointsman_core.resources import Admission
    from pointsman_learning.evaluation import (
        Composer,
        DrawnPools,
        Plan,
        Results,
        TrainedModel,
    )
    from pointsman_learning.evaluation.journal import Journal

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""
TABLE_WIDTH = 100
"""Columns of the tables where the output is no terminal."""
AS_RECORDED = "as-recorded"
"""As a load: a trace's own times."""
START_S = 6.0
"""Rough time until all processes are ready, for the first estimate only."""

_T = TypeVar("_T")


def evaluate(
    workloads: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: poisson, on-off, azure-conv, azure-code."
            " Default: all whose data is at hand."
        ),
    ] = None,
    loads: Annotated[
        str,
        typer.Option(
            help="Comma-separated shares of the site's estimated capacity; or as-recorded, to"
            " replay a trace at its own times."
        ),
    ] = "0.5,0.9",
    limits: Annotated[
        str,
        typer.Option(help="Comma-separated: x1, x2.5, x5 (multiples of the base limits), mixed."),
    ] = "x1",
    base_limits: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated ms per token, drawn evenly, for --limits to multiply."
            " Default: 50,70,100; azure-code 70,100,200."
        ),
    ] = None,
    admission: Annotated[
        str, typer.Option(help="Comma-separated: best-effort, reject.")
    ] = "reject",
    deciders: Annotated[
        str,
        typer.Option(
            help="Comma-separated names; also 'all' deciders, quick 'bounds', slow 'lookaheads'."
        ),
    ] = "all",
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="Windows of each kind; 20 to conclude.")
    ] = 10,
    requests: Annotated[
        int, typer.Option(min=10, max=1_000_000, help="Requests of each window.")
    ] = 1000,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="What deciders know of quality: 'builtin' (learned), 'priors' (declared),"
            " or the file of a predictor. Default: builtin; priors on synthetic prompts."
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(help="Decider that others are compared with; 'best': the best baseline."),
    ] = "best",
    quality_data: Annotated[
        Path | None,
        typer.Option(
            help="Your own scores: prompt,expert,score,output_tokens (CSV).",
            callback=readable_file,
        ),
    ] = None,
    arrivals: Annotated[
        Path | None,
        typer.Option(
            help="Your own trace: arrival_seconds,input_tokens,output_tokens (CSV).",
            callback=readable_file,
        ),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            help="Your own manifests, a file or folder; default: examples/edge-site.",
            callback=readable,
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy in the manifests; default: that of 'auto'.")
    ] = None,
    pool: Annotated[
        str,
        typer.Option(
            help="edge-site, or pools drawn anew by each seed: random:N, unseen-boards:N"
            " (boards that training never draws), or a range like random:20-32."
        ),
    ] = "edge-site",
    outages: Annotated[
        bool, typer.Option("--outages", help="In each window one endpoint fails, one joins.")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="A trained model (ONNX), evaluated as HanDrl:NAME; may be repeated."
            " Default name: the file's, without its ending.",
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Where tables and plots go.", callback=writable_folder)
    ] = Path("evaluation-output"),
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Also write the overview, in Markdown, to this file.", callback=writable_file
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with an evaluation that was broken off in the output folder."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print runs and summary as JSON on standard output.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes; default: one per core.")
    ] = None,
) -> None:
    """Compare deciders on held-out workloads, in simulation: tables, intervals, plots.

    All deciders meet the very same requests. Differences have paired bootstrap intervals.
    """
    with needs_extra():
        from pointsman_learning.evaluation import BUILTIN, PRIORS, Composer, Plan, registered

    if predictor not in (None, BUILTIN, PRIORS):
        must_be_readable(Path(predictor), option="--predictor")
    if policy is not None and experts is None:
        raise _bad("--policy", "names a policy in the manifests of --experts, which are not given")
    composer = Composer(
        requests=requests,
        predictor=predictor or _default_predictor(quality_data),
        experts=experts,
        policy=policy,
        quality_data=quality_data,
        arrivals=arrivals,
        base_limits_ms=None if base_limits is None else _base_limits(base_limits),
        drawn=_drawn(pool),
        outages=outages,
    )
    models = _models(model or [])
    with registered(one.contender() for one in models):
        chosen = _deciders(deciders, models)
        plan = Plan(
            workloads=_workloads(workloads, arrivals),
            loads=_loads(loads),
            limits=_limits(limits),
            admissions=_admissions(admission),
            deciders=chosen,
            seeds=range(seeds),
        )
        reference = _reference(reference, chosen)
        _check(composer, plan)
        with _named("--output-dir"):
            output_dir.mkdir(parents=True, exist_ok=True)
        journal = _journal(output_dir, _kept_setting(composer, plan, models), resume=resume)
        status = _run(
            composer,
            plan,
            models=models,
            reference=reference,
            journal=journal,
            output_dir=output_dir,
            markdown=markdown,
            as_json=as_json,
            jobs=min(jobs or _cores(), len(plan)),
        )
    raise typer.Exit(status)


# --- Options -----------------------------------------------------------------------------


def _bad(option: str, message: object) -> typer.BadParameter:
    return typer.BadParameter(str(message), param_hint=option)


def _items(text: str, option: str) -> list[str]:
    items = list(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    if not items:
        raise _bad(option, "names nothing")
    return items


def _choose(text: str, option: str, known: dict[str, _T]) -> list[_T]:
    """Values by name, case ignored."""
    folded = {name.casefold(): value for name, value in known.items()}
    items = _items(text, option)
    unknown = [item for item in items if item.casefold() not in folded]
    if unknown:
        raise _bad(option, f"{', '.join(unknown)}: choose from {', '.join(known)}")
    return list(dict.fromkeys(folded[item.casefold()] for item in items))


def _workloads(text: str | None, arrivals: Path | None) -> list[str]:
    from pointsman_learning.evaluation import available_workloads, workload_name
    from pointsman_learning.workloads import Process

    if arrivals is not None:
        if text is not None:
            raise _bad("--workloads", "give either this or --arrivals")
        return [workload_name(arrivals)]
    if text is None:
        with _named("POINTSMAN_DATA"):
            return list(available_workloads())
    return _choose(text, "--workloads", {process.value: process.value for process in Process})


def _loads(text: str) -> list[float | None]:
    items = [item.casefold() for item in _items(text, "--loads")]
    if AS_RECORDED not in items:
        return [*_numbers(text, "--loads", most=100)]
    if len(items) > 1:
        raise _bad("--loads", f"{AS_RECORDED} stands alone: other loads stretch the same trace")
    return [None]


def _numbers(text: str, option: str, *, most: float) -> list[float]:
    numbers = set()
    for item in _items(text, option):
        try:
            number = float(item)
        except ValueError:
            number = math.nan
        if not (0 < number <= most):
            raise _bad(option, f"{item}: must be a number above 0, and at most {most:,.0f}")
        numbers.add(number)
    return sorted(numbers)


def _base_limits(text: str) -> tuple[float, ...]:
    return tuple(_numbers(text, "--base-limits", most=1e6))


def _limits(text: str) -> list[str]:
    from pointsman_core.workload import WorkloadError
    from pointsman_learning.workloads import limits_of

    try:
        names = [limits_of(item.casefold()).name for item in _items(text, "--limits")]
    except WorkloadError as error:
        raise _bad("--limits", error.message) from None
    return list(dict.fromkeys(names))


def _admissions(text: str) -> "list[Admission]":
    from pointsman_core.resources import Admission

    known = {"best-effort": Admission.BEST_EFFORT, "reject": Admission.REJECT}
    product_names = {admission.value.casefold() for admission in Admission}
    items = [
        "best-effort" if item.casefold() in product_names - {"reject"} else item
        for item in _items(text, "--admission")
    ]
    return _choose(",".join(items), "--admission", known)


def _drawn(text: str) -> "DrawnPools | None":
    from pointsman_core.workload import WorkloadError
    from pointsman_learning.evaluation import DrawnPools

    try:
        return DrawnPools.parse(text)
    except WorkloadError as error:
        raise _bad("--pool", error.message) from None


def _models(texts: Sequence[str]) -> "tuple[TrainedModel, ...]":
    from pointsman_core.deciders.han_drl import ModelError
    from pointsman_learning.evaluation import load_models

    try:
        with _named("--model"):
            return load_models(texts)
    except ModelError as error:
        raise _bad("--model", error) from None


def _deciders(text: str, models: "Sequence[TrainedModel]") -> list[str]:
    """Those named, and every model that is given."""
    from pointsman_learning.evaluation import LOOKAHEAD, contenders

    known = contenders()
    bounds = [name for name, one in known.items() if one.bound]
    groups = {
        "all": [name for name in known if name not in bounds],
        "bounds": [name for name in bounds if not name.startswith(LOOKAHEAD)],
        "lookaheads": [name for name in bounds if name.startswith(LOOKAHEAD)],
    }
    folded = {name.casefold(): [name] for name in known} | groups
    items = _items(text, "--deciders")
    unknown = [item for item in items if item.casefold() not in folded]
    if unknown:
        choices = ", ".join([*known, *groups])
        raise _bad("--deciders", f"{', '.join(unknown)}: choose from {choices}")
    chosen = {name for item in items for name in folded[item.casefold()]}
    chosen |= {model.decider for model in models}
    return [name for name in known if name in chosen]


def _default_predictor(quality_data: Path | None) -> str:
    from pointsman_learning.evaluation import default_predictor

    with _named("POINTSMAN_DATA"):
        return default_predictor(quality_data)


def _reference(text: str, deciders: Sequence[str]) -> str:
    from pointsman_learning.evaluation import BEST_BASELINE

    known = {name: name for name in (BEST_BASELINE, *deciders)}
    return _choose(text, "--reference", known)[0]


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Turn errors of what an option names into messages that name the option."""
    from pointsman_core.manifests import ManifestErrors
    from pointsman_core.predictors import ArtefactError
    from pointsman_core.workload import WorkloadError

    try:
        yield
    except (ManifestErrors, WorkloadError, ArtefactError, OSError) as error:
        raise _bad(option, told(error)) from None


def _check(composer: "Composer", plan: "Plan") -> None:
    """Load everything once here, so that errors come at once and say where from."""
    with _named("--experts" if composer.policy is None else "--policy"):
        composer.pool()
    with _named("--quality-data"):
        composer.corpus()
    with _named("--predictor"):
        composer.said()
    for workload in plan.workloads:
        with _named("--workloads" if composer.arrivals is None else "--arrivals"):
            disjoint = composer.disjoint_windows(workload)
        if plan.as_recorded and composer.process(workload).trace is None:
            raise _bad(
                "--loads", f"{workload} has no times of its own to be replayed {AS_RECORDED}"
            )
        if disjoint == 0:
            raise _bad("--requests", f"{workload} has fewer than {composer.requests} requests")
    with _named("scenario"):
        composer(next(plan.tasks()).window)


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- Running -----------------------------------------------------------------------------


def _run(
    composer: "Composer",
    plan: "Plan",
    *,
    models: "Sequence[TrainedModel]",
    reference: str,
    journal: "Journal",
    output_dir: Path,
    markdown: Path | None,
    as_json: bool,
    jobs: int,
) -> int:
    """Run to the end; returns the exit status."""
    from rich.console import Console

    from pointsman_learning.evaluation import DeciderFailedError, as_markdown, collect

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    tables = _table_console(stderr=as_json)
    runs, status = journal.runs, 0
    try:
        with journal, _interrupted_by_sigterm():
            _play(composer, plan, models, jobs, errors, journal)
    except KeyboardInterrupt:
        finished = share(len(runs), len(plan), "run", one="was", many="were")
        errors.print(f"interrupted: {finished} finished; the same command with --resume goes on")
        status = INTERRUPTED
    except DeciderFailedError as error:
        errors.print(f"error: {error}")
        return 1
    if runs:
        results = collect(runs, plan, setting=_setting(composer, plan, models))
        summary = _summary(results, composer, reference)
        _publish(results, summary, output_dir, tables, as_json=as_json)
        if markdown is not None:
            text = as_markdown(summary, descriptions=results.notes)
            markdown.write_text(text, encoding="utf-8")
        errors.print(f"tables and plots: {output_dir}")
    if len(runs) == len(plan):
        journal.complete()
    return status


def _journal(output_dir: Path, setting: dict[str, Any], *, resume: bool) -> "Journal":
    from pointsman_learning.evaluation.journal import FILE, Journal, JournalError

    if not resume and (output_dir / FILE).exists():
        typer.echo(f"note: what was broken off in {output_dir} begins anew", err=True)
    try:
        with _named("--output-dir"):
            return (Journal.resume if resume else Journal.begin)(output_dir, setting)
    except JournalError as error:
        raise _bad("--resume", error) from None


def _kept_setting(
    composer: "Composer", plan: "Plan", models: "Sequence[TrainedModel]"
) -> dict[str, Any]:
    """All that the runs depend on: what goes on must have the same."""
    from importlib.metadata import version

    from pointsman_core.deciders.han_drl import shipped_model
    from pointsman_learning.workloads.folder import digest

    own = {
        "--quality-data": composer.quality_data,
        "--arrivals": composer.arrivals,
        "--predictor": composer.predictor_file,
    }
    return {
        **_setting(composer, plan, models),
        "workloads": list(plan.workloads),
        "loads": [AS_RECORDED if load is None else load for load in plan.loads],
        "limits": list(plan.limits),
        "admissions": [admission.value for admission in plan.admissions],
        "deciders": list(plan.deciders),
        "seeds": len(plan.seeds),
        "sizes": {name: composer.process(name).sizes.source for name in plan.workloads},
        "site's content": composer.pool().version,
        "content of files": {name: digest(file) for name, file in own.items() if file is not None},
        "release": version("pointsman"),
        "shipped model": shipped_model().sha256,
    }


def _setting(
    composer: "Composer", plan: "Plan", models: "Sequence[TrainedModel]"
) -> dict[str, Any]:
    setting = dict(composer.setting())
    if plan.as_recorded:
        setting["as_recorded"] = True
    if models:
        setting["models"] = {one.decider: dict(one.setting()) for one in models}
    return setting


def _table_console(*, stderr: bool) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=TABLE_WIDTH)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that no worker stays behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _play(
    composer: "Composer",
    plan: "Plan",
    models: "Sequence[TrainedModel]",
    jobs: int,
    console: "Console",
    journal: "Journal",
) -> None:
    """Run what is left of the plan under a progress bar."""
    from contextlib import closing

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from pointsman_learning.evaluation import Pace, run_all

    extra = [model.contender() for model in models]
    pace = Pace.of(plan, requests=composer.requests, jobs=jobs)
    finished = {run.task for run in journal.runs}
    for run in journal.runs:
        pace.done(run)
    left = [task for task in plan.tasks() if task not in finished]
    if finished:
        console.print(f"{share(len(finished), len(plan), 'run')} finished already")
    console.print(
        f"{counted(len(plan), 'run')} of {counted(composer.requests, 'request')}, quality predicted"
        f" by {composer.predictor_note()}, in {counted(jobs, 'process', 'processes')}:"
        f" about {_duration(pace.left_s + START_S)}"
    )
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with (
        Progress(*columns, console=console, transient=True) as progress,
        closing(run_all(left, composer, jobs=jobs, extra=extra)) as results,
    ):
        bar = progress.add_task("runs", total=len(plan), completed=len(finished), left="")
        for run in results:
            journal.add(run)
            pace.done(run)
            progress.update(bar, advance=1, left=f"{_duration(pace.left_s)} left")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _summary(results: "Results", composer: "Composer", reference: str) -> list[dict[str, Any]]:
    from pointsman_learning.evaluation import contenders, summarise

    workloads = results.runs["workload"].unique().to_list()
    return summarise(
        results.runs,
        reference=reference,
        baselines=[name for name, one in contenders().items() if one.baseline and not one.bound],
        disjoint={name: composer.disjoint_windows(name) for name in workloads},
        prompts=results.prompts,
    )


def _publish(
    results: "Results",
    summary: list[dict[str, Any]],
    output_dir: Path,
    tables: "Console",
    *,
    as_json: bool,
) -> None:
    import orjson

    from pointsman_learning.evaluation import (
        as_document,
        draw_all,
        print_report,
        write_parquet,
    )

    document = orjson.dumps(as_document(results, summary), option=orjson.OPT_INDENT_2) + b"\n"
    write_parquet(results, summary, output_dir)
    (output_dir / "evaluation.json").write_bytes(document)
    draw_all(results, summary, output_dir)
    print_report(tables, summary, descriptions=results.notes)
    if as_json:
        sys.stdout.buffer.write(document)
        sys.stdout.buffer.flush()
