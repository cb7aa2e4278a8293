"""Structured logs on standard error: JSON for machines, or lines for people."""

import logging
import sys

import structlog
from structlog.typing import Processor


def configure_logs(*, level: str, style: str) -> None:
    """Set up structlog for the process.

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
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderers[style],
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
