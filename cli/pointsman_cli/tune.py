"""``pointsman tune``: the heuristic deciders' parameters, from training windows."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pointsman_cli.deciders import parse_deciders
from pointsman_cli.extras import needs_extra
from pointsman_common.files import writable_file


def tune(
    deciders: Annotated[str, typer.Option(help="Comma-separated, or all.")] = "all",
    windows: Annotated[int, typer.Option(min=2, help="Training windows.")] = 96,
    requests: Annotated[int, typer.Option(min=10, help="Requests of each window.")] = 500,
    candidates: Annotated[int, typer.Option(min=2, help="Candidates per parameter.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Every run is kept here; the same command goes on.", callback=writable_file
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the result.", callback=writable_file)
    ] = None,
) -> None:
    """Search parameters for the highest average QoS; prints the result as JSON."""
    with needs_extra():
        from pointsman_core.workload import WorkloadError
        from pointsman_learning.evaluation import tuning
        from pointsman_learning.evaluation.composer import available_workloads

    known = tuning.spaces()
    wanted = [known[a] for a in parse_deciders(deciders) if a in known]
    if not wanted:
        raise typer.BadParameter(f"{deciders}: has nothing to tune", param_hint="--deciders")
    # In full, defaults too, so that a later release repeats it.
    command = (
        f"pointsman tune --deciders {','.join(space.algorithm for space in wanted)}"
        f" --windows {windows} --requests {requests} --candidates {candidates} --seed {seed}"
    )
    effort = tuning.Effort(
        windows=windows, first_windows=min(16, windows), candidates_per_parameter=candidates
    )
    runs = tuning.Journal(journal)
    found: list[tuning.Tuned] = []
    text = ""
    try:
        workloads = [name for name in tuning.WORKLOADS if name in available_workloads()]
        chosen = tuning.training_windows(windows, requests=requests, seed=seed, workloads=workloads)
        for space in wanted:
            found.append(
                tuning.tune(
                    space,
                    chosen,
                    effort=effort,
                    measure=runs.measured(space),
                    seed=seed,
                    report=lambda line: typer.echo(line, err=True),
                )
            )
            result = tuning.document(found, chosen, effort=effort, seed=seed, command=command)
            text = json.dumps(result, indent=2)
            if output is not None:  # after each decider: a long search may be broken off
                output.write_text(text + "\n")
    except WorkloadError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(text)
