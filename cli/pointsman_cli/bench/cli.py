"""The ``pointsman bench`` commands."""

import os
from typing import Annotated

import typer

from pointsman_cli.deciders import parse_deciders

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
