"""Logs: what is written, of whom, and what is refused."""

import json
import logging

import pytest
import structlog

from pointsman_common.logs import configure_logs


@pytest.fixture(autouse=True)
def _logging_as_before():
    root, library = logging.getLogger(), logging.getLogger("library")
    before = (root.handlers[:], root.level, library.level)
    yield
    root.handlers[:], level, library_level = before
    root.setLevel(level)
    library.setLevel(library_level)
    structlog.reset_defaults()


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_logs_of_libraries_are_structured_too(capsys):
    configure_logs(level="info", style="json")
    structlog.get_logger().info("ours", policy="auto")
    structlog.get_logger().debug("not this")
    logging.getLogger("library").info("its %s", "own")
    told = lines(capsys)
    assert [(line["event"], line["level"]) for line in told] == [
        ("ours", "info"),
        ("its own", "info"),
    ]
    assert told[0]["policy"] == "auto"


def test_a_library_can_be_quiet(capsys):
    configure_logs(level="info", style="json", quiet=("library",))
    logging.getLogger("library").info("chatter")
    logging.getLogger("library").warning("trouble")
    assert [line["event"] for line in lines(capsys)] == ["trouble"]


def test_an_exception_is_part_of_its_line(capsys):
    configure_logs(level="info", style="json")
    structlog.get_logger().error("lost", exc_info=LookupError("nowhere"))
    (line,) = lines(capsys)
    assert "LookupError: nowhere" in line["exception"]


def test_lines_for_people(capsys):
    configure_logs(level="INFO", style="console")
    structlog.get_logger().info("ours", policy="auto")
    assert "ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("level", "style", "message"),
    [
        ("loud", "json", "unknown log level 'loud'; use debug, info, warning or error"),
        ("info", "xml", "unknown log format 'xml'; use json or console"),
    ],
)
def test_what_is_unknown_is_refused(level, style, message):
    with pytest.raises(ValueError, match=message):
        configure_logs(level=level, style=style)
