"""Rules for the whole suite."""

import os
from pathlib import Path

import pytest

pytest_plugins = ["control_plane.fixtures"]

ALLOWED_IN_CI = ("needs a GPU",)
"""Reasons for which CI, too, may skip a test; anything else that is skipped there is a failure."""

_skipped: list[tuple[str, str]] = []
_measured: list[tuple[str, str]] = []


ORDER = ("unit", "integration", "e2e", "benchmarks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first; and the end-to-end tests' operator, which minds the whole cluster,
    is not yet there when others write to it."""
    here = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(here).parts[0]
        return ORDER.index(folder) if folder in ORDER else len(ORDER)

    items.sort(key=rank)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        values = (f"{name} {value}" for name, value in report.user_properties)
        _measured.extend((report.nodeid, value) for value in values)
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(allowed in reason for allowed in ALLOWED_IN_CI):
            _skipped.append((report.nodeid, reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") and _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _measured:  # what tests gave to record_property
        terminalreporter.section("measured")
        for nodeid, value in _measured:
            terminalreporter.line(f"{nodeid}: {value}")
    if os.environ.get("CI") and _skipped:
        terminalreporter.section("skipped, but must run in CI", red=True)
        for nodeid, reason in _skipped:
            terminalreporter.line(f"{nodeid}: {reason}")
