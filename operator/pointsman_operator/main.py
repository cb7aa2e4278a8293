"""The kopf side: ``kopf run -m pointsman_operator.main --all-namespaces``.

Handlers only feed what they are told into the `Operator`; nothing is written to objects by
kopf itself, no annotation and no finalizer. Settings come from the environment
(`settings_from_environment`), or from `pointsman_operator.cli` by kopf's memo.
"""

from collections.abc import Iterator
from typing import Any, Final

import kopf

from pointsman_core.resources import GROUP, VERSION
from pointsman_operator.cluster import ClusterError, connect
from pointsman_operator.observed import Kind
from pointsman_operator.runtime import Memory, Operator
from pointsman_operator.settings import settings_from_environment

PREFIX: Final = GROUP

SERVER_TIMEOUT_S: Final = 300
"""Each watch is renewed so often; kopf's own inactivity time-out finds dead ones sooner."""


class Backoffs:
    """Pauses between tries of one request: soon ones first, and never the end.

    kopf's default gives up after a minute and so stops the whole operator. An API server
    may be away for longer.
    """

    def __iter__(self) -> Iterator[float]:
        """Pauses in seconds."""
        yield from (0.1, 0.2, 0.5, 1.0)
        while True:
            yield 2.0


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Set kopf up and start what runs beside it."""
    configure(settings)
    try:
        ours = memo.get("settings") or settings_from_environment()
        settings.scanning.disabled = bool(ours.namespaces)
        cluster = memo.get("cluster") or connect(ours.namespaces)
        operator = Operator(
            ours,
            cluster,
            memory=memo.get("memory") or Memory(),
            on_silence=memo.get("on_silence"),
        )
        await operator.start()
    except (ClusterError, ValueError, OSError) as error:
        memo.refusal = str(error)  # for `supervise`: to start again would not help
        raise kopf.PermanentError(str(error)) from error
    memo.operator = operator


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Stop what `start` has started."""
    operator = memo.get("operator")
    if operator is not None:
        await operator.stop()
    ending = memo.get("ending")
    if ending is not None:
        ending.set()


def configure(settings: kopf.OperatorSettings) -> None:
    """What kopf must be told to be a mere source of events."""
    settings.persistence.finalizer = f"{PREFIX}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=PREFIX, v1=False)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=PREFIX, v1=False)
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.networking.error_backoffs = Backoffs()
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.watching.server_timeout = SERVER_TIMEOUT_S
    settings.watching.client_timeout = SERVER_TIMEOUT_S + 10
    settings.watching.connect_timeout = 5
    settings.watching.reconnect_backoff = 0.1


@kopf.on.event(GROUP, VERSION, "llmexperts")
async def on_expert(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Feed."""
    memo.operator.feed(Kind.EXPERT, event)


@kopf.on.event(GROUP, VERSION, "routingpolicies")
async def on_policy(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Feed."""
    memo.operator.feed(Kind.POLICY, event)


@kopf.on.event("", "v1", "services")
async def on_service(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Feed."""
    memo.operator.feed(Kind.SERVICE, event)


@kopf.on.event("discovery.k8s.io", "v1", "endpointslices")
async def on_slice(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Feed."""
    memo.operator.feed(Kind.SLICE, event)


@kopf.on.event("", "v1", "pods")
async def on_pod(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Feed."""
    memo.operator.feed(Kind.POD, event)


@kopf.on.event("inference.networking.k8s.io", "v1", "inferencepools")
async def on_pool(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Feed."""
    memo.operator.feed(Kind.POOL, event)
