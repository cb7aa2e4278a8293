"""The operator's logs, kopf's own among them."""

import logging

from pointsman_common import logs

_GONE = (404, 410)


def configure_logs(*, level: str, style: str) -> None:
    """As `pointsman_common.logs.configure_logs`; kopf tells what went wrong only.

    Else it tells each request's attempt and each handler's success.
    """
    logs.configure_logs(level=level, style=style, quiet=("kopf",), filters=(_quieten,))


def is_gone(error: BaseException | None) -> bool:
    """Whether a watch ended as its kind or its version is gone, which another run mends."""
    return getattr(error, "status", None) in _GONE


def _quieten(record: logging.LogRecord) -> bool:
    """Let a failure of kopf's watch be a warning when `is_gone`.

    asyncio tells of those for which kopf did not wait.
    """
    error = record.exc_info[1] if record.exc_info else None
    if record.name.startswith(("kopf.", "asyncio")) and is_gone(error):
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = None
    return True
