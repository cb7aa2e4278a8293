"""The operator's logs, kopf's own among them."""

import logging
import re

import kopf

from pointsman_common import logs

_GONE = (404, 410)
_ENDS_WITH_CREDENTIALS = re.compile(r"Connector is closed|will re-authenticate")
"""Of requests that kopf tries again by itself: it closes all connections when one was refused."""


def configure_logs(*, level: str, style: str) -> None:
    """As `pointsman_common.logs.configure_logs`; kopf tells what went wrong only.

    Else it tells each request's attempt and each handler's success.
    """
    logs.configure_logs(level=level, style=style, quiet=("kopf",), filters=(_quieten,))


def is_gone(error: BaseException | None) -> bool:
    """Whether a watch ended as its kind or its version is gone, which another run mends."""
    return getattr(error, "status", None) in _GONE


def is_locked_out(error: BaseException | None) -> bool:
    """Whether the API server does not accept the credentials."""
    return isinstance(error, kopf.LoginError)


def _quieten(record: logging.LogRecord) -> bool:
    """Let a failure of kopf's watch be a warning when `is_gone`, and nothing when `is_locked_out`.

    Of the latter every task of kopf tells, with advice for those who write operators; whoever
    has started it tells it once. asyncio tells of those for which kopf did not wait.
    """
    if not record.name.startswith(("kopf.", "asyncio")):
        return True
    error = record.exc_info[1] if record.exc_info else None
    if is_locked_out(error) or _ENDS_WITH_CREDENTIALS.search(record.getMessage()):
        return False
    if is_gone(error):
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = None
    return True
