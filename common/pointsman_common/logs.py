"""Structured logs on standard error, of libraries too: JSON for machines, or lines for people."""

import logging
import sys
from collections.abc import Callable, Sequence

import structlog
from structlog.typing import Processor

LogFilter = Callable[[logging.LogRecord], bool]
"""May change a record; tells whether it is kept."""

_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def configure_logs(
    *, level: str, style: str, quiet: Sequence[str] = (), filters: Sequence[LogFilter] = ()
) -> None:
    """Set up structlog and the standard library's logging for the process.

    Args:
        level: debug, info, warning or error, in any case.
        style: json or console.
        quiet: loggers of libraries that tell nothing below a warning.
        filters: see every record, those of libraries too.

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
    for one in filters:
        handler.addFilter(one)
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
    for name in quiet:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
