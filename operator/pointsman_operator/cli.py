"""The ``pointsman operator`` command."""

import sys
from typing import Annotated

import typer


def operator(
    namespace: Annotated[
        list[str] | None,
        typer.Option(
            help="Watch this namespace only; repeatable. Default: all.",
            envvar="POINTSMAN_NAMESPACE",
        ),
    ] = None,
    policy_servers: Annotated[
        str,
        typer.Option(
            help="namespace/name:port of the Service of the policy servers' control port.",
            envvar="POINTSMAN_POLICY_SERVERS",
        ),
    ] = "",
    policy_server_address: Annotated[
        list[str] | None,
        typer.Option(
            help="ip:port of a policy server's control port; repeatable.",
            envvar="POINTSMAN_POLICY_SERVER_ADDRESS",
        ),
    ] = None,
    tls_cert: Annotated[
        str,
        typer.Option(help="Client certificate for policy servers.", envvar="POINTSMAN_TLS_CERT"),
    ] = "",
    tls_key: Annotated[str, typer.Option(help="Its private key.", envvar="POINTSMAN_TLS_KEY")] = "",
    tls_ca: Annotated[
        str,
        typer.Option(
            help="CA of the policy servers' certificates. Without TLS only loopback is allowed.",
            envvar="POINTSMAN_TLS_CA",
        ),
    ] = "",
    tls_server_name: Annotated[
        str,
        typer.Option(
            help="Name in the policy servers' certificates. Default: name.namespace.svc.",
            envvar="POINTSMAN_TLS_SERVER_NAME",
        ),
    ] = "",
    prometheus_url: Annotated[
        str,
        typer.Option(
            help="Read averages from this Prometheus rather than from the policy servers.",
            envvar="POINTSMAN_PROMETHEUS_URL",
        ),
    ] = "",
    http_address: Annotated[
        str,
        typer.Option(
            help="ip:port for /metrics, /healthz and /readyz.", envvar="POINTSMAN_HTTP_ADDRESS"
        ),
    ] = "127.0.0.1:8080",
    resync_interval: Annotated[
        float,
        typer.Option(
            help="Seconds between two full lists.", min=1, envvar="POINTSMAN_RESYNC_INTERVAL"
        ),
    ] = 60.0,
    probe_interval: Annotated[
        float,
        typer.Option(
            help="Seconds between two looks at an endpoint.",
            min=1,
            envvar="POINTSMAN_PROBE_INTERVAL",
        ),
    ] = 30.0,
    stats_interval: Annotated[
        float,
        typer.Option(
            help="Seconds between two updates of averages.",
            min=1,
            envvar="POINTSMAN_STATS_INTERVAL",
        ),
    ] = 60.0,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error.", envvar="POINTSMAN_LOG_LEVEL")
    ] = "info",
    log_format: Annotated[
        str, typer.Option(help="json or console.", envvar="POINTSMAN_LOG_FORMAT")
    ] = "json",
) -> None:
    """Compile custom resources into snapshots and bring them to the policy servers."""
    from pointsman_operator.logs import configure_logs
    from pointsman_operator.settings import make_settings
    from pointsman_operator.supervise import StartError, run

    try:
        configure_logs(level=log_level, style=log_format)
        settings = make_settings(
            policy_servers=policy_servers,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_ca=tls_ca,
            tls_server_name=tls_server_name,
            namespaces=tuple(namespace or ()),
            policy_server_addresses=tuple(policy_server_address or ()),
            prometheus_url=prometheus_url,
            http_address=http_address,
            resync_interval_s=resync_interval,
            probe_interval_s=probe_interval,
            stats_interval_s=stats_interval,
        )
        run(settings)
    except (ValueError, StartError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - for a person at a terminal
        raise typer.Exit(1) from None
