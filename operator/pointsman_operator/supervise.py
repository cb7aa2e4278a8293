"""Keeping the watches alive.

Some answers end kopf as a whole: HTTP 410 or 404 on a watch call, an error within the
stream. Then everything is started again in the same process: what is in force and what was
written is kept, and Kubernetes need not count restarts.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import kopf
import structlog

from pointsman_operator import main
from pointsman_operator.cluster import Cluster, ClusterError, connect
from pointsman_operator.logs import is_gone, is_locked_out
from pointsman_operator.observed import Kind
from pointsman_operator.runtime import Memory
from pointsman_operator.settings import OperatorSettings

FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 30.0
PATIENCE_S: Final = 6.0
"""How long kopf may take to end: it gives others 5 s."""
GOOD_RUN_S: Final = 60.0
"""After a run of this length the pauses are short again."""

LOCKED_OUT: Final = (
    "the API server does not accept the operator's credentials (401): renew those of the "
    "kubeconfig or service account; trying again"
)

log = structlog.get_logger(__name__)


class StartError(RuntimeError):
    """The start failed for a reason that trying again does not mend."""


class StaleWatchesError(RuntimeError):
    """The watches do not tell what they should: the text says why."""


def run(settings: OperatorSettings) -> None:
    """Run until SIGTERM or SIGINT; raises `StartError`."""
    memory = Memory()
    log.info("starting", namespaces=settings.namespaces or "all")

    def once() -> None:
        # kopf cancels every task of its loop when it ends, so each run has its own.
        asyncio.run(operate(settings, memory))

    supervise(once)


class Signals:
    """SIGINT and SIGTERM, in place of kopf, which forgets one that comes while it fails."""

    def __init__(self, flag: asyncio.Event | threading.Event) -> None:
        self.came = False
        self._flag = flag

    def take(self) -> None:
        """From now on; only the main thread has signals."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self.came = True
        self._flag.set()


async def operate(
    settings: OperatorSettings, memory: Memory, *, stop_flag: threading.Event | None = None
) -> None:
    """One run of kopf, until a signal, the flag, or a failure of the watches.

    Raises:
        StartError: what must be there at the start is not.
        Exception: whatever ended the watches.

    """
    try:
        cluster = connect(settings.namespaces)
    except ClusterError as error:
        raise StartError(str(error)) from error
    unwatched = await forbidden_kinds(cluster)
    registry = kopf.OperatorRegistry()
    main.register(registry, (kind for kind in main.WATCHED if kind not in unwatched))
    why: list[str] = []
    ending = asyncio.Event()
    signals = Signals(ending if stop_flag is None else stop_flag)

    def on_stale_watches(reason: str) -> None:
        why.append(reason)
        (stop_flag or ending).set()

    memo = kopf.Memo(
        settings=settings,
        memory=memory,
        cluster=cluster,
        unwatched=unwatched,
        on_stale_watches=on_stale_watches,
        take_signals=signals.take,
        # The cleanup sets it too: kopf waits for whoever waits for its flag, for 5 s.
        ending=ending,
    )
    # Begun before kopf, which in the end cancels all that began after it.
    reaper = asyncio.create_task(end_stragglers(ending, others=asyncio.all_tasks()))
    try:
        await kopf.operator(
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            registry=registry,
            memo=memo,
            stop_flag=stop_flag or ending,
        )
    except Exception as error:
        if (refusal := memo.get("refusal")) is not None:
            raise StartError(refusal) from error
        if not signals.came:
            raise
        log.warning("watches ended while stopping", error=str(error))
    finally:
        reaper.cancel()
        if stop_flag is not None:
            stop_flag.set()  # kopf waits for it in a thread, which would keep the loop from closing
        await cluster.close()
    if why and not signals.came:
        raise StaleWatchesError(why[0])


async def end_stragglers(
    ending: asyncio.Event,
    *,
    others: Collection[asyncio.Task[Any]],
    patience_s: float = PATIENCE_S,
) -> None:
    """Once it is ending, cancel again and again what is left, but for ``others``.

    A watcher of kopf swallows a cancellation that comes while it leaves a stream: it then goes
    on for ever, and kopf waits for it.
    """
    await ending.wait()
    while True:
        await asyncio.sleep(patience_s)
        left = asyncio.all_tasks() - {*others, asyncio.current_task()}
        log.warning("ending what is left", tasks=sorted(task.get_name() for task in left))
        for task in left:
            task.cancel()


async def forbidden_kinds(cluster: Cluster) -> frozenset[Kind]:
    """Kinds that the operator's role does not let it watch; kopf would ask every 2 s for ever."""

    async def forbidden(kind: Kind) -> bool:
        try:
            return not await cluster.may_watch(kind)
        except ClusterError as error:
            log.debug("not known whether it may be watched", kind=kind, error=str(error))
            return False

    answers = await asyncio.gather(*map(forbidden, main.WATCHED))
    found = frozenset(kind for kind, no in zip(main.WATCHED, answers, strict=True) if no)
    if found:
        log.warning("not permitted to watch, the rest goes on", kinds=sorted(found))
    return found


def supervise(
    once: Callable[[], Any],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Call ``once`` until it returns; pause after failures, longer each time.

    Raises:
        StartError: raised by ``once``.

    """
    pause = FIRST_PAUSE_S
    while True:
        started = clock()
        try:
            once()
        except StartError:
            raise
        except StaleWatchesError as error:
            log.warning("starting the watches again", reason=str(error))
        except Exception as error:
            if is_gone(error):
                log.warning("starting the watches again", reason=str(error))
            elif is_locked_out(error):
                log.warning(LOCKED_OUT)
            else:
                log.exception("watches ended, starting again", error=str(error))
        else:
            return
        if clock() - started >= GOOD_RUN_S:
            pause = FIRST_PAUSE_S
        sleep(pause)
        pause = min(LAST_PAUSE_S, pause * 2)
