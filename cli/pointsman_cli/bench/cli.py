"""The ``pointsman bench`` commands."""

import os
from typing import Annotated

import typer

from pointsman_cli.deciders import parse_deciders
from pointsman_cli.extras import needs_extra

app = typer.Typer(
    no_args_is_help=True,
    help="Measure decisions on this machine. Quote ratios within one run: machines are noisy.",
)

_Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
_Deciders = Annotated[str, typer.Option(help="Comma-separated algorithms, or 'all'.")]
_Endpoints = Annotated[int, typer.Option(min=1, max=4096, help="Endpoints in the policy.")]
_InFlight = Annotated[int, typer.Option(min=0, max=65_536, help="Requests on them.")]
_Requests = Annotated[int, typer.Option(min=1, help="Decisions to measure per run.")]

MAX_CLIENTS = 4096


@app.command()
def decide(
    endpoints: _Endpoints = 16,
    in_flight: _InFlight = 256,
    requests: _Requests = 5000,
    deciders: _Deciders = "all",
    as_json: _Json = False,
) -> None:
    """One decision inside the server, without transport."""
    from pointsman_cli.bench import decide as bench
    from pointsman_cli.bench.report import show

    runs = bench.run(
        endpoints=endpoints,
        in_flight=in_flight,
        requests=requests,
        algorithms=parse_deciders(deciders),
    )
    show(runs, title="Decision inside the server", as_json=as_json, setting=_setting(requests))


@app.command()
def ext_proc(
    concurrency: Annotated[
        str, typer.Option(help="Comma-separated numbers of clients.")
    ] = "1,4,16",
    endpoints: _Endpoints = 16,
    in_flight: _InFlight = 256,
    requests: _Requests = 3000,
    deciders: _Deciders = "all",
    as_json: _Json = False,
) -> None:
    """An ext_proc round trip over loopback: headers, 2 kB body, decision, end of stream."""
    # The client's share of a round trip should be small; the server sets its own likewise.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    import uvloop

    from pointsman_cli.bench import ext_proc as bench
    from pointsman_cli.bench.report import show

    measured = bench.run(
        endpoints=endpoints,
        in_flight=in_flight,
        requests=requests,
        concurrency=_clients(concurrency),
        algorithms=parse_deciders(deciders),
    )
    runs = uvloop.run(measured)
    show(runs, title="ext_proc round trip", as_json=as_json, setting=_setting(requests))


@app.command()
def simulator(
    endpoints: Annotated[str, typer.Option(help="Comma-separated numbers.")] = "4,6,16,64",
    loads: Annotated[
        str, typer.Option(help="Comma-separated shares of the estimated capacity.")
    ] = "0.5,0.9,1.4",
    requests: Annotated[int, typer.Option(min=2, help="Requests per run.")] = 3000,
    verify: Annotated[
        int, typer.Option(min=0, help="Random cases to compare with the slow reference.")
    ] = 0,
    speed: Annotated[bool, typer.Option(help="Measure speeds.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of workloads and cases.")] = 0,
    as_json: _Json = False,
) -> None:
    """The training simulator: its speed on one core, and its equality with the reference."""
    pools = [int(number) for number in _numbers(endpoints, "--endpoints", least=1, most=256)]
    shares = _numbers(loads, "--loads", least=0.01, most=10)
    with needs_extra():
        from pointsman_cli.bench import simulator as bench
        from pointsman_learning.simulator.reference import MismatchError
        from pointsman_learning.simulator.reference import verify as compare
    from pointsman_cli.bench.progress import counting

    compared = None
    if verify:
        with counting("comparing with the reference", verify, quiet=as_json) as progress:
            try:
                compared = compare(verify, seed=seed, progress=progress)
            except MismatchError as mismatch:
                typer.echo(f"the simulator differs from the reference: {mismatch}", err=True)
                raise typer.Exit(1) from None
    runs = bench.run(endpoints=pools, loads=shares, requests=requests, seed=seed) if speed else []
    bench.show(runs, compared, as_json=as_json, setting=_setting(requests) | {"seed": seed})


def _numbers(text: str, option: str, *, least: float, most: float) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= most for number in numbers):
        message = f"{text!r} is not a list of numbers from {least:g} to {most:g}"
        raise typer.BadParameter(message, param_hint=option)
    return numbers


def _clients(text: str) -> list[int]:
    try:
        clients = [int(number) for number in text.split(",")]
    except ValueError:
        clients = []
    if not clients or not all(1 <= number <= MAX_CLIENTS for number in clients):
        message = f"{text!r} is not a list of numbers from 1 to {MAX_CLIENTS}"
        raise typer.BadParameter(message, param_hint="--concurrency")
    return clients


def _setting(requests: int) -> dict[str, object]:
    return {"requests_per_run": requests, "cpu_cores": os.cpu_count()}
