"""The kopf side: ``kopf run -m pointsman_operator.main --all-namespaces``.

Handlers only feed what they are told into the `Operator`; nothing is written to objects by
kopf itself, no annotation and no finalizer. Settings come from the environment
(`settings_from_environment`), or from `pointsman_operator.cli` by kopf's memo.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import kopf

from pointsman_core.resources import GROUP
from pointsman_operator.cluster import PATHS, ClusterError, connect
from pointsman_operator.logs import configure_logs
from pointsman_operator.observed import Kind
from pointsman_operator.runtime import Memory, Operator
from pointsman_operator.settings import log_settings_from_environment, settings_from_environment

PREFIX: Final = GROUP

WATCHED: Final = tuple(kind for kind in Kind if kind is not Kind.CONFIG_MAP)
"""ConfigMaps are listed from time to time only: nobody else should write them."""

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


async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Set kopf up and start what runs beside it."""
    configure(settings)
    try:
        ours = memo.get("settings")
        if ours is None:  # ``kopf run``, whose own logs tell every event
            level, style = log_settings_from_environment()
            configure_logs(level=level, style=style)
            ours = settings_from_environment()
        settings.scanning.disabled = bool(ours.namespaces)
        cluster = memo.get("cluster") or connect(ours.namespaces)
        operator = Operator(
            ours,
            cluster,
            memory=memo.get("memory") or Memory(),
            unwatched=memo.get("unwatched") or (),
            on_stale_watches=memo.get("on_stale_watches"),
        )
        await operator.start()
    except (ClusterError, ValueError, OSError) as error:
        memo.refusal = str(error)  # for `supervise`: to start again would not help
        if (ending := memo.get("ending")) is not None:
            ending.set()  # kopf would wait 5 s for whoever waits for its flag
        raise kopf.PermanentError(str(error)) from error
    memo.operator = operator
    if (take_signals := memo.get("take_signals")) is not None:
        take_signals()  # after kopf, which sees to signals once this waits for anything


async def stop(memo: kopf.Memo, **_: Any) -> None:  # noqa: ANN401
    """Stop what `start` has started."""
    ending = memo.get("ending")
    if ending is not None:
        ending.set()
    operator = memo.get("operator")
    if operator is not None:
        await operator.stop()


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


async def feed(*, event: kopf.RawEvent, memo: kopf.Memo, param: Any = None, **_: Any) -> None:  # noqa: ANN401
    """Hand one watch event on."""
    memo.operator.feed(param, event)


def register(registry: kopf.OperatorRegistry, kinds: Iterable[Kind]) -> None:
    """Have these kinds watched, with the credentials that the official client finds."""
    kopf.on.login(errors=kopf.ErrorsMode.IGNORED, registry=registry)(kopf.login_via_client)
    kopf.on.startup(registry=registry)(start)
    kopf.on.cleanup(registry=registry)(stop)
    for kind in kinds:
        where = PATHS[kind]
        watch = kopf.on.event(
            where.group, where.version, where.plural, id=kind.lower(), param=kind, registry=registry
        )
        watch(feed)


register(kopf.get_default_registry(), WATCHED)  # for ``kopf run``
