"""``pointsman train``: HAN-DRL for the built-in site, or for one's own experts and traces."""

import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pointsman_cli.extras import needs_extra
from pointsman_common.files import readable, readable_file, told, writable_folder
from pointsman_common.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from pointsman_learning.training.config import TrainConfig
    from pointsman_learning.training.trainer import Event, Result

LABELS_PER_SECOND = 250
"""Rough speed of a core, for the first estimate only."""
ACTIONS = 8.5
"""Labels of a state, on average over the default domain."""


def train(
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with settings that differ from the defaults.", callback=readable_file
        ),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(help="Your own manifests, a file or folder.", callback=readable),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy in the manifests; default: that of 'auto'.")
    ] = None,
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
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Stop after about so long, and export the best so far."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes; default: one per core.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for labels, checkpoint, curves, model.", callback=writable_folder
        ),
    ] = Path("training-output"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Make labels on a Ray cluster; needs the extra 'ray'.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, or cuda for the network; default: as configured.")
    ] = None,
) -> None:
    """Train HAN-DRL in simulation and export it as an ONNX model."""
    with needs_extra():
        from pointsman_core.manifests import ManifestErrors
        from pointsman_core.workload import WorkloadError
        from pointsman_learning.training.checkpoints import CheckpointError
        from pointsman_learning.training.config import ConfigError
        from pointsman_learning.training.trainer import Trainer

        if ray:
            import_module("ray")

    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    own = {
        "experts": experts,
        "policy": policy,
        "quality_data": quality_data,
        "arrivals": arrivals,
    }
    try:
        settings = _settings(config, own, device)
        workers = jobs or _cores()
        shown = _Shown(console)
        trainer = Trainer(
            settings,
            output,
            jobs=workers,
            ray=ray,
            minutes=minutes,
            command=_begun_by(sys.argv[1:]),
            report=shown.event,
        )
        trainer.prepare(resume=resume)
        stages = _stages(settings, workers, output)
        _announce(console, stages, minutes, output)
        with shown.of(stages):
            result = trainer.run()
    except (ConfigError, CheckpointError, WorkloadError, ManifestErrors, OSError) as error:
        typer.echo(f"error: {told(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command with --resume goes on in {output}")
        raise typer.Exit(130) from None
    _print(Console(width=110), result)
    if not result.finished:
        console.print(f"time is over; the same command with --resume goes on in {output}")
    console.print(f"model: {result.model}, training report: {result.report}")


def _begun_by(arguments: list[str]) -> str:
    """The command that began the run, also where this one goes on with it.

    Of files it holds the names only: it is part of the model, which may be given away.
    """
    names = [re.sub(r"(?:[^=/]*/)+", "", one) for one in arguments if one != "--resume"]
    return shlex.join(["pointsman", *names])


def _settings(file: Path | None, own: dict[str, Any], device: str | None) -> "TrainConfig":
    import torch

    from pointsman_learning.training.config import ConfigError, TrainConfig

    found = TrainConfig() if file is None else TrainConfig.load(file)
    content = found.model_dump()
    content["domain"] |= {name: value for name, value in own.items() if value is not None}
    if own["arrivals"] is not None:
        content["validation"]["workloads"] = ("poisson", "on-off", own["arrivals"].stem)
    if device is not None:
        content["device"] = device
    if content["device"].startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device: there is no CUDA device here")
    return TrainConfig.parse(content, source="options" if file is None else str(file))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _stages(config: "TrainConfig", jobs: int, output: Path) -> dict[str, str]:
    """What the run will do, by stage, in order."""
    from pointsman_learning.training.trainer import AGAIN, LABELS, SAC, WARM

    labels = config.labels
    plan = {LABELS: _labels_to_make(config, jobs, output)}
    if config.warm.epochs:
        plan[WARM] = f"up to {counted(config.warm.epochs, 'epoch')} of regression on them"
    if labels.second_round:
        shards = counted(labels.second_round, "shard")
        plan[AGAIN] = f"{shards} more with the learned policy as the base, and epochs on them"
    if config.sac.rounds:
        plan[SAC] = f"up to {counted(config.sac.rounds, 'round')}"
    return plan


def _labels_to_make(config: "TrainConfig", jobs: int, output: Path) -> str:
    labels, rollouts = config.labels, config.labels.rollouts
    there = min(len(list((output / "labels-1").glob("*.npz"))), labels.shards)
    if there == labels.shards:
        return f"all {counted(there, 'shard')} there"
    states = (labels.shards - there) * rollouts.trunks * rollouts.states_per_scenario
    seconds = states * ACTIONS / LABELS_PER_SECOND / jobs * rollouts.horizon / 90
    return (
        f"about {counted(states, 'state')} with {states * ACTIONS:,.0f} labels by"
        f" {counted(jobs, 'process', 'processes')}: roughly {math.ceil(seconds / 60)} min"
        + (f"; {there} of {counted(labels.shards, 'shard')} there" if there else "")
    )


def _announce(
    console: "Console", stages: dict[str, str], minutes: float | None, output: Path
) -> None:
    for number, (stage, text) in enumerate(stages.items(), 1):
        console.print(f"{number}/{len(stages)} {stage}: {text}")
    if minutes is not None:
        console.print(f"It stops after about {minutes:g} min, labels after half of that at most.")
    console.print(f"Everything is kept in {output}; break it off and resume as you like.")


class _Shown:
    """A line for each epoch and round, a bar while labels are made."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._stages: list[str] = []

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task("labels", total=None, text="", visible=False)
        self._started = time.monotonic()

    def of(self, stages: Iterable[str]) -> "_Shown":
        """Say which stages there will be."""
        self._stages = list(stages)
        return self

    def __enter__(self) -> "_Shown":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def event(self, event: "Event") -> None:
        from pointsman_learning.training.trainer import LABELS, SAC, WARM

        labels = event.stage == LABELS
        stage = event.stage if event.during in ("", WARM) else event.during
        unit = "shard" if labels else "round" if stage == SAC else "epoch"
        own = "" if stage == event.stage else f", {event.stage}"
        title = f"{self._stages.index(stage) + 1}/{len(self._stages)} {stage}{own}, {unit}"
        self._progress.update(
            self._bar,
            description=title,
            completed=event.done,
            total=event.total,
            text=event.text if labels else "",
            visible=True,
        )
        if not labels or event.done == event.total:
            minutes = (time.monotonic() - self._started) / 60
            line = f"{minutes:5.1f} min  {title} {event.done}/{event.total}: {event.text}"
            self._progress.console.print(line)


def _print(console: "Console", result: "Result") -> None:
    from rich.table import Table

    table = Table(title="Validation windows: the trained model against ImpactGreedy")
    for name in ("windows", "n", "ImpactGreedy", "HAN-DRL", "gain, 95 % interval"):
        table.add_column(name, justify="left" if name == "windows" else "right")
    table.add_column("by predicted quality", justify="right")
    table.add_column("rejected", justify="right")
    for row in result.rows:
        table.add_row(
            row.name,
            str(row.windows),
            f"{row.base:.3f}",
            f"{row.qos:.3f}",
            _interval(row.gain.mean, row.gain.low, row.gain.high),
            _interval(row.predicted_gain.mean, row.predicted_gain.low, row.predicted_gain.high),
            f"{row.rejected[0]:.3f} to {row.rejected[1]:.3f}",
        )
    console.print(table)
    own = result.estimator
    console.print(
        f"Impact estimator (ImpactGreedy's terms): chance AUC {own.chance_auc:.4f}"
        f" ({own.analytic_chance_auc:.4f}), Brier {own.chance_brier:.4f}"
        f" ({own.analytic_chance_brier:.4f}), calibration error {own.calibration_error:.3f}"
        f" ({own.analytic_calibration_error:.3f}), impact RMSE {own.impact_rmse:.4f}"
        f" ({own.analytic_impact_rmse:.4f})"
    )


def _interval(mean: float, low: float, high: float) -> str:
    if math.isnan(low):
        return f"{mean:+.2f} %"
    return f"{mean:+.2f} % [{low:+.2f}, {high:+.2f}]"
