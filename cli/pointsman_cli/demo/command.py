"""The command ``pointsman demo``."""

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pointsman_cli.deciders import parse_deciders
from pointsman_cli.demo.options import MAX_LIMIT_MS, TELLING_DECIDERS, DemoOptions, WorkloadName
from pointsman_cli.extras import needs_extra
from pointsman_common.data_folder import checkout
from pointsman_common.files import readable, told, writable_folder

if TYPE_CHECKING:
    from rich.console import Console

    from pointsman_cli.demo.results import DemoReport

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


def demo(
    seconds: Annotated[
        float,
        typer.Option(min=1, max=3600, help="Seconds of arrivals under each decider."),
    ] = 20.0,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=10_000,
            help="Requests per second; default: about 70 % of capacity.",
        ),
    ] = None,
    deciders: Annotated[
        str, typer.Option(help="Comma-separated algorithms; 'all', or 'none' to only serve.")
    ] = TELLING_DECIDERS,
    manifests: Annotated[
        Path | None,
        typer.Option(
            help="File or folder of experts and a policy; default: examples/edge-site.",
            callback=readable,
        ),
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Where plot, report and logs go.", callback=writable_folder)
    ] = Path("demo-output"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on standard output.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Chooses arrivals, prompts and answers.")] = 0,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Serve on after the runs, until Ctrl-C.")
    ] = False,
    workload: Annotated[
        WorkloadName, typer.Option(help="Arrivals and prompts; auto: real data where present.")
    ] = WorkloadName.AUTO,
    limit_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=MAX_LIMIT_MS,
            help="Limit in ms per output token; default: the policy's.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also give the laboratory's simulator the same requests, and show both QoS"
            " side by side (needs the learning extra).",
        ),
    ] = False,
) -> None:
    """Run each decider in turn against a site of simulated engines, through a real Envoy."""
    from rich.console import Console

    chosen = parse_deciders(deciders, none_allowed=True)
    if compare:
        if not chosen:
            raise typer.BadParameter("needs --deciders to compare", param_hint="--compare")
        with needs_extra():  # at once, not after minutes
            import pointsman_learning.simulator  # noqa: F401
    options = DemoOptions(
        seconds=seconds,
        rate=rate,
        deciders=chosen,
        manifests=manifests or checkout() / "examples" / "edge-site",
        output_dir=output_dir,
        workload=workload,
        limit_ms=limit_ms,
        seed=seed,
        keep_running=keep_running or not chosen,
        compare=compare,
    )
    raise typer.Exit(_run(options, Console(stderr=True), as_json=as_json))


def _run(options: DemoOptions, console: "Console", *, as_json: bool) -> int:
    """Run to the end; returns the exit status."""
    from pointsman_cli.demo.errors import DemoError
    from pointsman_cli.demo.runner import run_demo, say
    from pointsman_core.manifests import ManifestErrors
    from pointsman_core.workload import WorkloadError

    published = False

    def publish(report: "DemoReport") -> None:
        nonlocal published
        published = True
        _publish(report, options.output_dir, console, as_json=as_json)

    try:
        (options.output_dir / "logs").mkdir(parents=True, exist_ok=True)
        finished = run_until_signal(run_demo(options, console, publish))
    except (DemoError, ManifestErrors, WorkloadError, OSError) as error:
        say(console, f"error: {told(error)}")
        return 1
    served_only = options.keep_running and (published or not options.deciders)
    return 0 if finished or served_only else INTERRUPTED


def _publish(report: "DemoReport", output_dir: Path, console: "Console", *, as_json: bool) -> None:
    from pointsman_cli.demo.plot import draw
    from pointsman_cli.demo.report import print_report, write_json
    from pointsman_cli.demo.runner import say

    print_report(console, report)
    draw(report, output_dir / "demo.png")
    write_json(report, output_dir / "demo.json")
    say(console, f"plot: {output_dir / 'demo.png'}\nreport: {output_dir / 'demo.json'}")
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=2) + "\n")
        sys.stdout.flush()


def run_until_signal(main: Coroutine[None, None, None]) -> bool:
    """Run a coroutine, cancelling it on SIGINT or SIGTERM; returns whether it came to its end."""
    import asyncio
    import signal

    import uvloop

    async def guarded() -> bool:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return False
        return True

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(guarded())
