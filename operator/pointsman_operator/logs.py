"""Structured logs on standard error, kopf's own among them."""

import logging
import sys

import structlog
from structlog.typing import Processor

_GONE = (404, 410)

_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def configure_logs(*, level: str, style: str) -> None:
    """Set up structlog and the standard library's logging for the process.

    Raises:
        ValueError: unknown level or style.

    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}; use debug, info, warning or error")
    renderers: dict[str, Processor] = {
        "json": structlog.processors.JSONRenderer(),
        "console": structlog.dev.ConsoleRenderer(),
    }
    if style not in renderers:
        raise ValueError(f"unknown log format {style!r}; use json or console")
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_quieten)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                renderers[style],
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    # It tells each request's attempt and each handler's success.
    logging.getLogger("kopf").setLevel(max(number, logging.WARNING))


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
