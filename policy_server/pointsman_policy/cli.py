"""The ``pointsman policy-server``, ``snapshot`` and ``envoy`` commands."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pointsman_common.files import (
    must_be_readable,
    readable,
    readable_file,
    told,
    writable_folder,
)
from pointsman_policy.addresses import SocketAddress
from pointsman_policy.settings import (
    BUILTIN_PREDICTOR,
    DEFAULT_BODY_LIMIT,
    MAX_BODY_BYTES,
    NO_PREDICTOR,
)


def policy_server(
    manifests: Annotated[
        list[Path] | None,
        typer.Option(
            help="File or folder with LLMExpert and RoutingPolicy manifests; repeatable.",
            callback=readable,
        ),
    ] = None,
    snapshots: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead: file or folder with snapshots that an operator writes; repeatable."
        ),
    ] = None,
    grpc_address: Annotated[
        str, typer.Option(help="ip:port or unix:///path for ext_proc, EDS and pointsman.v1.")
    ] = "127.0.0.1:9002",
    http_address: Annotated[
        str, typer.Option(help="ip:port for /metrics, /healthz and /readyz.")
    ] = "127.0.0.1:9090",
    control_address: Annotated[
        str | None,
        typer.Option(help="ip:port or unix:///path on which an operator publishes snapshots."),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="Certificate of the control address, in PEM.", callback=readable_file),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key, in PEM.", callback=readable_file)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="Authority of the operator's certificate, in PEM.", callback=readable_file
        ),
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that SIGTERM waits for requests under way.", min=0)
    ] = 30.0,
    body_limit: Annotated[
        int,
        typer.Option(
            help="Longest request body in bytes, as for Envoy.", min=1024, max=MAX_BODY_BYTES
        ),
    ] = DEFAULT_BODY_LIMIT,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="json or console.")] = "json",
    stats_window: Annotated[
        float, typer.Option(help="Seconds over which the operator is told of QoS.", min=1)
    ] = 300.0,
    predictor: Annotated[
        str,
        typer.Option(
            help="Predictor of quality: builtin, none, or a file of `pointsman predictor train`;"
            " experts it does not know keep their declared priors.",
            envvar="POINTSMAN_PREDICTOR",
        ),
    ] = BUILTIN_PREDICTOR,
    models: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the HanDrl models that policies name.", envvar="POINTSMAN_MODELS"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random choices.", min=0)] = None,
) -> None:
    """Serve routing decisions to Envoy."""
    # gRPC's older listener: measured 12 % less CPU per decision and 40 % less per streamed
    # token than its event engine (grpcio 1.85). Read when grpc is first imported.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

    from pointsman_common.logs import configure_logs
    from pointsman_core.manifests import ManifestErrors
    from pointsman_policy.server import run
    from pointsman_policy.settings import ServerSettings, TlsFiles

    if predictor not in (BUILTIN_PREDICTOR, NO_PREDICTOR):
        must_be_readable(Path(predictor), option="--predictor")
    try:
        # watchfiles tells every change of a file, and the server what came of it.
        configure_logs(level=log_level, style=log_format, quiet=("watchfiles",))
        run(
            ServerSettings(
                manifests=tuple(manifests or ()),
                snapshots=tuple(snapshots or ()),
                grpc_address=grpc_address,
                http_address=http_address,
                control_address=control_address,
                tls=TlsFiles.of(certificate=tls_cert, key=tls_key, client_ca=tls_client_ca),
                stats_window_s=stats_window,
                drain_timeout_s=drain_timeout,
                body_limit_bytes=body_limit,
                predictor=predictor,
                models=models,
                seed=seed,
            )
        )
    except (ManifestErrors, OSError, ValueError) as error:
        print(told(error), file=sys.stderr)  # noqa: T201 - for a person at a terminal
        raise typer.Exit(1) from None


def snapshot(
    manifests: Annotated[
        list[Path],
        typer.Option(
            help="File or folder with LLMExpert and RoutingPolicy manifests; repeatable.",
            callback=readable,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write a file per policy to; without it, lines are printed.",
            callback=writable_folder,
        ),
    ] = None,
) -> None:
    """Compile manifests to the snapshots that an operator would publish, as JSON."""
    from pointsman_core.manifests import ManifestErrors, compile_manifests
    from pointsman_policy.manifest_files import read_manifest_files
    from pointsman_policy.snapshots import write_snapshot_files

    try:
        compiled = compile_manifests(read_manifest_files(manifests))
        if output is None:
            for one in compiled.snapshots:
                typer.echo(one.model_dump_json())
            return
        for file in write_snapshot_files(output, compiled.snapshots):
            typer.echo(str(file), err=True)
    except (ManifestErrors, OSError) as error:
        typer.echo(told(error), err=True)
        raise typer.Exit(1) from None


def envoy(
    listen: Annotated[str, typer.Option(help="ip:port for clients.")] = "127.0.0.1:8080",
    admin: Annotated[
        str, typer.Option(help="ip:port of Envoy's admin interface; keep it on loopback.")
    ] = "127.0.0.1:9901",
    policy_server: Annotated[
        str, typer.Option(help="ip:port or unix:///path of the policy server.")
    ] = "127.0.0.1:9002",
    fail_closed: Annotated[
        bool, typer.Option("--fail-closed", help="Without the policy server answer 503.")
    ] = False,
    body_limit: Annotated[
        int,
        typer.Option(
            help="Longest request body in bytes, as for the policy server.",
            min=1024,
            max=MAX_BODY_BYTES,
        ),
    ] = DEFAULT_BODY_LIMIT,
    retries: Annotated[
        int,
        typer.Option(
            help="Further attempts, each on another endpoint, when one fails before it answered.",
            min=0,
            max=10,
        ),
    ] = 2,
    message_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that a request waits for the policy server before it goes on without.",
            min=0.001,
            max=600,
        ),
    ] = 1.0,
    concurrency: Annotated[int, typer.Option(help="Worker threads.", min=1)] = 1,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the bootstrap and do not start Envoy.")
    ] = False,
) -> None:
    """Run Envoy in front of the policy server; its access log goes to standard output."""
    from pointsman_policy.envoy import EnvoySettings, envoy_binary, render_bootstrap

    try:
        clients, admins = _listening("--listen", listen), _listening("--admin", admin)
        SocketAddress.parse(policy_server)  # its message is plainer than the settings'
        settings = EnvoySettings(
            listen_address=clients.host,
            listen_port=clients.port,
            admin_address=admins.host,
            admin_port=admins.port,
            policy_server_address=policy_server,
            fail_open=not fail_closed,
            request_body_limit_bytes=body_limit,
            retries=retries,
            message_timeout_ms=round(message_timeout * 1e3),
        )
        binary = envoy_binary()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - for a person at a terminal
        raise typer.Exit(1) from None
    bootstrap = render_bootstrap(settings)
    if print_config:
        print(bootstrap)  # noqa: T201 - the command's output
        return
    # On the command line: a file would stay behind. Linux takes 128 KiB there, this is 35.
    arguments = ["--config-yaml", bootstrap, "--concurrency", str(concurrency)]
    # Becomes Envoy, so that signals and the exit status are Envoy's own.
    os.execv(binary, [str(binary), *arguments, "--disable-hot-restart"])  # noqa: S606


def _listening(option: str, text: str) -> SocketAddress:
    address = SocketAddress.parse(text)
    if address.pipe:
        raise ValueError(f"{option} {address.pipe}: write ip:port; Envoy listens on nothing else")
    return address
