"""The ``pointsman bench`` commands."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pointsman_core.resources import Algorithm

app = typer.Typer(
    no_args_is_help=True,
    help="Measure decisions on this machine. Quote ratios within one run: machines are noisy.",
)

_Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
_Deciders = Annotated[
    str | None, typer.Option(help="Comma-separated algorithms; default: all of them.")
]
_Endpoints = Annotated[int, typer.Option(min=1, max=4096, help="Endpoints in the policy.")]
_InFlight = Annotated[int, typer.Option(min=0, max=65_536, help="Requests on them.")]
_Requests = Annotated[int, typer.Option(min=1, help="Decisions to measure per run.")]


@app.command()
def decide(
    endpoints: _Endpoints = 16,
    in_flight: _InFlight = 256,
    requests: _Requests = 5000,
    deciders: _Deciders = None,
    as_json: _Json = False,
) -> None:
    """One decision inside the server, without transport."""
    from pointsman_cli.bench import decide as bench
    from pointsman_cli.bench.report import show

    runs = bench.run(
        endpoints=endpoints,
        in_flight=in_flight,
        requests=requests,
        algorithms=_algorithms(deciders),
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
    deciders: _Deciders = None,
    as_json: _Json = False,
) -> None:
    """An ext_proc round trip over loopback: headers, 2 kB body, decision, end of stream."""
    # The client's share of a round trip should be small; the server sets its own likewise.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
    import uvloop

    from pointsman_cli.bench import ext_proc as bench
    from pointsman_cli.bench.report import show

    clients = [int(text) if text.strip().isdigit() else 0 for text in concurrency.split(",")]
    if min(clients) < 1:
        message = f"{concurrency!r} is not a list of positive numbers"
        raise typer.BadParameter(message, param_hint="--concurrency")
    measured = bench.run(
        endpoints=endpoints,
        in_flight=in_flight,
        requests=requests,
        concurrency=clients,
        algorithms=_algorithms(deciders),
    )
    runs = uvloop.run(measured)
    show(runs, title="ext_proc round trip", as_json=as_json, setting=_setting(requests))


def _algorithms(names: str | None) -> "list[Algorithm]":
    from pointsman_core.resources import Algorithm

    if names is None:
        return list(Algorithm)
    by_name = {a.lower(): a for a in Algorithm}
    wanted = [name.strip().lower() for name in names.split(",")]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        message = f"unknown: {', '.join(unknown)}; choose from {', '.join(Algorithm)}"
        raise typer.BadParameter(message, param_hint="--deciders")
    return [by_name[name] for name in wanted]


def _setting(requests: int) -> dict[str, object]:
    return {"requests_per_run": requests, "cpu_cores": os.cpu_count()}
